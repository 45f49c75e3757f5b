"""Fusion of scorers, against scipy and a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata, zscore

from curate.fuse import FUSIONS, rank_fusion, zscore_fusion
from schemas.errors import WinnowError


def world(seed: int, rows: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 4, size=(rows, 3)).astype(float), rng.integers(0, 7, size=rows)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_rank_fusion_is_the_mean_of_average_ranks(seed: int) -> None:
    scores, groups = world(seed)
    expected = np.empty(len(scores))
    for group in np.unique(groups):
        rows = groups == group
        expected[rows] = ((rankdata(scores[rows], axis=0) - 0.5) / rows.sum()).mean(axis=1)
    np.testing.assert_allclose(rank_fusion(scores, groups), expected)


def test_samples_of_equal_ranks_in_sum_are_equal_to_the_bit() -> None:
    scores = np.random.default_rng(0).random((40, 5))
    sums, fused = rankdata(scores, axis=0).sum(axis=1), rank_fusion(scores, np.zeros(40, int))
    assert len(np.unique(sums)) < 40
    for total in np.unique(sums):
        assert len(np.unique(fused[sums == total])) == 1


def test_more_prompts_than_sixteen_bits_count() -> None:
    rng = np.random.default_rng(1)
    groups = rng.permutation(np.repeat(np.arange(100_000), 2))
    scores = rng.integers(0, 3, size=(200_000, 1)).astype(float)
    order = np.argsort(groups, kind="stable")
    first, second = scores[order, 0].reshape(-1, 2).T
    expected = np.stack([0.5 + np.sign(first - second) / 4, 0.5 - np.sign(first - second) / 4], axis=1).reshape(-1)
    np.testing.assert_array_equal(rank_fusion(scores, groups)[order], expected)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_zscore_fusion_is_the_mean_of_z_scores(seed: int) -> None:
    scores, groups = world(seed)
    scores[:, 0] = 1e6 + scores[:, 0] / 1e3
    expected = np.zeros(len(scores))
    for group in np.unique(groups):
        for column in scores.T:
            values = column[groups == group]
            if np.ptp(values) > 0:
                expected[groups == group] += zscore(values) / 3
    np.testing.assert_allclose(zscore_fusion(scores, groups), expected, atol=1e-5)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(list(FUSIONS)))
def test_order_of_rows_changes_no_bit(seed: int, fusion: str) -> None:
    scores, groups = world(seed)
    scores *= 0.1
    order = np.random.default_rng(seed).permutation(len(scores))
    fused = FUSIONS[fusion](scores, groups)
    np.testing.assert_array_equal(FUSIONS[fusion](scores[order], groups[order]), fused[order])


def test_names_of_prompts_and_weights_of_scorers() -> None:
    scores = [[1, 9], [2, 8], [3, 7]]
    np.testing.assert_allclose(rank_fusion(scores, ["a", "a", "b"]), [0.5, 0.5, 0.5])
    np.testing.assert_allclose(rank_fusion(scores, ["a", "a", "b"], weights=[1, 0]), [0.25, 0.75, 0.5])
    np.testing.assert_array_equal(zscore_fusion([[0.1], [0.1], [0.1]], [0, 0, 0]), 0)


@pytest.mark.parametrize("size", [1.7e308, 1.0, 5e-300])
def test_scores_of_any_size_have_z_scores(size: float) -> None:
    found = zscore_fusion(np.array([[-1.0], [1.0], [0.5], [1.0]]) * size, [0, 0, 1, 1])
    np.testing.assert_allclose(found, [-1, 1, -1, 1])


def test_each_prompt_has_its_own_scale() -> None:
    values = [[1.0], [2.0], [1e200], [2e200], [0.1 + 0.2], [0.3]]
    np.testing.assert_allclose(zscore_fusion(values, [0, 0, 1, 1, 2, 2]), [-1, 1, -1, 1, 0, 0])


def test_bad_input_is_refused() -> None:
    with pytest.raises(WinnowError, match="groups has 1 rows where 2"):
        rank_fusion([[1.0], [2.0]], [0])
    with pytest.raises(WinnowError, match="NaN"):
        zscore_fusion([[1.0], [np.nan]], [0, 0])
    with pytest.raises(WinnowError, match="not all 0"):
        rank_fusion([[1.0], [2.0]], [0, 0], weights=[0.0])
    with pytest.raises(WinnowError, match="integers or strings"):
        rank_fusion([[1.0], [2.0]], [0.5, 1.5])
