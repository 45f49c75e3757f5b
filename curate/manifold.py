"""Whether samples lie where a reference lies, and whether they reach all of it: balls around each other's rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from curate import rows
from curate.arrays import Bools, Float64s, Floats, matrix, pair_tiles, tiles
from curate.neighbours import prepare, search
from schemas.errors import WinnowError

ROUNDING = 1e-12  # of products, as a share of the rows' squares: a row at the edge of a ball is in it


class Manifold(NamedTuple):
    """Of each sample, whether it lies in a ball of the reference, and in how many, as a share of k; of each reference
    row, whether it lies in a ball of the samples, and whether a sample lies in its own. The means are precision,
    density, recall and coverage."""

    inside: Bools
    density: Float64s
    reached: Bools
    covered: Bools


def manifold(samples: ArrayLike, reference: ArrayLike, k: int = 5) -> Manifold:
    """Precision and recall (Kynkäänniemi et al., arXiv 1904.06991), density and coverage (Naeem et al., arXiv
    2002.09797) of samples [N, D] against reference [M, D]; a ball reaches to the row's k-th nearest of its own set.

    k in 1..min(N, M) - 1. Equal in law, the two sets come to a density of 1 and a coverage of 1 - 2^-k for large N = M.
    """
    ref = matrix("reference", reference)
    x = matrix("samples", samples, columns=ref.shape[1])
    if not 1 <= k < min(len(x), len(ref)):
        raise WinnowError(
            f"k is {k} with {len(x)} samples and {len(ref)} reference rows: give k of 1 or more, below both"
        )
    around_ref, around_x = _radii(ref, k), _radii(x, k)
    balls = np.zeros(len(x), np.int64)
    reached, covered = np.zeros(len(ref), bool), np.zeros(len(ref), bool)
    centre = rows.mean(ref)
    for own in pair_tiles(*x.shape):
        mine = rows.exact(x[own]) - centre
        for other in pair_tiles(*ref.shape):
            theirs = rows.exact(ref[other]) - centre
            lengths = np.vecdot(mine, mine)[:, None] + np.vecdot(theirs, theirs)
            squared = (1 - ROUNDING) * lengths - 2 * mine @ theirs.T
            inside = squared <= around_ref[other]
            balls[own] += inside.sum(axis=1)
            covered[other] |= inside.any(axis=0)
            reached[other] |= (squared <= around_x[own][:, None]).any(axis=0)
    return Manifold(balls > 0, balls / k, reached, covered)


def _radii(x: Floats, k: int) -> Float64s:
    """Squared distance of each row to its k-th nearest other: [N]."""
    farthest = search(x, prepare(x), k + 1).indices[:, -1]  # the row itself, or an exact double, comes first
    squared = np.empty(len(x))
    for tile in tiles(len(x), 24 * x.shape[1]):
        apart = rows.exact(x[tile]) - rows.exact(x[farthest[tile]])
        squared[tile] = np.vecdot(apart, apart)
    return squared
