"""Peaks of memory (Linux): of this process by stage, beside its seconds, and of two ways of doing the same."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.ratio import Ratio


def resident(key: str = "VmRSS") -> float:
    """MiB that this process holds now, or held at most ("VmHWM")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def forget() -> None:
    """The peak counts from here on."""
    Path("/proc/self/clear_refs").write_text("5")


class Peak:
    """Calls stages and keeps what each took: ``found``, by name ``seconds`` and ``peak`` in MiB."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}

    def __call__(self, name: str, stage: Callable[[], object]) -> None:
        forget()
        began = time.perf_counter()
        stage()
        self.found[name] = {"seconds": time.perf_counter() - began, "peak": resident("VmHWM")}


def memory(
    name: str, ours: Callable[..., Any], theirs: Callable[..., Any], make: Callable[[int, int], np.ndarray],
    counts: tuple[int, int],
) -> Ratio:  # fmt: skip
    """MiB that either takes at most beyond the two sets of rows that it is given, ``make`` (count, 0) and (count, 1),
    each in a process of its own."""
    mine, other = (_beyond(call, make, counts) for call in (ours, theirs))
    what = f"peak beyond the rows, {counts[0]} × {counts[1]} of {make(1, 0).shape[1]:,}"
    return Ratio(name, what, mine, other, *(3 * [mine / other]), 1, "MiB")


def _beyond(call: Callable[..., Any], make: Callable[[int, int], np.ndarray], counts: tuple[int, int]) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (call, make, counts))


def _measure(call: Callable[..., Any], make: Callable[[int, int], np.ndarray], counts: tuple[int, int]) -> float:
    x, y = (make(count, seed) for seed, count in enumerate(counts))
    call(x[:64], y[:64])  # what a library loads once
    before = resident()
    forget()
    call(x, y)
    return resident("VmHWM") - before
