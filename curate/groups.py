"""Rows in groups, such as the samples of one prompt: ranks and sums within each."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from curate.arrays import Float64s, Ints, keys


def codes(groups: ArrayLike, rows: int | None = None) -> Ints:
    """Integers or strings [N] -> group numbers [N], 0..G-1 in the order of the sorted keys."""
    return np.unique(keys("groups", groups, rows=rows), return_inverse=True)[1].astype(np.int64)


def sizes(code: Ints) -> Ints:
    """Rows in the group of each row: [N] -> [N]."""
    return np.bincount(code)[code].astype(np.int64)


def ranks(code: Ints, *by: NDArray[Any]) -> Ints:
    """Place of each row in its group, 1 = lowest `by`, later keys breaking the ties of earlier ones: [N]."""
    order = np.lexsort((*reversed(by), code))
    starts = np.flatnonzero(np.diff(code[order], prepend=-1))
    rank = np.empty(len(code), dtype=np.int64)
    rank[order] = np.arange(len(code)) - np.repeat(starts, np.diff(starts, append=len(code))) + 1
    return rank


def average_ranks(code: Ints, values: Float64s) -> Float64s:
    """As `ranks`, 1 = lowest value, but equal values share the mean of their places: [N]."""
    rank = ranks(code, values)
    order = np.lexsort((values, code))
    new = np.diff(code[order], prepend=-1) != 0
    new[1:] |= np.diff(values[order]) != 0
    starts = np.flatnonzero(new)
    lengths = np.diff(starts, append=len(order))
    result = np.empty(len(code))
    result[order] = np.repeat(rank[order][starts] + (lengths - 1) / 2, lengths)
    return result


def means(code: Ints, values: Float64s) -> Float64s:
    """Mean value of each group: [N] -> [G]. Summed in sorted order, so the order of rows changes no bit."""
    order = np.lexsort((values, code))
    starts = np.flatnonzero(np.diff(code[order], prepend=-1))
    return np.add.reduceat(values[order], starts) / np.bincount(code)


def lows(code: Ints, values: Float64s) -> Float64s:
    """Lowest value of each group: [N] -> [G]."""
    order = np.lexsort((values, code))
    return values[order][np.flatnonzero(np.diff(code[order], prepend=-1))]
