"""The judge: is the picture what its caption says? It plays the human, and never selects.

Colours and places are measured, not learned: the background is the median of the frame, the ink of a place is
what differs from it. Only the reading of the ink, cut out at its place, is a classifier, trained on handwriting
that neither the generator nor a scorer has seen. Its 64 features also serve as the space of the Fréchet distance.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from jobs.images import array
from jobs.models import digest
from jobs.world import WEIGHTS
from jobs.world.fit import Progress, fit, fresh_scenes, restore
from jobs.world.scenes import COLOURS, PALETTE, RELATIONS, Handwriting, Scene, parse

WINDOW = 24  # pixels a side of the ink that the classifier reads
NONE = 10  # the class of a window that does not hold exactly one digit in its place
FAINT = 60.0  # ink nearer to the background than this (Euclidean, of 441) is no ink
#: Row, column and side of the window of each place, a little larger than the digit's box in ``scenes.BOXES``.
WINDOWS = {
    None: ((0, 0, 32),),
    "left of": ((8, 0, 17), (8, 15, 17)),
    "above": ((0, 8, 17), (15, 8, 17)),
}
_PALETTE = np.array([PALETTE[c] for c in COLOURS], np.float32)


class DigitReader(nn.Module):
    """Ink [N, 1, 24, 24] in [0, 1] → (logits [N, 11], features [N, 64])."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 32, 3, padding=1, stride=2), nn.ReLU(),
            nn.Conv2d(32, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 64, 3, padding=1, stride=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(64 * 36, 64),
        )  # fmt: skip
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(64, 11))

    def forward(self, ink: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(ink)
        return self.head(features), features


@dataclass(frozen=True)
class Reading:
    """What was measured at one place: the colour names and the ink [24, 24]; ``colour`` None where no ink is."""

    background: str
    colour: str | None
    ink: np.ndarray


def nearest_colour(rgb: np.ndarray) -> str:
    return COLOURS[int(np.square(_PALETTE - rgb).sum(1).argmin())]


def read_places(image: np.ndarray, relation: str | None) -> list[Reading]:
    """Measure one image, uint8 [32, 32, 3], at the places of a scene with this relation."""
    image = image.astype(np.float32)
    frame = np.concatenate([image[0], image[-1], image[1:-1, 0], image[1:-1, -1]])
    background = np.median(frame, axis=0)
    away = np.sqrt(np.square(image - background).sum(2))
    readings = []
    for top, left, side in WINDOWS[relation]:
        window = slice(top, top + side), slice(left, left + side)
        strongest = away[window].max()
        if strongest < FAINT:
            readings.append(Reading(nearest_colour(background), None, np.zeros((WINDOW, WINDOW), np.float32)))
            continue
        colour = image[window][away[window] > 0.7 * strongest].mean(0)
        direction = colour - background
        ink = np.clip((image[window] - background) @ direction / (direction @ direction), 0, 1)
        resized = nn.functional.interpolate(
            torch.from_numpy(ink)[None, None], (WINDOW, WINDOW), mode="bilinear", antialias=True
        )
        readings.append(Reading(nearest_colour(background), nearest_colour(colour), resized[0, 0].numpy()))
    return readings


@torch.no_grad()
def judge(model: DigitReader, images: np.ndarray, scenes: list[Scene]) -> tuple[np.ndarray, np.ndarray]:
    """Verdicts and features of images uint8 [N, 32, 32, 3].

    Returns (right [N] bool: every digit, colour, place and named background as the scene says;
    features [N, 64] float32 of the ink of the digit that the caption names first).
    """
    readings = [read_places(image, scene.relation) for image, scene in zip(images, scenes, strict=True)]
    first = np.cumsum([0] + [len(r) for r in readings[:-1]])
    ink = torch.from_numpy(np.stack([place.ink for places in readings for place in places]))[:, None]
    logits, features = model(ink)
    digits = logits.argmax(1).numpy()
    right = np.empty(len(scenes), bool)
    for i, (scene, places, start) in enumerate(zip(scenes, readings, first, strict=True)):
        right[i] = (
            scene.background in (None, places[0].background)
            and tuple(p.colour for p in places) == scene.colours
            and tuple(digits[start : start + len(places)]) == scene.digits
        )
    return right, features.numpy()[first]


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


def train_judge(hand: Handwriting, steps: int, rng: np.random.Generator, progress: Progress) -> DigitReader:
    """Learn to read ink as ``read_places`` cuts it, with windows of the wrong places as class NONE."""
    model = DigitReader()
    batches = fresh_scenes(hand, 96, rng, pairs=0.5)
    relations = (None, *RELATIONS)

    def loss() -> Tensor:
        inks, labels = [], []
        for scene, image in zip(*next(batches), strict=True):
            asked = scene.relation if rng.random() < 0.85 else relations[rng.integers(3)]
            for place, reading in enumerate(read_places(image, asked)):
                inks.append(reading.ink)
                labels.append(scene.digits[place] if asked == scene.relation else NONE)
        ink = torch.from_numpy(np.stack(inks))[:, None]
        ink = (ink + 0.05 * torch.rand(1) * torch.randn_like(ink)).clamp(0, 1)
        return nn.functional.cross_entropy(model(ink)[0], torch.tensor(labels))

    fit("judge", model.parameters(), loss, steps, lr=2e-3, progress=progress, ema=0.99)
    return model.eval()
