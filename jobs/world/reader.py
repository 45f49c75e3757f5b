"""The held-out scorer: log p(caption | image) of a small network that reads the slots of a scene.

It is never used to select, has another architecture and another objective than the selecting scorer, and learned
from other handwriting: when the scores of both rise, the pictures got better; when only one does, it was gamed.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from jobs.digest import digest
from jobs.images import array
from jobs.world import WEIGHTS
from jobs.world.fit import Progress, fit, fresh_scenes, pixels, restore
from jobs.world.scenes import BACKGROUNDS, DIGITS, INKS, Handwriting, Scene, parse

#: The slots of a scene and their sizes: digit, ink, background.
SLOTS = (len(DIGITS), len(INKS), len(BACKGROUNDS))
UNSAID = -1


class SlotReader(nn.Module):
    """RGB [N, 3, 16, 16] in [−1, 1] → logits [N, sum(SLOTS)]."""

    def __init__(self) -> None:
        super().__init__()
        def block(a: int, b: int) -> list[nn.Module]:
            return [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]

        self.layers = nn.Sequential(
            *block(3, 32), *block(32, 64), nn.Flatten(), nn.Linear(64 * 16, 128), nn.ReLU(),
            nn.Linear(128, sum(SLOTS)),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def slots(scene: Scene) -> list[int]:
    """The scene as slot indices; what the caption leaves open is UNSAID."""
    return [
        scene.digit,
        INKS.index(scene.ink),
        BACKGROUNDS.index(scene.background) if scene.background else UNSAID,
    ]


def log_likelihood(model: SlotReader, images: Tensor, scenes: list[Scene]) -> Tensor:
    """Sum over the named slots of log p(slot | image), float32 [N], at most 0."""
    said = torch.tensor([slots(s) for s in scenes])
    total = torch.zeros(len(scenes))
    for logits, slot in zip(model(images).split(SLOTS, 1), said.T, strict=True):
        total = total - nn.functional.cross_entropy(logits, slot, ignore_index=UNSAID, reduction="none")
    return total


class Reader:
    """The shipped reader; its network is read when it is first asked."""

    def __init__(self, weights: Path = WEIGHTS / "reader.safetensors") -> None:
        self.weights = weights
        self.revision = digest(weights)

    @cached_property
    def model(self) -> SlotReader:
        return restore(SlotReader(), self.weights)

    @torch.no_grad()
    def __call__(self, images: list[Image.Image], prompts: list[str]) -> np.ndarray:
        """``log_likelihood`` of images for their prompts, float32 [N]."""
        return log_likelihood(self.model, pixels(array(images)), [parse(text) for text in prompts]).numpy()


def train_reader(hand: Handwriting, steps: int, rng: np.random.Generator, progress: Progress) -> SlotReader:
    """From scratch on scenes with a little noise, so that a generator's texture does not matter."""
    model = SlotReader()
    batches = fresh_scenes(hand, 128, rng)

    def loss() -> Tensor:
        scenes, images = next(batches)
        x = pixels(images)
        return -log_likelihood(model, x + 0.1 * torch.rand(1) * torch.randn_like(x), scenes).mean()

    fit("reader", model.parameters(), loss, steps, lr=2e-3, progress=progress)
    return model.eval()
