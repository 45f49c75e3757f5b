"""``python -m jobs.benchmarks refine`` or ``late``: measure, and write results/refine.* or results/late.*."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from jobs.benchmarks import page
from jobs.devices import device
from jobs.machine import machine
from jobs.progress import say
from schemas.errors import WinnowError


def main(words: list[str] | None = None) -> int:
    """Measure one of them; what a run that was stopped has made is used again. The exit status."""
    asked = argparse.ArgumentParser("python -m jobs.benchmarks", description=__doc__)
    asked.add_argument("benchmark", choices=("refine", "late"))
    asked.add_argument("--store", type=Path, help="where images and models stay; without: runs/benchmark-NAME")
    asked.add_argument("--out", type=Path, default=Path("results"))
    asked.add_argument("--rounds", type=int, default=6, help="refine: tries at each prompt")
    asked.add_argument("--prompts", type=int, help="refine: how many; without: all")
    asked.add_argument("--data", help="late: handwriting, an .npz of images and labels; without: scikit-learn's digits")
    asked.add_argument("--steps", type=int, default=400, help="late: training steps of each model")
    asked.add_argument("--images", type=int, default=400, help="late: to be repaired, of each kind")
    asked.add_argument("--threads", type=int, default=1, help="of torch")
    given = asked.parse_args(words)
    import torch

    torch.set_num_threads(given.threads)
    home, begun = given.store or Path("runs") / f"benchmark-{given.benchmark}", time.perf_counter()
    told = {"machine": machine(), "device": device(), "threads": given.threads}
    try:
        if given.benchmark == "refine":
            from jobs.benchmarks import spend

            rows, pictures = spend.measure(home, given.rounds, given.prompts)
            found = told | {"rounds": given.rounds, "seconds": round(time.perf_counter() - begun), "rows": rows}
            say(f"refine: {page.keep_refine(found, pictures, given.out)}")
        else:
            from jobs.benchmarks import repair

            figures, sheets = repair.measure(home, given.data, given.steps, given.images)
            found = told | {"seconds": round(time.perf_counter() - begun), **figures}
            say(f"late: {page.keep_late(found, sheets, given.out)}")
    except WinnowError as error:
        say(f"{given.benchmark}: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
