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
    cmmd,
    diversity,
    frechet,
    frechet_distance,
    kid,
    mean_over,
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


def test_frechet_with_singular_covariances() -> None:
    a, b = sets(n=4, m=5, dim=30)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 2) == pytest.approx(30 * 4)
    assert np.isfinite(frechet_distance(a, b))
    # One dimension: (m1 - m2)^2 + (s1 - s2)^2
    assert frechet([0.0], [[4.0]], [3.0], [[25.0]]) == pytest.approx(9 + 9)


def test_kid_is_the_double_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = sets(n=13, m=9)

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (x @ y / 6 + 1) ** 3

    expected = sum(kernel(a[i], a[j]) for i in range(13) for j in range(13) if i != j) / (13 * 12)
    expected += sum(kernel(b[i], b[j]) for i in range(9) for j in range(9) if i != j) / (9 * 8)
    expected -= 2 * sum(kernel(x, y) for x in a for y in b) / (13 * 9)
    assert kid(a, b) == pytest.approx(expected)
    monkeypatch.setattr(arrays, "TILE_BYTES", 100)
    assert kid(a, b) == pytest.approx(expected)


def test_kid_is_unbiased() -> None:
    rng = np.random.default_rng(0)
    draws = [kid(rng.normal(size=(20, 4)), rng.normal(size=(20, 4))) for _ in range(400)]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / 20


def test_cmmd_is_the_formula() -> None:
    a, b = sets()
    u, v = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (a, b))

    def mean(x: np.ndarray, y: np.ndarray) -> float:
        return np.exp(-((x[:, None] - y[None]) ** 2).sum(-1) / 200).mean()

    assert cmmd(a, b) == pytest.approx(1000 * (mean(u, u) + mean(v, v) - 2 * mean(u, v)), rel=1e-8)
    assert cmmd(a, 3 * a) == pytest.approx(0, abs=1e-12)


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
        (lambda: kid([[1.0]], [[1.0], [2.0]]), "2 or more samples"),
        (lambda: kid([[1.0]], [[1.0, 2.0]]), "columns where 1"),
        (lambda: cmmd([[0.0, 0.0]], [[1.0, 2.0]]), "no direction"),
        (lambda: frechet([0.0], [[1.0]], [0.0, 1.0], np.eye(2)), "features of one encoder|columns"),
        (lambda: frechet([0.0, 0.0], -np.eye(2), [0.0, 0.0], np.eye(2)), "eigenvalue"),
        (lambda: frechet_distance([[np.nan], [1.0]], [[1.0], [2.0]]), "NaN"),
        (lambda: proportion(3, 2), "no proportion"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], object], said: str) -> None:
    with pytest.raises(WinnowError, match=said):
        call()
