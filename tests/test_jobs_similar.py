"""The samples most like one, or most like a text, against all pairs."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import World

from curate.closest import Closest
from schemas.errors import WinnowError


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_batches_change_nothing_and_ties_go_by_id() -> None:
    rng = np.random.default_rng(0)
    x, query = rng.normal(size=(500, 6)), rng.normal(size=6)
    x[[3, 40, 41]] = query
    ids = rng.permutation(500) - 250
    likeness = unit(x) @ unit(query)
    for size in (7, 500):
        best = Closest(query, 10)
        for start in range(0, 500, size):
            best.add(ids[start : start + size], x[start : start + size].astype(np.float32))
        numbers, found = best.found()
        assert set(numbers[:3]) == set(ids[[3, 40, 41]]) and numbers[:3].tolist() == sorted(numbers[:3])
        np.testing.assert_allclose(found, np.sort(likeness)[::-1][:10], atol=1e-6)
    row, numbers = rng.normal(size=768).astype(np.float32), rng.permutation(70)
    for size in range(1, 70):  # equal rows are equal, however many of them come together
        best = Closest(rng.normal(size=768), 70)
        best.add(numbers[:size], np.tile(row, (size, 1)))
        best.add(numbers[size:], np.tile(row, (70 - size, 1)))
        assert best.found()[0].tolist() == list(range(70))
    for query, k, said in ((np.zeros(6), 3, "no direction"), (np.ones(6), 0, "k is 0")):
        with pytest.raises(WinnowError, match=said):
            Closest(query, k)
    with pytest.raises(WinnowError, match="6 are needed"):
        Closest(np.ones(6), 3).add([1], np.ones((1, 5)))


def vectors(world: World) -> tuple[np.ndarray, np.ndarray]:
    rows = world.rows("SELECT sample_id, vector FROM embeddings WHERE encoder = 'scene-clip' ORDER BY sample_id")
    return np.array([row["sample_id"] for row in rows]), unit(np.array([row["vector"] for row in rows]))


def test_similar_is_the_nearest_by_cosine(world: World, winnow: Callable[..., Any]) -> None:
    numbers, x = vectors(world)
    said = winnow("similar", numbers[5], "--store", world.store, "--space", "scene-clip", "-k", 4, "--format", "json")
    found = json.loads(said.out)
    likeness = np.delete(x @ x[5], 5)
    assert [row["similarity"] for row in found] == pytest.approx(np.sort(likeness)[::-1][:4], abs=1e-6)
    assert numbers[5] not in [row["sample_id"] for row in found]
    assert {"prompt", "round", "arm"} <= set(found[0])
    assert "similarity" in winnow("similar", numbers[5], "--store", world.store, "--space", "scene-clip").out


def test_search_ranks_by_the_text(world: World, winnow: Callable[..., Any]) -> None:
    from jobs.encoders import encoder

    numbers, x = vectors(world)
    read = encoder("scene-clip").texts
    assert read is not None
    text = "a red seven on a blue background"
    expected = np.sort(x @ unit(read([text])[0]))[::-1][:5]
    found = json.loads(winnow("search", text, "--store", world.store, "-k", 5, "--format", "json").out)
    assert [row["similarity"] for row in found] == pytest.approx(expected, abs=1e-5)
    assert len(numbers) > 5


def test_vectors_of_another_revision_are_no_neighbours(
    world: World, winnow: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from jobs import similar
    from jobs.encoders import encoder

    newer = replace(encoder("scene-clip"), revision="newer")
    monkeypatch.setattr(similar, "encoder", lambda name: newer)
    line = winnow("search", "a red seven", "--store", world.store).line
    assert "no other vectors of 'scene-clip' in its revision newer" in line


def test_what_cannot_be_found_is_said(world: World, winnow: Callable[..., Any]) -> None:
    assert "sample 7: not in" in winnow("similar", 7, "--store", world.store).line
    number = world.rows("SELECT min(sample_id) AS n FROM embeddings WHERE encoder = 'scene-clip'")[0]["n"]
    said = winnow("similar", number, "--store", world.store, "--space", "nope").line
    assert f"sample {number} has no vector in 'nope': add an encoder" in said and "run 'winnow embed'" in said
    assert "reads no text" in winnow("search", "x", "--store", world.store, "--space", "scene-judge").line
    assert "empty" in winnow("search", " ", "--store", world.store).line
