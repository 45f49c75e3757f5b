"""Negative guidance: predictions that are led away from those of another model.

A model that was trained on its own samples shows where self-training leads; the difference, taken the other way, is
guidance for the model that it came from: (1 + w) · prediction − w · prediction of the other (SIMS, arXiv 2408.16333).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from jobs import models
from jobs.families import family
from jobs.objective import objective
from schemas.errors import WinnowError

if TYPE_CHECKING:
    from jobs.generate import Negative


class Away(nn.Module):
    """A denoiser in the place of ``model``, with its configuration, that keeps away from ``other``: ``passes`` network
    evaluations in one."""

    passes = 2

    def __init__(self, model: nn.Module, other: nn.Module, weight: float) -> None:
        super().__init__()
        self.model, self.other, self.weight = model, other, weight

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model answers, a tuple or an object with ``sample``, its tensor moved."""
        mine, others = self.model(*args, **kwargs), self.other(*args, **kwargs)
        if isinstance(mine, tuple):
            return (torch.lerp(others[0], mine[0], 1 + self.weight), *mine[1:])
        mine.sample = torch.lerp(others.sample, mine.sample, 1 + self.weight)
        return mine


def lead_away(pipe: Any, negative: Negative) -> None:
    """Let the pipeline sample away from the other model; WinnowError where that is of another kind or shape."""
    kind = family(pipe)
    model = kind.model(pipe)
    theirs = models.load(negative.model, model.dtype)
    if family(theirs) is not kind:
        raise WinnowError(
            f"generate.negative.model {negative.model!r}: is a {type(theirs).__name__}, and the model a "
            f"{type(pipe).__name__}; give one that was trained from this model"
        )
    other = kind.model(theirs)
    shapes, others = ({n: p.shape for n, p in one.named_parameters() if "lora" not in n} for one in (model, other))
    if list(shapes.values()) != list(others.values()):
        raise WinnowError(
            f"generate.negative.model {negative.model!r}: its denoiser is of another shape; give one that was trained "
            "from this model"
        )
    mine, its = (objective(one.scheduler).kind for one in (pipe, theirs))
    if mine != its:
        raise WinnowError(
            f"generate.negative.model {negative.model!r}: predicts {its!r}, and the model {mine!r}; give one that was "
            "trained from this model"
        )
    setattr(pipe, kind.denoiser, Away(model, other, negative.weight).eval())
