"""One benchmark measured: how many samples obey the rule, for each way of sampling, against evaluations."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curate.drift import proportion
from jobs.devices import device
from jobs.digest import digest
from jobs.ipr.benchmarks import Benchmark, benchmark, task
from jobs.ipr.model import RegionTransformer
from jobs.ipr.refine import LOOKING, Choice, refine
from jobs.ipr.sampler import Pass, Sampler
from jobs.ipr.train import Task, load
from jobs.machine import machine
from jobs.progress import bar
from schemas import ids
from schemas.errors import WinnowError

QUARTER = 0.25  # of the regions: IPR as published
FRACTIONS = (0.125, QUARTER, 0.5)
PARALLEL = (16, 64)  # evaluations
LEVELS = (0.3, 0.5, 0.7)  # to which the whole image is noised: the strongest rival on a small budget
WHOLE = 8  # steps of that, at least
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


def budgets(how: Benchmark, free: int) -> list[int]:
    """Evaluations at which methods are compared: what IPR with a quarter of ``free`` regions takes."""
    first, each = how.start.length(free), how.again.length(part(QUARTER, free))
    return [first + k * each for k in how.iterations]


def part(fraction: float, free: int) -> int:
    """How many of ``free`` regions an iteration draws again."""
    return max(1, round(fraction * free))


def longest(overlap: float, budget: int, free: int) -> Pass:
    """The pass over ``free`` regions with the most steps that a budget of evaluations allows."""
    steps = max(n for n in range(1, budget + 1) if Pass(n, overlap=overlap).length(free) <= budget)
    return Pass(steps, overlap=overlap)


def methods(how: Benchmark, free: int, brief: bool = False) -> list[Method]:
    """What is compared where ``free`` regions are not given: the first pass in its kinds, IPR, and its controls; or,
    in ``brief``, the sequential sampler and IPR alone."""
    start, again, marks = how.start, how.again, budgets(how, free)

    def iterated(name: str, fraction: float, way: Pass, choice: Choice = "uniform") -> Method:
        each = way.length(part(fraction, free)) + (choice in LOOKING)
        counts = {(budget - start.length(free)) // each for budget in marks}
        return Method(name, start, way, fraction, choice, tuple(sorted(counts - {0})))

    found = [Method("sequential", start)]
    found += [Method("sequential", longest(start.overlap, budget, free)) for budget in marks]
    quarter = iterated("IPR", QUARTER, again)
    if brief:
        return [*found, quarter]
    found = [Method("parallel", Pass(n, overlap=1.0)) for n in sorted({*PARALLEL, marks[-1]})] + found
    found += [Method("sequential, random order", replace(start, order="random"))]
    other = 0.0 if start.overlap else 0.5
    beside = [longest(other, budget, free) for budget in (marks[0], marks[-1])]
    found += [Method(f"sequential, overlap {other:g}", one) for one in beside]
    found += [quarter, *(iterated("IPR", fraction, again) for fraction in FRACTIONS if fraction != QUARTER)]
    steps = max(WHOLE, again.steps)
    found += [iterated("whole image", 1.0, Pass(steps, overlap=1.0, level=level)) for level in LEVELS]
    found += [iterated("restart", 1.0, start)]
    found += [iterated("fixed regions", QUARTER, again, "fixed")]
    found += [iterated("least certain regions", QUARTER, again, "uncertain")]
    return [*found, iterated("regions in conflict", QUARTER, again, "conflict")]


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
        fixed |= {"fraction": method.fraction, "level": method.again.level, "again": method.again.steps}
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
        whole = [Pass(max(WHOLE, again.steps), overlap=1.0, level=level) for level in LEVELS]
        ways = [*(("IPR", fraction, again) for fraction in FRACTIONS), *(("whole image", 1.0, one) for one in whole)]
        for name, fraction, how in ways:
            (after,) = refine(self.sampler(1), real, free, 1, fraction, how)
            kept = rate(self.valid(after)[accepted])
            rows.append({"method": name, "fraction": fraction, "level": how.level, **kept})
        return rate(accepted), rows


def noted(file: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows by key, as a measurement that was stopped has left them; a line that was cut short counts for nothing."""
    found = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            found |= json.loads(line)
    return found


def measure(
    name: str, weights: Path, n: int, seed: int, data: str | None = None
) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """All figures of a benchmark, and some samples that were wrong first and right after IPR: before, after.

    While it lasts, finished methods are noted beside the model: a measurement that was killed goes on from them.
    """
    how, (made, source), load_before = benchmark(name), task(name, data), os.getloadavg()[0]
    model, config = load(weights / name)
    if source != config.get("handwriting", source):
        raise WinnowError(f"{weights / name}: learned from {config['handwriting']}, not {source}; give that")
    notes, rows = weights / f"{name}.state" / "rows.jsonl", []
    notes.parent.mkdir(exist_ok=True)
    known, spec = noted(notes), [digest(weights / name), n, seed, device(), torch.get_num_threads()]
    for given in how.given:
        bench = Bench(model, made, n, seed, given)
        # What matters most; the controls are compared where nothing is given.
        plan = methods(how, int(bench.free[0].sum()), brief=given > 0)
        with bar(f"measure {name}, {given:.0%} given", len(plan)) as advance, open(notes, "a") as file:
            file.write("\n" if file.tell() else "")  # ends a line that was cut short
            for method in plan:
                key = ids.digest([*spec, given, asdict(method)])
                shown = not given and (method.name, method.fraction) == ("IPR", QUARTER)  # its samples are wanted
                if key not in known or shown:
                    known[key] = []
                    for row, x in bench.run(method):
                        known[key].append(row)
                        if shown:
                            after = x
                    file.write(json.dumps({key: known[key]}) + "\n")
                    file.flush()
                rows += known[key]
                advance()
    hard = Bench(model, made, n, seed)
    ceiling, retention = hard.retention(how.again)
    before = hard.start(how.start)[0]
    mended = np.flatnonzero(~hard.valid(before) & hard.valid(after))[:SHOWN]
    figures = {
        "n": n, "seed": seed, "handwriting": source, "checker": made.figures(), "ceiling": ceiling,
        "retention": retention, "rows": rows, "model": config, "machine": machine(), "device": device(),
        "threads": torch.get_num_threads(), "load_before": round(load_before, 2),
    }  # fmt: skip
    shutil.rmtree(notes.parent)
    return figures, hard.images(before)[mended], hard.images(after)[mended]
