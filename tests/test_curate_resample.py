"""Repeats and draws by weight, against what the mean, the total and the law of large numbers demand."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, chisquare

from curate.resample import draws, repeats
from schemas.errors import WinnowError

WHOLE = st.lists(st.integers(0, 1000), min_size=1, max_size=40).filter(any)
SEEDS = st.integers(0, 2**32 - 1)


@settings(deadline=None)
@given(WHOLE, st.integers(1, 500), SEEDS)
def test_counts_are_their_means_rounded_and_add_up(w: list[int], total: int, seed: int) -> None:
    counts = repeats(np.array(w, float), total, seed)
    assert counts.sum() == total and counts.dtype == np.int64
    for count, weight in zip(counts.tolist(), w, strict=True):
        mean = Fraction(weight * total, sum(w))  # exact
        # A whole mean whose running sum is no binary fraction may be off by one, no more.
        assert mean - 1 <= count <= mean + 1
        if mean.denominator > 1:
            assert count in (math.floor(mean), math.ceil(mean))
        assert weight or not count


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e300), min_size=1, max_size=40).filter(lambda w: max(w) > 0), SEEDS)
def test_a_row_of_weight_0_never_comes(w: list[float], seed: int) -> None:
    w = [*w, 0.0]
    nothing = np.flatnonzero(np.array(w) == 0)
    counts = repeats(w, 100, seed)
    assert not counts[nothing].any() and counts.sum() == 100 and counts.min() >= 0
    assert not np.isin(draws(w, 100, seed), nothing).any()


def test_repeats_are_unbiased() -> None:
    w = np.array([0.0, 1.0, 0.001, 0.3, 0.77, 2.5, 0.0, 1 / 3])
    total, turns = 5, 4000
    seen = np.mean([repeats(w, total, seed) for seed in range(turns)], axis=0)
    mean = total * w / w.sum()
    # A count is its mean rounded: it varies as a coin of its fraction.
    error = np.sqrt((mean % 1) * (1 - mean % 1) / turns)
    assert (np.abs(seen - mean) <= 5 * error + 1e-12).all(), (seen, mean)


def test_equal_weights_leave_rows_as_they_are() -> None:
    for seed in range(50):
        np.testing.assert_array_equal(repeats([0.3] * 8, 8, seed), 1)
        np.testing.assert_array_equal(repeats([0.3] * 8, 24, seed), 3)


def test_draws_follow_the_weights() -> None:
    w = np.array([0.0, 3.0, 1.0, 0.5, 0.0, 5.5])
    n = 100_000
    seen = np.bincount(draws(w, n, 0), minlength=len(w))
    some = w > 0
    assert seen.sum() == n and not seen[~some].any()
    assert chisquare(seen[some], n * w[some] / w.sum()).pvalue > 1e-3
    # Drawn one by one: what comes next does not hang on what came.
    drawn = draws(w, n, 1)
    pairs = np.count_nonzero((drawn[:-1] == 5) & (drawn[1:] == 5))
    assert 1e-4 < binom.cdf(pairs, n - 1, 0.55**2) < 1 - 1e-4


def test_the_seed_decides() -> None:
    w = np.random.default_rng(0).random(100)
    np.testing.assert_array_equal(draws(w, 50, 3), draws(w, 50, 3))
    assert (draws(w, 50, 3) != draws(w, 50, 4)).any()
    assert (repeats(w, 70, 3) != repeats(w, 70, 4)).any()


@pytest.mark.parametrize("act", [repeats, draws])
@pytest.mark.parametrize(
    ("w", "n", "said"),
    [
        ([], 1, "at least one number"), ([math.nan], 1, "NaN"), ([math.inf, 1.0], 1, "infinity"),
        ([0.0, 0.0], 1, "not all 0"), ([-1.0, 2.0], 1, "0 or more"), ([1.0], 0, "give at least 1"),
        ([[1.0]], 1, "1-d"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(act: object, w: list, n: int, said: str) -> None:
    with pytest.raises(WinnowError, match=said):
        act(w, n, 0)  # type: ignore[operator]
