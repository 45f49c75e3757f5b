"""Which samples stay. A policy takes the candidates of a round and gives a Decision.

    policy(scores [N], groups [N], ids [N], features=None [N, D], budget=None, rng=None, **settings)

Scores are higher-is-better, groups are prompts, ids are unique and break ties, so the order of the rows never
changes a decision. A policy ignores what it does not need. `floors` and `dedup` come before a policy: they
narrow the candidates, and `narrow` puts the two decisions together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from curate import groups as grouped
from curate.arrays import Bools, Float64s, Ints, matrix, unique_keys, vector
from curate.clusters import kmeans
from curate.duplicates import by_vector
from schemas.errors import WinnowError

Rng = np.random.Generator | int | None


@dataclass(frozen=True)
class Decision:
    """kept [N]; rank [N], 1 = first in the policy's order, 0 = dropped before ranking; reason [N], why a
    row was dropped, "" where it is kept."""

    kept: Bools
    rank: Ints
    reason: NDArray[np.object_]


def best_of_n(
    scores: ArrayLike, groups: ArrayLike, ids: ArrayLike, features: ArrayLike | None = None,
    budget: int | None = None, rng: Rng = None, *, k: int = 1,
) -> Decision:  # fmt: skip
    """The k best of each prompt. Rank: place in the prompt.

    A budget takes the best of every prompt before the second of any, and within one place the higher score.
    """
    values, code, ids = _check(scores, groups, ids)
    return _per_prompt("rank", -values, code, ids, k, budget, np.ones(len(ids), bool))


def random_choice(
    scores: ArrayLike, groups: ArrayLike, ids: ArrayLike, features: ArrayLike | None = None,
    budget: int | None = None, rng: Rng = None, *, k: int = 1,
) -> Decision:  # fmt: skip
    """k of each prompt at random, scores unread: the naive arm. Rank: place in the prompt's draw."""
    _, code, ids = _check(np.zeros(np.shape(ids)), groups, ids)
    return _per_prompt("draw", _draws(ids, rng), code, ids, k, budget, np.ones(len(ids), bool))


def quantile_band(
    scores: ArrayLike, groups: ArrayLike, ids: ArrayLike, features: ArrayLike | None = None,
    budget: int | None = None, rng: Rng = None, *, low: float = 0.0, high: float = 0.5, k: int = 1,
) -> Decision:  # fmt: skip
    """k of each prompt at random among those whose place lies in the band, the better half by default.

    The best of n has place 0, the worst (n - 1) / n; the band is [low, high). Rank: place in the prompt.
    Milder than the best of n: it gives up a part of the gain for diversity.
    """
    if not 0 <= low < high <= 1:
        raise WinnowError(f"quantile band is [{low}, {high}): give 0 <= low < high <= 1")
    values, code, ids = _check(scores, groups, ids)
    rank, n = grouped.ranks(code, -values, ids), grouped.sizes(code)
    place = (rank - 1) / n
    inside = (place >= low) & (place < high)
    drawn = _per_prompt("draw", _draws(ids, rng), code, ids, k, budget, inside)
    reason = drawn.reason.copy()
    for i in np.flatnonzero(~inside):
        reason[i] = f"rank {rank[i]} of {n[i]} for its prompt lies outside the band [{low:g}, {high:g})"
    return Decision(drawn.kept, rank, reason)


def top_k(
    scores: ArrayLike, groups: ArrayLike, ids: ArrayLike, features: ArrayLike | None = None,
    budget: int | None = None, rng: Rng = None,
) -> Decision:  # fmt: skip
    """The `budget` best of all prompts together. Rank: place among all.

    Only for scores that compare across prompts: easy prompts crowd out hard ones otherwise.
    """
    values, _, ids = _check(scores, groups, ids)
    if budget is None:
        raise WinnowError("top_k has no budget: give the number of samples to keep")
    rank = grouped.ranks(np.zeros(len(ids), np.int64), -values, ids)
    return _cut(np.ones(len(ids), bool), rank, rank, _empty(len(ids)), budget)


