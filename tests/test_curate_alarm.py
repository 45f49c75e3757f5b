"""Alarms, on simulated histories, and the agreement of scorers against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from curate.alarm import agreement, alarms
from curate.drift import Interval
from schemas.errors import WinnowError


def series(*values: float, half: float = 0.02) -> list[Interval]:
    return [Interval(value, value - half, value + half) for value in values]


RISING = {"clip": series(0.2, 0.3, 0.4, 0.5)}


def raised(**changes: dict) -> list[str]:
    healthy = {
        "selecting": RISING,
        "held_out": {"pick": series(0.1, 0.2, 0.3, 0.4)},
        "agreement": {"pick": series(0.6, 0.6, 0.55, 0.6)},
        "looks": {"brightness": series(0.5, 0.5, 0.51, 0.52)},
    }
    return alarms(**(healthy | changes))


def test_a_healthy_history_raises_none() -> None:
    assert raised() == []
    assert raised(selecting={"clip": series(0.2)}, held_out={}, agreement={}, looks={}) == []
    assert alarms({}, {}, {}, {}) == []


def test_hacking_is_a_score_that_rises_while_held_out_falls() -> None:
    [said] = raised(held_out={"pick": series(0.1, 0.3, 0.2, 0.15)})
    assert said == "reward hacking: since round 1 clip rose while held-out pick fell from 0.3 to 0.15"
    # A fall within noise is none, nor one that the selecting score shares.
    assert raised(held_out={"pick": series(0.1, 0.3, 0.29, 0.28)}) == []
    both_fall = raised(selecting={"clip": series(0.2, 0.5, 0.4, 0.3)}, held_out={"pick": series(0.1, 0.3, 0.2, 0.15)})
    assert not any("hacking" in said for said in both_fall)


def test_saturation_takes_rounds_without_a_gain() -> None:
    assert raised(selecting={"clip": series(0.2, 0.5, 0.5, 0.51)}) == [
        "saturation: clip has not risen for 2 rounds, at 0.51"
    ]
    assert raised(selecting={"clip": series(0.2, 0.4, 0.4, 0.5)}) == []


def test_disagreement_and_looks() -> None:
    [said] = raised(agreement={"pick": series(0.6, 0.5, 0.4, 0.2)})
    assert said == "disagreement: the selecting score ranks with pick at 0.20, 0.60 at the base"
    assert raised(looks={"saturation": series(0.4, 0.45, 0.5, 0.6)}) == ["saturation moved from 0.400 to 0.600"]
    assert raised(looks={"saturation": series(0.4, 0.45, 0.5, 0.6, half=0.3)}) == []


def test_series_of_unequal_length_are_refused() -> None:
    with pytest.raises(WinnowError, match="in every round"):
        raised(looks={"brightness": series(0.5)})


def test_agreement_is_spearmans() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat([4, 1, 9], [8, 5, 1])
    a, b = rng.integers(0, 5, 14).astype(float), rng.normal(size=14)
    found = agreement(a, b, groups)
    assert found == pytest.approx([spearmanr(a[groups == g], b[groups == g]).statistic for g in (1, 4)])
    assert not len(agreement([1.0, 1.0], [1.0, 2.0], [3, 3]))
