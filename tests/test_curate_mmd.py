"""Kernel discrepancies, against their double sums and against repeated draws."""

from __future__ import annotations

import numpy as np
import pytest

from curate import arrays
from curate.drift import bootstrap
from curate.mmd import cmmd, kid
from schemas.errors import WinnowError


def sets(n: int = 60, m: int = 45, dim: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, dim)), rng.normal(size=(m, dim)) @ rng.normal(size=(dim, dim)) + 0.5


def test_kid_is_the_double_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = sets(n=13, m=9)

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (x @ y / 6 + 1) ** 3

    expected = sum(kernel(a[i], a[j]) for i in range(13) for j in range(13) if i != j) / (13 * 12)
    expected += sum(kernel(b[i], b[j]) for i in range(9) for j in range(9) if i != j) / (9 * 8)
    expected -= 2 * sum(kernel(x, y) for x in a for y in b) / (13 * 9)
    assert kid(a, b).value == pytest.approx(expected)
    for size in (100, 2000):  # tiles of one row, and of ten
        monkeypatch.setattr(arrays, "TILE_BYTES", size)
        assert kid(a, b).value == pytest.approx(expected)


def test_kid_is_unbiased() -> None:
    rng = np.random.default_rng(0)
    draws = [kid(rng.normal(size=(20, 4)), rng.normal(size=(20, 4))).value for _ in range(400)]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / 20


@pytest.mark.parametrize("size", [arrays.TILE_BYTES, 2000])
def test_cmmd_is_the_formula(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "TILE_BYTES", size)
    a, b = sets()
    u, v = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (a, b))

    def mean(x: np.ndarray, y: np.ndarray) -> float:
        return np.exp(-((x[:, None] - y[None]) ** 2).sum(-1) / 200).mean()

    assert cmmd(a, b).value == pytest.approx(1000 * (mean(u, u) + mean(v, v) - 2 * mean(u, v)), rel=1e-8)
    assert cmmd(a, 3 * a).value == pytest.approx(0, abs=1e-12)


def test_the_interval_is_that_of_drawing_anew() -> None:
    """Its width is the spread of the value over fresh sets of samples, the reference staying as it is."""
    rng = np.random.default_rng(3)
    reference = rng.normal(size=(400, 3)) + 1
    for measure in (kid, cmmd):
        found = [measure(rng.normal(size=(300, 3)), reference) for _ in range(60)]
        widths = [high - low for _, low, high in found]
        assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std([value for value, *_ in found]), rel=0.3)


def test_strata_take_out_what_prompts_fix() -> None:
    rng = np.random.default_rng(4)
    strata = np.repeat(np.arange(10), 30)
    x = rng.normal(size=(300, 3)) + rng.normal(size=(10, 3))[strata]
    _, low, high = kid(x, x[::-1] + 0.5, strata)
    whole = kid(x, x[::-1] + 0.5)
    drawn = bootstrap(lambda z: kid(z, x[::-1] + 0.5).value, x, n=200, rng=0, strata=strata)
    assert high - low < whole.high - whole.low
    assert high - low == pytest.approx(drawn[1] - drawn[0], rel=0.3)


def test_bad_input_is_refused() -> None:
    with pytest.raises(WinnowError, match="2 or more samples"):
        kid([[1.0]], [[1.0], [2.0]])
    with pytest.raises(WinnowError, match="columns where 1"):
        kid([[1.0]], [[1.0, 2.0]])
    with pytest.raises(WinnowError, match="no direction"):
        cmmd([[0.0, 0.0]], [[1.0, 2.0]])
