"""Weights against drift: a sample far from the reference set counts for less (RSIDiff, equation 5)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from curate.arrays import Float64s, vector
from schemas.errors import WinnowError

LEAST = 1e-12  # with every weight below this, training would move nothing
FLOOR = float(np.finfo(np.float32).tiny)  # a single weight stays above zero, in float32 too


def weights(d: ArrayLike, beta: float, sigma2: float) -> Float64s:
    """w = 1 where d <= beta, else exp(-(d - beta) / sigma2) (arXiv 2502.09963, eq. 5): [N] -> [N] in (0, 1].

    d, beta and sigma2 are in the unit of the distance. WinnowError when every weight vanishes, as they do
    with a beta from another metric (the paper's 35 against flattened latents at 181).
    """
    w = damped(d, beta, sigma2)
    if w.max() < LEAST:
        d = np.asarray(d)
        raise WinnowError(
            f"every weight is below {LEAST:g}: distances run from {d.min():.4g} to {d.max():.4g}, "
            f"beta is {beta:.4g}, sigma2 {sigma2:.4g}; give beta as a quantile of D_0's distance "
            "to itself, or a larger sigma2"
        )
    return w


def damped(d: ArrayLike, beta: float, sigma2: float) -> Float64s:
    """`weights`, also where every one of them vanishes: no more than LEAST is left of any."""
    d = vector("distances", d)
    if not math.isfinite(beta):
        raise WinnowError(f"beta is {beta}: give a finite distance")
    if not (math.isfinite(sigma2) and sigma2 > 0):
        raise WinnowError(f"sigma2 is {sigma2}: give a number above 0, in the unit of the distance")
    with np.errstate(over="ignore"):  # exp(-inf) is the 0 that is meant
        return np.maximum(np.exp(-np.maximum(d - beta, 0.0) / sigma2), FLOOR)


def threshold(self_distances: ArrayLike, quantile: float = 0.9) -> float:
    """beta as a quantile in [0, 1] of D_0's distances to itself [M]: that share of D_0 has full weight."""
    return float(np.quantile(vector("self-distances", self_distances), _quantile("quantile", quantile)))


def decay(self_distances: ArrayLike, quantile: float = 0.9, tail: float = 0.99) -> float:
    """sigma2 as the spread of D_0's own tail: its `tail` quantile less its `quantile` (beta's).

    So a sample as far out as D_0's 99 % row keeps weight 1/e, whatever the metric and its unit. A quantile
    spread, because one outlier of D_0 would set a standard deviation. 0 <= quantile < tail <= 1.
    """
    if _quantile("quantile", quantile) >= _quantile("tail", tail):
        raise WinnowError(
            f"tail quantile {tail} is not above beta's {quantile}: give a higher tail, or sigma2"
        )
    low, high = np.quantile(vector("self-distances", self_distances), [quantile, tail])
    if not high > low:
        raise WinnowError(
            f"D_0's self-distances have no spread between quantiles {quantile} and {tail}: "
            "give sigma2 as a number, or a larger D_0"
        )
    return float(high - low)


def effective_sample_size(w: ArrayLike) -> float:
    """(sum w)^2 / sum w^2 (Kish): in [1, N], N where all weights are equal."""
    values = vector("weights", w)
    if values.min() < 0 or values.max() <= 0:
        raise WinnowError(
            f"weights run from {values.min():.4g} to {values.max():.4g}: give numbers of 0 or more, not all 0"
        )
    values = values / values.max()  # tiny weights would underflow when squared
    return float(values.sum() ** 2 / (values**2).sum())


def _quantile(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise WinnowError(f"{name} is {value}: give a number in [0, 1]")
    return float(value)
