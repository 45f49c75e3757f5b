"""Seconds and the peak of this process's memory, by stage (Linux)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


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
