"""The benchmarks' results as files: figures as JSON, tables as Markdown, and pictures before and after."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jobs.benchmarks.methods import BEST, GUIDED, STEPS
from jobs.benchmarks.repair import EVALUATIONS

Found = dict[str, Any]
ZOOM = 2  # of the pictures
#: The published gains that are to be reached, of rejection with iterative refinement over one pass.
AIM = {"fd_change": -0.079, "score_change": 0.034, "preferred": 0.65}

REFINE = """# Rejection and refinement at equal evaluations

Made by `make benchmark-refine`: the embedded default, a row a way to spend the network's evaluations. All begin
with the same noise where they can: {n} images, {rounds} tries at each caption. The base draws without guidance in
{steps} steps, one evaluation each; guided rows (guidance {guidance:g}) take two a step. Selection, acceptance and
rejection are by `scene-clip` where nothing else is said; no row selects by what is measured here. Evaluations: of
the denoiser, for one sample that is kept, those of rejected candidates, of refinements that were not accepted and
of the scorer `guidance-gap` (10 an image) counted. Decoding and other scorers are not.

Judged: share that the judge finds right. Score: the mean probability that the held-out reader gives to the caption.
Distance: Fréchet distance to real scenes. Preferred: how often the judge prefers the image to the other of the same
caption and try, where one is right and the other wrong; beside it with the pairs that it finds alike as half a win.
Brackets: 95 % intervals, of bootstraps over captions, for the distance over the images of each caption.
"""
LATE = """# Late-step models

Made by `make benchmark-late`: U-Nets of the base's shape, trained from random weights on a window of the timesteps
(of 1000) through Winnow's trainer, beside the base's own text encoder and autoencoder, on {scenes:,} scenes of the
handwriting that the base was trained on ({handwriting}). A model of two windows spends half of its steps on each,
the second from the weights of the first, and each window keeps its own. The base's U-Net and text encoder took
{base:,} steps of batch 128.

Repaired: of images that the judge found wrong, the share that it finds right afterwards, ± its standard error.
Damaged: real scenes of handwriting that nobody has seen, right before the damage. Drawn wrong: the base's own
images. Drawn right: the share of the base's right images that are still right, a control. Each model repairs with
{evaluations} evaluations: noised to the level (1: pure noise), and denoised. Changed: mean difference of a pixel's
channel, of 255, outside of what was damaged.
"""


def _write(name: str, found: Found, text: str, picture: np.ndarray, out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    Image.fromarray(picture).save(out / f"{name}.png", optimize=True)
    (out / f"{name}.md").write_text(text)
    return out / f"{name}.md"


def sheet(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of images uint8 [K, H, W, 3], one below the other, with a grey line between, enlarged."""
    framed = [np.pad(row, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=128) for row in rows]
    return np.concatenate([np.concatenate(list(row), 1) for row in framed]).repeat(ZOOM, 0).repeat(ZOOM, 1)


def _percent(interval: Sequence[float] | None, signed: bool = False) -> str:
    if interval is None:
        return ""
    value, low, high = (f"{100 * x:{'+' if signed else ''}.1f}" for x in interval)
    return f"{value} [{low}, {high}]"


def keep_refine(found: Found, pictures: np.ndarray, out: Path) -> Path:
    """Write refine.json, refine.md and refine.png; returns the page."""
    return _write("refine", found, refine(found), sheet(pictures), out)


