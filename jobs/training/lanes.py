"""Lanes: on a CPU, the passes of two halves of a batch run side by side.

A small model's passes are many small operations. Handed out to all cores one after another, each ends with cores that
wait; two threads that take half of the rows each, with half of the cores, wait for each other once a step.

The cores are halved once and stay so: with every change of their number torch throws away the convolutions that oneDNN
has prepared, and to prepare them anew is a tenth of a small model's step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import nn

from jobs.families import Family
from jobs.training.flat import Flat, flat_gradient

T = TypeVar("T")


class Lanes:
    """A pipeline whose denoiser is trained (``flat``: what of it), and a twin of it where there are cores for two: the
    twin's parameters are the same memory, its gradients its own until they are added.

        with Lanes(pipe, family, flat, rows) as lanes: …

    Within the block the process computes with half of its cores, and the twin's thread with as many; outside of it
    there is one lane. There is no twin on a GPU, with one thread, for passes of a single row (``rows``: the most of
    one), or of a model with dropout, whose masks two threads would draw in no fixed order.
    """

    def __init__(self, pipe: Any, family: Family, flat: Flat, rows: int) -> None:
        model = family.model(pipe)
        self.pipes, self.cores = [pipe], torch.get_num_threads()
        self.other: ThreadPoolExecutor | None = None
        self.drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
        if next(model.parameters()).device.type != "cpu" or 1 in (self.cores, rows) or self.drops:
            return
        shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
        shared |= {id(buffer): buffer for buffer in model.buffers()}
        twin = copy.copy(pipe)
        setattr(twin, family.denoiser, copy.deepcopy(model, shared))
        self.pipes.append(twin)
        self.gradients = [flat.whole.grad, flat_gradient([shared[id(p)] for p in flat.parameters])]

    def __enter__(self) -> Lanes:
        if len(self.pipes) == 2:
            torch.set_num_threads(self.cores // 2)
            self.other = ThreadPoolExecutor(1, "lane")
        return self

    def __exit__(self, *_: object) -> None:
        if self.other:
            self.other.shutdown()
            self.other = None
            torch.set_num_threads(self.cores)

    def __call__(self, work: Callable[[Any, slice], T], rows: slice) -> list[T]:
        """What ``work`` (pipeline, rows) gives for each lane's share of the rows, in their order; the gradients that it
        leaves are then the pipeline's own, those of both added."""
        if self.other is None or rows.stop - rows.start < 2:
            return [work(self.pipes[0], rows)]
        middle = (rows.start + rows.stop + 1) // 2
        second = self.other.submit(work, self.pipes[1], slice(middle, rows.stop))
        made = [work(self.pipes[0], slice(rows.start, middle)), second.result()]
        self._add()
        return made

    def _add(self) -> None:
        own, other = self.gradients
        own += other
        other.zero_()
