"""Scenes: what a caption of the embedded world says, and how it looks with real handwriting.

A scene is one handwritten digit in bright ink on a dark background:

    a red seven on a blue background
    a cyan three

Captions and scenes are the same thing in two notations: ``parse(caption(scene)) == scene``. A caption that does
not name its background leaves it open, and any background is right for it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from schemas.errors import WinnowError

SIZE = 16  # pixels a side
PALETTE = {
    "red": (235, 60, 60),
    "green": (60, 190, 90),
    "yellow": (245, 215, 60),
    "white": (245, 245, 245),
    "cyan": (70, 215, 240),
    "pink": (250, 105, 180),
    "black": (15, 15, 15),
    "blue": (30, 40, 130),
    "purple": (100, 30, 110),
}
INKS = ("red", "green", "yellow", "white", "cyan", "pink")
COLOURS = tuple(PALETTE)
BACKGROUNDS = ("black", "blue", "purple")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
BOX = 14  # pixels a side of a digit
JITTER = 1  # pixels either way, around the middle
COLOUR_JITTER = 4.0  # standard deviation a channel, of 255
UNNAMED = 0.1  # share of the drawn scenes whose caption leaves the background open


@dataclass(frozen=True)
class Scene:
    """A digit 0…9, its ink, and its background, None for "any"."""

    digit: int
    ink: str
    background: str | None = None


def caption(scene: Scene) -> str:
    """The scene in words."""
    text = f"a {scene.ink} {DIGITS[scene.digit]}"
    return text if scene.background is None else f"{text} on a {scene.background} background"


_CAPTION = re.compile(rf"a ({'|'.join(INKS)}) ({'|'.join(DIGITS)})(?: on a ({'|'.join(BACKGROUNDS)}) background)?")


def parse(text: str) -> Scene:
    """The scene that a caption describes; WinnowError for a caption that is not of this world."""
    found = _CAPTION.fullmatch(" ".join(text.lower().split()))
    if found is None:
        raise WinnowError(
            f"prompt {text[:80]!r}: not a caption of the embedded world; write for example 'a red seven on a blue "
            f"background', with ink {', '.join(INKS)} and background {', '.join(BACKGROUNDS)}"
        )
    ink, digit, background = found.groups()
    return Scene(DIGITS.index(digit), ink, background)


def draw_scenes(n: int, rng: np.random.Generator) -> list[Scene]:
    """``n`` random scenes, most of which name their background."""
    digits, inks = rng.integers(0, 10, n), rng.choice(INKS, n)
    backgrounds, named = rng.choice(BACKGROUNDS, n), rng.random(n) >= UNNAMED
    return [
        Scene(int(d), str(i), str(b) if said else None)
        for d, i, b, said in zip(digits, inks, backgrounds, named, strict=True)
    ]


@dataclass(frozen=True)
class Handwriting:
    """Real digits: ``ink`` is float32 in [0, 1], [N, BOX, BOX]; labels [N]."""

    ink: np.ndarray
    labels: np.ndarray

    def slice(self, start: int, stop: int) -> Handwriting:
        return Handwriting(self.ink[start:stop], self.labels[start:stop])


def handwriting(images: np.ndarray, labels: np.ndarray) -> Handwriting:
    """Digits [N, H, W] uint8 cut to their ink's frame where they are MNIST's, and resized to the box."""
    import torch

    trim = 4 if images.shape[1] == 28 else 0  # MNIST centres a 20-pixel digit in 28 pixels
    ink = torch.from_numpy(images[:, trim : images.shape[1] - trim, trim : images.shape[2] - trim])
    ink = torch.nn.functional.interpolate(
        ink[:, None].float() / 255, (BOX, BOX), mode="bilinear", antialias=True
    )
    return Handwriting(ink[:, 0].numpy(), labels.astype(np.int64))


def render(scenes: list[Scene], hand: Handwriting, rng: np.random.Generator) -> np.ndarray:
    """Scenes as uint8 RGB [N, 16, 16, 3]; every digit is one real writer's, drawn at random from ``hand``."""
    by_digit = [np.flatnonzero(hand.labels == d) for d in range(10)]
    images = np.empty((len(scenes), SIZE, SIZE, 3), np.float32)
    for image, scene in zip(images, scenes, strict=True):
        background = scene.background or BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
        image[:] = PALETTE[background] + rng.normal(0, COLOUR_JITTER, 3)
        y, x = (SIZE - BOX) // 2 + rng.integers(-JITTER, JITTER + 1, 2)
        ink = hand.ink[rng.choice(by_digit[scene.digit])][:, :, None]
        box = image[y : y + BOX, x : x + BOX]
        box += ink * (PALETTE[scene.ink] + rng.normal(0, COLOUR_JITTER, 3) - box)
    return np.clip(images, 0, 255).round().astype(np.uint8)


def all_captions() -> list[str]:
    """Every caption that names its background: 180, digit by digit."""
    return [caption(Scene(digit, ink, background)) for digit in range(10) for ink in INKS for background in BACKGROUNDS]
