"""Several scorers made one: scores of different units, comparable only within a prompt."""

from __future__ import annotations

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
    columns, code, shares = _check(scores, groups, weights)
    n = grouped.sizes(code)
    places = np.stack([(grouped.average_ranks(code, column) - 0.5) / n for column in columns.T], axis=1)
    return (places * shares).sum(axis=1)


def zscore_fusion(scores: ArrayLike, groups: ArrayLike, weights: ArrayLike | None = None) -> Float64s:
    """Mean over the scorers of (score - prompt's mean) / prompt's standard deviation: as `rank_fusion`.

    Margins count here. The deviation divides by n; a scorer that finds all samples of a prompt equal adds 0.
    """
    columns, code, shares = _check(scores, groups, weights)
    return (np.stack([_zscores(column, code) for column in columns.T], axis=1) * shares).sum(axis=1)


FUSIONS = {"rank": rank_fusion, "zscore": zscore_fusion}


def _zscores(values: Float64s, code: Ints) -> Float64s:
    values = values - grouped.lows(code, values)[code]  # so that equal scores are 0, not a rounding error
    off = values - grouped.means(code, values)[code]
    deviation = np.sqrt(grouped.means(code, off**2))[code]
    return np.divide(off, deviation, out=np.zeros_like(off), where=deviation > 0)


def _check(
    scores: ArrayLike, groups: ArrayLike, weights: ArrayLike | None
) -> tuple[Float64s, Ints, Float64s]:
    columns = matrix("scores", scores).astype(np.float64)
    code = grouped.codes(groups, rows=len(columns))
    shares = vector(
        "weights", np.ones(columns.shape[1]) if weights is None else weights, rows=columns.shape[1]
    )
    if shares.min() < 0 or shares.sum() <= 0:
        raise WinnowError(f"fusion weights are {shares.tolist()}: give numbers of at least 0, not all 0")
    return columns, code, shares / shares.sum()
