"""A ratio of two ways of doing the same, taken in turns so that a busy machine slows both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """``ours`` and ``theirs``: median seconds, or another ``unit``; ``ratio``: median of ours / theirs, turn by turn;
    ``low``, ``high``: the least and the greatest of them."""

    name: str
    what: str
    ours: float
    theirs: float
    ratio: float
    low: float
    high: float
    turns: int
    unit: str = "s"


def compare(
    name: str, what: str, ours: Callable[[], object], theirs: Callable[[], object], turns: int = 5,
    before: Callable[[], object] = lambda: None,
) -> Ratio:  # fmt: skip
    """Time both in turns, after one of each that is not counted, the order changing from turn to turn. ``before``
    clears up in front of each, and is not timed."""
    pairs = []
    for turn in range(turns + 1):
        seconds = {}
        order = [(ours, "ours"), (theirs, "theirs")]
        for call, who in order if turn % 2 else reversed(order):
            before()
            began = time.perf_counter()
            call()
            seconds[who] = time.perf_counter() - began
        if turn:
            pairs.append((seconds["ours"], seconds["theirs"]))
    ratios = [mine / other for mine, other in pairs]
    mine, other = (statistics.median(side) for side in zip(*pairs, strict=True))
    return Ratio(name, what, mine, other, statistics.median(ratios), min(ratios), max(ratios), turns)