def diverse(
    scores: ArrayLike, groups: ArrayLike, ids: ArrayLike, features: ArrayLike | None = None,
    budget: int | None = None, rng: Rng = None, *, clusters: int | None = None,
) -> Decision:  # fmt: skip
    """The best under a quota for each cluster of the features, so that no mode of the model dies out.

    Each k-means cluster may keep its share of the budget, in proportion to its share of the candidates.
    Rows are visited as `best_of_n` ranks them and taken while their cluster has room. Rank: place in the
    visit. clusters: default one for each 10 rows of the budget. rng starts k-means, None as 0.
    """
    values, code, ids = _check(scores, groups, ids)
    if budget is None or features is None:
        raise WinnowError("diverse needs features and a budget: name an encoder and the number to keep")
    x = matrix("features", features, rows=len(ids))
    budget = min(_budget(budget), len(ids))
    clusters = max(1, budget // 10) if clusters is None else clusters
    by_id = np.argsort(ids)  # k-means starts from rows drawn by place, so their order must not be chance
    cluster = np.empty(len(ids), dtype=np.int64)
    seed = int(np.random.default_rng(0 if rng is None else rng).integers(2**31))
    cluster[by_id] = kmeans(x[by_id], min(clusters, len(ids)), seed)
    room = _quotas(np.bincount(cluster), budget)
    visit = np.lexsort((ids, -values, grouped.ranks(code, -values, ids)))
    rank = np.empty(len(ids), dtype=np.int64)
    rank[visit] = np.arange(1, len(ids) + 1)
    place = grouped.ranks(cluster, rank)
    kept = place <= room[cluster]
    reason = _empty(len(ids))
    for i in np.flatnonzero(~kept):
        c = cluster[i]
        reason[i] = f"outside quota: rank {place[i]} in cluster {c}, which keeps {room[c]}"
    return Decision(kept, rank, reason)


Policy = Callable[..., Decision]
POLICIES: dict[str, Policy] = {
    "best_of_n": best_of_n,
    "top_k": top_k,
    "quantile_band": quantile_band,
    "random": random_choice,
    "diverse": diverse,
}


def picks(ids: ArrayLike, chosen: ArrayLike) -> Decision:
    """Keeps the rows whose id [N] is among those that people chose [M]. Rank 0."""
    kept = np.isin(np.asarray(ids), np.asarray(chosen))
    reason = np.where(kept, "", "not picked by hand").astype(object)
    return Decision(kept, np.zeros(len(kept), dtype=np.int64), reason)


def floors(scores: Mapping[str, ArrayLike], least: Mapping[str, float]) -> Decision:
    """Drops rows below the least value of any scorer: scores {name: [N]}, least {name: value}. Rank 0."""
    if not scores:
        raise WinnowError("floors got no scores: score the samples first")
    values = {name: vector(f"scores of {name}", column) for name, column in scores.items()}
    rows = len(next(iter(values.values())))
    reason = _empty(rows)
    for name, floor in least.items():
        if name not in values:
            raise WinnowError(f"floor for {name!r}, which has no scores: choose among {', '.join(values)}")
        for i in np.flatnonzero(vector(f"scores of {name}", values[name], rows=rows) < floor):
            said = f"below floor {name} {values[name][i]:.6g} < {floor:g}"
            reason[i] = f"{reason[i]}; {said}" if reason[i] else said
    return Decision(reason == "", np.zeros(rows, dtype=np.int64), reason)


def dedup(features: ArrayLike, threshold: float, scores: ArrayLike, ids: ArrayLike) -> Decision:
    """Keeps the best of rows whose features [N, D] have cosine similarity >= threshold. Rank 0.

    Greedy from the highest score down, so a dropped row is always near to the kept row its reason names.
    """
    values, _, ids = _check(scores, np.zeros(np.shape(ids), np.int64), ids)
    x = matrix("features", features, rows=len(ids))
    twin, likeness = by_vector(x, threshold, np.lexsort((ids, -values)))
    reason = _empty(len(ids))
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


def _check(scores: ArrayLike, groups: ArrayLike, ids: ArrayLike) -> tuple[Float64s, Ints, NDArray[Any]]:
    ids = unique_keys("ids", ids)
    return vector("scores", scores, rows=len(ids)), grouped.codes(groups, rows=len(ids)), ids


def _per_prompt(
    order: str, key: Float64s, code: Ints, ids: NDArray[Any], k: int, budget: int | None, allowed: Bools
) -> Decision:
    """The k lowest keys of each prompt among the allowed rows, then the budget, place by place."""
    if k < 1:
        raise WinnowError(f"k is {k}: keep 1 or more of each prompt")
    rank = grouped.ranks(code, ~allowed, key, ids)
    count = np.bincount(code, weights=allowed).astype(np.int64)[code]
    kept = allowed & (rank <= k)
    reason = _empty(len(ids))
    for i in np.flatnonzero(~kept):
        reason[i] = f"{order} {rank[i]} of {count[i]} for its prompt"
    if budget is None:
        return Decision(kept, rank, reason)
    overall = np.empty(len(ids), dtype=np.int64)
    overall[np.lexsort((ids, key, rank, ~kept))] = np.arange(1, len(ids) + 1)
    return _cut(kept, rank, overall, reason, budget)


def _cut(kept: Bools, rank: Ints, overall: Ints, reason: NDArray[np.object_], budget: int) -> Decision:
    budget = _budget(budget)
    over = kept & (overall > budget)
    for i in np.flatnonzero(over):
        reason[i] = f"outside budget: rank {overall[i]} of {budget}"
    return Decision(kept & ~over, rank, reason)


def _quotas(counts: Ints, budget: int) -> Ints:
    """Budget shared in proportion to counts by largest remainder: no quota above its count, sum = budget."""
    share = counts * budget / counts.sum()
    quota = np.floor(share).astype(np.int64)
    quota[np.lexsort((np.arange(len(counts)), quota - share))[: budget - quota.sum()]] += 1
    return quota


def _draws(ids: NDArray[Any], rng: Rng) -> Float64s:
    """A random number a row, given out in the order of the ids: [N] in [0, 1)."""
    if rng is None:
        raise WinnowError("a random policy got no rng: give a seed or a numpy Generator")
    draws = np.empty(len(ids))
    draws[np.argsort(ids)] = np.random.default_rng(rng).random(len(ids))
    return draws


def _budget(budget: int) -> int:
    if budget < 1:
        raise WinnowError(f"budget is {budget}: keep 1 sample or more")
    return int(budget)


def _empty(rows: int) -> NDArray[np.object_]:
    return np.full(rows, "", dtype=object)
