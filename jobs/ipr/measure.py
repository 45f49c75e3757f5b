"""One benchmark measured: how many samples obey the rule, for each way of sampling, against evaluations."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curate.drift import proportion
from jobs.devices import device
from jobs.ipr.benchmarks import Benchmark, benchmark, task
from jobs.ipr.model import RegionTransformer
from jobs.ipr.refine import Choice, refine
from jobs.ipr.sampler import Pass, Sampler
from jobs.ipr.train import Task, load
from jobs.progress import bar
from jobs.study import machine

FRACTIONS = (0.125, 0.25, 0.5)
PARALLEL = (16, 64)  # evaluations
WHOLE = Pass(8, overlap=1.0, level=0.5)  # the whole image, half in noise: the strongest rival on a small budget
SHOWN = 8  # samples in the picture, as they were first and at last


@dataclass(frozen=True)
class Method:
    """A first pass, and perhaps iterations that draw a ``fraction`` of it ``again``, judged after each of ``marks``."""

    name: str
    start: Pass
    again: Pass | None = None
    fraction: float = 0.0
    choice: Choice = "uniform"
    marks: tuple[int, ...] = ()


def methods(how: Benchmark, free: int) -> list[Method]:
    """What is compared where ``free`` regions are not given: the first pass in its kinds, IPR, and its controls."""
    start, again = Pass(how.steps), Pass(how.again)
    found = [Method("parallel", Pass(n, overlap=1.0)) for n in PARALLEL if n <= max(how.budgets)]
    found += [Method("sequential, random order", Pass(how.steps, "random"))]
    found += [Method("sequential, overlap 1/2", Pass(2 * how.steps, overlap=0.5))]
    longer = sorted({budget // free for budget in how.budgets} - {how.steps})
    found += [Method("sequential", start), *(Method("sequential", Pass(steps)) for steps in longer)]

    def iterated(name: str, fraction: float, way: Pass, choice: Choice = "uniform") -> Method:
        each = way.length(max(1, round(fraction * free))) + (choice in ("uncertain", "conflict"))
        marks = sorted({(budget - start.length(free)) // each for budget in how.budgets})
        return Method(name, start, way, fraction, choice, tuple(mark for mark in marks if mark))

    found += [iterated("IPR", fraction, again) for fraction in FRACTIONS]
    found += [iterated("whole image", 1.0, WHOLE), iterated("restart", 1.0, start)]
    found += [iterated("fixed regions", 0.25, again, "fixed")]
    found += [iterated("least certain regions", 0.25, again, "uncertain")]
    found += [iterated("regions in conflict", 0.25, again, "conflict")]
    brief = {"parallel", "sequential", "whole image", "restart"}
    return [one for one in found if not how.brief or one.name in brief or (one.name, one.fraction) == ("IPR", 0.25)]


def rate(valid: np.ndarray) -> dict[str, Any]:
    """A share of bool [N] with its standard error and 95 % Wilson interval."""
    n, k = len(valid), int(valid.sum())
    value, low, high = proportion(k, n)
    return {"n": n, "valid": k, "rate": value, "se": math.sqrt(value * (1 - value) / n), "low": low, "high": high}


class Bench:
    """A model, its benchmark, and ``n`` samples with their seeds, regions that are given (``clues``) and free ones."""

    def __init__(self, model: RegionTransformer, made: Task, n: int, seed: int, given: float = 0.0) -> None:
        self.model, self.task, self.seed, self.given, self.n = model, made, seed, given, n
        rng = np.random.default_rng([seed, 1])
        regions = made.grid.regions
        place = rng.permuted(np.tile(np.arange(regions), (n, 1)), axis=1)
        real = made.grid.cut(made.draw(n, rng, "test")[0])
        self.free = torch.from_numpy(place >= round(given * regions)).to(device())
        self.clues = torch.from_numpy(real).to(device()) * ~self.free[..., None]
        self.starts: dict[Pass, tuple[Tensor, int, float]] = {}

    def sampler(self, stage: int) -> Sampler:
        return Sampler(self.model, [(self.seed * 2 + stage) * 2**32 + i for i in range(self.n)])

    def valid(self, x: Tensor) -> np.ndarray:
        return self.task.valid(self.images(x))

    def judge(self, x: Tensor) -> dict[str, Any]:
        """The valid share, and the benchmark's details."""
        images = self.images(x)
        valid = self.task.valid(images)
        return rate(valid) | self.task.details(images, valid)

    def images(self, x: Tensor) -> np.ndarray:
        return self.task.grid.join(x.cpu().numpy())

    def start(self, how: Pass) -> tuple[Tensor, int, float]:
        """Samples of a first pass, evaluations and seconds; drawn once, so that every refinement begins alike."""
        if how not in self.starts:
            begun, sampler = time.perf_counter(), self.sampler(0)
            x = sampler.draw(self.clues, self.free, how)
            self.starts[how] = x, sampler.evaluations, time.perf_counter() - begun
        return self.starts[how]

    def run(self, method: Method) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """A row of figures and the samples, of the first pass or after each mark."""
        x, evaluations, seconds = self.start(method.start)
        fixed = {"method": method.name, "given": self.given, "steps": method.start.steps}
        if method.again is None:
            yield {**fixed, "evaluations": evaluations, "seconds": round(seconds, 2), **self.judge(x)}, x
            return
        fixed |= {"fraction": method.fraction, "again": method.again.steps}
        sampler, begun = self.sampler(1), time.perf_counter()
        last = max(method.marks, default=0)
        turns = refine(sampler, x, self.free, last, method.fraction, method.again, method.choice)
        for k, after in enumerate(turns, 1):
            if k in method.marks:
                spent = round(seconds + time.perf_counter() - begun, 2)
                counts = {"iterations": k, "evaluations": evaluations + sampler.evaluations, "seconds": spent}
                yield {**fixed, **counts, **self.judge(after)}, after

    def retention(self, again: Pass) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The ceiling, which is the share of real samples that the checker accepts; and of these, how many one step of
        refinement leaves valid, by fraction. IPR can only help where this lies far above the model's own rate."""
        images = self.task.draw(self.n, np.random.default_rng([self.seed, 2]), "test")[0]
        accepted = self.task.valid(images)
        real = torch.from_numpy(self.task.grid.cut(images)).to(device())
        free, rows = torch.ones_like(self.free), []
        for name, fraction, how in [*(("IPR", f, again) for f in FRACTIONS), ("whole image", 1.0, WHOLE)]:
            (after,) = refine(self.sampler(1), real, free, 1, fraction, how)
            rows.append({"method": name, "fraction": fraction, **rate(self.valid(after)[accepted])})
        return rate(accepted), rows


