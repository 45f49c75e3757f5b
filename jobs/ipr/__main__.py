"""``python -m jobs.ipr sudoku4``: measure benchmarks with the models that ship, or train them anew first."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jobs.ipr import WEIGHTS
from jobs.ipr.benchmarks import BENCHMARKS, benchmark, build
from jobs.ipr.measure import measure
from jobs.ipr.page import keep
from jobs.progress import say
from schemas.errors import WinnowError


def main(words: list[str] | None = None) -> int:
    """Train where there is no model or ``--train`` asks for it, measure, and write the results; the exit status."""
    asked = argparse.ArgumentParser("python -m jobs.ipr", description=__doc__)
    asked.add_argument("benchmarks", nargs="*", help=f"of {', '.join(BENCHMARKS)}; none: those whose models are there")
    asked.add_argument("--data", help="handwriting, an .npz with images and labels; without: scikit-learn's digits")
    asked.add_argument("--train", action="store_true", help="train anew; a training that was stopped goes on")
    asked.add_argument("--only-train", action="store_true", help="and measure nothing")
    asked.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the models")
    asked.add_argument("--samples", type=int, default=512)
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--threads", type=int, help="of torch; without: what it takes by itself")
    asked.add_argument("--out", type=Path, default=Path("results"))
    given = asked.parse_args(words)
    import torch

    if given.threads:
        torch.set_num_threads(given.threads)
    try:
        there = [name for name in BENCHMARKS if (given.weights / name / "config.json").exists()]
        for name in given.benchmarks or there:
            benchmark(name)
            if given.train or given.only_train or name not in there:
                build(name, given.data, given.seed, given.weights)
            if not given.only_train:
                page = keep(name, *measure(name, given.weights, given.samples, given.seed, given.data), given.out)
                say(f"{name}: {page}")
    except WinnowError as error:
        say(f"ipr: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
