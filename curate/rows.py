"""Rows of features read exactly: in float64, of unit length where only directions count, or centred in float32."""

from __future__ import annotations

import numpy as np

from curate.arrays import Float64s, Floats, tiles
from schemas.errors import WinnowError


def lengths(x: Floats, cure: str = "drop it or use metric 'l2'") -> Float64s:
    """L2 norm of each row of x [N, D]: [N], above 0; WinnowError where a row is all zeros, with its cure."""
    result = np.empty(len(x))
    for tile in tiles(len(x), 24 * x.shape[1]):
        rows = x[tile].astype(np.float64)
        peaks = np.abs(rows).max(axis=1)
        if not (peaks > 0).all():
            bad = tile.start + int(np.argmin(peaks > 0))
            raise WinnowError(f"row {bad} is all zeros, so it has no direction: {cure}")
        rows /= peaks[:, None]  # so that neither tiny nor huge rows leave the range of a square
        result[tile] = peaks * np.sqrt(np.vecdot(rows, rows))
    return result


def exact(x: Floats, length: Float64s | None = None) -> Float64s:
    """A copy of the rows in float64, divided by their `length` [N] where it is given."""
    rows = x.astype(np.float64)
    if length is not None:
        rows /= length[:, None]
    return rows


def mean(x: Floats, length: Float64s | None = None) -> Float64s:
    """Mean of the rows, each divided by its `length` where it is given: [D]."""
    total = np.zeros(x.shape[1])
    for tile in tiles(len(x), 24 * x.shape[1]):
        if length is None:
            total += x[tile].sum(axis=0, dtype=np.float64)
        else:
            total += exact(x[tile], length[tile]).sum(axis=0)
    return total / len(x)


def squared_to(x: Floats, point: Float64s, length: Float64s | None = None) -> Float64s:
    """||x_i - point||^2, or that of the rows divided by their `length`: [N]."""
    result = np.empty(len(x))
    for tile in tiles(len(x), 24 * x.shape[1]):
        rows = exact(x[tile], None if length is None else length[tile])
        rows -= point
        result[tile] = np.vecdot(rows, rows)
    return result


def plain(x: Floats) -> bool:
    """Whether FAISS can read x [N, D] where it lies: float32, one row after the other."""
    return x.dtype == np.float32 and x.flags.c_contiguous


def centred(x: Floats, centre: Floats | None, length: Float64s | None = None) -> Floats:
    """x - centre in float32 [N, D], rounded once; centre [D] is float32. None: x itself, if it is `plain`.

    ||x - r||^2 = ||x||^2 + ||r||^2 - 2 x.r cancels when both lie far from the origin. Any centre of D_0 taken off both
    sides mends that, so it may be rounded itself.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # an overflow is reported as such at the end
        if length is not None:
            x = exact(x, length)
        if centre is None:
            return np.ascontiguousarray(x, np.float32)
        kind = np.float64 if x.dtype.itemsize > 4 else np.float32
        return np.subtract(x, centre, out=np.empty(x.shape, np.float32), dtype=kind, casting="same_kind")
