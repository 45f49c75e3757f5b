"""Counting Polygons: polygons of one kind, and two numerals that tell how many there are and how many corners each has.

At a small size: 40 × 40 pixels in regions of 8 × 8, 1 to 3 regular polygons of 3 to 5 corners (the published benchmark
has 128 × 128 pixels, 1 to 9 polygons of 3 to 7). The numeral at the top left tells their number, the one at the top
right the corners of each; both are real handwriting.
"""

from __future__ import annotations

from functools import cached_property, lru_cache

import numpy as np
from PIL import Image, ImageDraw

from jobs.ipr.digits import Digits, Reader
from jobs.ipr.grid import Grid

SIDE, CELL = 40, 8  # pixels
MOST, CORNERS = 3, (3, 4, 5)
RADII = (5.0, 6.5)  # pixels from a polygon's middle to its corners
GAP = 2.0  # pixels that are left free between two, at least
FINE = 4  # times as large each is drawn, for smooth edges
INK = 96  # of 255: what is brighter belongs to a polygon
SPECK = 12  # pixels: what is smaller is no polygon


def polygon(corners: int, radius: float, turn: float, x: float, y: float) -> np.ndarray:
    """A regular polygon around pixel (x, y), turned by ``turn`` radians, on black: uint8 [SIDE, SIDE]."""
    angles = turn + 2 * np.pi * np.arange(corners) / corners
    outline = [(FINE * (x + radius * np.cos(a)), FINE * (y + radius * np.sin(a))) for a in angles]
    canvas = Image.new("L", (FINE * SIDE, FINE * SIDE))
    ImageDraw.Draw(canvas).polygon(outline, fill=255)
    return np.asarray(canvas.reduce(FINE))


