"""Maximum mean discrepancies between two sets of features: KID and CMMD, each with how sure it is."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from curate.arrays import Float64s, Floats, matrix, pair_tiles, tiles
from curate.drift import Interval, mean_within
from curate.rows import exact, lengths
from schemas.errors import WinnowError

#: From scalar products to the kernel's values; it may overwrite what it is given.
Kernel = Callable[[Float64s], Float64s]


def kid(a: ArrayLike, b: ArrayLike, strata: ArrayLike | None = None) -> Interval:
    """Unbiased squared MMD of a [N, D] and b [M, D] under (x.y / D + 1)^3 (KID, arXiv 1801.01401).

    Over all rows rather than random subsets, so it needs no seed. May be slightly below 0. The 95 % interval is that of
    drawing a anew, within its strata [N] where they are given: b is taken as it is.
    """
    x, y = _two(a, b)
    if min(len(x), len(y)) < 2:
        raise WinnowError("features have 1 row: an unbiased MMD needs 2 or more samples on each side")
    dim = x.shape[1]

    def cubic(dots: Float64s) -> Float64s:
        dots /= dim
        dots += 1
        return dots * dots * dots  # a fifth of the time of a power

    def within(z: Floats) -> Float64s:
        squares = np.concatenate([np.vecdot(z[tile].astype(np.float64), z[tile].astype(np.float64))
                                  for tile in tiles(len(z), 16 * dim)])  # fmt: skip
        return (_kernel_means(z, z, cubic) * len(z) - cubic(squares)) / (len(z) - 1)

    return _interval(within(x), _kernel_means(x, y, cubic), within(y), strata)


def cmmd(a: ArrayLike, b: ArrayLike, strata: ArrayLike | None = None) -> Interval:
    """CMMD of CLIP features a [N, D] and b [M, D]: 1000 x squared MMD under a Gaussian kernel of sigma 10
    on unit vectors (arXiv 2401.09603, eq. 4), with the diagonal, as published figures have it. At least 0.
    Its interval is as that of `kid`."""
    x, y = (exact(side, lengths(side, "drop that sample")) for side in _two(a, b))

    def excess(dots: Float64s) -> Float64s:
        # exp(-|x - y|^2 / 200) - 1: the three ones cancel, so they are left out before they cost digits
        dots -= 1
        dots /= 10.0**2
        return np.expm1(dots, out=dots)

    found = _interval(*(_kernel_means(*pair, excess) for pair in ((x, x), (x, y), (y, y))), strata)
    return Interval(*(1000 * max(0.0, value) for value in found))


def _interval(own: Float64s, cross: Float64s, other: Float64s, strata: ArrayLike | None) -> Interval:
    """mean(own) - 2 mean(cross) + mean(other), each row's mean kernel [N], [N] and [M]. Exchanging one row of a moves
    it by 2 (own - cross) / N to first order, which sets the width."""
    value = (math.fsum(own) - 2 * math.fsum(cross)) / len(own) + math.fsum(other) / len(other)
    strata = np.zeros(len(own), np.int64) if strata is None else strata
    mean, low, high = mean_within(2 * (own - cross), strata)
    return Interval(value, value - (mean - low), value + (high - mean))


def _two(a: ArrayLike, b: ArrayLike) -> tuple[Floats, Floats]:
    x = matrix("features a", a)
    return x, matrix("features b", b, columns=x.shape[1])


def _kernel_means(x: Floats, y: Floats, kernel: Kernel) -> Float64s:
    """Mean over j of kernel(x_i . y_j): [N], a tile of rows against a tile of rows at a time. Of rows against
    themselves each pair of tiles is taken once."""
    sums, same = np.zeros(len(x)), x is y
    for own in pair_tiles(*x.shape):
        rows = x[own].astype(np.float64)
        for other in pair_tiles(*y.shape):
            if same and other.start < own.start:
                continue
            others = rows if same and other == own else y[other].astype(np.float64)
            found = kernel(rows @ others.T)
            sums[own] += found.sum(axis=1)
            if same and other.start > own.start:
                sums[other] += found.sum(axis=0)
    return sums / len(y)
