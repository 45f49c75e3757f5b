"""Strengths of contestants from who was preferred over whom (Bradley and Terry 1952, Biometrika 39, equation 1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from curate.arrays import Float64s
from schemas.errors import WinnowError

STEPS = 100  # of Newton's method; it takes about 6


@dataclass(frozen=True)
class Strengths:
    """``value`` [K], log-odds with mean 0: i is preferred over j with probability 1 / (1 + exp(value[j] − value[i])).
    ``error`` [K]: the standard error of each."""

    value: Float64s
    error: Float64s


def bradley_terry(wins: ArrayLike, prior: float = 0.5) -> Strengths:
    """Strengths from wins [K, K]: how often i was preferred over j, with zeros on the diagonal.

    ``prior``, above 0: so many wins and losses more for each contestant, against one of average strength. It keeps
    those finite that always win or always lose, and those comparable that nobody connects; with many votes it has no
    weight. The errors take votes as independent of each other.
    """
    w = np.asarray(wins, np.float64)
    if w.ndim != 2 or w.shape[0] != w.shape[1] or not len(w):
        raise WinnowError(f"wins have shape {w.shape}: give one row and one column a contestant")
    if not np.isfinite(w).all() or (w < 0).any() or np.diag(w).any():
        raise WinnowError("wins hold a negative or infinite number, or one on the diagonal: give counts of 0 or more")
    if not (np.isfinite(prior) and prior > 0):
        raise WinnowError(f"prior is {prior}: give a number above 0")
    met = w + w.T
    value = np.zeros(len(w))
    for _ in range(STEPS):
        slope, curve = _derivatives(value, w, met, prior)
        step = np.linalg.solve(curve, slope)
        # Far from the optimum a whole step may overshoot; the likelihood is concave, so that a bounded one arrives.
        value = value + step / max(1.0, np.abs(step).max())
        if np.abs(step).max() < 1e-12:
            break
    _, curve = _derivatives(value, w, met, prior)
    centre = np.eye(len(w)) - 1 / len(w)
    return Strengths(centre @ value, np.sqrt(np.diag(centre @ np.linalg.inv(curve) @ centre)))


def _derivatives(value: Float64s, wins: Float64s, met: Float64s, prior: float) -> tuple[Float64s, Float64s]:
    """Gradient [K] of the log-likelihood, and its negative Hessian [K, K]."""
    p = 1 / (1 + np.exp(value[None, :] - value[:, None]))
    own = 1 / (1 + np.exp(-value))
    spread = met * p * (1 - p)
    slope = (wins - met * p).sum(axis=1) + prior - 2 * prior * own
    return slope, np.diag(spread.sum(axis=1) + 2 * prior * own * (1 - own)) - spread
