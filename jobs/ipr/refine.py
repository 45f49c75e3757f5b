"""Iterative partial refinement, and what it is compared with.

Each iteration picks regions of a finished sample, sets them back to noise and draws them again among the others. What
comes is always accepted, and nothing but the model itself is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from jobs.ipr.sampler import Pass, Sampler
from schemas.errors import WinnowError

#: Which regions an iteration picks:
#: uniform    at random, without replacement: IPR
#: fixed      the same ones each time, at random once: a control
#: uncertain  those of which the model is least sure: beyond the source, one evaluation more
#: conflict   those that differ most from what it expects there, by its own certainty: beyond the source, one more
Choice = Literal["uniform", "fixed", "uncertain", "conflict"]
LOOKING = ("uncertain", "conflict")  # those that ask first
LOOK = 0.5  # noise level at which the model is asked what it thinks of a finished sample


def refine(
    sampler: Sampler, x: Tensor, free: Tensor, iterations: int, fraction: float, how: Pass, choice: Choice = "uniform"
) -> Iterator[Tensor]:
    """Refine samples x [N, R, D], and yield them after each iteration.

    Each draws a ``fraction`` of the ``free`` regions (bool [N, R], as many in each sample) again as ``how`` says;
    what is not free was given, and never changes. Fraction 1 at a lower level is re-noising the whole image, at
    level 1 it is a restart.
    """
    if not 0 < fraction <= 1:
        raise WinnowError(f"fraction {fraction}: give the share of regions that an iteration draws again, in (0, 1]")
    if choice not in get_args(Choice):
        raise WinnowError(f"choice {choice!r}: allowed are {', '.join(get_args(Choice))}")
    count = max(1, round(fraction * int(free[0].sum())))
    order = sampler.uniform()
    for _ in range(iterations):
        if choice == "uniform":
            order = sampler.uniform()
        elif choice != "fixed":
            order = -doubt(sampler, x, free, choice)
        picked = order.masked_fill(~free, torch.inf).argsort(1)[:, :count]
        chosen = torch.zeros_like(free).scatter(1, picked, True) & free
        x = sampler.draw(x, chosen, how)
        yield x


def doubt(sampler: Sampler, x: Tensor, free: Tensor, choice: Choice) -> Tensor:
    """How doubtful each region is [N, R], from one look at the sample with its free regions half in noise."""
    t = LOOK * free.float()
    found = sampler.ask(torch.lerp(x, sampler.noise(), t[..., None]), t)
    if choice == "uncertain":
        return found.log_var
    return (found.x - x).square().mean(2) * torch.exp(-found.log_var)
