"""Even Pixels: every pixel has one of two complementary hues, and exactly half of them have each.

Any arrangement will do, so nothing but the count over the whole image tells right from wrong. Regions of 4 × 4 pixels
as published, in 16 × 16 instead of 32 × 32: a quarter of the regions.
"""

from __future__ import annotations

import numpy as np

from jobs.ipr.grid import Grid

SIDE = 16
PATCH = 4
BINS = 72  # of the hue histogram, 5° each


def rgb(hue: np.ndarray) -> np.ndarray:
    """Fully saturated colours uint8 [..., 3] of hues in degrees."""
    away = np.abs((np.asarray(hue)[..., None] - np.array([0, 120, 240]) + 180) % 360 - 180)
    return (np.clip(2 - away / 60, 0, 1) * 255).round().astype(np.uint8)


def hues(images: np.ndarray) -> np.ndarray:
    """Hues in degrees [0, 360) of RGB images [..., 3]; 0 where there is no colour."""
    red, green, blue = np.moveaxis(images.astype(np.float64), -1, 0)
    return np.degrees(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue)) % 360


def valid(images: np.ndarray) -> np.ndarray:
    """Which images uint8 [N, H, W, 3] have exactly half of their pixels within 90° of their hue histogram's peak."""
    found = hues(images).reshape(len(images), -1)
    right = np.empty(len(images), bool)
    for i, one in enumerate(found):
        counts = np.histogram(one, BINS, (0, 360))[0]
        peak = (counts.argmax() + 0.5) * 360 / BINS
        near = np.abs((one - peak + 180) % 360 - 180) < 90
        right[i] = 2 * near.sum() == one.size
    return right


class EvenPixels:
    """The benchmark. Its checker is exact, so it has no figures of its own."""

    name = "even-pixels"
    grid = Grid(SIDE // PATCH, SIDE // PATCH, PATCH, 3)
    classes = 0

    def draw(self, n: int, rng: np.random.Generator, hand: str = "model") -> tuple[np.ndarray, None]:
        """``n`` real images uint8 [n, 16, 16, 3]; the handwriting plays no part."""
        first = rng.uniform(0, 360, n)
        half = rng.permuted(np.tile(np.arange(SIDE * SIDE) % 2, (n, 1)), axis=1)
        return rgb((first[:, None] + 180 * half) % 360).reshape(n, SIDE, SIDE, 3), None

    def valid(self, images: np.ndarray) -> np.ndarray:
        """bool [N]."""
        return valid(images)

    def details(self, images: np.ndarray, valid: np.ndarray) -> dict[str, float]:
        return {}

    def figures(self) -> dict[str, float]:
        return {}
