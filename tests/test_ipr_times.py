"""Noise levels in training, against the distributions that they promise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from jobs.ipr.times import draw, mean_beta, sequential, shared

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


def test_the_three_ways_have_their_shares() -> None:
    levels = draw(N, 16, np.random.default_rng(0))
    assert levels.dtype == np.float32 and levels.shape == (N, 16)
    one = (levels == levels[:, :1]).all(1)
    assert stats.binomtest(int(one.sum()), N, 0.3).pvalue > 0.001
    # Whole levels come from sequential sampling, and from the bounds of mean-beta.
    noisy_only = ~one & (levels > 0).all(1) & (levels < 1).all(1)
    assert 0.02 < noisy_only.mean() < 0.3
