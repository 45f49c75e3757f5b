"""Handwritten digits in disjoint slices: one to draw with, one for the classifier that reads, one for the figures."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from schemas.errors import WinnowError

#: Shares of the shuffled handwriting.
SLICES = {"model": (0.0, 0.5), "classifier": (0.5, 0.8), "test": (0.8, 1.0)}
SHIFTS = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))  # pixels by which the classifier sees each digit moved
AT_ONCE = 4096  # images
MOST = 2000  # digits of each kind that the classifier learns from: its cost grows with their square


@dataclass(frozen=True)
class Digits:
    """Real digits: ``ink`` uint8 [N, size, size], bright on dark; ``labels`` int64 [N]."""

    ink: np.ndarray
    labels: np.ndarray

    def draw(self, digits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """An image for each of ``digits`` [...], one real writer's each: uint8 [..., size, size]."""
        chosen = np.empty(digits.shape, np.int64)
        for digit in np.unique(digits):
            owned = np.flatnonzero(self.labels == digit)
            if not len(owned):
                raise WinnowError(f"digits: none shows a {digit}; give handwriting of every digit, 1000 or more")
            here = digits == digit
            chosen[here] = rng.choice(owned, int(here.sum()))
        return self.ink[chosen]


def slices(images: np.ndarray, labels: np.ndarray, size: int, seed: int) -> dict[str, Digits]:
    """Digits [N, H, W] uint8 in ``size`` × ``size`` pixels, shuffled and cut as SLICES says.

    MNIST's, 20 pixels in the middle of 28, lose their empty frame first.
    """
    trim = 4 if images.shape[1] == 28 else 0
    images = images[:, trim : images.shape[1] - trim, trim : images.shape[2] - trim]
    if images.shape[1:] != (size, size):
        images = np.stack([np.asarray(Image.fromarray(one).resize((size, size), Image.BILINEAR)) for one in images])
    mixed, n = np.random.default_rng([seed, 0]).permutation(len(images)), len(images)
    cut = {name: mixed[round(low * n) : round(high * n)] for name, (low, high) in SLICES.items()}
    return {name: Digits(images[rows], labels[rows].astype(np.int64)) for name, rows in cut.items()}


class Reader:
    """Tells which of the digits ``known`` an image shows: a support vector machine, since small networks that accept
    98 % of single digits refuse a third of real boards. It has no answer for what is no digit: ``distance`` has."""

    def __init__(self, digits: Digits, known: tuple[int, ...], seed: int = 0) -> None:
        from sklearn.svm import SVC

        rng = np.random.default_rng([seed, 1])
        rows = np.concatenate([rng.permutation(np.flatnonzero(digits.labels == digit))[:MOST] for digit in known])
        ink = np.concatenate([np.roll(digits.ink[rows], shift, (1, 2)) for shift in SHIFTS])
        self.seen = _features(digits.ink[rows])
        self.model = SVC(C=10.0, gamma="scale").fit(_features(ink), np.tile(digits.labels[rows], len(SHIFTS)))

    def __call__(self, ink: np.ndarray) -> np.ndarray:
        """Images uint8 [..., size, size] → digits int64 [...]."""
        flat = ink.reshape(-1, *ink.shape[-2:])
        parts = (_features(flat[i : i + AT_ONCE]) for i in range(0, len(flat), AT_ONCE))
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # libsvm computes on one core, and without Python's lock
            found = list(pool.map(self.model.predict, parts))
        return np.concatenate([np.zeros(0, np.int64), *found]).reshape(ink.shape[:-2])

    def distance(self, ink: np.ndarray) -> np.ndarray:
        """How far images uint8 [..., size, size] lie from the nearest digit that it learned from: Euclidean, of pixels
        in [0, 1], [...]."""
        flat = ink.reshape(-1, *ink.shape[-2:])
        parts = [_squared(_features(flat[i : i + AT_ONCE]), self.seen).min(1) for i in range(0, len(flat), AT_ONCE)]
        return np.sqrt(np.concatenate([np.zeros(0), *parts])).reshape(ink.shape[:-2])


def _squared(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Squared distances [N, M] between rows of x [N, D] and y [M, D]."""
    return np.maximum((x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T, 0)


def _features(ink: np.ndarray) -> np.ndarray:
    return ink.reshape(len(ink), -1).astype(np.float64) / 255
