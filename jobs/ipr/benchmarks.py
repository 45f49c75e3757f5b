"""The benchmarks by name: how each model is built and trained, and with how many evaluations its samples are drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jobs.ipr.digits import Digits, slices
from jobs.ipr.model import Shape
from jobs.ipr.pixels import EvenPixels
from jobs.ipr.polygons import Polygons
from jobs.ipr.sudoku import CELL, Sudoku
from jobs.ipr.train import Task, Training, train
from schemas.errors import WinnowError


@dataclass(frozen=True)
class Benchmark:
    """``task`` from handwriting; ``steps`` of a region in the first pass, ``again`` in a refinement; ``budgets``:
    evaluations a sample at which methods are compared; ``given``: shares of the regions that are given, 0 is hard;
    ``brief``: only the main methods, where evaluations are dear."""

    task: Callable[[dict[str, Digits]], Task]
    shape: Shape
    training: Training
    steps: int
    again: int
    budgets: tuple[int, ...]
    given: tuple[float, ...] = (0.0,)
    brief: bool = False


BENCHMARKS = {
    "sudoku4": Benchmark(
        lambda hand: Sudoku(2, hand), Shape(), Training(5000), 3, 2, (112, 176, 304), (0.0, 0.25),
    ),
    "even-pixels": Benchmark(
        lambda _: EvenPixels(), Shape(128), Training(2500, batch=64), 4, 4, (192,), brief=True,
    ),
    "polygons": Benchmark(
        Polygons, Shape(), Training(2500, batch=64), 3, 3, (216,), brief=True,
    ),
    # For a GPU: the class loss is what makes structure appear at this size.
    "sudoku9": Benchmark(
        lambda hand: Sudoku(3, hand), Shape(384, 8, 8, classes=9),
        Training(15000, batch=2048, lr=5e-4, warmup=500, ema=0.999, kind=0.1), 3, 2, (405, 567, 891), (0.0, 0.4, 0.75),
    ),
}  # fmt: skip


def benchmark(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        raise WinnowError(f"ipr: unknown benchmark {name!r}; allowed are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def task(name: str, data: str | None = None, seed: int = 0) -> tuple[Task, str]:
    """The benchmark's images and checker, and where its handwriting is from: an .npz of MNIST's kind, or scikit-learn's
    digits where ``data`` is empty."""
    from jobs.world.build import digits

    images, labels, source = digits(data)
    return benchmark(name).task(slices(images, labels, CELL, seed)), source


def build(name: str, data: str | None, seed: int, to: Path) -> None:
    """Train the benchmark's model into the checkpoint folder ``to``/``name``."""
    made, how = task(name, data, seed)[0], benchmark(name)
    train(made, how.shape, how.training, seed, to / name)
