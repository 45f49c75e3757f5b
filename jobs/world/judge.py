"""The judge: is the picture what its caption says? It plays the human, and never selects.

Colours are measured, not learned: the background is the median of the frame, the ink is what differs from it.
Only the reading of the ink is a classifier, trained on handwriting that neither the generator nor a scorer has
seen, and taught to refuse ink that is no digit. Its 64 features also serve as the space of the Fréchet distance.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from jobs.digest import digest
from jobs.images import array
from jobs.world import WEIGHTS
from jobs.world.fit import Progress, fit, fresh_scenes, restore
from jobs.world.scenes import COLOURS, PALETTE, SIZE, Handwriting, Scene, parse

NONE = 10  # the class of ink that is no digit
FAINT = 60.0  # ink nearer to the background than this (Euclidean, of 441) is no ink
SPOILT = 0.15  # share of the training ink that is joined from halves of two different digits
_PALETTE = np.array([PALETTE[c] for c in COLOURS], np.float32)


class DigitReader(nn.Module):
    """Ink [N, 1, 16, 16] in [0, 1] → (logits [N, 11], features [N, 64])."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 32, 3, padding=1, stride=2), nn.ReLU(),
            nn.Conv2d(32, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 64, 3, padding=1, stride=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(64 * 16, 64),
        )  # fmt: skip
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(64, 11))

    def forward(self, ink: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(ink)
        return self.head(features), features


@dataclass(frozen=True)
class Reading:
    """What was measured: the colour names and the ink [16, 16]; ``colour`` None where no ink is."""

    background: str
    colour: str | None
    ink: np.ndarray


def nearest_colour(rgb: np.ndarray) -> str:
    return COLOURS[int(np.square(_PALETTE - rgb).sum(1).argmin())]


def read_ink(image: np.ndarray) -> Reading:
    """Measure one image, uint8 [16, 16, 3]."""
    image = image.astype(np.float32)
    frame = np.concatenate([image[0], image[-1], image[1:-1, 0], image[1:-1, -1]])
    background = np.median(frame, axis=0)
    away = np.sqrt(np.square(image - background).sum(2))
    if away.max() < FAINT:
        return Reading(nearest_colour(background), None, np.zeros((SIZE, SIZE), np.float32))
    colour = image[away > 0.85 * away.max()].mean(0)
    direction = colour - background
    ink = np.clip((image - background) @ direction / (direction @ direction), 0, 1)
    return Reading(nearest_colour(background), nearest_colour(colour), ink)


@torch.no_grad()
def judge(model: DigitReader, images: np.ndarray, scenes: list[Scene]) -> tuple[np.ndarray, np.ndarray]:
    """Verdicts and features of images uint8 [N, 16, 16, 3].

    Returns (right [N] bool: digit, ink and named background as the scene says; features [N, 64] float32 of the
    ink, whatever its colour).
    """
    readings = [read_ink(image) for image in images]
    logits, features = model(torch.from_numpy(np.stack([r.ink for r in readings]))[:, None])
    right = [
        digit == scene.digit and reading.colour == scene.ink and scene.background in (None, reading.background)
        for digit, reading, scene in zip(logits.argmax(1).tolist(), readings, scenes, strict=True)
    ]
    return np.array(right, bool), features.numpy()


class Judge:
    """The shipped judge; its network is read when it is first asked."""

    def __init__(self, weights: Path = WEIGHTS / "judge.safetensors") -> None:
        self.weights = weights
        self.revision = digest(weights)

    @cached_property
    def model(self) -> DigitReader:
        return restore(DigitReader(), self.weights)

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """``judge`` of images for their prompts; WinnowError where a prompt is no caption of this world."""
        return judge(self.model, array(images), [parse(text) for text in prompts])


def spoil(ink: np.ndarray, digits: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Replace a share of inks [N, 16, 16] by halves, left and right or top and bottom, of two different digits.

    Returns the inks and their classes [N], NONE for what was spoilt.
    """
    ink, classes = ink.copy(), digits.copy()
    whole = ink.copy()
    for i in np.flatnonzero(rng.random(len(ink)) < SPOILT):
        other = rng.choice(np.flatnonzero(digits != digits[i]))
        half = (slice(SIZE // 2, None), slice(None))[:: rng.choice([-1, 1])]
        ink[i][half] = whole[other][half]
        classes[i] = NONE
    return ink, classes


def train_judge(hand: Handwriting, steps: int, rng: np.random.Generator, progress: Progress) -> DigitReader:
    """Learn to read ink as ``read_ink`` measures it, and to refuse what ``spoil`` makes of it."""
    model = DigitReader()
    batches = fresh_scenes(hand, 128, rng)

    def loss() -> Tensor:
        scenes, images = next(batches)
        inks = np.stack([read_ink(image).ink for image in images])
        inks, classes = spoil(inks, np.array([s.digit for s in scenes]), rng)
        ink = torch.from_numpy(inks)[:, None]
        ink = (ink + 0.05 * torch.rand(1) * torch.randn_like(ink)).clamp(0, 1)
        return nn.functional.cross_entropy(model(ink)[0], torch.from_numpy(classes))

    fit("judge", model.parameters(), loss, steps, lr=2e-3, progress=progress, ema=0.99)
    return model.eval()
