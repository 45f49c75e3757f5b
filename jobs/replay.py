"""Replay: make a sample's image again from its row, and compare."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import ValidationError

from jobs import models
from jobs.generate import sampler
from jobs.images import decode, encode
from jobs.recipe import Recipe
from schemas.errors import WinnowError
from storage.layout import check, clean
from storage.query import arrow
from storage.snapshot import load, numbers


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
    found = arrow(home, "SELECT * FROM samples WHERE sample_id = $id", {"id": sample}).to_pylist()
    if not found:
        raise WinnowError(f"sample {sample}: not in {store}; 'winnow sql \"SELECT sample_id FROM samples\"' lists them")
    row = found[0]
    if row["model"].startswith("own:") or row["parent_id"] is not None:
        made = "taken in" if row["parent_id"] is None else "refined from another"
        raise WinnowError(f"sample {sample}: was {made}, not sampled from a text; there is nothing to replay")
    recipe = _recipe(home, row)
    name, _, revision = row["model"].rpartition("@")
    model = str(home / "models" / name) if (home / "models" / name).exists() else recipe.model
    now = models.revision(model)
    if now != revision:
        raise WinnowError(f"sample {sample}: made by {row['model']}, and {model} is now at {now}; restore that model")
    image = sampler(model, recipe.generate)([row["prompt"]], [row["seed"]])[0]
    pixels = np.round(image * 255).astype(np.uint8)
    again = np.asarray(decode(encode(pixels, recipe.generate.format)))
    stored = np.asarray(decode(row["image"]["bytes"], f"sample {sample}"))
    if again.shape != stored.shape:
        raise WinnowError(f"sample {sample}: is {stored.shape[:2]}, came out {again.shape[:2]}; was the store edited?")
    return Replay(stored, again)


def _recipe(home: Path, row: dict[str, object]) -> Recipe:
    """The recipe under which the sample's stage was sealed."""
    folder = f"tables/samples/round-{row['round']}/arm-{clean(str(row['arm']))}/split-{row['split']}/"
    for number in numbers(home):
        snapshot = load(home, number)
        if snapshot.stage.startswith("generate") and any(part.path.startswith(folder) for part in snapshot.parts):
            try:
                return Recipe.model_validate(snapshot.recipe)
            except ValidationError as error:
                raise WinnowError(
                    f"snapshot {number}: its recipe is of another Winnow ({error.error_count()} keys differ); replay "
                    "with the Winnow that made it"
                ) from error
    raise WinnowError(f"{folder}: sealed by no snapshot; run 'winnow verify'")
