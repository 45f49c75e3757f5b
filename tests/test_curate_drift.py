"""Measures of drift, against textbook formulas and plain loops."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from curate import arrays
from curate.drift import (
    bootstrap,
    diversity,
    frechet,
    frechet_distance,
    mean_over,
    mean_within,
    moments,
    proportion,
    wins,
)  # fmt: skip
from schemas.errors import WinnowError


def sets(seed: int = 0, n: int = 60, m: int = 45, dim: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, dim)), rng.normal(size=(m, dim)) @ rng.normal(size=(dim, dim)) + 0.5


def test_moments_far_from_the_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    x = (1000 + sets()[0]).astype(np.float32)
    monkeypatch.setattr(arrays, "TILE_BYTES", 500)
    mean, cov, n = moments(x)
    np.testing.assert_allclose(mean, x.astype(np.float64).mean(axis=0))
    np.testing.assert_allclose(cov, np.cov(x.astype(np.float64).T), rtol=1e-9)
    assert n == 60


@pytest.mark.parametrize("seed", range(5))
def test_frechet_is_the_formula(seed: int) -> None:
    a, b = sets(seed)
    (m1, c1, _), (m2, c2, _) = moments(a), moments(b)
    root = scipy.linalg.sqrtm(c1 @ c2).real
    expected = np.sum((m1 - m2) ** 2) + np.trace(c1 + c2 - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "m", "dim"), [(7, 12, 30), (12, 7, 30), (40, 7, 20), (5, 60, 20)])
def test_frechet_from_few_rows_is_that_of_the_covariances(n: int, m: int, dim: int) -> None:
    a, b = sets(1, n, m, dim)
    (m1, c1, _), (m2, c2, _) = moments(a), moments(b)
    assert frechet_distance(a, b) == pytest.approx(frechet(m1, c1, m2, c2), rel=1e-6)


def test_frechet_with_singular_covariances() -> None:
    a, b = sets(n=4, m=5, dim=30)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 2) == pytest.approx(30 * 4)
    assert np.isfinite(frechet_distance(a, b))
    # One dimension: (m1 - m2)^2 + (s1 - s2)^2
    assert frechet([0.0], [[4.0]], [3.0], [[25.0]]) == pytest.approx(9 + 9)


def test_diversity_is_the_mean_trace_within() -> None:
    x, _ = sets()
    groups = np.array([0] * 30 + [1] * 20 + [2] * 9 + [3])
    expected = np.mean([np.trace(np.cov(x[groups == g].T)) for g in (0, 1, 2)])
    assert diversity(x, groups) == pytest.approx(expected)
    assert diversity(x + 100 * groups[:, None], groups) == pytest.approx(expected)
    with pytest.raises(WinnowError, match="no group has two"):
        diversity(x, np.arange(60))


def test_bootstrap_covers_a_mean() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        x = rng.normal(size=50)
        low, high = bootstrap(np.mean, x, n=200, rng=rng)
        hits += low <= 0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_bootstrap_pairs_rows_where_told() -> None:
    x = np.arange(30.0)
    assert bootstrap(lambda a, b: float(np.mean(a - b)), x, x - 1, n=50, rng=0, paired=True) == (1.0, 1.0)
    low, high = bootstrap(lambda a, b: float(np.mean(a - b)), x, x - 1, n=50, rng=0)
    assert low < 0 < high
    assert bootstrap(np.mean, x, n=50, rng=3) == bootstrap(np.mean, x, n=50, rng=3)
    with pytest.raises(WinnowError, match="paired arrays have"):
        bootstrap(lambda a, b: 0.0, x, x[1:], rng=0, paired=True)
    with pytest.raises(WinnowError, match="empty"):
        bootstrap(np.mean, [], rng=0)


def test_strata_keep_their_shares() -> None:
    groups = np.repeat([7, 3, 5], [4, 9, 1])
    x = groups * 10.0 + np.arange(14) / 100
    seen: list[tuple[float, ...]] = []

    def shares(values: np.ndarray) -> float:
        seen.append(tuple(np.bincount((values // 10).astype(int), minlength=8)[[7, 3, 5]]))
        return float(values.mean())

    low, high = bootstrap(shares, x, n=50, rng=0, strata=groups)
    assert set(seen) == {(4, 9, 1)}
    assert low < x.mean() < high
    with pytest.raises(WinnowError, match="groups has 13 rows"):
        bootstrap(shares, x, n=5, rng=0, strata=groups[1:])


def test_mean_over_draws_groups() -> None:
    """Rows that repeat within a group add no certainty: the interval is that of the groups' means."""
    rng = np.random.default_rng(1)
    hits, widths = 0, []
    for _ in range(200):
        effects = rng.normal(size=20)
        value, low, high = mean_over(np.repeat(effects, 50), np.repeat(np.arange(20), 50), n=200, rng=rng)
        assert low <= value <= high and value == pytest.approx(effects.mean())
        hits += low <= 0 <= high
        widths.append(high - low)
    assert 0.85 <= hits / 200 <= 0.99
    assert np.mean(widths) == pytest.approx(2 * 1.96 / np.sqrt(20), rel=0.12)
    one = mean_over([0.0, 1.0, 1.0, 0.0], [5, 5, 5, 5])
    assert one.low < 0.5 < one.high


