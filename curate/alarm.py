"""Signs that a loop wins its score and loses its aim. They are said beside the verdict and do not make it.

A change counts where it is beyond noise: more than two standard errors of the difference, the intervals taken as
independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from curate import groups as grouped
from curate.arrays import Float64s, vector
from curate.drift import Interval, Z
from curate.guard import NOISE
from schemas.errors import WinnowError

Series = Sequence[Interval]  # of every round, the base (round 0) first

STILL = 2  # rounds in a row without a gain that count as saturated
LEAST_AGREEMENT = 0.5  # the share of the base's agreement below which scorers count as in disagreement
LEAST_LOOK = 0.05  # change of brightness or saturation, of a range of 1, that is worth a word


def alarms(
    selecting: Mapping[str, Series], held_out: Mapping[str, Series], agreement: Mapping[str, Series],
    looks: Mapping[str, Series],
) -> list[str]:  # fmt: skip
    """What is amiss in the newest round, a sentence each; [] where nothing is.

    selecting: scorers that choose; held_out: those that never do; agreement: of the choosing score with each held-out
    one within a prompt; looks: brightness and saturation in [0, 1]. All of equal length; round 0 alone raises none.
    """
    lengths = {len(series) for named in (selecting, held_out, agreement, looks) for series in named.values()}
    if len(lengths) > 1:
        raise WinnowError(f"alarms over series of {sorted(lengths)} rounds: measure every metric in every round")
    if not lengths or lengths.pop() < 2:
        return []
    return [
        *_hacked(selecting, held_out),
        *(said for name, series in selecting.items() if (said := _saturated(name, series))),
        *(said for name, series in agreement.items() if (said := _apart(name, series))),
        *(said for name, series in looks.items() if (said := _moved(name, series))),
    ]


def agreement(a: ArrayLike, b: ArrayLike, groups: ArrayLike) -> Float64s:
    """Spearman's rank correlation of scores a and b [N] within each group [N] where both differ at all: the
    correlations in [-1, 1] of those groups, in the order of their sorted keys; empty where there is none."""
    a = vector("scores a", a)
    b = vector("scores b", b, rows=len(a))
    code = grouped.codes(groups, rows=len(a))
    sides = [grouped.average_ranks(code, side) - (grouped.sizes(code) + 1) / 2 for side in (a, b)]
    both = np.sqrt(np.bincount(code, sides[0] ** 2) * np.bincount(code, sides[1] ** 2))
    known = both > 0
    return (np.bincount(code, sides[0] * sides[1])[known] / both[known]).clip(-1, 1)


def _hacked(selecting: Mapping[str, Series], held_out: Mapping[str, Series]) -> list[str]:
    """Since a held-out scorer's best round it fell, while a selecting one rose."""
    found = []
    for name, series in held_out.items():
        best = max(range(len(series) - 1), key=lambda i: series[i].value)
        if _change(series[best], series[-1]) >= 0:
            continue
        rose = [one for one, scores in selecting.items() if _change(scores[best], scores[-1]) > 0]
        if rose:
            found.append(
                f"reward hacking: since round {best} {' and '.join(rose)} rose while held-out {name} fell from "
                f"{series[best].value:.4g} to {series[-1].value:.4g}"
            )
    return found


def _saturated(name: str, series: Series) -> str:
    if len(series) <= STILL or any(_change(series[-1 - STILL], later) > 0 for later in series[-STILL:]):
        return ""
    return f"saturation: {name} has not risen for {STILL} rounds, at {series[-1].value:.4g}"


def _apart(name: str, series: Series) -> str:
    base, newest = series[0], series[-1]
    if _change(base, newest) >= 0 or newest.value >= LEAST_AGREEMENT * base.value:
        return ""
    return f"disagreement: the selecting score ranks with {name} at {newest.value:.2f}, {base.value:.2f} at the base"


def _moved(name: str, series: Series) -> str:
    base, newest = series[0], series[-1]
    if not _change(base, newest) or abs(newest.value - base.value) < LEAST_LOOK:
        return ""
    return f"{name} moved from {base.value:.3f} to {newest.value:.3f}"


def _change(before: Interval, after: Interval) -> int:
    """1 or -1 where it rose or fell beyond noise, else 0."""
    errors = [(interval.high - interval.low) / (2 * Z) for interval in (before, after)]
    difference = after.value - before.value
    return int(math.copysign(1, difference)) if abs(difference) > NOISE * math.hypot(*errors) else 0
