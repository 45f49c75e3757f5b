"""The benchmarks' results as files: ipr.json, ipr.md, a curve and a picture of samples for each benchmark."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jobs.ipr.benchmarks import BENCHMARKS
from jobs.ipr.grid import Grid
from jobs.plots import Line, curve

#: What the curve shows, by method, fraction and level.
DRAWN = {
    "sequential": ("sequential", None, None),
    "IPR": ("IPR", 0.25, 1.0),
    "whole image": ("whole image", 1.0, 0.5),
}
#: What IPR is compared with in a sentence, the best row of each.
RIVALS = (
    "parallel", "sequential", "whole image", "restart", "fixed regions", "least certain regions", "regions in conflict"
)  # fmt: skip
ZOOM, WIDE = 4, 64  # of the picture; half of it for images of more pixels
HEAD = """# Iterative partial refinement

Made by `make benchmark-ipr`. Valid: share of the samples that obey the benchmark's rule, ± its standard error, with its
95 % Wilson interval; evaluations: of the model, for one sample; seconds: for all samples, on the machine named. Every
refinement begins with the same samples, those of "sequential". The ceiling is the share of real images that the checker
accepts; retention, how many of these are still valid after one iteration. Distinct: different boards among the valid
ones. Unlike: share of the cells that lie further from every digit of the classifier's than 99 % of real ones do.

| method | what it does |
|---|---|
| parallel | all regions at one noise level |
| sequential | one region after the other, or beside the last part of it; the most certain first |
| IPR | each iteration sets a random share of the regions to noise and draws them again among the others |
| whole image | each iteration sets the whole image to a noise level below 1 and denoises it: a control |
| restart | each iteration draws everything anew, sequentially: a control |
| fixed regions | IPR, but the same regions in each iteration: a control |
| least certain regions | IPR of the regions that the model is least sure of; a look costs one evaluation |
| regions in conflict | IPR of the regions that differ most from what the model expects there; the same cost |
"""
ABSENT = """## {name}: not measured

No model of it ships: `make benchmark-ipr ARGS="{name} --train"` trains one and measures it.
"""


def keep(name: str, figures: dict[str, Any], before: np.ndarray, after: np.ndarray, out: Path) -> Path:
    """Write one benchmark's figures beside those that ``out``/ipr.json has, and the page anew; returns the page."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "ipr.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    found[name] = figures
    found = {known: found[known] for known in BENCHMARKS if known in found}
    file.write_text(json.dumps(found, indent=1) + "\n")
    (out / f"ipr-{name}.svg").write_bytes(picture(name, figures))
    if len(before):
        sheet(before, after, Grid(**figures["model"]["grid"])).save(out / f"ipr-{name}.png", optimize=True)
    (out / "ipr.md").write_text(page(found, out))
    return out / "ipr.md"


def sheet(before: np.ndarray, after: np.ndarray, grid: Grid) -> Image.Image:
    """Images uint8 [N, H, W, C] above what became of them, enlarged; cells of a board with lines between them."""
    rows = []
    for side in (before, after):
        if grid.box:
            for axis, count in ((1, grid.rows), (2, grid.columns)):
                side = np.insert(side, grid.patch * np.arange(1, count), 128, axis)
        side = np.pad(side, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=128)
        rows.append(np.concatenate(list(side), 1))
    zoom = ZOOM if grid.shape[1] <= WIDE else ZOOM // 2
    whole = np.concatenate(rows).repeat(zoom, 0).repeat(zoom, 1)
    return Image.fromarray(whole[..., 0] if whole.shape[-1] == 1 else whole)


def picture(name: str, figures: dict[str, Any]) -> bytes:
    """An SVG of the valid share against evaluations where nothing is given; bands are one standard error."""
    lines = []
    for label, kind in DRAWN.items():
        rows = [row for row in figures["rows"] if not row["given"] and _kind(row) == kind]
        if kind[1] is not None:  # from the samples that it begins with
            rows = [_first(figures), *rows]
        x, y, half = ([row[key] for row in rows] for key in ("evaluations", "rate", "se"))
        lines.append(Line(label, x, y, half))
    subtitle = f"{name}, by evaluations a sample; ± standard error"
    uri = curve("valid, %", subtitle, lines, figures["ceiling"]["rate"], 100.0, "")
    return base64.b64decode(uri.partition(",")[2])


def _first(figures: dict[str, Any]) -> dict[str, Any]:
    """The row of the first pass that every refinement begins with."""
    rows = [row for row in figures["rows"] if not row["given"] and row["method"] == "sequential"]
    return min(rows, key=lambda row: row["evaluations"])


def _kind(row: dict[str, Any]) -> tuple[str, float | None, float | None]:
    return row["method"], row.get("fraction"), row.get("level")


