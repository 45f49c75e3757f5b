"""Noise levels in training, against the distributions that they promise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from jobs.ipr.times import density, draw, mean_beta, sequential, shared

N = 20_000


@pytest.mark.parametrize("regions", [1, 2, 5, 16, 81])
def test_the_mean_of_mean_beta_is_uniform(regions: int) -> None:
    levels = mean_beta(N, regions, np.random.default_rng(regions))
    assert levels.shape == (N, regions) and levels.min() >= 0 and levels.max() <= 1
    assert stats.kstest(levels.mean(1), "uniform").pvalue > 0.001


def test_independent_levels_would_not_pass() -> None:
    """What mean-beta mends: the mean of 16 independent levels hardly leaves the middle."""
    assert stats.kstest(np.random.default_rng(0).random((N, 16)).mean(1), "uniform").pvalue < 1e-100


def test_regions_of_mean_beta_are_alike() -> None:
    """Shuffled: the odd region of a split is not known by its place."""
    levels = mean_beta(N, 5, np.random.default_rng(0))
    for place in range(1, 5):
        assert stats.ks_2samp(levels[:, 0], levels[:, place]).pvalue > 0.001
    assert abs(levels.mean() - 0.5) < 0.01


def test_sharper_splits_are_more_alike() -> None:
    spread = [mean_beta(2000, 16, np.random.default_rng(0), a).std(1).mean() for a in (0.5, 1.0, 10.0, 1000.0)]
    assert spread == sorted(spread, reverse=True) and spread[-1] < 0.05 < spread[1]


def test_two_regions_split_a_sum_by_a_beta() -> None:
    """With two regions and a = 1 the first split alone is left: where neither bound is hit, it is uniform."""
    levels = mean_beta(N, 2, np.random.default_rng(1))
    total = levels.sum(1)
    free = total < 1  # no bound is in reach
    assert stats.kstest((levels[:, 0] / total)[free], "uniform").pvalue > 0.001


def test_shared_levels_are_one_for_all() -> None:
    levels = shared(N, 7, np.random.default_rng(0))
    assert (levels == levels[:, :1]).all() and stats.kstest(levels[:, 0], "uniform").pvalue > 0.001


@given(st.integers(1, 90), st.integers(0, 2**32))
def test_sequential_levels_are_a_moment_of_sampling(regions: int, seed: int) -> None:
    levels = sequential(50, regions, np.random.default_rng(seed))
    done, waiting = (levels == 0).sum(1), (levels == 1).sum(1)
    active = regions - done - waiting
    assert levels.min() >= 0 and levels.max() <= 1
    assert (done < regions).all() and (active >= 1).all() and (active <= max(1, regions // 4)).all()


def test_any_number_of_regions_is_finished_equally_often() -> None:
    levels = sequential(N, 16, np.random.default_rng(0))
    assert stats.chisquare(np.bincount((levels == 0).sum(1), minlength=16)).pvalue > 0.001
    assert stats.chisquare((levels == 0).sum(0)).pvalue > 0.001  # and any of them
    active = levels[(levels > 0) & (levels < 1)]
    assert stats.kstest(active, "uniform").pvalue > 0.001


def test_more_regions_split_more_evenly() -> None:
    """Of their sum, 16 regions' halves differ by no more than those of as many independent levels do."""
    levels = mean_beta(N, 16, np.random.default_rng(0))
    middle = np.abs(levels.mean(1) - 0.5) < 0.05
    independent = np.random.default_rng(1).random((N, 16)).std(1).mean()
    assert 0.6 * independent < levels[middle].std(1).mean() < 1.2 * independent


@pytest.mark.parametrize("regions", [2, 16, 81])
def test_the_weight_makes_every_level_count_alike(regions: int) -> None:
    """The loss weight 1 / density, on levels that it was not estimated from."""
    assert density(regions).mean() == pytest.approx(1)
    levels = mean_beta(N, regions, np.random.default_rng(7)).ravel()
    weights = 1 / density(regions)[np.minimum((levels * 50).astype(int), 49)]
    counts = np.histogram(levels, 10, (0, 1), weights=weights)[0] / len(levels)
    assert np.abs(counts - 0.1).max() < 0.004
    assert np.abs(np.histogram(levels, 10, (0, 1))[0] / len(levels) - 0.1).max() > 0.005 or regions == 2


def test_the_three_ways_have_their_shares() -> None:
    levels, weights = draw(N, 16, np.random.default_rng(0))
    assert levels.dtype == weights.dtype == np.float32 and levels.shape == weights.shape == (N, 16)
    one = (levels == levels[:, :1]).all(1)
    assert stats.binomtest(int(one.sum()), N, 0.3).pvalue > 0.001
    moment = ((levels == 0) | (levels == 1)).any(1)
    assert stats.binomtest(int(moment.sum()), N, 0.4).pvalue > 1e-4  # but for moments without a whole level
    assert (weights[levels == 0] == 0).all() and (weights[one] == 1).all()
    assert (weights[moment][levels[moment] > 0] == 1).all()
    mean_betas = ~one & ~moment
    assert (np.unique(weights[mean_betas]).size > 10) and weights[mean_betas].mean() == pytest.approx(1, abs=0.02)