def test_intervals_within_strata_of_two_rows_are_as_wide_as_the_truth() -> None:
    rng, strata = np.random.default_rng(0), np.repeat(np.arange(30), 2)
    worlds = rng.normal(size=(400, 60)) + strata
    truth = 1.96 / np.sqrt(60)
    said = [mean_within(values, strata) for values in worlds]
    assert np.sqrt(np.mean([(high - low) ** 2 for _, low, high in said])) / 2 == pytest.approx(truth, rel=0.03)
    drawn = [bootstrap(np.mean, values, n=200, rng=0, strata=strata) for values in worlds]
    assert np.sqrt(np.mean([(high - low) ** 2 for low, high in drawn])) / 2 == pytest.approx(truth, rel=0.05)


def test_mean_within_is_the_bootstrap_in_its_strata() -> None:
    rng = np.random.default_rng(2)
    strata = np.repeat(np.arange(20), 30)
    values = rng.normal(size=600) + 5 * strata
    value, low, high = mean_within(values, strata)
    assert value == pytest.approx(values.mean())
    drawn = bootstrap(np.mean, values, n=4000, rng=0, strata=strata)
    assert high - low == pytest.approx(drawn[1] - drawn[0], rel=0.08)


def test_wins_counts_ties_half() -> None:
    assert wins([2, 2, 1, 0], [1, 1, 1, 1]).tolist() == [1, 1, 0.5, 0]
    with pytest.raises(WinnowError, match="scores b has 1 rows"):
        wins([1, 2], [1])


@settings(deadline=None)
@given(st.integers(1, 5000), st.floats(0, 1))
def test_wilson_interval_solves_its_equation(n: int, share: float) -> None:
    k = round(share * n)
    value, low, high = proportion(k, n)
    assert 0 <= low <= value <= high <= 1 and low < high
    for bound in (low, high):  # (p - bound)^2 = z^2 bound (1 - bound) / n
        if 0 < bound < 1:
            left = (value - bound) ** 2
            assert left == pytest.approx(1.959963984540054**2 * bound * (1 - bound) / n, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: moments([[1.0, 2.0]]), "2 or more samples"),
        (lambda: frechet([0.0], [[1.0]], [0.0, 1.0], np.eye(2)), "features of one encoder|columns"),
        (lambda: frechet([0.0, 0.0], -np.eye(2), [0.0, 0.0], np.eye(2)), "eigenvalue"),
        (lambda: frechet_distance([[np.nan], [1.0]], [[1.0], [2.0]]), "NaN"),
        (lambda: proportion(3, 2), "no proportion"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], object], said: str) -> None:
    with pytest.raises(WinnowError, match=said):
        call()


def test_features_that_overflow_are_refused_also_where_they_are_few() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(WinnowError, match="too large"):
        frechet_distance(rng.normal(size=(4, 30)), rng.normal(size=(4, 30)) * 3e159)
    with pytest.raises(WinnowError, match="too large"):
        diversity(rng.normal(size=(4, 30)) * 3e159, [0, 0, 1, 1])
