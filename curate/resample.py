"""Weights for trainers that know none: rows repeated, or drawn, in proportion to their weight."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from curate.arrays import Float64s, Ints, vector
from schemas.errors import WinnowError


def repeats(weights: ArrayLike, total: int, rng: np.random.Generator | int) -> Ints:
    """How often each row is written, [N] whole numbers that add up to `total`; row i's mean is total · w_i / Σw.

    Systematic rounding (Madow 1949): with C the running sum of the means and one u uniform in [0, 1), row i comes
    floor(C_i + u) − floor(C_{i−1} + u) times. Over u the mean of floor(x + u) is x, so that of the difference is row
    i's; the difference is its mean rounded down or up; and all of them add up to floor(total + u) − floor(u) = total.
    """
    running = _running("total", weights, total) * total
    u = np.random.default_rng(rng).random()
    # u next to 1 could round total + u up to total + 1.
    ends = np.minimum(np.floor(running + u), total).astype(np.int64)
    return np.diff(ends, prepend=0)


def draws(weights: ArrayLike, n: int, rng: np.random.Generator | int) -> Ints:
    """`n` rows [n], each drawn with probability w_i / Σw, with replacement."""
    running = _running("n", weights, n)
    return np.searchsorted(running, np.random.default_rng(rng).random(n), side="right").astype(np.int64)


def _running(name: str, weights: ArrayLike, count: int) -> Float64s:
    """The running share of the weights [N], which ends with 1 exactly; a row of weight 0 adds nothing to it."""
    w = vector("weights", weights)
    if w.min() < 0 or w.max() <= 0:
        raise WinnowError(f"weights run from {w.min():.4g} to {w.max():.4g}: give numbers of 0 or more, not all 0")
    if count < 1:
        raise WinnowError(f"{name} is {count}: give at least 1")
    running = np.cumsum(w / w.max())  # huge weights would overflow when added
    return running / running[-1]
