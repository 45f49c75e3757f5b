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

Every function takes rows in any float type, reads them in tiles and returns float64. What it needs beyond its input and
output stays below 1 GiB for any N, M and D.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from curate import rows
from curate.arrays import TILE_BYTES, TOO_LARGE, Float64s, Floats, Ints, keys, matrix, tiles
from curate.mahalanobis import mahalanobis
from curate.neighbours import HELD, RECALL, Reference, prepare, search
from schemas.errors import WinnowError, about

METRICS = ("l2", "mse", "cosine")
ROWS = 4096  # the most of either side at once, so that their products stay small


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


def matched(
    x: ArrayLike, groups: ArrayLike, reference: ArrayLike, reference_groups: ArrayLike, kind: str = "mean",
    metric: str = "l2", k: int = 10,
) -> Float64s:  # fmt: skip
    """`distance` of each row of x [N, D] to the reference rows [M, D] of its own group, such as its prompt: [N].

    What the prompt asks for is then no part of the distance. Every group of x needs reference rows.
    """
    ref = matrix("reference", reference)
    x = matrix("x", x, columns=ref.shape[1])
    own, others = keys("groups", groups, rows=len(x)), keys("reference groups", reference_groups, rows=len(ref))
    names = np.unique(own)
    result = np.empty(len(x))
    for name, mine, theirs in zip(names, _members(own, names), _members(others, names), strict=True):
        if not len(theirs):
            raise WinnowError(f"group {name} has no row in the reference: sample the base for it, or match the whole")
        with about(f"group {name}"):
            result[mine] = distance(x[mine], ref[theirs], kind, metric, k)
    return result


def self_matched(
    reference: ArrayLike, groups: ArrayLike, kind: str = "mean", metric: str = "l2", k: int = 10
) -> Float64s:
    """`self_distance` of each reference row [M, D] to the others of its own group: [M]."""
    ref = matrix("reference", reference)
    own = keys("groups", groups, rows=len(ref))
    names = np.unique(own)
    result = np.empty(len(ref))
    for name, mine in zip(names, _members(own, names), strict=True):
        with about(f"group {name}"):
            result[mine] = self_distance(ref[mine], kind, metric, k)
    return result


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
    own, other = (rows.lengths(x), rows.lengths(ref)) if unit else (None, None)
    mean = rows.mean(ref, other)
    spread = float(np.mean(rows.squared_to(ref, mean, other)))
    return rest * (rows.squared_to(x, mean, own) + spread) / (2.0 if unit else ref.shape[1])


def knn_distance(
    x: ArrayLike, reference: ArrayLike, k: int = 10, metric: str = "l2", exclude_self: bool = False
) -> Float64s:
    """Mean of metric(x_i, r) over the k reference rows nearest to x_i: x [N, D], reference [M, D] -> [N].

    exclude_self: x is the reference, row for row, and no row is its own neighbour. k in 1..M (M - 1 then).
    """
    x, ref = _pair(x, reference, metric, exclude_self)
    k = _neighbours(k, len(ref) - exclude_self)
    return _mean_of_nearest(x, prepare(ref, metric == "cosine"), k, metric, exclude_self)[0]


def indexed(reference: ArrayLike, metric: str = "l2", index: str = "ivf") -> Reference:
    """Reference [M, D] behind an index of curate/neighbours.py, for `knn_by_index` of many sets of rows."""
    _check(metric)
    return prepare(matrix("reference", reference), metric == "cosine", index)


def knn_by_index(x: ArrayLike, reference: Reference, k: int = 10, metric: str = "l2") -> tuple[Float64s, float]:
    """`knn_distance` [N] with the neighbours that an index finds (made for the same metric), and its recall in [0, 1],
    measured. What it misses is replaced by rows farther off, so that no distance comes out too small."""
    _check(metric)
    x = matrix("x", x, columns=reference.rows.shape[1])
    values, recall = _mean_of_nearest(x, reference, _neighbours(k, len(reference.rows)), metric, False)
    return _finite(values), recall


def self_by_index(reference: Reference, k: int = 10, metric: str = "l2") -> tuple[Float64s, float]:
    """`self_distance` [M] with the neighbours that an index finds, so that a threshold errs as the distances of
    `knn_by_index` do; and its recall, measured."""
    _check(metric)
    k = _neighbours(k, len(reference.rows) - 1)
    values, recall = _mean_of_nearest(reference.rows, reference, k, metric, True)
    return _finite(values), recall


