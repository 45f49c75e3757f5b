"""Precision, recall, density and coverage, against all pairs."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from curate import arrays
from curate.manifold import manifold
from schemas.errors import WinnowError


@pytest.mark.parametrize("k", [1, 3, 5])
def test_it_is_the_definition_over_all_pairs(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(k)
    x, ref = rng.normal(size=(70, 4)) * 0.7 + 100, rng.normal(size=(50, 4)) + 100
    pairs = cdist(x, ref)
    reach_ref, reach_x = np.sort(cdist(ref, ref), axis=1)[:, k], np.sort(cdist(x, x), axis=1)[:, k]
    for size in (arrays.TILE_BYTES, 2000):
        monkeypatch.setattr(arrays, "TILE_BYTES", size)
        found = manifold(x, ref, k)
        np.testing.assert_array_equal(found.inside, (pairs <= reach_ref).any(axis=1))
        np.testing.assert_allclose(found.density, (pairs <= reach_ref).sum(axis=1) / k)
        np.testing.assert_array_equal(found.reached, (pairs <= reach_x[:, None]).any(axis=0))
        np.testing.assert_array_equal(found.covered, (pairs <= reach_ref).any(axis=0))


def test_equal_laws_have_density_1_and_lost_modes_lose_coverage() -> None:
    rng = np.random.default_rng(0)
    modes = 20 * np.eye(4)
    ref, same = (modes[rng.integers(0, 4, 800)] + rng.normal(size=(800, 4)) for _ in range(2))
    few = modes[rng.integers(0, 2, 800)] + rng.normal(size=(800, 4))
    like, lost = manifold(same, ref), manifold(few, ref)
    assert like.density.mean() == pytest.approx(1, abs=0.1)
    assert like.covered.mean() == pytest.approx(1 - 2**-5, abs=0.03)
    assert lost.inside.mean() > 0.8 and lost.covered.mean() == pytest.approx(0.5, abs=0.05)
    assert lost.reached.mean() < 0.55


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16])
def test_a_row_at_the_edge_of_a_ball_is_in_it(kind: type) -> None:
    """Each row has k others and itself within its own ball, the k-th of them at its very edge."""
    x = np.random.default_rng(0).normal(size=(400, 64)).astype(kind)
    assert manifold(x, x, 5).density.mean() == pytest.approx(6 / 5)


def test_doubles_are_in_each_others_balls_of_no_size() -> None:
    x = (20 * np.random.default_rng(1).normal(size=(40, 768))).astype(np.float32)
    ref = np.repeat(x, 4, axis=0)
    found = manifold(ref, ref, 3)
    assert found.inside.all() and found.covered.all() and found.reached.all()
    np.testing.assert_array_equal(found.density, 4 / 3)


def test_bad_input_is_refused() -> None:
    with pytest.raises(WinnowError, match="below both"):
        manifold(np.eye(4), np.eye(4), 4)
    with pytest.raises(WinnowError, match="4 columns where 3"):
        manifold(np.eye(4), np.ones((9, 3)), 2)
