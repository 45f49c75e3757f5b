"""Distances to a reference set, against brute force in float64."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from curate import arrays, mahalanobis, neighbours
from curate import distance as d
from schemas.errors import WinnowError

WORLDS = {
    "plain": (lambda rng: (rng.normal(size=(37, 12)), rng.normal(size=(53, 12)))),
    "far from the origin": (lambda rng: (1e4 + rng.normal(size=(37, 12)), 1e4 + rng.normal(size=(53, 12)))),
    "float32, far": (
        lambda rng: (
            (500 + rng.normal(size=(37, 12))).astype(np.float32),
            (500 + rng.normal(size=(53, 12))).astype(np.float32),
        )
    ),
    "float32, not centred": (
        lambda rng: (
            (0.5 + rng.normal(size=(37, 12))).astype(np.float32),
            (0.5 + rng.normal(size=(53, 12))).astype(np.float32),
        )
    ),
    "float16": (
        lambda rng: (
            rng.normal(size=(37, 12)).astype(np.float16),
            rng.normal(size=(53, 12)).astype(np.float16),
        )
    ),
    "scales apart": (
        lambda rng: (rng.normal(size=(37, 12)) * 10.0 ** np.arange(-3, 9), rng.normal(size=(53, 12)))
    ),
    "more columns than rows": (lambda rng: (rng.normal(size=(5, 90)), rng.normal(size=(9, 90)) + 3)),
    "one reference": (lambda rng: (rng.normal(size=(5, 4)), rng.normal(size=(1, 4)))),
}


def brute(x: np.ndarray, ref: np.ndarray, metric: str) -> np.ndarray:
    x, ref = x.astype(np.float64), ref.astype(np.float64)
    name = {"l2": "euclidean", "mse": "sqeuclidean", "cosine": "cosine"}[metric]
    return cdist(x, ref, name) / (x.shape[1] if metric == "mse" else 1)


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray]:
    return WORLDS[request.param](np.random.default_rng(0))


@pytest.mark.parametrize("metric", d.METRICS)
def test_mean_and_nearest_agree_with_brute_force(world: tuple[np.ndarray, np.ndarray], metric: str) -> None:
    x, ref = world
    full = brute(x, ref, metric)
    tolerance = {"rtol": 1e-4, "atol": 1e-12 if metric == "cosine" else 0}
    np.testing.assert_allclose(d.distance(x, ref, "mean", metric), full.mean(axis=1), **tolerance)
    k = min(3, len(ref))
    near = np.sort(full, axis=1)[:, :k]
    np.testing.assert_allclose(d.distance(x, ref, "knn", metric, k), near.mean(axis=1), **tolerance)
    indices, values = d.nearest(x, ref, k, metric)
    np.testing.assert_allclose(values, near, **tolerance)
    np.testing.assert_allclose(np.take_along_axis(full, indices, 1), values, **tolerance)


@pytest.mark.parametrize("metric", d.METRICS)
def test_distance_to_mean(world: tuple[np.ndarray, np.ndarray], metric: str) -> None:
    x, ref = (side.astype(np.float64) for side in world)
    if metric == "cosine":
        ref = ref / np.linalg.norm(ref, axis=1, keepdims=True)
    expected = brute(x, ref.mean(axis=0)[None], metric)[:, 0]
    np.testing.assert_allclose(
        d.distance(world[0], world[1], "center", metric), expected, rtol=1e-6, atol=1e-12
    )


@pytest.mark.parametrize("metric", d.METRICS)
@pytest.mark.parametrize("kind", d.KINDS)
def test_self_distance_leaves_each_row_out(kind: str, metric: str) -> None:
    ref = 100 + np.random.default_rng(1).normal(size=(23, 5))
    own = d.self_distance(ref, kind, metric, k=4)
    if kind == "mahalanobis":  # its shrinkage is estimated once, on all rows
        shrinkage = _shrinkage(ref)
        left = [d.mahalanobis(ref[[i]], np.delete(ref, i, 0), shrinkage)[0] for i in range(len(ref))]
    else:
        left = [d.distance(ref[[i]], np.delete(ref, i, 0), kind, metric, 4)[0] for i in range(len(ref))]
    np.testing.assert_allclose(own, left, rtol=1e-4)


def _shrinkage(ref: np.ndarray) -> float:
    covariance = pytest.importorskip("sklearn.covariance")
    return float(covariance.ledoit_wolf_shrinkage(ref - ref.mean(axis=0), assume_centered=True))


@pytest.mark.parametrize("shape", [(40, 6), (9, 30)])
@pytest.mark.parametrize("shrinkage", [None, 0.1, 1.0])
def test_mahalanobis_is_the_formula(shape: tuple[int, int], shrinkage: float | None) -> None:
    rng = np.random.default_rng(2)
    ref, x = rng.normal(size=shape) @ rng.normal(size=(shape[1], shape[1])), rng.normal(size=(7, shape[1]))
    s = _shrinkage(ref) if shrinkage is None else shrinkage
    cov = np.cov(ref.T)
    cov = (1 - s) * cov + s * np.trace(cov) / len(cov) * np.eye(len(cov))
    y = x - ref.mean(axis=0)
    expected = np.sqrt(np.einsum("nd,nd->n", y, np.linalg.solve(cov, y.T).T))
    np.testing.assert_allclose(d.mahalanobis(x, ref, shrinkage), expected, rtol=1e-7)
    if shrinkage is not None:
        left = [d.mahalanobis(ref[[i]], np.delete(ref, i, 0), shrinkage)[0] for i in range(len(ref))]
        np.testing.assert_allclose(d.mahalanobis(ref, ref, shrinkage, exclude_self=True), left, rtol=1e-7)


def test_equal_rows_are_their_own_neighbours_no_more_than_once() -> None:
    ref = np.repeat(np.random.default_rng(3).normal(size=(4, 3)), 5, axis=0)
    np.testing.assert_allclose(d.self_distance(ref, "knn", k=4), 0, atol=1e-9)
    assert (d.self_distance(ref, "knn", k=5) > 1e-3).all()


@pytest.mark.parametrize("kind", d.KINDS)
@pytest.mark.parametrize("metric", d.METRICS)
def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch, kind: str, metric: str) -> None:
    rng = np.random.default_rng(4)
    x, ref = rng.normal(size=(50, 8)), rng.normal(size=(70, 8))
    whole, own = d.distance(x, ref, kind, metric), d.self_distance(ref, kind, metric)
    for module in (arrays, d, neighbours):
        monkeypatch.setattr(module, "TILE_BYTES", 1500)
    np.testing.assert_allclose(d.distance(x, ref, kind, metric), whole, rtol=1e-5)
    np.testing.assert_allclose(d.self_distance(ref, kind, metric), own, rtol=1e-5)


def test_rows_around_the_origin_are_read_where_they_lie() -> None:
    rng = np.random.default_rng(4)
    x, ref = (rng.normal(size=(500, 2000)).astype(np.float32) for _ in range(2))
    tracemalloc.start()
    d.distance(x, ref, "mean", "l2")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < ref.nbytes


@pytest.mark.parametrize("kind", ["mean", "knn", "center"])
@pytest.mark.parametrize("metric", d.METRICS)
def test_memory_does_not_grow_with_the_sets(monkeypatch: pytest.MonkeyPatch, kind: str, metric: str) -> None:
    for module in (arrays, d, neighbours):
        monkeypatch.setattr(module, "TILE_BYTES", 2**16)

    def peak(n: int) -> int:
        x, ref = np.ones((n, 64)) + np.eye(n, 64), np.random.default_rng(5).normal(size=(n, 64))
        tracemalloc.start()
        d.distance(x, ref, kind, metric)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    # A few numbers for each row of either side, never the rows themselves (512 bytes), their neighbours nor all pairs.
    assert peak(3000) - peak(1000) < 2000 * 100


@pytest.mark.parametrize("index", neighbours.INDEXES)
@pytest.mark.parametrize("large", [(1, 1e25), (1e25, 1), (1e25, 1e25)])
def test_numbers_too_large_for_an_index_are_refused(index: str, large: tuple[float, float]) -> None:
    rng = np.random.default_rng(0)
    x, ref = rng.normal(size=(50, 8)) * large[0], rng.normal(size=(600, 8)) * large[1]
    with pytest.raises(WinnowError, match="distance overflows"):
        d.knn_by_index(x, d.indexed(ref, "l2", index), 3)


@pytest.mark.parametrize("index", neighbours.INDEXES[1:])
@pytest.mark.parametrize("metric", d.METRICS)
def test_an_index_finds_what_its_recall_says(index: str, metric: str) -> None:
    rng = np.random.default_rng(6)
    centres = 3 * rng.normal(size=(40, 16))
    ref, x = (centres[rng.integers(0, 40, n)] + rng.normal(size=(n, 16)) for n in (4000, 300))
    ready = d.indexed(ref, metric, index)
    values, recall = d.knn_by_index(x, ready, 5, metric)
    truth = np.sort(brute(x, ref, metric), axis=1)[:, :5]
    assert neighbours.RECALL <= recall <= 1
    found = neighbours.search(x, ready, 5).indices
    true = np.argsort(brute(x, ref, metric), axis=1)[:, :5]
    share = np.mean([np.isin(a, b).mean() for a, b in zip(true, found, strict=True)])
    assert share == pytest.approx(recall, abs=0.05)
    assert (values >= truth.mean(axis=1) * (1 - 1e-6)).all()
    assert np.median(values / truth.mean(axis=1)) < 1.01


@pytest.mark.parametrize("index", neighbours.INDEXES)
@pytest.mark.parametrize("metric", d.METRICS)
@pytest.mark.parametrize("k", [1, 5])
def test_an_index_leaves_each_row_out_of_its_own_neighbours(index: str, metric: str, k: int) -> None:
    rng = np.random.default_rng(9)
    centres = 3 * rng.normal(size=(40, 16))
    ref = centres[rng.integers(0, 40, 3000)] + rng.normal(size=(3000, 16))
    values, recall = d.self_by_index(d.indexed(ref, metric, index), k, metric)
    apart = brute(ref, ref, metric)
    np.fill_diagonal(apart, np.inf)
    true = np.sort(apart, axis=1)[:, :k].mean(axis=1)
    assert neighbours.RECALL <= recall <= 1
    assert (values >= true * (1 - 1e-6)).all() and np.median(values / true) < 1.01
    if index == "exact":
        np.testing.assert_allclose(values, d.self_distance(ref, "knn", metric, k))
    with pytest.raises(WinnowError, match="give k in 1..2999"):
        d.self_by_index(d.indexed(ref, metric, index), 3000, metric)


@pytest.mark.parametrize("index", neighbours.INDEXES[1:])
def test_an_index_over_few_rows_finds_all(index: str) -> None:
    ref = np.random.default_rng(7).normal(size=(12, 3))
    values, _ = d.knn_by_index(ref, d.indexed(ref, "l2", index), 12)
    np.testing.assert_allclose(values, brute(ref, ref, "l2").mean(axis=1), rtol=1e-6)


@pytest.mark.parametrize("index", neighbours.INDEXES[1:])
def test_what_an_index_does_not_find_counts_no_neighbour_twice(index: str) -> None:
    """Many neighbours of uneven rows, so that lists run out."""
    rng = np.random.default_rng(9)
    ref = (rng.normal(size=(4000, 13)) * rng.exponential(size=(4000, 1))).astype(np.float32)
    x = rng.normal(size=(200, 13)).astype(np.float32)
    ready = d.indexed(ref, "l2", index)
    for k in (20, 50, 100):
        true = np.sort(brute(x, ref, "l2"), axis=1)[:, :k].mean(axis=1)
        assert (d.knn_by_index(x, ready, k)[0] >= true * (1 - 1e-5)).all(), k
        apart = brute(ref[:500], ref, "l2")
        apart[np.arange(500), np.arange(500)] = np.inf
        true = np.sort(apart, axis=1)[:, :k].mean(axis=1)
        assert (d.self_by_index(ready, k)[0][:500] >= true * (1 - 1e-5)).all(), k


def test_rows_that_are_equal_but_for_one_have_no_covariance_without_it() -> None:
    with pytest.raises(WinnowError, match="all equal but for one.*use kind 'center'"):
        d.self_distance([[0.0], [0.0], [1.0]], "mahalanobis")


def test_a_covariance_of_any_shape_is_found_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(8)
    ref, x = rng.normal(size=(9, 30)), rng.normal(size=(4, 30))
    whole = d.mahalanobis(x, ref)
    monkeypatch.setattr(arrays, "TILE_BYTES", 500)
    np.testing.assert_allclose(d.mahalanobis(x, ref), whole, rtol=1e-9)
    monkeypatch.setattr(mahalanobis, "LARGEST", 8)
    with pytest.raises(WinnowError, match="at most 8 reference rows"):
        d.mahalanobis(x, ref)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(list(d.KINDS)), st.sampled_from(d.METRICS))
def test_order_of_rows_does_not_matter(seed: int, kind: str, metric: str) -> None:
    rng = np.random.default_rng(seed)
    x, ref = rng.normal(size=(9, 4)), rng.normal(size=(15, 4))
    straight = d.distance(x, ref, kind, metric, 3)
    turned = d.distance(x[::-1], rng.permutation(ref), kind, metric, 3)
    np.testing.assert_allclose(turned[::-1], straight, rtol=1e-5)


@pytest.mark.parametrize(
    ("x", "ref", "settings", "said"),
    [
        ([[np.nan, 0]], [[0, 1]], {}, "x row 0 holds NaN"),
        ([[0, 1]], [[0, np.inf]], {}, "reference row 0 holds NaN or infinity"),
        ([0, 1], [[0, 1]], {}, "x has shape"),
        ([[0, 1], [2]], [[0, 1]], {}, "x is no array.*rows of one length"),
        (np.empty((0, 2)), [[0, 1]], {}, "x has shape"),
        ([[0, 1, 2]], [[0, 1]], {}, "x has 3 columns where 2"),
        ([["a", "b"]], [[0, 1]], {}, "give real numbers"),
        ([[0, 1]], [[0, 1]], {"metric": "manhattan"}, "choose one of l2, mse, cosine"),
        ([[0, 1]], [[0, 1]], {"kind": "median"}, "choose one of mean, knn"),
        ([[0, 1]], [[0, 1]], {"kind": "knn", "k": 2}, "give k in 1..1"),
        ([[0, 1]], [[0, 1], [1, 1]], {"kind": "knn", "k": 1.5}, "give k in 1..2"),
        ([[0, 1]], [[0, 1], [1, 1]], {"kind": "knn", "k": np.nan}, "give k in 1..2"),
        ([[0, 0]], [[0, 1]], {"metric": "cosine"}, "row 0 is all zeros, so it has no direction"),
        ([[0, 1]], [[0, 1], [0, -1]], {"kind": "center", "metric": "cosine"}, "directions cancel out"),
        ([[0, 1]], [[0, 1]], {"kind": "mahalanobis"}, "needs 2 or more"),
        ([[0, 1]], [[0, 1], [0, 1]], {"kind": "mahalanobis"}, "rows are all equal"),
        ([[1e200, 1]], [[0, 1]], {"kind": "center", "metric": "mse"}, "overflows"),
        ([[0, 1]], [[1e160, 1], [0, 2], [1, 0]], {"kind": "mahalanobis"}, "overflows"),
        ([[0, 1, 1]], [[1e160, 1, 0], [0, 2, 1]], {"kind": "mahalanobis"}, "overflows"),
    ],
)
def test_bad_input_is_refused(x: list, ref: list, settings: dict, said: str) -> None:
    with np.errstate(over="ignore"), pytest.raises(WinnowError, match=said):
        d.distance(x, ref, **settings)


@pytest.mark.parametrize("metric", d.METRICS)
@pytest.mark.parametrize("kind", d.KINDS)
def test_matched_distances_know_their_own_group_only(kind: str, metric: str) -> None:
    rng = np.random.default_rng(9)
    groups, own = rng.permutation(np.repeat([7, 3, 5], 4)), rng.permutation(np.repeat([5, 7, 3, 9], 6))
    x, ref = rng.normal(size=(12, 5)), rng.normal(size=(24, 5)) + own[:, None]
    found = d.matched(x, groups, ref, own, kind, metric, 2)
    expected = [d.distance(x[[i]], ref[own == g], kind, metric, 2)[0] for i, g in enumerate(groups)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    alone = d.self_matched(ref, own, kind, metric, 2)
    for group in (3, 9):
        np.testing.assert_allclose(alone[own == group], d.self_distance(ref[own == group], kind, metric, 2), rtol=1e-5)


def test_groups_that_have_no_reference_are_refused() -> None:
    x = np.eye(3)
    with pytest.raises(WinnowError, match="group 4 has no row"):
        d.matched(x, [1, 4, 1], x, [1, 1, 2])
    with pytest.raises(WinnowError, match="group 2: reference has 1 row"):
        d.self_matched(x, [1, 1, 2])
    with pytest.raises(WinnowError, match="group b: k is 2"):
        d.matched(x, ["a", "a", "b"], x, ["a", "a", "b"], "knn", k=2)


def test_bad_self_distances_are_refused() -> None:
    with pytest.raises(WinnowError, match="needs 2 or more"):
        d.self_distance([[1.0, 2.0]])
    with pytest.raises(WinnowError, match="has no inverse"):
        d.mahalanobis([[1.0, 2.0]], [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]], shrinkage=0.0)
    with pytest.raises(WinnowError, match="shrinkage is 2"):
        d.mahalanobis([[1.0, 2.0]], [[0.0, 0.0], [1.0, 1.0]], shrinkage=2.0)
