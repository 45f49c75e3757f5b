"""Replay: an image comes back from its row, and what cannot come back says why."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import World
from PIL import Image

from jobs.replay import replay
from schemas.errors import WinnowError


@pytest.mark.parametrize(
    "where",
    [
        "arm = 'base' AND split = 'reference'",
        "round = 2 AND arm = 'curated' AND split = 'train'",
        "round = 2 AND arm = 'naive' AND split = 'eval'",
        "attempt > 0",
    ],
)
def test_an_image_comes_back(world: World, winnow: Any, tmp_path: Path, where: str) -> None:
    """By the base, by a model that a round started from, by the one it made; on a second seed as well."""
    found = world.rows(f"SELECT sample_id FROM samples WHERE {where} ORDER BY sample_id LIMIT 1")
    if not found and where == "attempt > 0":
        pytest.skip("no image of this run needed a second seed")
    number = found[0]["sample_id"]
    made = replay(world.store, number)
    assert made.largest <= 1 and made.stored.std() > 2
    said = winnow("replay", number, "--store", world.store, "--to", tmp_path / "both.png")
    assert said.status == 0 and "largest difference" in said.out
    both = np.asarray(Image.open(tmp_path / "both.png"))
    np.testing.assert_array_equal(both[:, : both.shape[1] // 2], made.stored)


def test_another_image_is_no_replay(world: World, winnow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs import generate

    inner = generate.Sampler.__call__

    def other(self: Any, texts: list[str], seeds: list[int]) -> Any:
        return inner(self, texts, [seed + 1 for seed in seeds])

    monkeypatch.setattr(generate.Sampler, "__call__", other)
    number = world.rows("SELECT sample_id FROM samples WHERE arm = 'base' ORDER BY sample_id LIMIT 1")[0]["sample_id"]
    assert "comes out otherwise" in winnow("replay", number, "--store", world.store).line


def test_what_cannot_come_back_says_why(world: World, winnow: Any, tmp_path: Path) -> None:
    assert "sample 5: not in" in winnow("replay", 5, "--store", world.store).line
    assert "is a folder; give a file" in winnow("replay", 5, "--store", world.store, "--to", world.store).line
    copy = Path(shutil.copytree(world.store, tmp_path / "copy"))
    number = world.rows("SELECT sample_id FROM samples WHERE round = 2 AND split = 'train' LIMIT 1")[0]["sample_id"]
    for model in (copy / "models").iterdir():
        shutil.rmtree(model)
    with pytest.raises(WinnowError, match="restore that model"):
        replay(copy, number)
