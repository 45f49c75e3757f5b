"""What a set of images is worth: the judge's verdicts, a score that never selected, and the distance to real scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from curate.drift import around, bootstrap, frechet, mean_over, moments, wins
from jobs.evaluate import real_vectors

RESAMPLES = 200  # of the bootstrap behind each interval
Figures = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """N images as nobody saw them who selected: ``right`` bool [N], the judge's verdict; ``score`` float64 [N], the
    probability that the held-out reader gives to the caption; ``features`` [N, 64], the judge's; ``prompts`` [N]."""

    right: np.ndarray
    score: np.ndarray
    features: np.ndarray
    prompts: np.ndarray


def look(pixels: np.ndarray, prompts: Sequence[str]) -> Measured:
    """Judge and read images uint8 [N, 16, 16, 3] of captions [N]."""
    from jobs.world.judge import Judge
    from jobs.world.reader import Reader

    images = [Image.fromarray(image) for image in pixels]
    right, features = Judge()(images, list(prompts))
    score = np.exp(Reader()(images, list(prompts)).astype(np.float64))
    return Measured(right, score, features, np.asarray(prompts))


def figures(mine: Measured, against: dict[str, Measured], seed: int = 0) -> Figures:
    """Values with 95 % intervals [value, low, high]: of the set, and compared with others of the same captions in
    the same order. A win is an image that is right where the other is wrong; what both are is half a win."""
    mean = partial(mean_over, groups=mine.prompts, n=RESAMPLES, rng=seed)
    target = moments(real_vectors("embedded", list(mine.prompts)))[:2]

    def distance(features: np.ndarray) -> float:
        return frechet(*moments(features)[:2], *target)

    def change(ours: np.ndarray, theirs: np.ndarray) -> float:
        return distance(ours) / distance(theirs) - 1

    within = {"n": RESAMPLES, "rng": seed, "strata": mine.prompts}
    found: Figures = {
        "n": len(mine.prompts),
        "accuracy": list(mean(mine.right.astype(float))),
        "score": list(mean(mine.score)),
        "fd_real": list(around(distance(mine.features), bootstrap(distance, mine.features, **within))),
    }
    for name, other in against.items():
        assert (mine.prompts == other.prompts).all(), "images are compared with those of the same captions"
        won = wins(mine.right.astype(float), other.right.astype(float))
        decided = won != 0.5
        value = change(mine.features, other.features)
        found[name] = {
            "preferred": list(mean(won)),
            "decided": int(decided.sum()),
            "preferred_of_decided": list(mean_over(won[decided], mine.prompts[decided], RESAMPLES, seed))
            if decided.any() else None,
            "score_change": list(np.array(mean(mine.score - other.score)) / other.score.mean()),
            "fd_change": list(around(value, bootstrap(change, mine.features, other.features, **within))),
        }  # fmt: skip
    return found
