"""What is held out is a fair picture of what is trained on."""

from collections import Counter

import pytest

from jobs.prompts import Prompts, rows, texts
from jobs.world.scenes import parse


def held_out(seed: int) -> list[str]:
    settings = Prompts(source="embedded", least_specificity=0, least_clarity=0, near=None, held_out=0.2)
    table = rows(settings, seed, texts(settings, seed))
    assert table.num_rows == 180 and set(table["split"].to_pylist()) == {"train", "eval"}
    return [text for text, split in zip(*(table[c].to_pylist() for c in ("text", "split")), strict=True)
            if split == "eval"]  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 7])
def test_held_out_prompts_are_of_every_kind(seed: int) -> None:
    scenes = [parse(text) for text in held_out(seed)]
    assert len(scenes) == 36
    assert set(Counter(scene.digit for scene in scenes).values()) <= {3, 4} and len({s.digit for s in scenes}) == 10
    assert min(Counter(scene.ink for scene in scenes).values()) >= 3
    assert min(Counter(scene.background for scene in scenes).values()) >= 9


def test_the_seed_decides_what_is_held_out() -> None:
    assert held_out(3) == held_out(3) != held_out(3 + 2**30)
