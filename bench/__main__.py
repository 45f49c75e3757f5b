"""Run every benchmark and write results/bench.json and results/bench.md."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import distance, export, generation, index, large, scale, training
from jobs.machine import machine

SUITES = {
    "distance": distance.run, "index": index.run, "scale": scale.run, "generation": generation.run,
    "export": export.run, "training": training.run, "large": large.run,
}  # fmt: skip


def main(names: list[str], out: Path) -> None:
    """Run the named suites (all without a name); results of others stay in the files."""
    unknown = [name for name in names if name not in SUITES]
    if unknown:
        sys.exit(f"bench: no suite {unknown[0]!r}; there are {', '.join(SUITES)}")
    file = out / "bench.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    for name in names or SUITES:
        load, rows = os.getloadavg()[0], [asdict(r) for r in SUITES[name]()]
        if not rows:  # what cannot be measured here stays as it was
            continue
        found[name] = {"machine": machine(), "load_before": round(load, 2), "rows": rows}
        for row in rows:
            print(f"{row['name']}: {row['ratio']:.3f} ({row['what']})", flush=True)
    out.mkdir(exist_ok=True)
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
    lines += ["", *(f"`{name}` on {suite['machine']}." for name, suite in found.items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:], Path("results"))