def scatter(number: int, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Radius, x and y of polygons that lie apart, below the numerals and within the picture."""
    while True:
        placed: list[tuple[float, float, float]] = []
        for _ in range(50):
            r = rng.uniform(*RADII)
            x, y = rng.uniform(r, SIDE - r), rng.uniform(CELL + GAP + r, SIDE - r)
            if all(np.hypot(x - x2, y - y2) > r + r2 + GAP for r2, x2, y2 in placed):
                placed.append((r, x, y))
            if len(placed) == number:
                return placed


def components(image: np.ndarray) -> list[np.ndarray]:
    """What hangs together (by its sides) in a picture bool [H, W]: masks, those below SPECK pixels left out."""
    left, found = image.copy(), []
    while left.any():
        seed = np.zeros_like(left)
        seed[np.unravel_index(left.argmax(), left.shape)] = True
        while True:
            grown = seed.copy()
            grown[1:] |= seed[:-1]
            grown[:-1] |= seed[1:]
            grown[:, 1:] |= seed[:, :-1]
            grown[:, :-1] |= seed[:, 1:]
            grown &= left
            if (grown == seed).all():
                break
            seed = grown
        left &= ~seed
        if seed.sum() >= SPECK:
            found.append(seed)
    return found


def harmonics(image: np.ndarray) -> np.ndarray:
    """How strongly a shape repeats itself n times around its middle, for each n of CORNERS: |Σ w r² e^{inθ}| / Σ w r²
    over its pixels of brightness w [H, W]. For a regular polygon only multiples of its corners differ from 0."""
    y, x = np.indices(image.shape)
    weight = image / image.sum()
    dx, dy = x - (weight * x).sum(), y - (weight * y).sum()
    angle, spread = np.arctan2(dy, dx), weight * (dx**2 + dy**2)
    return np.array([abs((spread * np.exp(1j * n * angle)).sum()) for n in CORNERS]) / spread.sum()


@lru_cache
def ideal() -> np.ndarray:
    """The harmonic of each polygon of CORNERS at its own number, from large drawings."""
    drawn = [polygon(n, SIDE / 2 - 2, 0.1, SIDE / 2, SIDE / 2) for n in CORNERS]
    return np.array([harmonics(one.astype(float))[i] for i, one in enumerate(drawn)])


def corners(image: np.ndarray) -> int:
    """How many corners a single shape on black has, uint8 [H, W]: the harmonic that comes nearest to its ideal
    strength; 0 where none reaches half of it, as in a disc."""
    strength = harmonics(image.astype(float)) / ideal()
    return CORNERS[int(strength.argmax())] if strength.max() > 0.5 else 0


def read(image: np.ndarray) -> tuple[int, set[int]]:
    """How many polygons a picture uint8 [SIDE, SIDE] shows below its numerals, and which numbers of corners."""
    field = image.copy()
    field[:CELL] = 0
    masks = components(field > INK)
    found = set()
    for mask in masks:
        near = mask.copy()  # its soft edge belongs to it
        near[1:] |= mask[:-1]
        near[:-1] |= mask[1:]
        near[:, 1:] |= mask[:, :-1]
        near[:, :-1] |= mask[:, 1:]
        found.add(corners(np.where(near, field, 0)))
    return len(masks), found


class Polygons:
    """The benchmark. Valid: as many polygons as the first numeral says, all with the second numeral's corners."""

    name = "polygons"
    grid = Grid(SIDE // CELL, SIDE // CELL, CELL)
    classes = 0

    def __init__(self, hand: dict[str, Digits]) -> None:
        self.hand = hand

    @cached_property
    def readers(self) -> tuple[Reader, Reader]:
        """Of the number, and of the corners."""
        return Reader(self.hand["classifier"], tuple(range(1, MOST + 1))), Reader(self.hand["classifier"], CORNERS)

    def told(self, n: int, rng: np.random.Generator, hand: str = "model") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``n`` real images uint8 [n, SIDE, SIDE, 1], their numbers of polygons [n] and of corners [n]."""
        numbers, sides = rng.integers(1, MOST + 1, n), rng.choice(CORNERS, n)
        numerals = self.hand[hand].draw(np.stack([numbers, sides], 1), rng)
        images = np.zeros((n, SIDE, SIDE), np.uint8)
        for image, number, side in zip(images, numbers, sides, strict=True):
            for r, x, y in scatter(number, rng):
                np.maximum(image, polygon(side, r, rng.uniform(0, 2 * np.pi), x, y), out=image)
        images[:, :CELL, :CELL], images[:, :CELL, -CELL:] = numerals[:, 0], numerals[:, 1]
        return images[..., None], numbers, sides

    def draw(self, n: int, rng: np.random.Generator, hand: str = "model") -> tuple[np.ndarray, None]:
        """``n`` real images uint8 [n, SIDE, SIDE, 1]."""
        return self.told(n, rng, hand)[0], None

    def valid(self, images: np.ndarray) -> np.ndarray:
        """Images uint8 [N, SIDE, SIDE, 1] → bool [N]."""
        images = images[..., 0]
        number = self.readers[0](images[:, :CELL, :CELL])
        side = self.readers[1](images[:, :CELL, -CELL:])
        return np.array([read(image) == (n, {s}) for image, n, s in zip(images, number, side, strict=True)], bool)

    def details(self, images: np.ndarray, valid: np.ndarray) -> dict[str, float]:
        return {}

    def figures(self) -> dict[str, float]:
        """How often the counts of polygons and of corners are right on real images, and both numerals."""
        images, numbers, sides = self.told(500, np.random.default_rng(0), "test")
        counted = [read(image) for image in images[..., 0]]
        top = images[:, :CELL, :, 0]
        numerals = (self.readers[0](top[..., :CELL]) == numbers) & (self.readers[1](top[..., -CELL:]) == sides)
        return {
            "number_accuracy": float(np.mean([one[0] == n for one, n in zip(counted, numbers, strict=True)])),
            "corners_accuracy": float(np.mean([one[1] == {s} for one, s in zip(counted, sides, strict=True)])),
            "numerals_accuracy": float(numerals.mean()),
        }