def measure(
    name: str, weights: Path, n: int, seed: int, data: str | None = None
) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """All figures of a benchmark, and some samples that were wrong first and right after IPR: before, after."""
    how, (made, source), load_before = benchmark(name), task(name, data), os.getloadavg()[0]
    model, config = load(weights / name)
    begun, rows, ends = time.perf_counter(), [], {}
    for given in how.given:
        bench = Bench(model, made, n, seed, given)
        plan = methods(how, int(bench.free[0].sum()))
        if given:  # only what matters most; the controls are compared where nothing is given
            runs = [one for one in plan if one.name == "sequential"]
            plan = [runs[0], runs[-1], *(one for one in plan if (one.name, one.fraction) == ("IPR", 0.25))]
        with bar(f"measure {name}, {given:.0%} given", len(plan)) as advance:
            for method in plan:
                for row, x in bench.run(method):
                    rows.append(row)
                    if not given:
                        ends[method.name, method.fraction] = x
                advance()
    hard = Bench(model, made, n, seed)
    ceiling, retention = hard.retention(Pass(how.again))
    before, after = hard.start(Pass(how.steps))[0], ends["IPR", 0.25]
    mended = np.flatnonzero(~hard.valid(before) & hard.valid(after))[:SHOWN]
    figures = {
        "n": n, "seed": seed, "handwriting": source, "checker": made.figures(), "ceiling": ceiling,
        "retention": retention, "rows": rows, "model": config, "machine": machine(), "device": device(),
        "threads": torch.get_num_threads(), "load_before": round(load_before, 2),
        "seconds": round(time.perf_counter() - begun, 1),
    }  # fmt: skip
    return figures, hard.images(before)[mended], hard.images(after)[mended]
