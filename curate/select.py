"""Which samples stay. A policy takes the candidates of a round and gives a Decision.

    policy(scores [N], groups [N], ids [N], features=None [N, D], budget=None, rng=None, **settings)

Scores are higher-is-better, groups are prompts, ids are unique and break ties, so the order of the rows never
changes a decision. A policy ignores what it does not need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from curate import groups as grouped
from curate.arrays import Bools, Float64s, Ints, keys, matrix, unique_keys, vector
from curate.balance import shares
from curate.clusters import kmeans
from curate.decision import Decision, unsaid
from curate.pareto import beaten_by
from schemas.errors import WinnowError

Rng = np.random.Generator | int | None


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
    return _cut(np.ones(len(ids), bool), rank, rank, unsaid(len(ids)), budget)


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
    names = np.array([f"cluster {c}" for c in range(cluster.max() + 1)])
    everything = Decision(np.ones(len(ids), bool), grouped.ranks(code, -values, ids), unsaid(len(ids)))
    return _under_quotas(everything, values, ids, cluster, names, _quotas(np.bincount(cluster), budget))


def stratified(
    scores: ArrayLike, groups: ArrayLike, ids: ArrayLike, features: ArrayLike | None = None,
    budget: int | None = None, rng: Rng = None, *, strata: ArrayLike, k: int = 1,
) -> Decision:  # fmt: skip
    """The k best of each prompt, as many of every stratum as of any other, or all it has.

    strata names that of each row [N], such as its prompt's category. Within a stratum they are taken as `best_of_n`
    ranks them. Rank: place in that visit.
    """
    values, code, ids = _check(scores, groups, ids)
    if budget is None:
        raise WinnowError("strata have no budget to share: give the number of samples to keep")
    names, stratum = np.unique(keys("strata", strata, rows=len(ids)), return_inverse=True)
    best = _per_prompt("rank", -values, code, ids, k, None, np.ones(len(ids), bool))
    room = np.array(shares(np.bincount(stratum[best.kept], minlength=len(names)).tolist(), _budget(budget)), np.int64)
    return _under_quotas(best, values, ids, stratum, names, room)


def pareto(
    scores: ArrayLike, groups: ArrayLike, ids: ArrayLike, features: ArrayLike | None = None,
    budget: int | None = None, rng: Rng = None, *, columns: ArrayLike, k: int = 1,
) -> Decision:  # fmt: skip
    """Of each prompt those that no other outdoes: as good by every scorer and better by one; columns [N, S].

    k at most, the highest `scores` (the scorers fused) first. Rank: place among those of the prompt.
    """
    values, code, ids = _check(scores, groups, ids)
    better = beaten_by(matrix("score columns", columns, rows=len(ids)), code, ids)
    decision = _per_prompt("rank", -values, code, ids, k, budget, better < 0)
    reason = decision.reason.copy()
    for i in np.flatnonzero(better >= 0):
        reason[i] = f"outdone by {ids[better[i]]}: no score is higher, one or more lower"
    return Decision(decision.kept, decision.rank, reason)


Policy = Callable[..., Decision]
POLICIES: dict[str, Policy] = {
    "best_of_n": best_of_n,
    "top_k": top_k,
    "quantile_band": quantile_band,
    "random": random_choice,
    "diverse": diverse,
    "strata": stratified,
    "pareto": pareto,
}


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
    reason = unsaid(len(ids))
    # Few pairs of numbers, many samples: each sentence is written once.
    pairs, which = np.unique(rank[~kept] + (int(rank.max()) + 1) * count[~kept], return_inverse=True)
    counts, places = np.divmod(pairs, int(rank.max()) + 1)
    said = [f"{order} {place} of {n} for its prompt" for place, n in zip(places, counts, strict=True)]
    reason[~kept] = np.array(said, object)[which]
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


def _under_quotas(
    first: Decision, values: Float64s, ids: NDArray[Any], code: Ints, names: NDArray[Any], room: Ints
) -> Decision:
    """Those that `first` kept, by their rank in the prompt, then by score, while their class [N] has room [C]."""
    visit = np.lexsort((ids, -values, first.rank, ~first.kept))
    rank = np.empty(len(ids), dtype=np.int64)
    rank[visit] = np.arange(1, len(ids) + 1)
    place = grouped.ranks(code, rank)
    kept = first.kept & (place <= room[code])
    reason = first.reason.copy()
    for i in np.flatnonzero(first.kept & ~kept):
        reason[i] = f"outside quota: rank {place[i]} in {names[code[i]] or 'no class'}, which keeps {room[code[i]]}"
    return Decision(kept, rank, reason)


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