def nearest(
    x: ArrayLike, reference: ArrayLike, k: int = 10, metric: str = "l2"
) -> tuple[np.ndarray, Float64s]:
    """The k reference rows nearest to each row of x: indices [N, k] and distances [N, k], nearest first."""
    x, ref = _pair(x, reference, metric)
    indices, squared, _ = search(x, prepare(ref, metric == "cosine"), _neighbours(k, len(ref)))
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
        return _from_squared(rest**2 * rows.squared_to(x, rows.mean(ref)), metric, ref.shape[1])
    own, mean = rows.lengths(x), rows.mean(ref, rows.lengths(ref))
    result = np.empty(len(x))
    for tile in tiles(len(x), 24 * x.shape[1]):
        unit = rows.exact(x[tile], own[tile])
        centers = (count * mean - unit) / (count - 1) if exclude_self else mean[None]
        norms = np.linalg.norm(centers, axis=1, keepdims=True)
        if not (norms > 1e-12).all():
            raise WinnowError(
                "reference directions cancel out, so D_0 has no mean direction: "
                "use kind 'mean' or metric 'l2'"
            )
        result[tile] = np.sum((unit - centers / norms) ** 2, axis=1) / 2
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


def _check(metric: str) -> None:
    if metric not in METRICS:
        raise WinnowError(f"distance metric is {metric!r}: choose one of {', '.join(METRICS)}")


def _pair(
    x: ArrayLike, reference: ArrayLike, metric: str, exclude_self: bool = False
) -> tuple[Floats, Floats]:
    _check(metric)
    ref = matrix("reference", reference)
    x = matrix("x", x, columns=ref.shape[1])
    if exclude_self and (len(x) != len(ref) or len(ref) < 2):
        raise WinnowError(
            f"x has {len(x)} rows and reference {len(ref)}: leaving each row out of the "
            "reference needs the same rows on both sides, two or more"
        )
    return x, ref


def _members(groups: np.ndarray, names: np.ndarray) -> list[Ints]:
    """The rows of each of these groups; of the others none."""
    order = np.argsort(groups, kind="stable")
    start, stop = (np.searchsorted(groups, names, side, sorter=order) for side in ("left", "right"))
    return [order[a:b] for a, b in zip(start, stop, strict=True)]


def _neighbours(k: int, rows: int) -> int:
    if not (float(k).is_integer() and 1 <= k <= rows):
        raise WinnowError(f"k is {k} where {rows} reference rows can be neighbours: give k in 1..{rows}")
    return int(k)


def _finite(values: Float64s) -> Float64s:
    if not np.isfinite(values).all():
        raise WinnowError(TOO_LARGE)
    return values


def _from_squared(squared: Float64s, metric: str, dim: int) -> Float64s:
    return {"l2": np.sqrt(squared), "mse": squared / dim, "cosine": squared / 2}[metric]


def _mean_of_nearest(x: Floats, ref: Reference, k: int, metric: str, same: bool) -> tuple[Float64s, float]:
    """The mean of the metric over the k nearest rows [N], and the share of the true ones among them."""
    values, recall = np.empty(len(x)), 0.0
    least = (RECALL * k + same) / (k + same)  # of k others: the row itself is always found
    for tile in tiles(len(x), HELD * (k + same)):  # as many rows as a search takes, so that no [N, k] is held
        indices, squared, share = search(x[tile], ref, k + same, least)
        if same:  # drop the row itself; where exact doubles crowded it out, drop the farthest
            extra = indices == np.arange(tile.start, tile.stop)[:, None]
            extra[~extra.any(axis=1), -1] = True
            squared = squared[~extra].reshape(len(indices), k)
        values[tile] = np.mean(_from_squared(squared, metric, x.shape[1]), axis=1)
        recall += (share * (k + same) - same) / k * len(indices) / len(x)
    return values, recall


def _mean_l2(x: Floats, ref: Floats, same: bool) -> Float64s:
    # Rounding is harmless here: the mean distance is at least ||x - mean|| and at least half of the mean ||r - mean||,
    # which is at least half of the mean ||r|| where no centre is taken off.
    centre = _centre(ref)
    bytes_, total = 4 * x.shape[1], np.zeros(len(x))
    for own in tiles(len(x), max(bytes_, TILE_BYTES // ROWS)):
        mine = rows.centred(x[own], centre)
        mine_squared = np.vecdot(mine, mine)[:, None]
        for other in tiles(len(ref), max(bytes_, TILE_BYTES // ROWS), TILE_BYTES // 4):
            others = rows.centred(ref[other], centre)
            squared = mine @ others.T
            squared *= -2
            squared += mine_squared
            squared += np.vecdot(others, others)
            np.maximum(squared, 0, out=squared)
            if same:
                both = np.arange(max(own.start, other.start), min(own.stop, other.stop))
                squared[both - own.start, both - other.start] = 0
            total[own] += np.sqrt(squared, out=squared).sum(axis=1)
    return total / len(ref)


def _centre(ref: Floats) -> Floats | None:
    """The mean [D] of D_0. None where its rows can be read where they lie and are twice as long as it, so that they are
    nearly as far from it as from the origin: copies of them would gain nothing."""
    mean = rows.mean(ref).astype(np.float32)
    around = rows.plain(ref) and 2 * np.linalg.norm(mean) <= np.sqrt(np.vecdot(ref, ref)).mean(dtype=np.float64)
    return None if around else mean
