"""Selections beside each other: what they share, and how varied each is."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from curate import rows
from curate.arrays import Float64s, matrix
from schemas.errors import WinnowError


def overlaps(kept: ArrayLike) -> Float64s:
    """Jaccard similarity of each pair of selections, the share of what either keeps that both keep: masks [P, N] ->
    [P, P] in [0, 1]. Two that keep nothing are alike."""
    masks = np.asarray(kept)
    if masks.ndim != 2 or masks.dtype != bool:
        raise WinnowError(f"selections are {masks.dtype} of shape {masks.shape}: give booleans [P, N]")
    counts = masks.astype(np.float64)
    both = counts @ counts.T
    either = both.diagonal()[:, None] + both.diagonal() - both
    return np.divide(both, either, out=np.ones_like(both), where=either > 0)


def spread(x: ArrayLike) -> float:
    """Total variance of rows x [N, D], N at least 2: the sum over D, divided by N - 1."""
    x = matrix("features", x)
    if len(x) < 2:
        raise WinnowError("features have 1 row: a variance needs 2 or more samples")
    return float(rows.squared_to(x, rows.mean(x)).sum() / (len(x) - 1))
