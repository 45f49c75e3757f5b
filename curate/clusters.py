"""K-means clusters and the rows that stand for them. The same rows and seed give the same clusters."""

from __future__ import annotations

import faiss
import numpy as np
from numpy.typing import ArrayLike
from sklearn.cluster import kmeans_plusplus

from curate.arrays import TOO_LARGE, Floats, Ints, matrix
from curate.neighbours import LARGEST
from schemas.errors import WinnowError

SPREAD = 10_000_000  # rows times centres up to which k-means begins from spread centres


def kmeans(features: ArrayLike, k: int, seed: int = 0) -> Ints:
    """Cluster of each row of features [N, D] by squared L2 after 20 steps of k-means: [N] in 0..k-1."""
    x = matrix("features", features)
    if not 1 <= k <= len(x):
        raise WinnowError(f"{k} clusters of {len(x)} rows: give a number of clusters in 1..{len(x)}")
    x = _centred(x)
    return _train(x, k, seed).index.search(x, 1)[1][:, 0].astype(np.int64)


def representatives(features: ArrayLike, k: int, seed: int = 0) -> tuple[Ints, Ints]:
    """k-means, and the row nearest to each centre: exactly min(k, distinct rows) rows, none twice.

    Returns cluster [N], the chosen row nearest to each row, and chosen [min(k, distinct)], row indices with
    chosen[c] in cluster c; among equal rows the first is chosen.
    """
    x = _centred(matrix("features", features))
    if k < 1:
        raise WinnowError(f"{k} representatives asked for: give 1 or more")
    places: dict[bytes, int] = {}
    distinct_of = np.array([places.setdefault(row.tobytes(), len(places)) for row in x], dtype=np.int64)
    first = np.unique(distinct_of, return_index=True)[1]
    rows = x[first]
    if k >= len(rows):
        return distinct_of, first
    squared, cluster = (column[:, 0] for column in _train(rows, k, seed).index.search(rows, 1))
    order = np.lexsort((squared, cluster))
    heads = order[np.flatnonzero(np.diff(cluster[order], prepend=-1))]
    # k-means may leave a cluster empty: the rows worst served so far then make up the number.
    rest = np.setdiff1d(np.arange(len(rows)), heads)
    heads = np.concatenate([heads, rest[np.argsort(-squared[rest], kind="stable")][: k - len(heads)]])
    nearest = _to(rows[heads], rows)[1][:, 0]
    nearest[heads] = np.arange(k)
    return nearest[distinct_of].astype(np.int64), first[heads]


def _centred(x: Floats) -> Floats:
    # faiss multiplies ||x - c||^2 out in float32, which cancels far from the origin.
    with np.errstate(over="ignore", invalid="ignore"):
        near = np.ascontiguousarray(x - x.mean(axis=0, dtype=np.float64), dtype=np.float32)
        longest = np.vecdot(near, near).max()
    if not longest < LARGEST:  # faiss would end the process
        raise WinnowError(TOO_LARGE)
    return near


def _train(x: Floats, k: int, seed: int) -> faiss.Kmeans:
    run = faiss.Kmeans(x.shape[1], k, niter=20, seed=seed, min_points_per_centroid=1)
    # Drawn by chance alone, two centres may begin in one group and none in another, and stay there. Among many
    # thousands that matters little, and choosing them well takes longer than all the steps.
    well = len(x) * k <= SPREAD
    run.train(x, init_centroids=kmeans_plusplus(x, k, random_state=seed)[0] if well else None)
    return run


def _to(points: Floats, rows: Floats) -> tuple[Floats, Ints]:
    index = faiss.IndexFlatL2(points.shape[1])
    index.add(points)
    return index.search(rows, 1)
