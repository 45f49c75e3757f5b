"""A small store to vote on: held-out images of three models, and candidates of one round."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from schemas.tables import TABLES
from storage.commit import commit
from storage.layout import create, part_path
from storage.snapshot import seal

ARMS = (("base", 0), ("curated", 1), ("naive", 1))
HTML = "<img src=x onerror=document.title='broken'> & \"two\" cats"


def png(seed: int) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
    pixels[:, :, seed % 3] = 255
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


def samples(arm: str, round: int, split: str, prompts: int, each: int) -> list[dict[str, Any]]:
    lead = 1000 * [*ARMS].index((arm, round)) + (500 if split == "train" else 0)
    return [
        {"sample_id": 2**62 + lead + p * each + i, "round": round, "arm": arm, "split": split, "prompt_id": p + 1,
         "prompt": HTML if p == 0 else f"prompt {p}", "seed": 100 * p + i, "model": f"{arm}@0", "width": 16,
         "height": 16, "parent_id": None, "refiner": None, "attempt": 0,
         "image": {"bytes": png(lead + p * each + i), "path": "x.png"}}
        for p in range(prompts) for i in range(each)
    ]  # fmt: skip


def voting_store(folder: Path) -> Path:
    """Held-out images of three models, and candidates of one round, sealed as a run seals them."""
    home = create(folder)
    made = []
    for arm, round in ARMS:
        rows = samples(arm, round, "eval", 6, 2)
        rows += samples(arm, round, "train", 10, 4) if arm == "curated" else []
        path = part_path("samples", {"round": round, "arm": arm}, "00000", "x")
        table = pa.Table.from_pylist(rows, schema=TABLES["samples"].schema)
        made.append(commit(home, "samples", path, table))
    seal(home, "generate", made, {})
    return home
