"""Sampling of regions: all at once, one after the other, or some of a finished sample again.

One schedule serves all three. Region i of those that are drawn begins at evaluation i · (1 − overlap) · steps and goes
linearly from its level to 0 in ``steps`` evaluations; overlap 0 is one after the other, overlap 1 is all at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from jobs.devices import dtype
from jobs.ipr.model import Prediction, RegionTransformer
from schemas.errors import WinnowError

ALPHA = 0.5  # share of a step's noise variance that is drawn afresh: 0 is the plain ODE step, 1 forgets the noise


@dataclass(frozen=True)
class Pass:
    """How regions are drawn: ``steps`` evaluations each, from noise ``level`` in (0, 1]; which next: in ``random``
    order, or always the one that is most ``certain``; by which share of their steps neighbours ``overlap``."""

    steps: int
    order: Literal["random", "certain"] = "certain"
    overlap: float = 0.0
    level: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 <= self.overlap <= 1 or not 0 < self.level <= 1:
            raise WinnowError(f"{self}: give steps of 1 or more, overlap in [0, 1] and level in (0, 1]")
        if self.order not in ("random", "certain"):
            raise WinnowError(f"order {self.order!r}: allowed are random, certain")

    def length(self, regions: int) -> int:
        """Evaluations that ``regions`` of them take: ⌈steps + (regions − 1)(1 − overlap) steps⌉, 0 for none."""
        return math.ceil(round(self.steps + (regions - 1) * (1 - self.overlap) * self.steps, 9)) if regions else 0

    def begun(self, evaluation: int, regions: int) -> int:
        """How many of them have begun by the end of an evaluation, counted from 0."""
        stride = (1 - self.overlap) * self.steps
        return regions if stride == 0 else min(regions, math.ceil(round((evaluation + 1) / stride, 9)))


class Sampler:
    """A batch of samples on their way. Each has its own generator, so that its numbers do not hang on its neighbours;
    ``evaluations``: of the model, so far, for each sample."""

    def __init__(self, model: RegionTransformer, seeds: Sequence[int], alpha: float = ALPHA) -> None:
        self.model, self.alpha = model, alpha
        self.device = next(model.parameters()).device
        self.generators = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
        self.evaluations = 0

    def noise(self) -> Tensor:
        """Standard normal [N, R, D]."""
        shape = (self.model.grid.regions, self.model.grid.width)
        return torch.stack([torch.randn(shape, generator=one, device=self.device) for one in self.generators])

    def uniform(self) -> Tensor:
        """Uniform in [0, 1), [N, R]."""
        regions = self.model.grid.regions
        return torch.stack([torch.rand(regions, generator=one, device=self.device) for one in self.generators])

    @torch.no_grad()
    def ask(self, z: Tensor, t: Tensor) -> Prediction:
        self.evaluations += 1
        with torch.autocast(self.device.type, torch.bfloat16, enabled=dtype() == torch.bfloat16):
            found = self.model(z, t)
        return Prediction(*(part if part is None else part.float() for part in found))

    def draw(self, x: Tensor, chosen: Tensor, how: Pass) -> Tensor:
        """Set the ``chosen`` regions (bool [N, R], as many in each sample) of x [N, R, D] to noise of ``how.level`` and
        denoise them; the others stay as they are, to the bit, and are read as clean."""
        count = self._count(chosen)
        t = how.level * chosen.float()
        z = torch.where(chosen[..., None], torch.lerp(x, self.noise(), how.level), x)
        start = torch.full_like(t, math.inf)
        rank = self.uniform()
        begun = 0
        for k in range(how.length(count)):
            found = self.ask(z, t)
            due = how.begun(k, count)
            if due > begun:
                waiting = chosen & start.isinf()
                best = (found.log_var if how.order == "certain" else rank).masked_fill(~waiting, math.inf)
                slots = torch.arange(begun, due, device=z.device) * (1 - how.overlap) * how.steps
                start.scatter_(1, best.argsort(1)[:, : due - begun], slots.expand(len(z), -1).to(start.dtype))
                begun = due
            goal = how.level * (1 - (k + 1 - start) / how.steps).clamp(0, 1)
            goal = torch.where(goal < 1e-6, 0.0, goal)  # what rounding leaves of 0
            moves = chosen & (goal < t)
            z = torch.where(moves[..., None], step(z, found.x, t, goal, self.noise(), self.alpha), z)
            t = torch.where(moves, goal, t)
        return z

    def _count(self, chosen: Tensor) -> int:
        counts = chosen.sum(1)
        if (counts != counts[0]).any():
            raise WinnowError(f"samples have {counts.min()} to {counts.max()} regions to draw; give as many in each")
        return int(counts[0])


def step(z: Tensor, x: Tensor, t: Tensor, goal: Tensor, fresh: Tensor, alpha: float) -> Tensor:
    """From level t to ``goal`` [N, R], given the clean x that is expected: (1 − s) x + s (√(1−α) ε + √α ξ), with ε the
    noise that z then holds and ξ fresh. α = 0 is Euler's step of the rectified flow."""
    t, goal = t[..., None], goal[..., None]
    noise = (z - (1 - t) * x) / t.clamp(min=1e-3)
    return (1 - goal) * x + goal * (math.sqrt(1 - alpha) * noise + math.sqrt(alpha) * fresh)
