"""Bradley–Terry strengths: against an optimiser, the truth, and what their intervals promise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from curate.bradley_terry import bradley_terry
from schemas.errors import WinnowError


def likelihood(value: np.ndarray, wins: np.ndarray, prior: float) -> float:
    """Minus the penalised log-likelihood, written out game by game."""
    total = 0.0
    for i in range(len(wins)):
        for j in range(len(wins)):
            total += wins[i, j] * np.log1p(np.exp(value[j] - value[i]))
        total += prior * (np.log1p(np.exp(-value[i])) + np.log1p(np.exp(value[i])))
    return total


def played(value: np.ndarray, games: int, rng: np.random.Generator) -> np.ndarray:
    """Wins of ``games`` games of each pair."""
    wins = np.zeros((len(value), len(value)))
    for i in range(len(value)):
        for j in range(i):
            wins[i, j] = rng.binomial(games, 1 / (1 + np.exp(value[j] - value[i])))
            wins[j, i] = games - wins[i, j]
    return wins


@given(st.integers(2, 5), st.integers(0, 2**31), st.floats(0.05, 3))
def test_it_is_the_optimum(n: int, seed: int, prior: float) -> None:
    rng = np.random.default_rng(seed)
    wins = rng.integers(0, 12, (n, n)) * (rng.random((n, n)) < 0.7)
    np.fill_diagonal(wins, 0)
    best = minimize(likelihood, np.zeros(n), (wins, prior), method="BFGS", options={"gtol": 1e-7}).x
    np.testing.assert_allclose(bradley_terry(wins, prior).value, best - best.mean(), atol=2e-4)


def test_many_games_find_the_truth() -> None:
    truth = np.array([1.2, 0.1, -0.3, -1.0])
    found = bradley_terry(played(truth, 100_000, np.random.default_rng(0)))
    np.testing.assert_allclose(found.value, truth, atol=0.02)
    assert (found.error < 0.01).all()


def test_95_of_100_intervals_hold_the_truth() -> None:
    truth, rng = np.array([0.8, 0.0, -0.8]), np.random.default_rng(1)
    inside = [
        np.abs(found.value - truth) < 1.96 * found.error
        for found in (bradley_terry(played(truth, 60, rng), prior=1e-3) for _ in range(1000))
    ]
    assert 0.93 < np.mean(inside) < 0.97


def test_who_always_wins_is_strong_and_finite() -> None:
    found = bradley_terry([[0, 50, 0], [0, 0, 0], [0, 0, 0]])
    assert found.value[0] > 1 and found.value[1] < -1 and abs(found.value[2]) < 0.5
    assert np.isfinite(found.error).all() and abs(found.value.sum()) < 1e-9
    more = bradley_terry([[0, 500, 0], [0, 0, 0], [0, 0, 0]])
    assert more.value[0] > found.value[0]


def test_nothing_played_is_nothing_known() -> None:
    found = bradley_terry(np.zeros((3, 3)))
    assert found.value.tolist() == [0, 0, 0] and (found.error > 1).all()
    assert bradley_terry([[0]]).value.tolist() == [0]


def test_names_do_not_matter() -> None:
    wins = np.array([[0, 5, 9], [3, 0, 6], [1, 2, 0]])
    order = [2, 0, 1]
    one, two = bradley_terry(wins), bradley_terry(wins[np.ix_(order, order)])
    np.testing.assert_allclose(two.value, one.value[order], atol=1e-9)
    np.testing.assert_allclose(two.error, one.error[order], atol=1e-9)


@pytest.mark.parametrize(
    ("wins", "prior", "said"),
    [
        ([[0, 1]], 0.5, "one row and one column"), ([[1, 2], [3, 0]], 0.5, "diagonal"), ([], 0.5, "shape"),
        ([[0, -1], [0, 0]], 0.5, "counts of 0 or more"), ([[0, np.nan], [0, 0]], 0.5, "infinite"),
        ([[0, 1], [1, 0]], 0.0, "above 0"),
    ],
)  # fmt: skip
def test_what_is_no_count_is_refused(wins: list[list[float]], prior: float, said: str) -> None:
    with pytest.raises(WinnowError, match=said):
        bradley_terry(wins, prior)
