"""``make study``: does the demo's effect hold over seeds and more rounds? Figures and plots into results/."""

from __future__ import annotations

import base64
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np

from jobs import recipe as recipes
from jobs.demo import play_arms
from jobs.plots import Line, curve
from jobs.progress import say
from jobs.summary import name_of, real_figures
from storage.query import arrow

METRICS = ("judge_accuracy", "fd_real", "fd_d0", "diversity")


def study(store: Path, seeds: int, rounds: int, out: Path, settings: list[tuple[list[str], Any]]) -> Path:
    """Play every arm ``rounds`` rounds for each seed, and write ``out``/study.json, study.md and a plot a metric.

    The guard judges but does not end a loop before its last round, so that what comes after the best round is
    seen, too. Returns the path of study.md.
    """
    all_rows, outcomes = [], []
    for seed in range(seeds):
        whole = [*settings, (["seed"], seed), (["rounds"], rounds), (["guard", "min_rounds"], rounds)]
        home = store / f"seed-{seed}"
        outcomes += [{"seed": seed} | vars(outcome) for outcome in play_arms(home, "embedded", whole)]
        rows = arrow(home, "SELECT arm, round, metric, value FROM evaluations ORDER BY ALL").to_pylist()
        all_rows += [{"seed": seed} | row for row in rows]
        say(f"study: seed {seed} done")
    for outcome in outcomes:
        outcome["model"] = Path(outcome["model"]).name
    table = summarise(all_rows)
    found = {"seeds": seeds, "rounds": rounds, "machine": machine(), "outcomes": outcomes, "table": table}
    out.mkdir(parents=True, exist_ok=True)
    (out / "study.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "study.md").write_text(page(found))
    for metric in METRICS:
        (out / f"study-{metric}.svg").write_bytes(picture(table, metric))
    return out / "study.md"


def machine() -> str:
    """What the figures were measured on, in words."""
    return f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}, Python {platform.python_version()}"


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard error over the seeds of every metric, by arm and round."""
    groups: dict[tuple[str, int, str], list[float]] = {}
    for row in rows:
        groups.setdefault((row["arm"], row["round"], row["metric"]), []).append(row["value"])
    return [
        {"arm": arm, "round": number, "metric": metric, "mean": float(np.mean(values)), "values": values,
         "se": float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None}
        for (arm, number, metric), values in sorted(groups.items())
    ]  # fmt: skip


def picture(table: list[dict[str, Any]], metric: str) -> bytes:
    """An SVG of one metric over the rounds, a line an arm, its band one standard error of the seeds."""
    lines = []
    for arm in sorted({row["arm"] for row in table}):
        rows = [row for row in table if row["arm"] == arm and row["metric"] == metric]
        values, halves = [row["mean"] for row in rows], [row["se"] or 0.0 for row in rows]
        lines.append(Line(arm, [row["round"] for row in rows], values, halves))
    ceiling = real_figures(recipes.load("embedded")).get(metric)
    uri = curve(name_of(metric), "mean over the seeds ± standard error", lines, ceiling)
    return base64.b64decode(uri.partition(",")[2])


def page(found: dict[str, Any]) -> str:
    """The study as Markdown: one table an arm, then how each loop ended."""
    rows = {(r["arm"], r["round"], r["metric"]): r for r in found["table"]}
    arms = sorted({r["arm"] for r in found["table"]})
    others = sorted({r["metric"] for r in found["table"]} - set(METRICS))
    metrics = [*METRICS, *(m for m in others if not m.startswith("win_rate:"))]
    lines = [
        "# Study: the embedded default",
        "",
        f"Made by `make study`: {found['seeds']} seeds, {found['rounds']} rounds, on {found['machine']}. "
        "Mean over the seeds ± standard error; a seed that was stopped counts as far as it came.",
        "",
        " ".join(f"![{name_of(metric)}](study-{metric}.svg)" for metric in METRICS),
    ]
    for arm in arms:
        lines += ["", f"## Arm {arm}", "", "| round | " + " | ".join(metrics) + " |", "|" + "---|" * (len(metrics) + 1)]
        for number in range(found["rounds"] + 1):
            cells = [_cell(rows.get((arm, number, metric)), found["seeds"]) for metric in metrics]
            lines.append(f"| {number} | " + " | ".join(cells) + " |")
    lines += ["", "## How the loops ended", ""]
    lines += ["| seed | arm | verdict | best round | reason |", "|---|---|---|---|---|"]
    for o in found["outcomes"]:
        lines.append(f"| {o['seed']} | {o['arm']} | {o['verdict']} | {o['best_round']} | {o['reason']} |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any] | None, seeds: int) -> str:
    """A mean with its standard error; of how many seeds, where some are not that far."""
    if row is None:
        return ""
    digits = 1 if abs(row["mean"]) >= 100 else 3
    spread = "" if row["se"] is None else f" ± {row['se']:.{digits}f}"
    some = "" if len(row["values"]) == seeds else f" ({len(row['values'])} of {seeds} seeds)"
    return f"{row['mean']:.{digits}f}{spread}{some}"
