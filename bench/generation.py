"""Generation: what the engine costs over a bare loop of the same pipeline's calls.

Ours is the stage as a round runs it: conditions, sampling, checks for images that show nothing, PNG files, ids, Parquet
parts with fsync, and the seal. The bare loop calls the pipeline with the same texts, seeds and batches, and throws the
images away.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import torch

from bench.ratio import Ratio, compare
from jobs import models
from jobs import recipe as recipes
from jobs.generate import generate, plan
from jobs.prompts import prompts
from jobs.run import Run
from storage.layout import create


def run() -> list[Ratio]:
    """The embedded default: 16×16 pixels, where an image takes a millisecond and every overhead shows; and the same
    pipeline at 64×64, where a batch takes seconds, as with real models."""
    found = []
    for side, images in ((16, 4), (64, 1)):
        found.append(_one(side, images))
    return found


def _one(side: int, images: int) -> Ratio:
    recipe = recipes.override(
        recipes.load("embedded"),
        [(["generate", "width"], side), (["generate", "height"], side), (["generate", "images_per_prompt"], images),
         (["generate", "batch"], 48)],
    ).for_arm("curated")  # fmt: skip
    turn = itertools.count(1)
    settings = recipe.generate
    with tempfile.TemporaryDirectory() as folder:
        run = Run(create(Path(folder) / "store"), recipe, 1)
        prompts(run)
        rows = plan(run, "train", None, images, models.revision(recipe.model)).to_pylist()

        def ours() -> None:
            # Another arm each time: the same work, and nothing of it is there yet.
            name = f"turn-{next(turn)}"
            generate(Run(run.store, recipe, 1, name))

        def theirs() -> None:
            pipe = models.load(recipe.model)  # as ours does
            for start in range(0, len(rows), settings.batch):
                some = rows[start : start + settings.batch]
                pipe(
                    [row["prompt"] for row in some], num_inference_steps=settings.steps,
                    guidance_scale=settings.guidance, width=side, height=side, output_type="np",
                    generator=[torch.Generator("cpu").manual_seed(row["seed"]) for row in some],
                )  # fmt: skip

        what = f"{len(rows)} images of {side}×{side}, {settings.steps} steps, batches of {settings.batch}"
        return compare("generation, engine / bare loop", what, ours, theirs)
