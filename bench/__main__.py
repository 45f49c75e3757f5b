"""Run every benchmark and write results/bench.json and results/bench.md."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bench import distance, drift, export, generation, index, large, policies, scale, training
from jobs.machine import machine

SUITES = {
    "distance": distance.run, "index": index.run, "drift": drift.run, "policies": policies.run, "scale": scale.run,
    "generation": generation.run, "export": export.run, "training": training.run, "large": large.run,
}  # fmt: skip
LIBRARIES = (
    "numpy", "scipy", "scikit-learn", "torch", "faiss-cpu", "diffusers", "pandas", "polars", "pyarrow", "duckdb",
    "datasets", "webdataset",
)  # fmt: skip
PLOTS = {"scale": scale.plot}  # from a suite's rows to an SVG of them


def main(names: list[str], out: Path) -> None:
    """Run the named suites (all without a name); results of others stay in the files."""
    unknown = [name for name in names if name not in SUITES]
    if unknown:
        sys.exit(f"bench: no suite {unknown[0]!r}; there are {', '.join(SUITES)}")
    file = out / "bench.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    about = {"machine": machine(), "gflops": round(_rate()), "libraries": _libraries()}
    out.mkdir(exist_ok=True)
    for name in names or SUITES:
        load, rows = os.getloadavg()[0], [asdict(r) for r in SUITES[name]()]
        if not rows:  # what cannot be measured here stays as it was
            continue
        found[name] = about | {"load_before": round(load, 2), "rows": rows}
        file.write_text(json.dumps(found, indent=1) + "\n")
        for row in rows:
            print(f"{row['name']}: {row['ratio']:.3f} ({row['what']})", flush=True)
        if name in PLOTS:
            (out / f"bench-{name}.svg").write_bytes(PLOTS[name](rows))
            found[name]["plot"] = f"bench-{name}.svg"
    file.write_text(json.dumps(found, indent=1) + "\n")
    (out / "bench.md").write_text(page(found))


def page(found: dict[str, Any]) -> str:
    """All suites as Markdown."""
    lines = ["# Benchmarks", "", "Made by `make bench`: medians over turns, ours and theirs in one run. What takes "
             "minutes, and peaks of memory, have one turn.", ""]  # fmt: skip
    lines += ["| | what | | ours | theirs | ours / theirs | from – to | turns |", "|---|---|---|---|---|---|---|---|"]
    for suite in found.values():
        for r in suite["rows"]:
            lines.append(
                f"| {r['name']} | {r['what']} | {r.get('unit', 's')} | {r['ours']:.3g} | {r['theirs']:.3g} | "
                f"{r['ratio']:.3f} | {r['low']:.3f} – {r['high']:.3f} | {r['turns']} |"
            )
    for name, suite in found.items():
        lines += ["", f"![{name}]({suite['plot']})"] if "plot" in suite else []
    with_libraries: dict[str, list[str]] = {}
    lines.append("")
    for name, suite in found.items():
        rate = f", {suite['gflops']} GFLOP/s in a product of float32 matrices" if "gflops" in suite else ""
        lines.append(f"`{name}` on {suite['machine']}{rate}.")
        with_libraries.setdefault(suite.get("libraries", ""), []).append(f"`{name}`")
    lines += [f"\n{', '.join(names)} with {said}." for said, names in with_libraries.items() if said]
    return "\n".join(lines) + "\n"


def _rate() -> float:
    """10^9 float32 operations a second, in the best of a few matrix products on all cores."""
    x, took = np.ones((3000, 3000), np.float32), []
    for _ in range(5):
        began = time.perf_counter()
        x @ x
        took.append(time.perf_counter() - began)
    return 2 * 3000**3 / min(took) / 1e9


def _libraries() -> str:
    return ", ".join(f"{name} {version(name)}" for name in LIBRARIES)


if __name__ == "__main__":
    main(sys.argv[1:], Path("results"))
