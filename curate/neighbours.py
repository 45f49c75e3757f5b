"""The nearest reference rows: found by matrix products or through an index, then measured exactly.

    index    finds                                                      memory beyond the reference's own
    exact    the nearest, but for ties within float32                   tiles alone
    ivf      most of them: those in the clusters nearest to the row     4 D bytes a reference row
    ivfpq    most of them, by codes that stand for the vectors          D / 4 bytes a row
    hnsw     most of them, along a graph of neighbours                  4 D + 256 bytes a row

What an index misses is measured, and it searches wider until that is little.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import faiss
import numpy as np

from curate import rows
from curate.arrays import TILE_BYTES, TOO_LARGE, Float64s, Floats, Ints, tiles
from schemas.errors import WinnowError

INDEXES = ("exact", "ivf", "ivfpq", "hnsw")
RECALL = 0.95  # an index searches wider until it finds this share of the true neighbours
PROBES = 200  # rows that the share is measured on
CODED = 256  # reference rows below which there are too few to tell codes of a byte by
LARGEST = float(np.finfo(np.float32).max) / 16  # square of a vector whose differences to others still have squares
HELD = 64  # bytes that a candidate takes while rows are searched where they lie: number, distance, their order
MOST = 32  # candidates for each neighbour, at most, where vectors are known by codes alone

#: From rows [N, D] float32, centred, to the indices of k reference rows each: [N, k], -1 where it found fewer.
Finder = Callable[[Floats], Ints]


class Neighbours(NamedTuple):
    """indices [N, k] and squared L2 distances [N, k] of reference rows, nearest first; and the share in [0, 1] of the
    true neighbours among them, measured on some rows."""

    indices: Ints
    squared: Float64s
    recall: float


@dataclass(frozen=True)
class Reference:
    """Reference rows [M, D] made ready for many searches: their centre [D] where they lie far from the origin, their
    norms [M] where rows are compared at length 1, and an index, if any, that was filled with them."""

    rows: Floats
    centre: Floats | None
    length: Float64s | None
    filled: faiss.Index | None


def prepare(ref: Floats, unit: bool = False, index: str = "exact", seed: int = 0) -> Reference:
    """The rows with their centre, and their index where one is asked for. The same rows and seed give the same one."""
    if index not in INDEXES:
        raise WinnowError(f"index is {index!r}: choose one of {', '.join(INDEXES)}")
    length = rows.lengths(ref) if unit else None
    centre = _centre(ref, length)
    return Reference(ref, centre, length, None if index == "exact" else _index(ref, index, centre, length, seed))


def _centre(ref: Floats, length: Float64s | None) -> Floats | None:
    """The mean of some rows, which is near enough to the middle of them all; None where they lie around the origin, so
    that next to nothing cancels and no row needs to be copied."""
    every = slice(None, None, -(-len(ref) // PROBES))
    some = rows.exact(ref[every], None if length is None else length[every])
    centre = some.mean(axis=0).astype(np.float32)
    return centre if 2 * np.vdot(centre, centre) > np.mean(np.vecdot(some, some)) else None


def search(x: Floats, ref: Reference, k: int, share: float = RECALL) -> Neighbours:
    """The k reference rows nearest to each row of x [N, D], k in 1..M, an index this share of them or more. Whatever
    found the rows, their distances are sums of squared differences, in which nothing cancels."""
    own = None if ref.length is None else rows.lengths(x)

    def flat(query: Floats) -> Ints:
        return _flat(query, ref, k)

    find, recall = flat, 1.0
    if ref.filled is not None:
        some = np.linspace(0, len(x) - 1, min(PROBES, len(x))).astype(np.int64)
        probes = rows.centred(x[some], ref.centre, None if own is None else own[some])
        find, recall = _tuned(ref.filled, probes, flat(probes), len(ref.rows), share)
    indices, squared = np.empty((len(x), k), np.int64), np.empty((len(x), k))
    copied = not (ref.centre is None and own is None and rows.plain(x))
    for tile in tiles(len(x), 4 * x.shape[1] if copied else HELD * k):
        mine = None if own is None else own[tile]
        query = rows.centred(x[tile], ref.centre, mine)
        found = find(query)
        if (few := (found < 0).any(axis=1)).any():
            found[few, :k], found[few, k:] = flat(query[few]), -1  # what the index found is among them
        indices[tile], squared[tile] = _measured(x[tile], mine, ref, found, k)
    return Neighbours(indices, squared, recall)


def _index(ref: Floats, kind: str, centre: Floats | None, length: Float64s | None, seed: int) -> faiss.Index:
    """A filled index over the reference [M, D]."""
    count, dim = ref.shape
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, 32)
        index.hnsw.efConstruction = 80
    else:
        # 4 sqrt(M) lists balance the work of choosing lists and of reading them; one needs 39 rows to be placed well.
        lists = max(1, min(round(4 * count**0.5), count // 39))
        coarse = faiss.IndexFlatL2(dim)
        if kind == "ivf" or count < CODED:
            index = faiss.IndexIVFFlat(coarse, dim, lists)
        else:
            index = faiss.IndexIVFPQ(coarse, dim, lists, _pieces(dim), 8)
            index.pq.cp.seed = seed
            index.pq.cp.min_points_per_centroid = 1
        index.cp.seed = seed
        index.cp.min_points_per_centroid = 1
        places = np.sort(np.random.default_rng(seed).permutation(count)[: 64 * max(lists, 256)])
        some = rows.centred(ref[places], centre, None if length is None else length[places])
        with np.errstate(over="ignore"):
            longest = np.vecdot(some, some).max()
        if not longest < LARGEST:
            raise WinnowError(TOO_LARGE)
        index.train(some)
    for tile in tiles(count, 12 * dim):
        index.add(rows.centred(ref[tile], centre, None if length is None else length[tile]))
    return index


def _tuned(index: faiss.Index, probes: Floats, truth: Ints, count: int, share: float) -> tuple[Finder, float]:
    """The index as a Finder that looks as widely as the probes ask for, at most at everything, and its recall."""
    k, graph, codes = truth.shape[1], isinstance(index, faiss.IndexHNSW), isinstance(index, faiss.IndexIVFPQ)
    most = count if graph else index.nlist
    width, wanted = min(most, max(8, k)) if graph else 1, k
    last = min(count, MOST * k) if codes else k  # codes stand for no exact place: more are asked for, and measured
    while True:
        if graph:
            index.hnsw.efSearch = width
        else:
            index.nprobe = width
        found = index.search(probes, wanted)[1]
        recall = float(np.mean([np.isin(a, b).mean() for a, b in zip(truth, found, strict=True)]))
        if recall >= share or (width >= most and wanted >= last):
            return partial(_found, index, wanted), recall
        width, wanted = min(most, 2 * width), min(last, 2 * wanted)


def _found(index: faiss.Index, k: int, query: Floats) -> Ints:
    return index.search(query, k)[1]


def _pieces(dim: int) -> int:
    """Into how many pieces of a byte each a vector is cut: the most up to D / 4 that divide D."""
    return max(m for m in range(1, max(dim // 4, 1) + 1) if dim % m == 0)


def _flat(query: Floats, ref: Reference, k: int) -> Ints:
    """All pairs, never [N, M] at once; a tile of the reference at a time where it has to be copied."""
    best = np.empty((len(query), 0), np.int64)
    near = np.empty((len(query), 0), np.float32)
    copied = not (ref.centre is None and ref.length is None and rows.plain(ref.rows))
    for tile in tiles(len(ref.rows), 4 * ref.rows.shape[1] if copied else 0, TILE_BYTES // 4):
        others = rows.centred(ref.rows[tile], ref.centre, None if ref.length is None else ref.length[tile])
        squared, found = faiss.knn(query, others, min(k, len(others)))
        best, near = np.hstack([best, found + tile.start]), np.hstack([near, squared])
        if best.shape[1] > k:
            order = np.argpartition(near, k - 1, axis=1)[:, :k]
            best, near = np.take_along_axis(best, order, 1), np.take_along_axis(near, order, 1)
    return best


def _measured(x: Floats, own: Float64s | None, ref: Reference, found: Ints, k: int) -> tuple[Ints, Float64s]:
    """The k nearest of the rows that were found, by the sum of squared differences: [N, k] both."""
    in_place = own is None and rows.plain(x) and rows.plain(ref.rows)
    squared = _in_place(x, ref.rows, found) if in_place else _gathered(x, own, ref, found)
    far = np.where(found < 0, np.inf, squared)  # an index may find fewer rows than were asked for
    order = np.argsort(far, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(found, order, 1), np.take_along_axis(far, order, 1)


def _in_place(x: Floats, ref: Floats, found: Ints) -> Float64s:
    """Squared distances [N, k] of float32 rows, read where they lie."""
    squared, found = np.empty(found.shape, np.float32), np.ascontiguousarray(found)
    at = faiss.swig_ptr
    faiss.fvec_L2sqr_by_idx(at(squared), at(x), at(ref), at(found), x.shape[1], *found.shape)
    return squared.astype(np.float64)


def _gathered(x: Floats, own: Float64s | None, ref: Reference, found: Ints) -> Float64s:
    """Squared distances [N, k] of any rows, or of directions. A few at once, so that they stay in the cache between
    the passes."""
    squared = np.empty(found.shape)
    # Differences of small floats lose nothing that matters in float32; others, and directions, are taken in float64.
    single = own is None and max(x.dtype.itemsize, ref.rows.dtype.itemsize) <= 4
    kind = np.float32 if single else np.float64

    def measure(tile: slice) -> None:
        flat = found[tile].reshape(-1)
        near = np.take(ref.rows, flat, axis=0).astype(kind, copy=False)
        mine = x[tile].astype(kind, copy=False)
        if own is not None and ref.length is not None:
            near, mine = near / ref.length[flat, None], mine / own[tile, None]
        near = near.reshape(len(mine), -1, x.shape[1])
        near -= mine[:, None]
        squared[tile] = np.vecdot(near, near)

    with ThreadPoolExecutor(faiss.omp_get_max_threads()) as pool:
        list(pool.map(measure, tiles(len(x), kind().itemsize * found.shape[1] * x.shape[1], TILE_BYTES // 128)))
    return squared
