"""Metrics as people read them: their names, their groups, their figures, and which way is better."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from jobs.evaluate import LOOKS
from jobs.guard import DISTANCES
from jobs.recipe import Recipe
from jobs.select import choosing

HEADLINES = ("judge_accuracy", "fd_real", "fd_d0", "diversity")
NAMES = {"judge_accuracy": "Judged accuracy", "diversity": "Diversity within a prompt"}
MEASURES = {
    "fd": "Fréchet distance to", "kid": "Kernel distance (KID) to", "cmmd": "CMMD to", "density": "Density among",
    "coverage": "Coverage of",
}  # fmt: skip
TARGETS = {"real": "real images", "d0": "D₀"}
GROUPS = ("What decides", "Scores", "Other distances", "Signs of a loop that wins its score and loses its aim")
Figure = dict[str, Any]  # value, ci_low, ci_high, n


def name_of(metric: str) -> str:
    """A metric's name for people."""
    if metric.startswith("win_rate:"):
        by = metric.removeprefix("win_rate:")
        return f"Win rate over the base, {'judged' if by == 'judge_accuracy' else f'by {by}'}"
    if metric.startswith("agreement:"):
        return f"Agreement with {metric.removeprefix('agreement:')}"
    head, _, space = metric.partition("@")
    measure, _, target = head.partition("_")
    name = f"{MEASURES[measure]} {TARGETS[target]}" if measure in MEASURES and target in TARGETS else NAMES.get(head)
    return metric if name is None else name + (f", {space}" if space else "")


def percent(metric: str) -> bool:
    """Whether a metric is a share."""
    return metric == "judge_accuracy" or metric.startswith(("win_rate:", "coverage_"))


def shown(metric: str, value: float | None, digits: int = 4) -> str:
    """A figure as people read it: shares in percent, others with so many digits."""
    if value is None or not math.isfinite(value):
        return "–"
    if percent(metric):
        return f"{100 * value:.1f}\N{NO-BREAK SPACE}%"
    text = f"{value:.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"
    return text.replace("-", "−")


def half_width(figure: Figure) -> float | None:
    """Half the 95 % interval's width. Bootstrapped Fréchet distances are biased upwards, so that their interval can
    leave out the value: its width is what says how sure the value is."""
    low, high = figure["ci_low"], figure["ci_high"]
    return None if low is None or high is None else abs(high - low) / 2


def better(metric: str, change: float) -> bool | None:
    """Whether a change is for the better; None where neither direction is."""
    neither = metric.partition("@")[0] in ("diversity", *LOOKS) or "_d0" in metric or metric.startswith("agreement:")
    if neither or not change:
        return None
    return change < 0 if metric.startswith(DISTANCES) else change > 0


def noise(before: Figure, after: Figure) -> float | None:
    """Half the width of the 95 % interval of a difference; None where one of the two has none."""
    widths = half_width(before), half_width(after)
    return None if None in widths else math.hypot(*widths)  # type: ignore[arg-type]


def judgement(metric: str, before: Figure, after: Figure) -> str:
    """Whether a metric got better or worse, or by less than its noise."""
    change, error = after["value"] - before["value"], noise(before, after)
    if error is not None and abs(change) <= error:
        return "within noise"
    neither = "higher" if change > 0 else "lower" if change < 0 else "unchanged"
    word = {True: "better", False: "worse", None: neither}[better(metric, change)]
    return word if error is not None else f"{word}, of unknown certainty"


def grouped(found: Iterable[str], recipe: Recipe | None) -> list[tuple[str, dict[str, str]]]:
    """The metrics in groups with their headings, each metric with what it is; what decides stands first."""
    groups: list[tuple[str, dict[str, str]]] = [(title, {}) for title in GROUPS]
    roles = {metric: _role(metric, recipe) for metric in found}
    order = {"training": 1, "held-out": 2, "scorer": 3}

    def place(metric: str) -> tuple[int, int, str]:
        headline = HEADLINES.index(metric) if metric in HEADLINES else len(HEADLINES)
        return headline, metric.startswith("win_rate:") * 9 + order.get(roles[metric].split(" ")[0], 0), metric

    for metric in sorted(roles, key=place):
        decides = recipe is not None and recipe.guard.enabled and metric == recipe.guard.metric
        role = f"{roles[metric]}; the guard decides by it" if decides else roles[metric]
        groups[0 if decides else _group(metric, role)][1][metric] = role
    return [(title, metrics) for title, metrics in groups if metrics]


def _group(metric: str, role: str) -> int:
    """Its place in GROUPS."""
    if metric in HEADLINES or (metric.startswith("win_rate:") and role.startswith("held-out")):
        return 0
    if metric in LOOKS or metric.startswith("agreement:"):
        return 3
    head = metric.partition("@")[0]
    return 2 if head == "diversity" or head.partition("_")[0] in MEASURES else 1


def _role(metric: str, recipe: Recipe | None) -> str:
    if metric == "judge_accuracy":
        return "held-out judge; higher is better"
    if metric in LOOKS:
        return "mean over the images, of 1"
    if metric.startswith("agreement:"):
        return "rank correlation with the score that selects, within a prompt"
    head = metric.partition("@")[0]
    if head == "diversity":
        return "variance among images of one prompt"
    if head.partition("_")[0] in MEASURES:
        better = "lower is better" if head.startswith(DISTANCES) else "higher is better"
        return "how far from the base's own images" if head.endswith("_d0") else better
    scorer = metric.removeprefix("win_rate:")
    if recipe and scorer in choosing(recipe):
        kind = "training scorer"
    elif recipe and (scorer in recipe.evaluate.scorers or scorer == "judge_accuracy"):
        kind = "held-out judge" if scorer == "judge_accuracy" else "held-out scorer"
    else:
        kind = "scorer"
    return f"{kind}; {'50 % is no difference' if scorer != metric else 'higher is better'}"
