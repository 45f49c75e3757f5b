"""How far samples lie from a reference set D_0 (RSIDiff, arXiv 2502.09963, section 3.4).

The paper takes "the mean distance to D_0" in the autoencoder's latents and leaves the metric open, so the
kind and the metric are settings:

    kind         value for a row x
    mean         mean of metric(x, r) over all r in D_0                  (the paper)
    knn          mean of metric(x, r) over the k nearest r in D_0
    center       metric(x, mean of D_0)
    mahalanobis  sqrt((x - mean)^T C^-1 (x - mean)), C the shrunk covariance of D_0; has no metric

    metric       metric(x, r), x and r of D elements
    l2           ||x - r||
    mse          ||x - r||^2 / D
    cosine       1 - cos(x, r), in [0, 2]

Every function takes rows in any float type, reads them in tiles of bounded memory and returns float64.
"""

from __future__ import annotations

from collections.abc import Callable

import faiss
import numpy as np
from numpy.typing import ArrayLike

from curate.arrays import TILE_BYTES, Float64s, Floats, matrix, tiles
from schemas.errors import WinnowError

METRICS = ("l2", "mse", "cosine")


def distance(
    x: ArrayLike, reference: ArrayLike, kind: str = "mean", metric: str = "l2", k: int = 10
) -> Float64s:
    """Distance of each row of x [N, D] to reference [M, D], as the table above says: [N], at least 0."""
    return _finite(_pick(kind)(x, reference, metric, k, False))


def self_distance(reference: ArrayLike, kind: str = "mean", metric: str = "l2", k: int = 10) -> Float64s:
    """Distance of each row of reference [M, D] to the other M - 1 rows, exactly left out: [M].

    What `distance` gives for a fresh sample of the very model that made D_0, so its quantiles are a scale
    for the threshold beta of the weights. Needs two rows; mahalanobis needs three.
    """
    ref = matrix("reference", reference)
    least = 3 if kind == "mahalanobis" else 2
    if len(ref) < least:
        raise WinnowError(f"reference has {len(ref)} row: its distance to itself needs {least} or more")
    return _finite(_pick(kind)(ref, ref, metric, k, True))


def mean_distance(
    x: ArrayLike, reference: ArrayLike, metric: str = "l2", *, exclude_self: bool = False
) -> Float64s:
    """Mean of metric(x_i, r) over all reference rows: x [N, D], reference [M, D] -> [N].

    exclude_self: x is the reference, row for row, and each row is left out of its own mean.
    mse and cosine have a closed form in O(N D); l2 runs tiled fp32 matrix products, never [N, M] at once.
    """
    x, ref = _pair(x, reference, metric, exclude_self)
    rest = len(ref) / (len(ref) - 1) if exclude_self else 1.0  # a row's distance to itself adds 0 to the sum
    if metric == "l2":
        return rest * _mean_l2(x, ref, exclude_self)
    # mean ||x - r||^2 = ||x - mean||^2 + mean ||r - mean||^2: a sum of squares, so nothing cancels.
    # For unit rows 1 - cos = ||x - r||^2 / 2, so cosine is the same sum.
    unit = metric == "cosine"
    mean = _mean(ref, unit)
    spread = float(np.mean(_squared_to(ref, mean, unit)))
    return rest * (_squared_to(x, mean, unit) + spread) / (2.0 if unit else ref.shape[1])


def knn_distance(
    x: ArrayLike, reference: ArrayLike, k: int = 10, metric: str = "l2", exclude_self: bool = False
) -> Float64s:
    """Mean of metric(x_i, r) over the k reference rows nearest to x_i: x [N, D], reference [M, D] -> [N].

    exclude_self: x is the reference, row for row, and no row is its own neighbour. k in 1..M (M - 1 then).
    """
    x, ref = _pair(x, reference, metric, exclude_self)
    k = _neighbours(k, len(ref) - exclude_self)
    indices, squared = _search(x, ref, k + exclude_self, metric == "cosine")
    if exclude_self:  # drop the row itself; where exact doubles crowded it out, drop the farthest
        extra = indices == np.arange(len(x))[:, None]
        extra[~extra.any(axis=1), -1] = True
        squared = squared[~extra].reshape(len(x), k)
    return np.mean(_from_squared(squared, metric, ref.shape[1]), axis=1)


def nearest(
    x: ArrayLike, reference: ArrayLike, k: int = 10, metric: str = "l2"
) -> tuple[np.ndarray, Float64s]:
    """The k reference rows nearest to each row of x: indices [N, k] and distances [N, k], nearest first."""
    x, ref = _pair(x, reference, metric)
    indices, squared = _search(x, ref, _neighbours(k, len(ref)), metric == "cosine")
    return indices, _from_squared(squared, metric, ref.shape[1])