def _share(row: dict[str, Any]) -> str:
    return f"{100 * row['rate']:.1f} ± {100 * row['se']:.1f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def findings(one: dict[str, Any]) -> list[str]:
    """In a sentence for each share of given regions: IPR with a quarter, after its last iteration, against the best row
    of every other method with at most as many evaluations."""
    lines = []
    for given in sorted({row["given"] for row in one["rows"]}):
        rows = [row for row in one["rows"] if row["given"] == given]
        ours = max((row for row in rows if _kind(row) == DRAWN["IPR"]), key=lambda row: row["evaluations"])
        parts = []
        for method in RIVALS:
            others = [row for row in rows if row["method"] == method and row["evaluations"] <= ours["evaluations"]]
            if others:
                best = max(others, key=lambda row: row["rate"])
                change, error = 100 * (ours["rate"] - best["rate"]), 100 * math.hypot(ours["se"], best["se"])
                level = f" at level {best['level']}" if method == "whole image" else ""
                theirs = f"{method}{level} ({_share(best)}, {best['evaluations']})"
                parts.append(f"{change:+.1f} ± {error:.1f} over {theirs}")
        lines.append(
            f"- {given:.0%} given, {ours['evaluations']} evaluations: IPR is valid in {_share(ours)} %. In points, "
            f"against the best row of each other method (its share, its evaluations): {'; '.join(parts)}."
        )
    return lines


def choices(one: dict[str, Any]) -> list[str]:
    """In a sentence for each way to choose regions beyond the source: points over the uniform choice, where nothing is
    given, at each of its numbers of evaluations or a little fewer."""
    rows = [row for row in one["rows"] if not row["given"]]
    lines = []
    for method in ("least certain regions", "regions in conflict"):
        parts = []
        for uniform in (row for row in rows if _kind(row) == DRAWN["IPR"]):
            some = [row for row in rows if row["method"] == method and row["evaluations"] <= uniform["evaluations"]]
            if some:
                ours = max(some, key=lambda row: row["evaluations"])
                change, error = 100 * (ours["rate"] - uniform["rate"]), 100 * math.hypot(ours["se"], uniform["se"])
                parts.append(f"{change:+.1f} ± {error:.1f} ({ours['evaluations']} and {uniform['evaluations']})")
        if parts:
            said = "; ".join(parts)
            lines.append(f"- {method.capitalize()} instead of random ones, in points (evaluations): {said}.")
    return lines


def page(found: dict[str, Any], out: Path) -> str:
    """All benchmarks as Markdown."""
    lines = [HEAD]
    for name, one in found.items():
        how, model = one["model"]["training"], one["model"]["figures"]
        checker = ", ".join(
            f"{key.replace('_', ' ')} {100 * value:.1f} %" for key, value in one["checker"].items() if value <= 1
        )
        lines += [
            f"## {name}", "", f"![valid share against evaluations](ipr-{name}.svg)", "",
            *findings(one), *choices(one),
            f"- Model: {model['parameters']:,} parameters, {how['steps']:,} steps of {how['batch']} images, "
            f"{_minutes(how, model)}, learned from {one['handwriting']}.",
            f"- Checker on what nobody has seen: {checker or 'exact'}. "
            f"Ceiling: {_share(one['ceiling'])} % of {one['ceiling']['n']} real images.",
            "- Retention: " + "; ".join(
                f"{row['method']} {row['level'] if row['method'] == 'whole image' else row['fraction']:g}: "
                f"{_share(row)} %" for row in one["retention"]
            ) + ".",
            f"- {one['n']} samples, {one['device']}, {one['threads']} thread{'s' * (one['threads'] > 1)}; "
            f"{one['machine']}; load {one['load_before']} when it began.",
            "",
            "| given | method | drawn again | level | iterations | evaluations | valid, % | 95 % interval | distinct "
            "| unlike | s |",
            "|" + "---|" * 11,
        ]  # fmt: skip
        for row in one["rows"]:
            lines.append(
                f"| {row['given']:.0%} | {row['method']} | {row.get('fraction', '')} | {row.get('level', '')} | "
                f"{row.get('iterations', '')} | "
                f"{row['evaluations']} | {_share(row)} | {100 * row['low']:.1f} – {100 * row['high']:.1f} | "
                f"{row.get('distinct', '')} | {_percent(row.get('unlike'))} | {row['seconds']:.0f} |"
            )
        if (out / f"ipr-{name}.png").exists():
            lines += ["", "Samples that were wrong first (above), and the same after IPR (below):", ""]
            lines += [f"![samples before and after](ipr-{name}.png)"]
        lines.append("")
    lines += [ABSENT.format(name=name) for name in BENCHMARKS if name not in found]
    return "\n".join(lines).rstrip() + "\n"


def _minutes(how: dict[str, Any], model: dict[str, Any]) -> str:
    """The time of a training, or what the part since it went on makes of the whole, and what it took that time of."""
    timed = how["steps"] - model["timed_from_step"]
    on_gpu = model["device"] == "cuda"
    minutes = model["seconds" if on_gpu else "cpu_seconds"] / 60 * how["steps"] / max(1, timed)
    threads = "a GPU" if on_gpu else f"{model['threads']} thread{'s' * (model['threads'] > 1)}"
    part = f" (by the last {timed:,} steps)" if model["timed_from_step"] else ""
    return f"{minutes:.1f} {'' if on_gpu else 'CPU-'}minutes{part} on {threads}"
