"""The report: one HTML file that shows a store's run, and its figures as JSON."""

from __future__ import annotations

import base64
import io
import json
import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from jobs import plots
from jobs.candidates import candidates, histograms, lineage, selected
from jobs.evaluate import LOOKS
from jobs.guard import DISTANCES
from jobs.images import decode
from jobs.recipe import Recipe
from jobs.run import BASE
from jobs.select import selecting
from jobs.summary import (
    HEADLINES,
    MEASURES,
    Figure,
    Source,
    half_width,
    main_arm,
    name_of,
    opened,
    recipe_of,
    shown,
    summarise,
)
from schemas.errors import WinnowError
from storage.commit import write_file

TEMPLATES = Path(__file__).parent / "templates"
PROMPTS, ROUNDS, ARMS = 8, 8, 4  # at most that many are shown, so that the file stays small
PIXELATED, THUMB = 64, 144  # images up to the one side are shown pixel by pixel, larger ones are shrunk to the other


def report(store: Path) -> Path:
    """Write report.html and summary.json of the newest snapshot into the store; returns the report's path."""
    with opened(store) as source:
        summary = summarise(source)
        html = _render(source, summary, store)
    text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_file(source.store, "summary.json", text.encode())
    return write_file(source.store, "report.html", html.encode())


def _render(source: Source, summary: dict[str, Any], store: Path) -> str:
    main = main_arm(summary)
    recipe = recipe_of(source, main) if main else None
    columns, metrics = _columns(summary), _metrics(summary, recipe)
    sheet = _sheet(source, columns, recipe)
    rounds = thinned(selected(source, main), _best(summary["arms"].get(main, {})))
    chosen = [candidates(source, recipe, str(main), number) for number in rounds]
    galleries = [(one.round, one.gallery()) for one in chosen]
    kept = lineage(source, chosen)
    wanted = {tile["sample_id"] for row in sheet for tile in row["tiles"] if tile}
    wanted |= {tile["sample_id"] for _, shelves in galleries for _, tiles in shelves for tile in tiles}
    wanted |= {kept["sample"]["sample_id"]} if kept else set()
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.globals |= {"shown": shown, "name_of": name_of, "half": _half, "headlines": HEADLINES}
    return environment.get_template("report.html").render(
        summary=summary, main=main, facts=_facts(summary, main), columns=columns,
        metrics=metrics, curves=plots.curves(summary, metrics), changes=_changes(summary),
        judged=any(tile and tile["right"] is not None for row in sheet for tile in row["tiles"]),
        sheet=sheet, galleries=galleries, histograms=histograms(source, recipe, chosen), kept=kept,
        pictures=_pictures(source, wanted), store=shlex.quote(os.path.relpath(store) if _inside(store) else str(store)),
        recipe=yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True) if recipe else None,
    )  # fmt: skip


def _inside(store: Path) -> bool:
    return store.resolve().is_relative_to(Path.cwd())


def _half(metric: str, figure: Figure) -> str:
    half = half_width(figure)
    return "" if half is None else f"± {shown(metric, half, 3 if half >= 100 else 2)}"


def thinned(numbers: Sequence[int], best: int = 0) -> list[int]:
    """All of the rounds or, where they are many, some of them: the first, the best and the last always."""
    if len(numbers) <= ROUNDS:
        return list(numbers)
    spread = {numbers[round(i)] for i in np.linspace(0, len(numbers) - 1, ROUNDS - 1)}
    return sorted(spread if best not in numbers else {*spread, best})


def _best(arm: dict[str, Any]) -> int:
    """The round that the report marks: the best of a judged arm; 0 for none."""
    return arm["best_round"] or 0 if arm.get("judged") else 0


# --- what was measured -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """One model: the base, or that of one round of one arm; ``first`` of its arm's."""

    arm: str
    round: int
    first: bool
    best: bool
    metrics: dict[str, Figure]


def _columns(summary: dict[str, Any]) -> list[Column]:
    columns = [Column(BASE, 0, False, False, summary["base"])] if summary["arms"] else []
    for name, arm in list(summary["arms"].items())[:ARMS]:
        by_round = {row["round"]: row["metrics"] for row in arm["rounds"] if row["round"] and row["metrics"]}
        best = _best(arm)
        some = thinned(sorted(by_round), best)
        columns += [Column(name, number, number == some[0], number == best, by_round[number]) for number in some]
    return columns


