"""The benchmarks of drift, selection and distance, small: theirs and ours come to the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest

from bench import distance, drift, policies


@pytest.mark.parametrize(("name", "ours", "theirs", "by"), drift.PAIRS)
def test_drift_is_theirs(name: str, ours: Callable[..., Any], theirs: Callable[..., Any], by: str) -> None:
    x, y = (np.ascontiguousarray(drift.rows(300, seed)[:, :8]) for seed in (0, 1))
    np.testing.assert_allclose(ours(x, y), theirs(x, y), rtol=1e-6)


def test_the_same_are_selected() -> None:
    rows = policies.table(3000)
    kept = policies.ours(rows)
    assert len(kept) == 300
    np.testing.assert_array_equal(policies.by_pandas(rows), kept)
    np.testing.assert_array_equal(policies.by_polars(pl.from_pandas(rows)), kept)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (distance.ours, distance.by_scikit), (distance.ours, distance.by_scikit_chunks),
        (distance.ours, distance.by_torch), (distance.ours, distance.by_scipy),
        (distance.our_cosine, distance.scikit_cosine), (distance.mahalanobis, distance.scikit_mahalanobis),
    ],
)  # fmt: skip
def test_distances_are_theirs(ours: Callable[..., Any], theirs: Callable[..., Any]) -> None:
    x, ref = (distance.rows(40, seed, 16) for seed in (0, 1))
    np.testing.assert_allclose(ours(x, ref), theirs(x, ref), rtol=1e-4)


@pytest.mark.parametrize(
    "theirs",
    [distance.faiss_neighbours, distance.scikit_neighbours, distance.torch_neighbours, distance.scipy_neighbours],
)
def test_neighbours_are_theirs(theirs: Callable[..., Any]) -> None:
    x, ref = (distance.rows(40, seed, 16) for seed in (0, 1))
    np.testing.assert_array_equal(np.sort(theirs(x, ref)), np.sort(distance.our_neighbours(x, ref)))
