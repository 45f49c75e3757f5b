"""Whether a new model may live: the verdict at the end of a round."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from schemas.errors import WinnowError

NOISE = 2.0  # standard errors of a difference that count as no difference


@dataclass(frozen=True)
class Measure:
    """What one round's model was measured at.

    distance: lower is better, to a reference that stays fixed and is not the base's own output (to its own
    output the base is nearest by construction, and no round could beat it). distance_se: its standard error,
    0 if unknown. diversity: above 0, in any unit that stays the same.
    """

    round: int
    distance: float
    distance_se: float
    diversity: float


@dataclass(frozen=True)
class Verdict:
    """verdict: promote, the loop goes on from the newest model; stop, it ends with the newest, which is the
    best; rollback, it ends with the model of the earlier `best_round`."""

    verdict: Literal["promote", "stop", "rollback"]
    best_round: int
    reason: str


def verdict(
    history: Sequence[Measure], *, planned: int, min_rounds: int = 1, patience: int = 1,
    diversity_floor: float = 0.5, higher: str = "",
) -> Verdict:  # fmt: skip
    """Judges the newest of the rounds measured so far, the base (round 0) first.

    A round is sound if its diversity is at least `diversity_floor` (a share in [0, 1]) of the base's; the
    base always is. The best round is the sound round of the lowest distance, the earliest of equals. A round
    is poor if it is unsound, or farther than the best by more than two standard errors of the difference.
    When round `planned` is reached the loop ends: stop if it is the best, else rollback. Before that, more
    than `patience` poor rounds in a row end it with rollback, though never before round `min_rounds`.
    Everything else is promote. So the loop never ends with a model worse than the best it had.

    `higher`: the name of a measure of which more is better, whose negative is given as the distance.
    """
    _check(history, planned, min_rounds, patience, diversity_floor)
    base, newest = history[0], history[-1]
    least = diversity_floor * base.diversity
    sound = [measure for measure in history if measure.round == 0 or measure.diversity >= least]
    best = min(sound, key=lambda measure: (measure.distance, measure.round))
    told = (lambda one: f"{higher} {-one.distance:.4g}") if higher else (lambda one: f"distance {one.distance:.4g}")
    found = f"best is round {best.round} at {told(best)}"
    if newest is best:
        if newest.round >= planned:
            return Verdict("stop", best.round, f"all {planned} rounds done; {found}")
        return Verdict("promote", best.round, f"{found}, the newest")

    poor = 0
    for measure in reversed(history[1:]):
        if measure is best or (measure in sound and not _farther(measure, best)):
            break
        poor += 1
    if newest not in sound:
        state = f"diversity {newest.diversity:.4g} of round {newest.round} is below the floor {least:.4g}"
    else:
        near = "beyond" if _farther(newest, best) else "within"
        side = "below" if higher else "above"
        state = f"{told(newest)} of round {newest.round} is {side} the best, {near} noise"
    if newest.round >= planned:
        return Verdict("rollback", best.round, f"all {planned} rounds done; {state}; {found}")
    if poor > patience and newest.round >= min_rounds:
        return Verdict("rollback", best.round, f"{poor} poor rounds in a row; {state}; {found}")
    return Verdict("promote", best.round, f"{state}; {found}; {poor} poor in a row, {patience} allowed")


def _farther(measure: Measure, best: Measure) -> bool:
    return measure.distance - best.distance > NOISE * math.hypot(measure.distance_se, best.distance_se)


def _check(
    history: Sequence[Measure], planned: int, min_rounds: int, patience: int, diversity_floor: float
) -> None:
    if [measure.round for measure in history] != list(range(len(history))) or not history:
        raise WinnowError(
            f"rounds measured are {[m.round for m in history]}: give each round once, in order, "
            "from the base, round 0"
        )
    for measure in history:
        if not all(map(math.isfinite, (measure.distance, measure.distance_se, measure.diversity))):
            raise WinnowError(f"round {measure.round} measured NaN or infinity: evaluate it again")
        if measure.distance_se < 0 or measure.diversity < 0:
            raise WinnowError(
                f"round {measure.round} has a standard error or diversity below 0: evaluate it again"
            )
    if history[0].diversity <= 0:
        raise WinnowError("the base has no diversity: evaluate it with 2 or more images per prompt")
    if planned < 1 or not 0 <= min_rounds <= planned or patience < 0:
        raise WinnowError(
            f"planned {planned}, min_rounds {min_rounds}, patience {patience}: give planned of 1 or "
            "more, min_rounds in 0..planned and patience of 0 or more"
        )
    if not 0 <= diversity_floor <= 1:
        raise WinnowError(
            f"diversity_floor is {diversity_floor}: give a share of the base's diversity in [0, 1]"
        )
