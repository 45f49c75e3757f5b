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
import pyarrow as pa
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from curate import weigh as law
from curate.fuse import rank_fusion, zscore_fusion
from jobs import plots
from jobs.images import decode
from jobs.recipe import Recipe
from jobs.run import BASE
from jobs.summary import (
    HEADLINES,
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
PROMPTS, ROUNDS, ARMS, TILES = 8, 8, 4, 6  # at most that many are shown, so that the file stays small
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
    rounds = thinned(_selected(source, main), _best(summary["arms"].get(main, {})))
    chosen = [_candidates(source, recipe, str(main), number) for number in rounds]
    galleries = [(one.round, one.gallery()) for one in chosen]
    kept = _lineage(source, chosen)
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
        sheet=sheet, galleries=galleries, histograms=_histograms(source, recipe, chosen), kept=kept,
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
    known = {
        "judge_accuracy": "held-out judge; higher is better", "fd_real": "lower is better",
        "fd_d0": "how far from the base's own images", "diversity": "variance among images of one prompt",
    }  # fmt: skip
    if metric in known:
        return known[metric]
    scorer = metric.removeprefix("win_rate:")
    if recipe and scorer in {*_selecting(recipe), *recipe.select.floors}:
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


def _selected(source: Source, arm: str | None) -> list[int]:
    found = source.rows("SELECT DISTINCT round FROM selections WHERE selection = $arm ORDER BY round", arm=arm)
    return [row["round"] for row in found]


@dataclass(frozen=True)
class Candidates:
    """What a round chose from: the rows of its selection, and their selection score where there is one."""

    round: int
    rows: pa.Table
    score: np.ndarray | None

    def gallery(self) -> list[tuple[str, list[dict[str, Any]]]]:
        """Shelves of tiles: best, median and worst by the selection score, and rejects with their reasons."""
        kept = self.rows["kept"].to_numpy(zero_copy_only=False)
        if self.score is None:
            first = np.flatnonzero(kept)[:TILES]
            shelves = [("kept", first)]
        else:
            order = np.argsort(-self.score, kind="stable")
            middle = max(0, len(order) // 2 - TILES // 2)
            shelves = [("best", order[:TILES]), ("median", order[middle : middle + TILES]), ("worst", order[-TILES:])]
        reasons: dict[str, int] = {}
        rejected = np.flatnonzero(~kept)
        for i in rejected:  # one of each reason first, then more of them in the order of their ids
            reasons.setdefault(self.rows["reason"][int(i)].as_py(), int(i))
        first_of_each = list(reasons.values())
        more = [int(i) for i in rejected[: 2 * TILES] if int(i) not in first_of_each]
        shelves.append(("rejected", np.asarray([*first_of_each, *more][:TILES], int)))
        return [(name, [self.tile(int(i)) for i in places]) for name, places in shelves if len(places)]

    def tile(self, i: int) -> dict[str, Any]:
        return self.rows.slice(i, 1).to_pylist()[0] | {"score": None if self.score is None else float(self.score[i])}


def _candidates(source: Source, recipe: Recipe | None, arm: str, number: int) -> Candidates:
    rows = source.table(
        "SELECT sample_id, prompt_id, prompt, kept, rank, weight, selections.reason, measured.value AS distance "
        "FROM selections JOIN samples USING (sample_id) LEFT JOIN (SELECT sample_id, value FROM distances "
        "WHERE space = $space AND metric = $metric) AS measured USING (sample_id) "
        "WHERE selection = $arm AND selections.round = $round ORDER BY sample_id",
        arm=arm, round=number, space=recipe.distance.space if recipe else None,
        metric=recipe.distance.name if recipe else None,
    )  # fmt: skip
    return Candidates(number, rows, _selection_score(source, recipe, rows))


def _selecting(recipe: Recipe) -> tuple[str, ...]:
    """The scorers that order the candidates."""
    return recipe.score.scorers if recipe.select.scorers is None else recipe.select.scorers


def _selection_score(source: Source, recipe: Recipe | None, rows: pa.Table) -> np.ndarray | None:
    """The number that the selection went by: one scorer's, or several fused; None where not all rows have it."""
    if recipe is None or recipe.select.policy == "random":
        return None
    columns = []
    for scorer in _selecting(recipe):
        found = source.table(
            "SELECT sample_id, value FROM scores WHERE scorer = $scorer AND sample_id IN (SELECT unnest($ids))",
            scorer=scorer, ids=rows["sample_id"].to_pylist(),
        ).sort_by("sample_id")  # fmt: skip
        if not found.num_rows or found.num_rows != rows.num_rows:
            return None
        columns.append(found["value"].to_numpy())
    if len(columns) < 2:
        return columns[0] if columns else None
    fuse = {"rank": rank_fusion, "zscore": zscore_fusion}[recipe.select.fuse]
    return fuse(np.stack(columns, axis=1), rows["prompt_id"].to_numpy())


def _histograms(source: Source, recipe: Recipe | None, chosen: list[Candidates]) -> list[tuple[int, list[str]]]:
    """By round: scores of the kept and the dropped, weights of the kept, distances beside D_0's own."""
    own = np.empty(0)
    if recipe and recipe.distance.space:
        own = source.table(
            "SELECT value FROM distances JOIN samples USING (sample_id) WHERE arm = $base AND split = 'reference' "
            "AND space = $space AND metric = $metric",
            base=BASE, space=recipe.distance.space, metric=recipe.distance.name,
        )["value"].to_numpy()  # fmt: skip
    beta = None
    if recipe and recipe.weigh.by == "distance":
        beta = recipe.weigh.beta
        beta = law.threshold(own, recipe.weigh.quantile) if beta is None and len(own) else beta
    by_round = []
    for one in chosen:
        kept = one.rows["kept"].to_numpy(zero_copy_only=False)
        distance = one.rows["distance"].to_numpy(zero_copy_only=False).astype(float)
        weight = one.rows["weight"].to_numpy(zero_copy_only=False).astype(float)[kept]
        charts = []
        if one.score is not None:
            groups = [("kept", one.score[kept]), ("dropped", one.score[~kept])]
            charts.append(plots.histogram("Selection score", f"round {one.round}", groups))
        if np.isfinite(weight).any():
            groups = [("kept", weight)]
            charts.append(plots.histogram("Training weight", f"round {one.round}, of the kept", groups))
        if np.isfinite(distance).any():
            groups = [("kept", distance[kept]), ("D₀ to itself", own)]
            mark = None if beta is None else ("β", beta)
            subtitle = f"round {one.round}" + ("" if beta is None else "; full weight up to β")
            charts.append(plots.histogram("Distance to D₀", subtitle, groups, mark))
        if charts:
            by_round.append((one.round, charts))
    return by_round


def _lineage(source: Source, chosen: list[Candidates]) -> dict[str, Any] | None:
    """All that led to one kept sample: the best scored one of the newest round."""
    for one in reversed(chosen):
        kept = np.flatnonzero(one.rows["kept"].to_numpy(zero_copy_only=False))
        if len(kept):
            best = kept[0] if one.score is None else kept[np.argmax(one.score[kept])]
            tile = one.tile(int(best))
            number = tile["sample_id"]
            [row] = source.rows("SELECT * EXCLUDE (image) FROM samples WHERE sample_id = $id", id=number)
            scores = source.rows("SELECT scorer, value FROM scores WHERE sample_id = $id ORDER BY scorer", id=number)
            return {"sample": row | tile | {"round": row["round"]}, "selected_in": one.round, "scores": scores,
                    "parents": _parents(source, row["parent_id"])}  # fmt: skip
    return None


def _parents(source: Source, parent: int | None) -> list[int]:
    chain: list[int] = []
    while parent is not None and parent not in chain and len(chain) < 20:
        chain.append(parent)
        found = source.rows("SELECT parent_id FROM samples WHERE sample_id = $id", id=parent)
        parent = found[0]["parent_id"] if found else None
    return chain


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
