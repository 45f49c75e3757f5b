"""Advantages: how much better a sample is than the others of its prompt, and what it then counts.

After group-relative advantages (arXiv 2402.03300, section 4.1) and advantage-weighted regression (arXiv 1910.00177,
equation 9): the scores of all n images of a prompt, kept and rejected, set the scale for each of them.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from curate import groups as grouped
from curate.arrays import Float64s, vector
from curate.weigh import FLOOR, LEAST
from schemas.errors import WinnowError


def advantages(scores: ArrayLike, groups: ArrayLike) -> Float64s:
    """(score − mean) / standard deviation, both over the sample's group: [N], [N] -> [N].

    0 for all of a group whose scores are equal, and for a sample that is alone. The deviation is that of the group
    itself (division by n).
    """
    values = vector("scores", scores)
    return grouped.zscores(grouped.codes(groups, rows=len(values)), values)


def weights(advantage: ArrayLike, temperature: float = 1.0, most: float = 20.0) -> Float64s:
    """w = min(exp(advantage / temperature), most): [N] -> [N] above 0; 1 for a sample that is as good as its peers.

    A small temperature trains on the best alone, a large one on all alike. WinnowError when every weight vanishes.
    """
    a = vector("advantages", advantage)
    if not (math.isfinite(temperature) and temperature > 0):
        raise WinnowError(f"temperature is {temperature}: give a number above 0")
    if not (math.isfinite(most) and most >= 1):
        raise WinnowError(f"the largest weight is {most}: give 1 or more")
    with np.errstate(over="ignore"):  # of a tiny temperature: the best count most, the others nothing
        power = a / temperature
    w = np.where(power >= math.log(most), most, np.exp(np.minimum(power, math.log(most))))
    if w.max() < LEAST:
        raise WinnowError(
            f"every weight is below {LEAST:g}: advantages run from {a.min():.4g} to {a.max():.4g}, temperature is "
            f"{temperature:.4g}; give a larger temperature"
        )
    return np.maximum(w, FLOOR)
