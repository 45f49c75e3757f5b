"""Weights against drift, against the closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from curate.weigh import LEAST, decay, effective_sample_size, threshold, weights
from schemas.errors import WinnowError

DISTANCES = st.lists(st.floats(0, 100), min_size=1, max_size=30)


@given(DISTANCES, st.floats(0, 100), st.floats(0.1, 50))
def test_equation_5(d: list[float], beta: float, sigma2: float) -> None:
    expected = [1.0 if one <= beta else math.exp(-(one - beta) / sigma2) for one in d]
    assume(max(expected) > 2 * LEAST)
    np.testing.assert_allclose(weights(d, beta, sigma2), expected, rtol=1e-12, atol=1e-37)


@given(DISTANCES, st.floats(0, 100), st.floats(1e-300, 1e6))
def test_weights_fall_with_distance_and_stay_in_0_1(d: list[float], beta: float, sigma2: float) -> None:
    d = [0.0, *sorted(d)]  # beta is at least 0, so the first has full weight
    w = weights(d, beta, sigma2)
    assert (w > 0).all() and (w <= 1).all() and w[0] == 1
    assert (np.diff(w) <= 0).all()
    assert (w.astype(np.float32) > 0).all()


def test_papers_beta_against_another_metric_is_refused() -> None:
    with pytest.raises(WinnowError, match="every weight is below"):
        weights([181.0, 180.0], beta=35, sigma2=2)


@pytest.mark.parametrize(
    ("d", "beta", "sigma2", "said"),
    [
        ([], 1, 1, "at least one number"),
        ([[1.0]], 1, 1, "1-d"),
        ([math.nan], 1, 1, "NaN"),
        ([1.0], math.nan, 1, "beta is nan"),
        ([1.0], 1, 0, "sigma2 is 0"),
        ([1.0], 1, -1, "sigma2 is -1"),
        ([1.0], 1, math.inf, "sigma2 is inf"),
    ],
)
def test_bad_weights_are_refused(d: list, beta: float, sigma2: float, said: str) -> None:
    with pytest.raises(WinnowError, match=said):
        weights(d, beta, sigma2)


def test_calibration_on_the_reference_itself() -> None:
    own = np.random.default_rng(0).gamma(4, size=10_000)
    beta, sigma2 = threshold(own, 0.9), decay(own, 0.9)
    w = weights(own, beta, sigma2)
    assert np.mean(w == 1) == pytest.approx(0.9, abs=1e-3)
    assert weights([np.quantile(own, 0.99)], beta, sigma2)[0] == pytest.approx(math.exp(-1))
    # Another unit of distance changes no weight.
    np.testing.assert_allclose(weights(7 * own, threshold(7 * own), decay(7 * own)), w, rtol=1e-9)


def test_bad_calibration_is_refused() -> None:
    with pytest.raises(WinnowError, match="no spread"):
        decay([1.0] * 50)
    with pytest.raises(WinnowError, match="not above beta's"):
        decay([1.0, 2.0], quantile=0.99)
    with pytest.raises(WinnowError, match=r"give a number in \[0, 1\]"):
        threshold([1.0], quantile=90)


@given(st.lists(st.floats(1e-30, 1), min_size=1, max_size=50))
def test_effective_sample_size_lies_between_1_and_n(w: list[float]) -> None:
    assert 1 - 1e-9 <= effective_sample_size(w) <= len(w) + 1e-9


def test_effective_sample_size() -> None:
    assert effective_sample_size([0.5] * 8) == pytest.approx(8)
    assert effective_sample_size([1, 0, 0]) == 1
    assert effective_sample_size([1e-200, 1e-200]) == pytest.approx(2)
    for bad in ([0.0, 0.0], [-1.0, 2.0], [math.nan]):
        with pytest.raises(WinnowError):
            effective_sample_size(bad)
