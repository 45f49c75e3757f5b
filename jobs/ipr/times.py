"""Noise levels of the regions in training: 0 is clean, 1 is noise.

What a sampler will ask of the model must have been seen: all regions alike (parallel sampling), some finished and a few
under way (sequential sampling and refinement), and everything between.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

SHARES = {"shared": 0.3, "mean_beta": 0.3, "sequential": 0.4}
SHARPNESS = 1.0  # of the Beta distributions that split a sum of levels in two; higher: more alike
BINS, LEVELS = 50, 400_000  # of the histogram that tells how often mean_beta draws a level


def shared(n: int, regions: int, rng: np.random.Generator) -> np.ndarray:
    """One level for all regions of a sample, uniform in [0, 1): [n, regions]."""
    return np.repeat(rng.random((n, 1)), regions, 1)


def mean_beta(n: int, regions: int, rng: np.random.Generator, sharpness: float = SHARPNESS) -> np.ndarray:
    """Levels [n, regions] in [0, 1] whose mean is uniform (Spatial Reasoning Models, arXiv 2502.21075).

    Independent levels would leave their mean near 1/2 (Irwin-Hall). So the mean is drawn first, and the sum is split
    over halves of the regions, again and again: of the range that both can hold, the one gets a share that is
    Beta(a, a). As in its authors' public code, a = sharpness · (n − 1 − n mod 2)^1.05 for n regions: the more there
    are, the more alike are halves of them. Then the regions are shuffled.
    """
    levels = np.empty((n, regions))

    def split(total: np.ndarray, low: int, high: int) -> None:
        count = high - low
        if count == 1:
            levels[:, low] = total
            return
        left = count // 2
        right = count - left
        least, most = np.maximum(0, total - right), np.minimum(left, total)
        a = sharpness * (count - 1 - count % 2) ** 1.05
        given = least + (most - least) * rng.beta(a, a, n)
        split(given, low, low + left)
        split(total - given, low + left, high)

    split(rng.random(n) * regions, 0, regions)
    return np.clip(rng.permuted(levels, axis=1), 0, 1)


@lru_cache
def density(regions: int) -> np.ndarray:
    """How often ``mean_beta`` draws each level: the density in BINS equal bins of [0, 1], with mean 1."""
    levels = mean_beta(-(-LEVELS // regions), regions, np.random.default_rng(0))
    return np.histogram(levels, BINS, (0, 1), density=True)[0]


def sequential(n: int, regions: int, rng: np.random.Generator) -> np.ndarray:
    """Levels [n, regions] as in the midst of sequential sampling: a random number of regions is finished (0), up to a
    quarter is under way (each uniform), the rest has not begun (1)."""
    place = rng.permuted(np.tile(np.arange(regions), (n, 1)), axis=1)
    done = rng.integers(0, regions, (n, 1))
    active = rng.integers(1, max(1, regions // 4) + 1, (n, 1))
    levels = np.where(place < done + active, rng.random((n, regions)), 1.0)
    return np.where(place < done, 0.0, levels)


def draw(n: int, regions: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Levels float32 [n, regions], each sample by one of the three ways, as often as SHARES says, and the weight of
    each region in the loss, float32 [n, regions].

    The weight is 1 / density of the level for ``mean_beta``, so that each level counts alike, and 1 for the others,
    which draw levels evenly (and those that have not begun as often as a sampler meets them); a clean region has none.
    """
    kind = rng.choice(len(SHARES), n, p=list(SHARES.values()))[:, None]
    levels = np.choose(kind, [way(n, regions, rng) for way in (shared, mean_beta, sequential)]).astype(np.float32)
    weights = 1 / density(regions)[np.minimum((levels * BINS).astype(np.int64), BINS - 1)]
    weights = np.where(kind == list(SHARES).index("mean_beta"), weights, 1)
    return levels, np.where(levels > 0, weights, 0).astype(np.float32)
