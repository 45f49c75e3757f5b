"""Several scorers made one: scores of different units, comparable only within a prompt."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import ArrayLike

from curate import groups as grouped
from curate.arrays import Float64s, Ints, matrix, vector
from schemas.errors import WinnowError


def rank_fusion(scores: ArrayLike, groups: ArrayLike, weights: ArrayLike | None = None) -> Float64s:
    """Mean over the scorers of each sample's place within its prompt: scores [N, S], groups [N] -> [N].

    A place is (rank - 1/2) / n, in (0, 1), 1 the best, equal scores sharing their mean rank, 1/2 for a
    sample alone. Only the order counts: no unit, no outlier. weights: [S], at least 0, default equal.
    """
    columns, code, weights = _check(scores, groups, weights)
    # Ranks are halves: by whole weights nothing is rounded, and samples of the same ranks in sum are equal.
    total = np.zeros(len(columns))
    with ThreadPoolExecutor() as pool:  # a scorer a core: sorting holds no lock of Python's
        for weight, ranks in zip(weights, pool.map(partial(grouped.average_ranks, code), columns.T), strict=True):
            total += weight * (ranks - 0.5)
    return total / (grouped.sizes(code) * weights.sum())


def zscore_fusion(scores: ArrayLike, groups: ArrayLike, weights: ArrayLike | None = None) -> Float64s:
    """Mean over the scorers of (score - prompt's mean) / prompt's standard deviation: as `rank_fusion`.

    Margins count here. The deviation divides by n; a scorer that finds all samples of a prompt equal adds 0.
    """
    columns, code, weights = _check(scores, groups, weights)
    zscores = np.stack([grouped.zscores(code, column) for column in columns.T], axis=1)
    return (zscores * (weights / weights.sum())).sum(axis=1)


FUSIONS = {"rank": rank_fusion, "zscore": zscore_fusion}


def _check(
    scores: ArrayLike, groups: ArrayLike, weights: ArrayLike | None
) -> tuple[Float64s, Ints, Float64s]:
    columns = matrix("scores", scores).astype(np.float64)
    code = grouped.codes(groups, rows=len(columns))
    found = vector("weights", np.ones(columns.shape[1]) if weights is None else weights, rows=columns.shape[1])
    if found.min() < 0 or found.sum() <= 0:
        raise WinnowError(f"fusion weights are {found.tolist()}: give numbers of at least 0, not all 0")
    return columns, code, found