def refine(found: Found) -> str:
    """The figures as Markdown, a table a budget."""
    rows = found["rows"]
    lines = [REFINE.format(n=rows[0]["n"], rounds=found["rounds"], steps=STEPS, guidance=GUIDED["guidance"])]
    for budget, best in BEST.items():
        lines += [
            f"## {budget} evaluations", "",
            f"| method | evaluations | judged, % | score, % | distance | preferred to one pass, % | with ties | "
            f"preferred to {best}, % | with ties | score, change % | distance, change % |", "|" + "---|" * 11,
        ]  # fmt: skip
        for row in rows:
            if row["budget"] not in (STEPS, budget):
                continue
            one, other = row.get("one"), row.get("best")
            value, low, high = row["fd_real"]
            cells = [row["method"], f"{row['evaluations']:.1f}", _percent(row["accuracy"]), _percent(row["score"]),
                     f"{value:.1f} [{low:.1f}, {high:.1f}]"]  # fmt: skip
            for pair in (one, other):
                cells += [_percent(pair["preferred_of_decided"]), _percent(pair["preferred"])] if pair else ["", ""]
            cells += [_percent(one["score_change"], True), _percent(one["fd_change"], True)] if one else ["", ""]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    lines += [aim(rows), "", "Images of one pass; then the best of 4; then the best of 3, refined (level 0.5):", "",
              "![images of one pass, selected, and refined](refine.png)", "", _where(found)]  # fmt: skip
    return "\n".join(lines) + "\n"


def reached(row: Found) -> bool:
    """Whether a row gains at least what is published over one pass, in all three."""
    one = row.get("one")
    return bool(
        one and one["fd_change"][0] <= AIM["fd_change"] and one["score_change"][0] >= AIM["score_change"]
        and one["preferred"][0] >= AIM["preferred"]
    )  # fmt: skip


def aim(rows: list[Found]) -> str:
    """One sentence: which rows gain what is published."""
    names = [f"{row['method']} ({row['evaluations']:.0f})" for row in rows if reached(row)]
    return (
        "Published gains of rejection with iterative refinement over one pass: distance −7.9 %, score +3.4 %, "
        "preferred 65 %. All three, with ties as half a win, are reached here by "
        f"{len(names)} of {len(rows) - 1} rows: {'; '.join(names) or 'none'}."
    )


def _where(found: Found) -> str:
    return (
        f"Measured on {found['machine']}, {found['device']}, {found['threads']} threads; the last run took "
        f"{found['seconds']:,} s, without what an earlier one had left."
    )


def keep_late(found: Found, sheets: list[np.ndarray], out: Path) -> Path:
    """Write late.json, late.md and late.png; returns the page."""
    return _write("late", found, late(found), sheet([row for one in sheets for row in one]), out)


def late(found: Found) -> str:
    """The figures as Markdown: the models, what they repair, and what they change."""
    from jobs.world.build import STEPS as BASE

    rows = found["rows"]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    by = {(row["way"], row["case"]): row for row in rows}
    text = LATE.format(**found, base=BASE["generator"], evaluations=EVALUATIONS)
    lines = [text, "## Models", "", "| model | windows, in order | steps | batch | CPU-seconds |", "|" + "---|" * 5]
    for name, model in found["models"].items():
        windows = ", ".join(f"[{low}, {high})" for low, high in model["windows"])
        lines.append(f"| {name} | {windows} | {model['steps']:,} | {model['batch']} | {model['cpu_seconds']:.0f} |")
    head = ["way", "evaluations", *(f"{case} ({by[rows[0]['way'], case]['n']})" for case in cases)]
    lines += ["", "## Repaired, %", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for way in dict.fromkeys(row["way"] for row in rows):
        mine = [by[way, case] for case in cases]
        cells = [f"{100 * row['share']:.1f} ± {100 * row['se']:.1f}" for row in mine]
        lines.append(f"| {way} | {mine[0]['evaluations']} | {' | '.join(cells)} |")
    outside = [case for case in cases if by[rows[0]["way"], case]["changed_outside"] is not None]
    head = ["way", *outside, *(f"{case}, everywhere" for case in cases if case not in outside)]
    lines += ["", "## Changed", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for way in dict.fromkeys(row["way"] for row in rows):
        cells = [f"{by[way, case]['changed_outside']:.1f}" for case in outside]
        cells += [f"{by[way, case]['changed']:.1f}" for case in cases if case not in outside]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    lines += ["", f"In threes, {'; '.join(cases)}: the images, repaired by the base (level 0.5), and by the model of "
              "both windows:", "", "![images before and after repair](late.png)", "", _where(found)]  # fmt: skip
    return "\n".join(lines) + "\n"
