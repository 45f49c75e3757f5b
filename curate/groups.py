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
    order = _sorted(code, values)
    starts = np.diff(code[order], prepend=-1) != 0
    runs = starts.copy()
    runs[1:] |= np.diff(values[order]) != 0
    first = np.flatnonzero(runs)
    lengths = np.diff(first, append=len(order))
    before = np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))[first]
    result = np.empty(len(code))
    result[order] = np.repeat(first - before + (lengths + 1) / 2, lengths)
    return result


def means(code: Ints, values: Float64s) -> Float64s:
    """Mean value of each group: [N] -> [G]. Summed in sorted order, so the order of rows changes no bit."""
    order = _sorted(code, values)
    starts = np.flatnonzero(np.diff(code[order], prepend=-1))
    return np.add.reduceat(values[order], starts) / np.bincount(code)


def zscores(code: Ints, values: Float64s) -> Float64s:
    """(value - group's mean) / group's standard deviation, which divides by n: [N]. 0 where the values of a group are
    equal, or differ by less than a 10^-12 of them, which is rounding."""
    order = _sorted(code, values)
    starts = np.flatnonzero(np.diff(code[order], prepend=-1))
    counts = np.diff(starts, append=len(order))
    low, high = values[order][starts], values[order][starts + counts - 1]
    span = high / 2 - low / 2  # halves, as the whole may be beyond the largest float
    told = span > 5e-13 * np.maximum(np.abs(low), np.abs(high))
    share = np.divide(values / 2 - (low / 2)[code], span[code], out=np.zeros(len(values)), where=told[code])
    off = share - (np.add.reduceat(share[order], starts) / counts)[code]
    deviation = np.sqrt(np.add.reduceat(off[order] ** 2, starts) / counts)[code]
    return np.divide(off, deviation, out=np.zeros(len(values)), where=told[code])


def _sorted(code: Ints, values: Float64s) -> Ints:
    """The order of the rows by group and then by value, equal ones in any order: [N]. By 16 bits of the code at a time,
    which a stable sort takes in one pass."""
    order = np.argsort(values)
    for shift in range(0, int(code.max()).bit_length(), 16):
        order = order[np.argsort((code[order] >> shift).astype(np.uint16), kind="stable")]
    return order
