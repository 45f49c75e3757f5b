"""The arrays that curation accepts, checked once at the door, and the tiles they are read in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from schemas.errors import WinnowError

Floats = NDArray[np.floating[Any]]
Float64s = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

TOO_LARGE = "distance overflows: features are too large, scale them to about 1"
TILE_BYTES = 256 * 2**20


def tiles(rows: int, row_bytes: int, limit: int | None = None) -> Iterator[slice]:
    """Slices that cover `rows`, each of at most `limit` bytes (256 MB) but never of no row."""
    step = max(1, (TILE_BYTES if limit is None else limit) // max(1, row_bytes))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def pair_tiles(rows: int, dim: int) -> Iterator[slice]:
    """Slices that cover either side of a comparison of rows [rows, dim] with rows, all pairs of two slices in float64:
    1,024 rows, or as many as leave their own copies a quarter of a tile."""
    return tiles(rows, max(32 * dim, TILE_BYTES // 1024))


def matrix(name: str, value: ArrayLike, *, columns: int | None = None, rows: int | None = None) -> Floats:
    """A finite, real [N, D] array with N and D at least 1, not copied; WinnowError otherwise."""
    array = _array(name, value)
    if array.ndim != 2 or 0 in array.shape:
        raise WinnowError(
            f"{name} has shape {array.shape}: give a 2-d array of at least one row and column, "
            "flattening each sample to one row"
        )
    _numeric(name, array)
    if columns is not None and array.shape[1] != columns:
        raise WinnowError(
            f"{name} has {array.shape[1]} columns where {columns} are needed: "
            "embed both sides with the same encoder"
        )
    _length(name, array, rows)
    for tile in tiles(len(array), 8 * array.shape[1]):
        _finite(name, array[tile], tile.start)
    return array if array.dtype.kind == "f" else array.astype(np.float64)


def vector(name: str, value: ArrayLike, *, rows: int | None = None) -> Float64s:
    """A finite, real [N] float64 array with N at least 1; WinnowError otherwise."""
    array = _array(name, value)
    if array.ndim != 1 or array.size == 0:
        raise WinnowError(f"{name} has shape {array.shape}: give a 1-d array of at least one number")
    _numeric(name, array)
    _length(name, array, rows)
    _finite(name, array, 0)
    return array.astype(np.float64)


def keys(name: str, value: ArrayLike, *, rows: int | None = None) -> NDArray[Any]:
    """A [N] array of integers or strings, such as ids or prompt groups; WinnowError otherwise."""
    array = _array(name, value)
    if array.ndim != 1 or array.size == 0:
        raise WinnowError(f"{name} has shape {array.shape}: give a 1-d array of at least one key")
    if array.dtype.kind == "O" and all(isinstance(item, str) for item in array):
        array = array.astype(str)
    if array.dtype.kind not in "iuUS":
        raise WinnowError(f"{name} holds {array.dtype}: give integers or strings")
    _length(name, array, rows)
    return array


def unique_keys(name: str, value: ArrayLike, *, rows: int | None = None) -> NDArray[Any]:
    """As `keys`, and none twice: ties are broken by id, so that the order of the rows never matters."""
    array = keys(name, value, rows=rows)
    found, counts = np.unique(array, return_counts=True)
    if len(found) < len(array):
        raise WinnowError(
            f"{name} {found[counts > 1][0]} comes {counts.max()} times: give each row its own id"
        )
    return array


def _array(name: str, value: ArrayLike) -> NDArray[Any]:
    try:
        return np.asarray(value)
    except ValueError as error:
        raise WinnowError(f"{name} is no array ({error}): give rows of one length") from None


def _numeric(name: str, array: NDArray[Any]) -> None:
    if array.dtype.kind not in "fiub":
        raise WinnowError(f"{name} holds {array.dtype}: give real numbers")


def _length(name: str, array: NDArray[Any], rows: int | None) -> None:
    if rows is not None and len(array) != rows:
        raise WinnowError(f"{name} has {len(array)} rows where {rows} are needed: give one for each sample")


def _finite(name: str, array: NDArray[Any], start: int) -> None:
    finite = np.isfinite(array)
    if not finite.all():
        row = start + int(np.argwhere(~finite)[0][0])
        raise WinnowError(f"{name} row {row} holds NaN or infinity: drop that sample or make it again")
