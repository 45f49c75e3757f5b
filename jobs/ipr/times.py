"""Noise levels of the regions in training: 0 is clean, 1 is noise.

What a sampler will ask of the model must have been seen: all regions alike (parallel sampling), some finished and a few
under way (sequential sampling and refinement), and everything between.
"""

from __future__ import annotations

import numpy as np

SHARES = {"shared": 0.3, "mean_beta": 0.3, "sequential": 0.4}
SHARPNESS = 1.0  # of the Beta distribution that splits a sum of levels in two; higher: more alike


def shared(n: int, regions: int, rng: np.random.Generator) -> np.ndarray:
    """One level for all regions of a sample, uniform in [0, 1): [n, regions]."""
    return np.repeat(rng.random((n, 1)), regions, 1)


def mean_beta(n: int, regions: int, rng: np.random.Generator, sharpness: float = SHARPNESS) -> np.ndarray:
    """Levels [n, regions] in [0, 1] whose mean is uniform (Spatial Reasoning Models, arXiv 2502.21075).

    Independent levels would leave their mean near 1/2 (Irwin-Hall). So the mean is drawn first, and the sum is
    split over halves of the regions, again and again: Beta(a, a) of it to the one, clipped to what both can hold.
    Then the regions are shuffled.
    """
    levels = np.empty((n, regions))

    def split(total: np.ndarray, low: int, high: int) -> None:
        if high - low == 1:
            levels[:, low] = total
            return
        left = (high - low) // 2
        right = high - low - left
        given = rng.beta(sharpness, sharpness, n) * total
        given = np.clip(given, np.maximum(0, total - right), np.minimum(left, total))
        split(given, low, low + left)
        split(total - given, low + left, high)

    split(rng.random(n) * regions, 0, regions)
    return np.clip(rng.permuted(levels, axis=1), 0, 1)


def sequential(n: int, regions: int, rng: np.random.Generator) -> np.ndarray:
    """Levels [n, regions] as in the midst of sequential sampling: a random number of regions is finished (0), up to a
    quarter is under way (each uniform), the rest has not begun (1)."""
    place = rng.permuted(np.tile(np.arange(regions), (n, 1)), axis=1)
    done = rng.integers(0, regions, (n, 1))
    active = rng.integers(1, max(1, regions // 4) + 1, (n, 1))
    levels = np.where(place < done + active, rng.random((n, regions)), 1.0)
    return np.where(place < done, 0.0, levels)


def draw(n: int, regions: int, rng: np.random.Generator) -> np.ndarray:
    """Levels float32 [n, regions], each sample by one of the three ways, as often as SHARES says."""
    kind = rng.choice(len(SHARES), n, p=list(SHARES.values()))[:, None]
    ways = [way(n, regions, rng) for way in (shared, mean_beta, sequential)]
    return np.choose(kind, ways).astype(np.float32)