def _facts(summary: dict[str, Any], main: str | None) -> list[dict[str, str]]:
    """The three figures at the top: the base's, and the best round's of the arm that is judged."""
    arm = summary["arms"].get(main, {})
    best = next((row["metrics"] for row in arm.get("rounds", ()) if 0 < row["round"] == arm["best_round"]), {})
    return [
        {"name": name_of(metric), "base": shown(metric, summary["base"][metric]["value"]),
         "best": shown(metric, best[metric]["value"]) if metric in best else "",
         "where": f"{main} round {arm['best_round']}, the best"}
        for metric in ("judge_accuracy", "fd_real", "diversity") if metric in summary["base"]
    ]  # fmt: skip


def _metrics(summary: dict[str, Any], recipe: Recipe | None) -> dict[str, str]:
    """Every metric that was measured, the headlines first, with what it is."""
    found = {m for arm in summary["arms"].values() for row in arm["rounds"] for m in row["metrics"]}
    roles = {metric: _role(metric, recipe) for metric in found}
    order = {"training": 1, "held-out": 2, "scorer": 3}

    def place(metric: str) -> tuple[int, int, str]:
        headline = HEADLINES.index(metric) if metric in HEADLINES else len(HEADLINES)
        return headline, metric.startswith("win_rate:") * 9 + order.get(roles[metric].split(" ")[0], 0), metric

    return {metric: roles[metric] for metric in sorted(found, key=place)}


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
    if recipe and scorer in {*selecting(recipe), *recipe.select.floors}:
        kind = "training scorer"
    elif recipe and (scorer in recipe.evaluate.scorers or scorer == "judge_accuracy"):
        kind = "held-out judge" if scorer == "judge_accuracy" else "held-out scorer"
    else:
        kind = "scorer"
    return f"{kind}; {'50 % is no difference' if scorer != metric else 'higher is better'}"


def _changes(summary: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """The effects as a table: what is compared, and by metric the effect."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for effect in summary["effects"]:
        compared = f"{effect['arm']} round {effect['round']} ({effect['which']}) against {effect['against']}"
        table.setdefault(compared, {})[effect["metric"]] = effect
    return table


# --- what was made -----------------------------------------------------------------------------------------


def _sheet(source: Source, columns: list[Column], recipe: Recipe | None) -> list[dict[str, Any]]:
    """A row a held-out prompt, a tile a model. The prompts are the first by id, which is a hash: no pick."""
    found = source.rows(
        "SELECT sample_id, arm, round, prompt_id, prompt, seed, judged FROM samples LEFT JOIN (SELECT sample_id, "
        "value AS judged FROM scores WHERE scorer = $judge) USING (sample_id) WHERE split = 'eval' AND prompt_id IN "
        "(SELECT DISTINCT prompt_id FROM samples WHERE split = 'eval' ORDER BY prompt_id LIMIT $n) ORDER BY sample_id",
        judge=recipe.evaluate.judge if recipe else None, n=PROMPTS,
    )  # fmt: skip
    rows = []
    for prompt in sorted({row["prompt_id"] for row in found}):
        mine = [row for row in found if row["prompt_id"] == prompt]
        models_of: dict[int, int] = {}
        for row in mine:
            models_of[row["seed"]] = models_of.get(row["seed"], 0) + 1
        # An image that showed nothing got another seed: take one that every model, or nearly every, has.
        seed = min(models_of, key=lambda number: (-models_of[number], number))
        tiles = {(row["arm"], row["round"]): row for row in mine if row["seed"] == seed}
        judged = [row["judged"] for row in tiles.values()]
        certain = all(value in (0.0, 1.0, None) for value in judged)
        for row in tiles.values():
            row["right"] = None if row["judged"] is None or not certain else row["judged"] == 1.0
        line = [tiles.get((column.arm, column.round)) for column in columns]
        rows.append({"prompt": mine[0]["prompt"], "seed": seed, "tiles": line})
    return rows


def _pictures(source: Source, wanted: Iterable[int]) -> dict[int, tuple[str, bool]]:
    """Data URI by sample id, and whether it is to be shown pixel by pixel."""
    ids = ", ".join(str(int(number)) for number in sorted(wanted)) or "NULL"
    # Literal ids, not a parameter: DuckDB then skips the row groups that hold none of them.
    found = source.rows(f"SELECT sample_id, image.bytes AS file FROM samples WHERE sample_id IN ({ids})")
    pictures = {}
    for row in found:
        try:
            image = decode(row["file"] or b"")
        except WinnowError:
            continue  # the tile says that there is none; verify tells which part is wrong
        small = max(image.size) <= PIXELATED
        image.thumbnail((THUMB, THUMB))
        out = io.BytesIO()
        image.save(out, "png" if small else "webp", **({"optimize": True} if small else {"quality": 82}))
        kind = "png" if small else "webp"
        pictures[row["sample_id"]] = f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}", small
    return pictures
