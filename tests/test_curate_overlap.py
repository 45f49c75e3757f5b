"""Selections beside each other, against sets and numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.overlap import overlaps, spread
from schemas.errors import WinnowError


@settings(deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=5))
def test_overlap_is_jaccards(masks: list[list[bool]]) -> None:
    kept = [set(np.flatnonzero(mask)) for mask in masks]
    expected = [[len(a & b) / len(a | b) if a | b else 1.0 for b in kept] for a in kept]
    np.testing.assert_allclose(overlaps(np.array(masks)), expected)


def test_spread_is_the_trace_of_the_covariance() -> None:
    x = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32) + 100
    assert spread(x) == pytest.approx(np.trace(np.cov(x.astype(np.float64).T)))
    with pytest.raises(WinnowError, match="2 or more samples"):
        spread(x[:1])
    with pytest.raises(WinnowError, match="booleans"):
        overlaps([[1, 0]])
