"""The benchmarks by name: how each model is built and trained, and how its samples are drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jobs.ipr.digits import Digits, slices
from jobs.ipr.model import Shape
from jobs.ipr.pixels import EvenPixels
from jobs.ipr.polygons import Polygons
from jobs.ipr.sampler import Pass
from jobs.ipr.sudoku import CELL, Sudoku
from jobs.ipr.train import Task, Training, train
from schemas.errors import WinnowError


@dataclass(frozen=True)
class Benchmark:
    """``task`` from handwriting; how the ``start`` of a sample is drawn, and how regions are drawn ``again``; how many
    ``iterations`` of IPR with a quarter of the regions; every method is compared at the evaluations that these take;
    ``given``: shares of the regions that are given, 0 is hard."""

    task: Callable[[dict[str, Digits]], Task]
    shape: Shape
    training: Training
    start: Pass
    again: Pass
    iterations: tuple[int, ...]
    given: tuple[float, ...] = (0.0,)


# Where regions are drawn side by side, steps and overlap are near those of the published code.
BENCHMARKS = {
    "sudoku4": Benchmark(
        lambda hand: Sudoku(2, hand), Shape(), Training(5000), Pass(3), Pass(2), (4, 8, 16, 32), (0.0, 0.25),
    ),
    "even-pixels": Benchmark(
        lambda _: EvenPixels(), Shape(), Training(5000), Pass(20, overlap=0.9), Pass(20, overlap=0.9), (2, 4, 8),
    ),
    "polygons": Benchmark(
        Polygons, Shape(), Training(8000), Pass(10, overlap=0.9), Pass(10, overlap=0.9), (2, 4, 8),
    ),
    # For a GPU: two and a half minutes of an H100. The class loss is what makes structure appear at this size.
    "sudoku9": Benchmark(
        lambda hand: Sudoku(3, hand), Shape(256, 8, 8, classes=9),
        Training(4800, batch=512, lr=6e-4, warmup=500, ema=0.999, kind=0.1), Pass(3), Pass(2), (4, 8),
        (0.0, 0.4, 0.75),
    ),
}  # fmt: skip


def benchmark(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        raise WinnowError(f"ipr: unknown benchmark {name!r}; allowed are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def task(name: str, data: str | None = None) -> tuple[Task, str]:
    """The benchmark's images and checker, and where its handwriting is from: an .npz of MNIST's kind, or scikit-learn's
    digits where ``data`` is empty. Whatever the seed of a training, it is cut into the same slices, so that no model is
    measured on digits that it has seen."""
    from jobs.world.build import digits

    images, labels, source = digits(data)
    return benchmark(name).task(slices(images, labels, CELL, 0)), source


def build(name: str, data: str | None, seed: int, to: Path) -> None:
    """Train the benchmark's model into the checkpoint folder ``to``/``name``."""
    (made, source), how = task(name, data), benchmark(name)
    command = f'make benchmark-ipr ARGS="{name} --train{" --data " + source if data else ""}"'
    train(made, how.shape, how.training, seed, to / name, {"handwriting": source, "made_by": command})
