"""Scenes: what a caption of the embedded world says, and how it looks with real handwriting.

A scene holds one or two handwritten digits, each in a colour, on a plain background:

    a red seven on a blue background
    a green three left of a white eight
    a green three above a white eight on a black background

Captions and scenes are the same thing in two notations: ``parse(caption(scene)) == scene``. A caption that does
not name its background leaves it open, and any background is right for it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from schemas.errors import WinnowError

SIZE = 32  # pixels a side
PALETTE = {
    "red": (210, 40, 45),
    "green": (40, 160, 70),
    "blue": (45, 80, 205),
    "yellow": (240, 205, 50),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
}
COLOURS = tuple(PALETTE)
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RELATIONS = ("left of", "above")
#: Top-left corners of the digit boxes, before jitter: rows, columns. The box side is the last number.
BOXES = {
    None: ((5, 5, 22),),
    "left of": ((9, 0, 15), (9, 17, 15)),
    "above": ((0, 9, 15), (17, 9, 15)),
}
BOX_SIDES = (22, 15)
JITTER = {22: 2, 15: 1}  # pixels either way
COLOUR_JITTER = 8.0  # standard deviation a channel, of 255


@dataclass(frozen=True)
class Scene:
    """One or two coloured digits; ``relation`` is None for one; ``background`` None means "any"."""

    digits: tuple[int, ...]
    colours: tuple[str, ...]
    relation: str | None = None
    background: str | None = None


def caption(scene: Scene) -> str:
    """The scene in words."""
    nouns = [f"a {c} {DIGITS[d]}" for c, d in zip(scene.colours, scene.digits, strict=True)]
    text = nouns[0] if scene.relation is None else f"{nouns[0]} {scene.relation} {nouns[1]}"
    return text if scene.background is None else f"{text} on a {scene.background} background"


_NOUN = rf"a ({'|'.join(COLOURS)}) ({'|'.join(DIGITS)})"
_CAPTION = re.compile(
    rf"{_NOUN}(?: ({'|'.join(RELATIONS)}) {_NOUN})?(?: on a ({'|'.join(COLOURS)}) background)?"
)


def parse(text: str) -> Scene:
    """The scene that a caption describes; WinnowError for a caption that is not of this world."""
    found = _CAPTION.fullmatch(" ".join(text.lower().split()))
    if found is None:
        raise WinnowError(
            f"prompt {text[:80]!r}: not a caption of the embedded world; write for example "
            "'a red seven on a blue background' or 'a green three left of a white eight'"
        )
    c1, d1, relation, c2, d2, background = found.groups()
    if relation is None:
        return Scene((DIGITS.index(d1),), (c1,), None, background)
    return Scene((DIGITS.index(d1), DIGITS.index(d2)), (c1, c2), relation, background)


def draw_scenes(n: int, rng: np.random.Generator, pairs: float = 0.2) -> list[Scene]:
    """``n`` random scenes, a share ``pairs`` of them with two digits (half of those name their background)."""
    scenes = []
    for _ in range(n):
        background, *others = rng.permutation(len(COLOURS))
        named = str(COLOURS[background])
        if rng.random() < pairs:
            digits = tuple(int(d) for d in rng.integers(0, 10, 2))
            colours = tuple(COLOURS[i] for i in rng.choice(others, 2))
            relation = RELATIONS[rng.integers(2)]
            scenes.append(Scene(digits, colours, relation, named if rng.random() < 0.5 else None))
        else:
            scenes.append(Scene((int(rng.integers(10)),), (COLOURS[others[0]],), None, named))
    return scenes


@dataclass(frozen=True)
class Handwriting:
    """Real digits at the two box sides: ``boxes[side]`` is float32 ink in [0, 1], [N, side, side]; labels [N]."""

    boxes: dict[int, np.ndarray]
    labels: np.ndarray

    def slice(self, start: int, stop: int) -> Handwriting:
        return Handwriting({s: b[start:stop] for s, b in self.boxes.items()}, self.labels[start:stop])


def handwriting(images: np.ndarray, labels: np.ndarray) -> Handwriting:
    """Digits [N, H, W] uint8 cut to their ink's common frame and resized by area to the box sides."""
    import torch

    trim = 4 if images.shape[1] == 28 else 0  # MNIST centres a 20-pixel digit in 28 pixels
    ink = torch.from_numpy(images[:, trim : images.shape[1] - trim, trim : images.shape[2] - trim])
    ink = ink[:, None].float() / 255
    boxes = {
        side: torch.nn.functional.interpolate(ink, (side, side), mode="bilinear", antialias=True)[:, 0].numpy()
        for side in BOX_SIDES
    }
    return Handwriting(boxes, labels.astype(np.int64))


def render(scenes: list[Scene], hand: Handwriting, rng: np.random.Generator) -> np.ndarray:
    """Scenes as uint8 RGB [N, 32, 32, 3]; every digit is one real writer's, drawn at random from ``hand``."""
    by_digit = [np.flatnonzero(hand.labels == d) for d in range(10)]
    images = np.empty((len(scenes), SIZE, SIZE, 3), np.float32)
    for image, scene in zip(images, scenes, strict=True):
        free = [c for c in COLOURS if c not in scene.colours]
        background = scene.background or free[rng.integers(len(free))]
        image[:] = PALETTE[background] + rng.normal(0, COLOUR_JITTER, 3)
        for digit, colour, (top, left, side) in zip(
            scene.digits, scene.colours, BOXES[scene.relation], strict=True
        ):
            shift = JITTER[side]
            y = int(np.clip(top + rng.integers(-shift, shift + 1), 0, SIZE - side))
            x = int(np.clip(left + rng.integers(-shift, shift + 1), 0, SIZE - side))
            ink = hand.boxes[side][rng.choice(by_digit[digit])][:, :, None]
            box = image[y : y + side, x : x + side]
            box += ink * (PALETTE[colour] + rng.normal(0, COLOUR_JITTER, 3) - box)
    return np.clip(images, 0, 255).round().astype(np.uint8)


def all_captions(pairs: int = 60) -> list[str]:
    """Every caption of one digit (300), and ``pairs`` of two digits: always the same ones."""
    singles = [
        Scene((digit,), (colour,), None, background)
        for digit in range(10)
        for colour in COLOURS
        for background in COLOURS
        if background != colour
    ]
    twos = draw_scenes(pairs, np.random.default_rng(0), pairs=1.0)
    return sorted({caption(scene) for scene in [*singles, *twos]})