def distance_to_mean(
    x: ArrayLike, reference: ArrayLike, metric: str = "l2", *, exclude_self: bool = False
) -> Float64s:
    """metric(x_i, mean of reference): x [N, D], reference [M, D] -> [N].

    For cosine the mean is that of the unit rows, the mean direction. exclude_self as in `mean_distance`.
    """
    x, ref = _pair(x, reference, metric, exclude_self)
    count = len(ref)
    if metric != "cosine":
        rest = count / (count - 1) if exclude_self else 1.0  # x - mean of the others = rest * (x - mean)
        return _from_squared(rest**2 * _squared_to(x, _mean(ref)), metric, ref.shape[1])
    mean = _mean(ref, unit=True)
    result = np.empty(len(x))
    for tile in tiles(len(x), 24 * x.shape[1]):
        rows = _rows(x[tile], unit=True)
        centers = (count * mean - rows) / (count - 1) if exclude_self else mean[None]
        norms = np.linalg.norm(centers, axis=1, keepdims=True)
        if not (norms > 1e-12).all():
            raise WinnowError(
                "reference directions cancel out, so D_0 has no mean direction: "
                "use kind 'mean' or metric 'l2'"
            )
        result[tile] = np.sum((rows - centers / norms) ** 2, axis=1) / 2
    return result


def mahalanobis(
    x: ArrayLike, reference: ArrayLike, shrinkage: float | None = None, *, exclude_self: bool = False
) -> Float64s:
    """Mahalanobis distance to reference [M, D] under C = (1 - s) cov + s tr(cov)/D I: x [N, D] -> [N].

    shrinkage: s in [0, 1]; None estimates it (Ledoit & Wolf 2004). s = 0 needs a covariance of full rank.
    exclude_self: x is the reference; mean and covariance leave each row out (s is estimated once).
    """
    x, ref = _pair(x, reference, "l2", exclude_self)
    count, dim = ref.shape
    if count < 2:
        raise WinnowError("reference has 1 row: a covariance needs 2 or more, use kind 'center'")
    mean = _mean(ref)
    values, axes = _principal_axes(ref, mean)
    total = float(values.sum())
    if total <= 0:
        raise WinnowError("reference rows are all equal, so D_0 has no covariance: use kind 'center'")
    if shrinkage is None:
        shrinkage = _ledoit_wolf(values, _squared_to(ref, mean), dim)
    if not 0 <= shrinkage <= 1:
        raise WinnowError(f"shrinkage is {shrinkage}: give a number in [0, 1], or none to estimate it")
    if shrinkage == 0 and (len(values) < dim or values.min() <= values.max() * dim * np.finfo(float).eps):
        raise WinnowError(
            f"covariance of {count} reference rows in {dim} dimensions has no inverse: "
            "give shrinkage above 0 or more rows"
        )
    result = np.empty(len(x))
    for tile in tiles(len(x), 8 * (2 * dim + len(values))):
        y = _rows(x[tile]) - mean
        norm2 = np.einsum("nd,nd->n", y, y)
        along = (y @ axes) ** 2
        # Squared length outside the axes; zero, not rounding noise, where they span the space.
        outside = np.maximum(norm2 - along.sum(axis=1), 0) if len(values) < dim else np.zeros(len(y))
        scale, ridge = 1.0, np.full(len(y), shrinkage * total / dim)
        if exclude_self:
            # Without row y: cov' = ((M-1) cov - M/(M-1) y y^T) / (M-2), mean' = mean - y/(M-1).
            scale = (count - 1) / (count - 2)
            ridge = shrinkage * (scale * total - norm2 * count / ((count - 1) * (count - 2))) / dim
        quad = np.sum(along / ((1 - shrinkage) * scale * values + ridge[:, None]), axis=1)
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


Kind = Callable[[ArrayLike, ArrayLike, str, int, bool], Float64s]
KINDS: dict[str, Kind] = {
    "mean": lambda x, ref, metric, k, own: mean_distance(x, ref, metric, exclude_self=own),
    "knn": lambda x, ref, metric, k, own: knn_distance(x, ref, k, metric, exclude_self=own),
    "center": lambda x, ref, metric, k, own: distance_to_mean(x, ref, metric, exclude_self=own),
    "mahalanobis": lambda x, ref, metric, k, own: mahalanobis(x, ref, exclude_self=own),
}


def _pick(kind: str) -> Kind:
    if kind not in KINDS:
        raise WinnowError(f"distance kind is {kind!r}: choose one of {', '.join(KINDS)}")
    return KINDS[kind]


def _pair(
    x: ArrayLike, reference: ArrayLike, metric: str, exclude_self: bool = False
) -> tuple[Floats, Floats]:
    if metric not in METRICS:
        raise WinnowError(f"distance metric is {metric!r}: choose one of {', '.join(METRICS)}")
    ref = matrix("reference", reference)
    x = matrix("x", x, columns=ref.shape[1])
    if exclude_self and (len(x) != len(ref) or len(ref) < 2):
        raise WinnowError(
            f"x has {len(x)} rows and reference {len(ref)}: leaving each row out of the "
            "reference needs the same rows on both sides, two or more"
        )
    return x, ref


def _neighbours(k: int, rows: int) -> int:
    if not 1 <= k <= rows:
        raise WinnowError(f"k is {k} where {rows} reference rows can be neighbours: give k in 1..{rows}")
    return int(k)


def _finite(values: Float64s) -> Float64s:
    if not np.isfinite(values).all():
        raise WinnowError("distance overflows: features are too large, scale them to about 1")
    return values


