"""What is seen of a model while it trains: its loss on rows held back, and a sheet of samples.

    losses.jsonl        one line a look: {"step": …, "train": …, "validation": …}
    sheet-00250.png     a picture of each prompt, from the same seeds every time
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from jobs.generate import Generate
from jobs.sampler import Sampler
from storage.commit import write_file

if TYPE_CHECKING:
    from jobs.training.loop import Trainer

COLUMNS = 4


class Watch:
    """Looks every ``every`` steps and after the last. ``folder`` is below ``store``; the prompts of the sheet may be
    none. Both are of the weights that training would end with, before a step of Neon."""

    def __init__(self, store: Path, folder: str, every: int, prompts: Sequence[str], generate: Generate) -> None:
        self.store, self.folder, self.every = store, folder, every
        self.prompts, self.generate = list(prompts), generate
        self.losses: list[float] = []

    def __call__(self, trainer: Trainer, done: int, loss: float) -> None:
        """Take note of a step's loss, and look when it is time."""
        self.losses.append(loss)
        if done % self.every and done < trainer.settings.steps:
            return
        trainer.check(done)
        line: dict[str, float] = {"step": done}
        if len(self.losses) == (done - 1) % self.every + 1:  # else a run that was stopped had the steps before
            line["train"] = float(np.mean(self.losses))
        self.losses.clear()
        with trainer.averaged():
            if len(trainer.held_back):
                line["validation"] = validation(trainer)
            if self.prompts:
                self._sheet(trainer, done)
        write_file(self.store, f"{self.folder}/losses.jsonl", "".join(self._lines(line)).encode())

    def _lines(self, line: dict[str, float]) -> list[str]:
        """The file with a new line; those of steps that a resumed run makes again go."""
        file = self.store / self.folder / "losses.jsonl"
        old = []
        with suppress(FileNotFoundError, ValueError):  # a file that somebody cut short begins again
            old = [json.loads(text) for text in file.read_text().splitlines()]
        return [json.dumps(one) + "\n" for one in [*(one for one in old if one["step"] < line["step"]), line]]

    def _sheet(self, trainer: Trainer, done: int) -> None:
        draw = Sampler(trainer.pipe, self.generate)
        size = self.generate.batch
        texts = self.prompts
        pictures = [
            Image.fromarray(np.round(image * 255).astype(np.uint8))
            for start in range(0, len(texts), size)
            for image in draw(texts[start : start + size], list(range(start, min(start + size, len(texts)))))
        ]
        width, height = pictures[0].size
        sheet = Image.new("RGB", (width * COLUMNS, height * -(-len(pictures) // COLUMNS)), "white")
        for i, picture in enumerate(pictures):
            sheet.paste(picture, (i % COLUMNS * width, i // COLUMNS * height))
        from jobs.images import encode

        write_file(self.store, f"{self.folder}/sheet-{done:05d}.png", encode(np.asarray(sheet), "png"))


@torch.no_grad()
def validation(trainer: Trainer) -> float:
    """Mean loss, weights 1, of the rows held back; their noise and timesteps are the same at every call."""
    total, count = 0.0, 0
    for row in trainer.held_back:
        batch = trainer.fixed(row)
        total += float(trainer.loss(batch.part(slice(None), trainer.device))[1].sum())
        count += len(batch.rows)
    return total / count
