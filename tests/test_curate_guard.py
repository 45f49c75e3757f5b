"""The verdict, on simulated histories."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.guard import Measure, Verdict, verdict
from schemas.errors import WinnowError


def history(distances: list[float], diversities: list[float] | None = None, se: float = 0.5) -> list[Measure]:
    diversities = diversities or [100.0] * len(distances)
    return [Measure(i, d, se, v) for i, (d, v) in enumerate(zip(distances, diversities, strict=True))]


def play(measures: list[Measure], **settings: float) -> tuple[int, Verdict]:
    """Judges round after round as the loop would: the round that ended it, and its verdict."""
    settings = {"planned": len(measures) - 1, "patience": 1, "diversity_floor": 0.7} | settings
    for end in range(2, len(measures) + 1):
        given_ = verdict(measures[:end], **settings)
        if given_.verdict != "promote":
            return end - 1, given_
    raise AssertionError("the loop did not end")


def test_improving_runs_to_the_plan() -> None:
    ended, last = play(history([50, 40, 32, 27, 24]))
    assert (ended, last.verdict, last.best_round) == (4, "stop", 4)


def test_plateau_within_noise_runs_to_the_plan_and_gives_the_best() -> None:
    ended, last = play(history([50, 30, 30.4, 29.8, 30.2, 30.1]))
    assert (ended, last.verdict, last.best_round) == (5, "rollback", 3)


def test_collapse_at_round_7_rolls_back_to_6() -> None:
    ended, last = play(history([50, 45, 40, 36, 33, 31, 30, 38, 55, 90, 150]))
    assert (ended, last.verdict, last.best_round) == (8, "rollback", 6)
    assert "2 poor rounds in a row" in last.reason
    assert play(history([50, 45, 40, 36, 33, 31, 30, 38, 55]), patience=0)[0] == 7


def test_one_noisy_round_is_forgiven() -> None:
    ended, last = play(history([50, 40, 46, 35, 39, 30]))
    assert (ended, last.verdict, last.best_round) == (5, "stop", 5)


def test_slow_decline_below_the_noise_of_a_step_is_seen() -> None:
    ended, last = play(history([50, 30, 30.9, 31.8, 32.7, 33.6, 34.5, 35.4]))
    assert (last.verdict, last.best_round) == ("rollback", 1) and ended < 7


def test_immediate_collapse_gives_the_base() -> None:
    ended, last = play(history([50, 70, 90, 120]))
    assert (ended, last.verdict, last.best_round) == (2, "rollback", 0)


def test_falling_distance_does_not_excuse_lost_diversity() -> None:
    ended, last = play(history([50, 40, 30, 20, 10, 5], [100, 90, 80, 60, 40, 20]))
    assert (ended, last.verdict, last.best_round) == (4, "rollback", 2)
    assert "below the floor 70" in last.reason


def test_min_rounds_come_before_any_end() -> None:
    ended, last = play(history([50, 70, 90, 120, 150, 200]), min_rounds=4)
    assert (ended, last.best_round) == (4, 0)


@given(
    st.lists(st.tuples(st.floats(0, 100), st.floats(0, 5), st.floats(0, 200)), min_size=2, max_size=12),
    st.integers(0, 3), st.floats(0, 1), st.data(),
)  # fmt: skip
def test_the_loop_never_ends_with_less_than_its_best(
    rows: list[tuple[float, float, float]], patience: int, floor: float, data: st.DataObject
) -> None:
    measures = [Measure(i, d, se, v + (i == 0)) for i, (d, se, v) in enumerate(rows)]
    min_rounds = data.draw(st.integers(0, len(rows) - 1))
    ended, last = play(measures, patience=patience, diversity_floor=floor, min_rounds=min_rounds)
    assert ended >= min_rounds
    seen = measures[: ended + 1]
    sound = [m for m in seen if m.round == 0 or m.diversity >= floor * measures[0].diversity]
    assert measures[last.best_round] in sound
    assert measures[last.best_round].distance == min(m.distance for m in sound)
    assert (last.verdict == "stop") == (last.best_round == ended)


@pytest.mark.parametrize(
    ("measures", "settings", "said"),
    [
        ([], {}, "from the base, round 0"),
        ([Measure(1, 1, 0, 1)], {}, "from the base, round 0"),
        (history([50, math.nan]), {}, "round 1 measured NaN"),
        (history([50, 40], [100, math.inf]), {}, "round 1 measured NaN or infinity"),
        (history([50, 40], se=-1), {}, "below 0"),
        (history([50, 40], [0, 10]), {}, "base has no diversity"),
        (history([50]), {"min_rounds": 9}, "min_rounds in 0..planned"),
        (history([50]), {"diversity_floor": 70}, "share of the base's diversity"),
    ],
)
def test_bad_history_is_refused(measures: list[Measure], settings: dict, said: str) -> None:
    with pytest.raises(WinnowError, match=said):
        verdict(measures, **({"planned": 8} | settings))


def test_a_measure_that_counts_up_is_told_as_it_is() -> None:
    last = verdict(history([-0.5, -0.75, -0.625], se=0.01), planned=2, higher="judge_accuracy")
    assert "judge_accuracy 0.625 of round 2 is below the best, beyond noise" in last.reason
    assert "best is round 1 at judge_accuracy 0.75" in last.reason and "distance" not in last.reason
