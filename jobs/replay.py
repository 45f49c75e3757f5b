"""Replay: make a sample's image again from its row, and compare."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from jobs import models
from jobs.generate import sampling
from jobs.images import decode, encode
from jobs.run import Run
from jobs.sampler import sampler
from jobs.sealed import recipe_of, sample_row
from schemas.errors import WinnowError
from storage.layout import check


@dataclass(frozen=True)
class Replay:
    """The stored image and the new one, uint8 [H, W, 3], after the same file format."""

    stored: np.ndarray
    again: np.ndarray

    @property
    def largest(self) -> int:
        """The largest difference of a channel, of 255."""
        return int(np.abs(self.stored.astype(int) - self.again).max())

    @property
    def mean(self) -> float:
        """The mean difference, of 255."""
        return float(np.abs(self.stored.astype(int) - self.again).mean())


    def side_by_side(self) -> Image.Image:
        """The stored image on the left, the new one on the right."""
        return Image.fromarray(np.concatenate([self.stored, self.again], axis=1))


def replay(store: Path, sample: int) -> Replay:
    """Sample ``sample`` again with the model, seed and settings that made it.

    WinnowError where there is no such sample, it was taken in or refined and not sampled, or its model is gone.
    """
    home = check(store)
    row = sample_row(home, sample)
    if row["model"].startswith("own:") or row["parent_id"] is not None:
        made = "taken in" if row["parent_id"] is None else "refined from another"
        raise WinnowError(f"sample {sample}: was {made}, not sampled from a text; there is nothing to replay")
    recipe = recipe_of(home, row)
    name, _, revision = row["model"].rpartition("@")
    model = str(home / "models" / name) if (home / "models" / name).exists() else recipe.model
    now = models.revision(model)
    if now != revision:
        raise WinnowError(f"sample {sample}: made by {row['model']}, and {model} is now at {now}; restore that model")
    settings = sampling(Run(home, recipe, row["round"], row["arm"]))
    image = sampler(model, settings)([row["prompt"]], [row["seed"]])[0]
    pixels = np.round(image * 255).astype(np.uint8)
    again = np.asarray(decode(encode(pixels, settings.format)))
    stored = np.asarray(decode(row["image"]["bytes"], f"sample {sample}"))
    if again.shape != stored.shape:
        raise WinnowError(f"sample {sample}: is {stored.shape[:2]}, came out {again.shape[:2]}; was the store edited?")
    return Replay(stored, again)