def _rows(x: Floats, unit: bool = False) -> Float64s:
    """Rows in float64, of length 1 if unit."""
    rows = x.astype(np.float64)
    if unit:
        peaks = np.abs(rows).max(axis=1, keepdims=True)
        if not (peaks > 0).all():
            raise WinnowError("a row is all zeros, so it has no direction: drop it or use metric 'l2'")
        rows /= peaks  # so that neither tiny nor huge rows leave the range of a square
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def _mean(x: Floats, unit: bool = False) -> Float64s:
    total = np.zeros(x.shape[1])
    for tile in tiles(len(x), 24 * x.shape[1]):
        total += _rows(x[tile], unit).sum(axis=0)
    return total / len(x)


def _squared_to(x: Floats, point: Float64s, unit: bool = False) -> Float64s:
    """||x_i - point||^2: [N]."""
    result = np.empty(len(x))
    for tile in tiles(len(x), 24 * x.shape[1]):
        y = _rows(x[tile], unit) - point
        result[tile] = np.einsum("nd,nd->n", y, y)
    return result


def _from_squared(squared: Float64s, metric: str, dim: int) -> Float64s:
    return {"l2": np.sqrt(squared), "mse": squared / dim, "cosine": squared / 2}[metric]


def _mean_l2(x: Floats, ref: Floats, same: bool) -> Float64s:
    # ||x - r||^2 = ||x||^2 + ||r||^2 - 2 x.r cancels when both lie far from the origin, so both sides are
    # centred on D_0's mean in float64 before they are cut to float32. What is left is harmless: the mean
    # distance is at least ||x - mean|| and at least half of the mean ||r - mean||.
    mean = _mean(ref)
    side = max(1, min(4096, TILE_BYTES // (16 * x.shape[1])))
    total = np.zeros(len(x))
    for i in range(0, len(x), side):
        xs, xx = _centred(x[i : i + side], mean)
        for j in range(0, len(ref), side):
            rs, rr = _centred(ref[j : j + side], mean)
            squared = xs @ rs.T
            squared *= -2
            squared += xx[:, None]
            squared += rr[None, :]
            np.maximum(squared, 0, out=squared)
            if same and i == j:
                np.fill_diagonal(squared, 0)
            total[i : i + side] += np.sqrt(squared, out=squared).sum(axis=1, dtype=np.float64)
    return total / len(ref)


def _centred(rows: Floats, mean: Float64s) -> tuple[Floats, Floats]:
    with np.errstate(over="ignore"):  # an overflow is reported as such at the end
        centred = (rows - mean).astype(np.float32)
        return centred, np.einsum("nd,nd->n", centred, centred)


def _search(x: Floats, ref: Floats, k: int, unit: bool) -> tuple[np.ndarray, Float64s]:
    """k nearest reference rows by faiss, then their squared distances again in float64: both [N, k]."""
    mean = _mean(ref, unit)
    index = faiss.IndexFlatL2(ref.shape[1])
    for tile in tiles(len(ref), 24 * ref.shape[1]):
        index.add(np.ascontiguousarray(_rows(ref[tile], unit) - mean, dtype=np.float32))
    indices = np.empty((len(x), k), dtype=np.int64)
    squared = np.empty((len(x), k))
    for tile in tiles(len(x), 24 * x.shape[1] * (k + 1)):
        rows = _rows(x[tile], unit)
        found = index.search(np.ascontiguousarray(rows - mean, dtype=np.float32), k)[1]
        near = _rows(ref[found.reshape(-1)], unit).reshape(*found.shape, -1)
        exact = np.sum((rows[:, None, :] - near) ** 2, axis=2)
        order = np.argsort(exact, axis=1, kind="stable")
        indices[tile] = np.take_along_axis(found, order, axis=1)
        squared[tile] = np.take_along_axis(exact, order, axis=1)
    return indices, squared


def _ledoit_wolf(values: Float64s, norms2: Float64s, dim: int) -> float:
    """Shrinkage of Ledoit & Wolf (2004) from the variances and the squared lengths of the centred rows."""
    count = len(norms2)
    values = values * (count - 1) / count
    square = np.sum(values**2)
    spread = square - values.sum() ** 2 / dim
    error = (np.mean(norms2**2) - square) / count
    return float(np.clip(error / spread, 0, 1)) if spread > 0 else 1.0


def _principal_axes(ref: Floats, mean: Float64s) -> tuple[Float64s, Float64s]:
    """Variances [K] along orthonormal axes [D, K] of the reference, K = min(M - 1, D) or fewer."""
    count, dim = ref.shape
    if dim < count:
        cov = np.zeros((dim, dim))
        for tile in tiles(count, 24 * dim):
            y = _rows(ref[tile]) - mean
            cov += y.T @ y
        values, axes = np.linalg.eigh(cov / (count - 1))
        return np.maximum(values, 0), axes
    _, scales, axes = np.linalg.svd(_rows(ref) - mean, full_matrices=False)
    values = scales**2 / (count - 1)
    real = values > values.max(initial=0) * dim * np.finfo(float).eps
    return values[real], axes[real].T
