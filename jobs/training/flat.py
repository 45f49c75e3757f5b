"""Flat parameters: many small tensors as one, for what is done to all of them alike.

A step of the optimiser over hundreds of small tensors is hundreds of operations, and on a CPU as many waits of its
cores for each other; over one tensor it is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


class Flat:
    """Parameters of one model, of one type and on one device, end to end: ``whole`` [n], itself a parameter. They and
    their gradients are views of it and of its gradient, which passes add to and ``whole.grad.zero_()`` clears."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.whole = nn.Parameter(torch.cat([p.detach().flatten() for p in self.parameters]))
        for parameter, view in self._pairs():
            parameter.data = view
        self.whole.grad = flat_gradient(self.parameters)

    def release(self) -> None:
        """Give each parameter memory of its own again, and no gradient. RuntimeError where one had left the whole, by a
        move or a change of its layout: steps did not reach it."""
        self.whole.grad = None  # first, so that its memory serves the copies
        for parameter in self.parameters:
            parameter.grad = None
        for parameter, view in self._pairs():
            if parameter.data_ptr() != view.data_ptr():
                raise RuntimeError("a parameter was moved while it was trained: the steps since then did not reach it")
            parameter.data = view.clone()

    def _pairs(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        return zip(self.parameters, views(self.whole.detach(), self.parameters), strict=True)


def flat_gradient(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Zeros [n], of which each parameter's gradient is a view from now on."""
    whole = parameters[0].new_zeros(sum(p.numel() for p in parameters))
    for parameter, view in zip(parameters, views(whole, parameters), strict=True):
        parameter.grad = view
    return whole


def views(whole: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The parts of ``whole`` [n] in the parameters' order and shapes."""
    parts = whole.split([p.numel() for p in parameters])
    return [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]


def averaging(ema: float, step: int) -> float:
    """How far a moving average goes towards the weights after a step, counted from 0: 1 - ema, but further in the first
    steps, so that it does not linger where training began."""
    return 1 - min(ema, (1 + step) / (10 + step))
