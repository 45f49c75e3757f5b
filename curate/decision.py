"""A decision over candidates, each reject with its reason; and those that are no policy: lists, floors, duplicates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from curate.arrays import Bools, Ints, matrix, unique_keys, vector
from curate.duplicates import by_vector
from schemas.errors import WinnowError

RANKS = 2**31 - 1  # the largest, as they are stored


@dataclass(frozen=True)
class Decision:
    """kept [N]; rank [N], 1 = first in the policy's order, 0 = dropped before ranking; reason [N], why a
    row was dropped, "" where it is kept."""

    kept: Bools
    rank: Ints
    reason: NDArray[np.object_]


def whole(decision: Decision, rows: int) -> Decision:
    """A decision that somebody else made, in the types of the class and without reasons for what is kept; WinnowError
    where it is not one over ``rows`` rows, or drops a row without a reason."""
    kept, rank, reason = map(np.asarray, (decision.kept, decision.rank, decision.reason))
    for name, column, kinds in (("kept", kept, "b"), ("rank", rank, "iuf"), ("reason", reason, "OU")):
        if column.shape != (rows,) or column.dtype.kind not in kinds:
            raise WinnowError(
                f"{name} is {column.dtype} {list(column.shape)}: give booleans to keep, numbers as ranks and strings "
                f"as reasons, one for each of {rows} rows"
            )
    far = ~((rank >= 0) & (rank <= RANKS) & (rank == np.floor(rank)))
    if far.any():
        raise WinnowError(f"rank {rank[far][0]}: give 1, for the first, to {RANKS}, or 0 for none")
    if not all(isinstance(one, str) and one for one in reason[~kept]):
        raise WinnowError("a row is dropped without a reason: give a string for each that is dropped")
    return Decision(kept, rank.astype(np.int64), np.where(kept, "", reason).astype(object))


def unsaid(rows: int) -> NDArray[np.object_]:
    """No reason for any row: [N]."""
    return np.full(rows, "", dtype=object)


def picks(ids: ArrayLike, chosen: ArrayLike) -> Decision:
    """Keeps the rows whose id [N] is among those that people chose [M]. Rank 0."""
    kept = np.isin(np.asarray(ids), np.asarray(chosen))
    reason = np.where(kept, "", "not picked by hand").astype(object)
    return Decision(kept, np.zeros(len(kept), dtype=np.int64), reason)


def listed(ids: ArrayLike, chosen: ArrayLike, rank: ArrayLike | None = None) -> Decision:
    """Keeps the rows whose id [N] a query gave [M], with the rank [M] that it gave them, 0 without one."""
    ids, chosen = unique_keys("ids", ids), np.asarray(chosen, np.int64)
    order = np.argsort(chosen, kind="stable")
    place = np.searchsorted(chosen, ids, sorter=order).clip(0, max(0, len(chosen) - 1))
    kept = np.zeros(len(ids), bool) if not len(chosen) else chosen[order[place]] == ids
    ranks = np.zeros(len(ids), np.int64)
    if rank is not None and len(chosen):
        ranks[kept] = np.asarray(rank, np.int64)[order[place]][kept]
    return Decision(kept, ranks, np.where(kept, "", "not among what the query gives").astype(object))


def floors(scores: Mapping[str, ArrayLike], least: Mapping[str, float]) -> Decision:
    """Drops rows below the least value of any scorer: scores {name: [N]}, least {name: value}. Rank 0."""
    if not scores:
        raise WinnowError("floors got no scores: score the samples first")
    values = {name: vector(f"scores of {name}", column) for name, column in scores.items()}
    rows = len(next(iter(values.values())))
    reason = unsaid(rows)
    for name, floor in least.items():
        if name not in values:
            raise WinnowError(f"floor for {name!r}, which has no scores: choose among {', '.join(values)}")
        if np.isnan(floor):
            raise WinnowError(f"floor for {name!r} is NaN: give the least value to keep")
        for i in np.flatnonzero(vector(f"scores of {name}", values[name], rows=rows) < floor):
            said = f"below floor {name} {values[name][i]:.6g} < {floor:g}"
            reason[i] = f"{reason[i]}; {said}" if reason[i] else said
    return Decision(reason == "", np.zeros(rows, dtype=np.int64), reason)


def dedup(features: ArrayLike, threshold: float, scores: ArrayLike, ids: ArrayLike) -> Decision:
    """Keeps the best of rows whose features [N, D] have cosine similarity >= threshold. Rank 0.

    Greedy from the highest score down, so a dropped row is always near to the kept row its reason names.
    """
    ids = unique_keys("ids", ids)
    values = vector("scores", scores, rows=len(ids))
    x = matrix("features", features, rows=len(ids))
    if (nothing := ~x.any(axis=1)).any():
        raise WinnowError(f"features of {ids[nothing][0]} are all zeros, so they have no direction: drop that sample")
    twin, likeness = by_vector(x, threshold, np.lexsort((ids, -values)))
    reason = unsaid(len(ids))
    for i in np.flatnonzero(twin >= 0):
        reason[i] = f"near duplicate of {ids[twin[i]]}: similarity {likeness[i]:.4f}"
    return Decision(twin < 0, np.zeros(len(ids), dtype=np.int64), reason)


def narrow(first: Decision, second: Decision) -> Decision:
    """`second` decided over the rows that `first` kept, in their order; the two as one over all rows [N]."""
    if len(second.kept) != first.kept.sum():
        raise WinnowError(
            f"second decision covers {len(second.kept)} rows, the first kept {first.kept.sum()}: "
            "decide over exactly the rows that were kept"
        )
    kept, rank, reason = first.kept.copy(), first.rank.copy(), first.reason.copy()
    left = np.flatnonzero(first.kept)
    kept[left], rank[left], reason[left] = second.kept, second.rank, second.reason
    return Decision(kept, rank, reason)
