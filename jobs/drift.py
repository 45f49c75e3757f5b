"""How far a round's held-out images lie from D_0 and from real ones, and how varied they are, in one space."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from curate.drift import (
    Interval,
    around,
    bootstrap,
    diversity,
    frechet,
    frechet_distance,
    mean_within,
    moments,
    proportion,
)
from curate.manifold import manifold
from curate.mmd import cmmd, kid

WIDE = 4096  # numbers in a vector beyond which a covariance takes longer, and more memory, than products of rows
BALLS = 5  # k of density and coverage, as published


def drift(
    mine: np.ndarray, prompts: np.ndarray, targets: Mapping[str, np.ndarray], resamples: int, seed: int
) -> dict[str, Interval]:
    """By metric the value and its 95 % interval of vectors [N, D]: diversity within a prompt [N], and for each target
    ("d0", "real") of vectors [M, D] fd_, kid_, cmmd_, density_ and coverage_.

    They describe this very set of prompts, so their intervals draw the images anew within each prompt.
    """
    found = {}
    for name, target in targets.items():
        far = _frechet_to(target)
        found[f"fd_{name}"] = _around(far(mine), bootstrap(far, mine, n=resamples, rng=seed, strata=prompts))
        found[f"kid_{name}"] = kid(mine, target, prompts)
        if mine.any(axis=1).all() and target.any(axis=1).all():  # it compares directions, and a zero has none
            found[f"cmmd_{name}"] = cmmd(mine, target, prompts)
        where = manifold(mine, target, min(BALLS, len(mine) - 1, len(target) - 1))
        found[f"density_{name}"] = mean_within(where.density, prompts)
        found[f"coverage_{name}"] = proportion(int(where.covered.sum()), len(target))
    spread = bootstrap(diversity, mine, prompts, n=resamples, rng=seed, strata=prompts)
    found["diversity"] = _around(diversity(mine, prompts), spread)
    return found


def _around(value: float, interval: tuple[float, float]) -> Interval:
    """``around``, of what is never below 0."""
    found = around(value, interval)
    return found._replace(low=max(0.0, found.low))


def _frechet_to(target: np.ndarray) -> Callable[[np.ndarray], float]:
    """The Fréchet distance of rows to a target, whose moments are taken once where they are small."""
    if target.shape[1] > WIDE:
        return lambda x: frechet_distance(x, target)
    mean, cov, _ = moments(target)
    return lambda x: frechet(*moments(x)[:2], mean, cov)
