"""Mahalanobis distance to a reference set, under a covariance that is shrunk so that it has an inverse."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from curate import rows
from curate.arrays import TOO_LARGE, Float64s, Floats, matrix, tiles
from schemas.errors import WinnowError

LARGEST = 5000  # sides of a covariance whose eigenvectors take 1 GiB to find, five times its own bytes


def mahalanobis(
    x: ArrayLike, reference: ArrayLike, shrinkage: float | None = None, *, exclude_self: bool = False
) -> Float64s:
    """sqrt((x - mean)^T C^-1 (x - mean)) to reference [M, D], C = (1 - s) cov + s tr(cov)/D I: x [N, D] -> [N].

    shrinkage: s in [0, 1]; None estimates it (Ledoit & Wolf 2004). s = 0 needs a covariance of full rank.
    exclude_self: x is the reference; mean and covariance leave each row out (s is estimated once).
    WinnowError where both M and D are above LARGEST.
    """
    ref = matrix("reference", reference)
    x = matrix("x", x, columns=ref.shape[1])
    count, dim = ref.shape
    if count < 2:
        raise WinnowError("reference has 1 row: a covariance needs 2 or more, use kind 'center'")
    if min(count, dim) > LARGEST:
        raise WinnowError(
            f"a covariance of {count} reference rows in {dim} dimensions would take more than 1 GiB: use kind 'mean' "
            f"or 'knn', or at most {LARGEST} reference rows"
        )
    mean = rows.mean(ref)
    values, along = _principal_axes(ref, mean)
    total = float(values.sum())
    if total <= 0:
        raise WinnowError("reference rows are all equal, so D_0 has no covariance: use kind 'center'")
    if shrinkage is None:
        shrinkage = _ledoit_wolf(values, rows.squared_to(ref, mean), dim)
    if not 0 <= shrinkage <= 1:
        raise WinnowError(f"shrinkage is {shrinkage}: give a number in [0, 1], or none to estimate it")
    if shrinkage == 0 and (len(values) < dim or values.min() <= values.max() * dim * np.finfo(float).eps):
        raise WinnowError(
            f"covariance of {count} reference rows in {dim} dimensions has no inverse: "
            "give shrinkage above 0 or more rows"
        )
    result = np.empty(len(x))
    for tile in tiles(len(x), 8 * (2 * dim + 2 * len(values))):
        y = rows.exact(x[tile]) - mean
        norm2 = np.vecdot(y, y)
        squared = along(y) ** 2
        # Squared length outside the axes; zero, not rounding noise, where they span the space.
        outside = np.maximum(norm2 - squared.sum(axis=1), 0) if len(values) < dim else np.zeros(len(y))
        scale, ridge = 1.0, np.full(len(y), shrinkage * total / dim)
        if exclude_self:
            # Without row y: cov' = ((M-1) cov - M/(M-1) y y^T) / (M-2), mean' = mean - y/(M-1).
            scale = (count - 1) / (count - 2)
            ridge = shrinkage * (scale * total - norm2 * count / ((count - 1) * (count - 2))) / dim
            if (ridge < 1e-12 * shrinkage * total / dim).any():
                raise WinnowError(
                    "reference rows are all equal but for one, so that without it there is no covariance: use kind "
                    "'center'"
                )
        quad = np.sum(squared / ((1 - shrinkage) * scale * values + ridge[:, None]), axis=1)
        if len(values) < dim:
            quad += outside / ridge
        if exclude_self:  # Sherman-Morrison takes the y y^T term out of the inverse
            lost = (1 - shrinkage) * count / ((count - 1) * (count - 2))
            if (lost * quad >= 1 - 1e-9).any():
                raise WinnowError(
                    "covariance without one of the reference rows has no inverse: "
                    "give shrinkage above 0 or more rows"
                )
            quad = (count / (count - 1)) ** 2 * quad / (1 - lost * quad)
        result[tile] = np.sqrt(quad)
    return result


def _ledoit_wolf(values: Float64s, norms2: Float64s, dim: int) -> float:
    """Shrinkage of Ledoit & Wolf (2004) from the variances and the squared lengths of the centred rows."""
    count = len(norms2)
    values = values * (count - 1) / count
    square = np.sum(values**2)
    spread = square - values.sum() ** 2 / dim
    error = (np.mean(norms2**2) - square) / count
    return float(np.clip(error / spread, 0, 1)) if spread > 0 else 1.0


def _principal_axes(ref: Floats, mean: Float64s) -> tuple[Float64s, Callable[[Float64s], Float64s]]:
    """Variances [K] of the reference along orthonormal axes, K = min(M - 1, D) or fewer, and the function that gives
    the coordinates of centred rows [n, D] along them: [n, K]."""
    count, dim = ref.shape
    if dim < count:
        cov = np.zeros((dim, dim))
        for tile in tiles(count, 24 * dim):
            y = rows.exact(ref[tile]) - mean
            cov += y.T @ y
        cov /= count - 1
        values, axes = _eigen(cov)
        return np.maximum(values, 0), lambda y: y @ axes

    # Fewer rows than dimensions: Y Y^T [M, M] has the eigenvalues of Y^T Y, whose axes Y^T u / ||Y^T u|| are never
    # written out.
    def products(y: Float64s) -> Float64s:
        dots = np.empty((len(y), count))
        for tile in tiles(count, 16 * dim):
            dots[:, tile] = y @ (rows.exact(ref[tile]) - mean).T
        return dots

    gram = np.empty((count, count))
    for tile in tiles(count, 16 * dim):
        gram[tile] = products(rows.exact(ref[tile]) - mean)
    squares, turns = _eigen(gram)
    real = squares > squares.max() * dim * np.finfo(float).eps
    turns = turns[:, real] / np.sqrt(squares[real])
    return squares[real] / (count - 1), lambda y: products(y) @ turns


def _eigen(symmetric: Float64s) -> tuple[Float64s, Float64s]:
    if not np.isfinite(symmetric).all():
        raise WinnowError(TOO_LARGE)
    values, vectors = np.linalg.eigh(symmetric)
    return values, vectors
