"""A store in numbers: what every round of every arm measured, what that amounts to, and the story in sentences."""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from pydantic import ValidationError

from curate import guard as rule
from jobs.costs import by_stage, by_table
from jobs.evaluate import PROMPT_SET
from jobs.guard import history, warnings
from jobs.metrics import HEADLINES, Figure, judgement, name_of, noise, shown
from jobs.recipe import Recipe
from jobs.run import BASE, Run
from jobs.world import WEIGHTS
from jobs.world.scenes import all_captions
from schemas.errors import WinnowError
from storage.layout import check, clean
from storage.query import connect
from storage.snapshot import Snapshot, latest, load, numbers


@dataclass(frozen=True)
class Source:
    """One snapshot of a store, open for many questions. ``lost``: parts that it lists and that are not there."""

    store: Path
    snapshot: Snapshot
    connection: duckdb.DuckDBPyConnection
    lost: tuple[str, ...] = ()

    def table(self, sql: str, **params: Any) -> pa.Table:
        return self.connection.sql(sql, params=params or None).to_arrow_table()

    def rows(self, sql: str, **params: Any) -> list[dict[str, Any]]:
        return self.table(sql, **params).to_pylist()


@contextmanager
def opened(store: Path, without_lost: bool = False) -> Iterator[Source]:
    """The newest snapshot of a store. A table with a lost part refuses to be read, or is read ``without_lost`` parts:
    for whoever then says so."""
    home = check(store)
    snapshot = latest(home)
    lost: tuple[str, ...] = ()
    if without_lost:
        lost = tuple(part.path for part in snapshot.parts if not (home / part.path).exists())
        snapshot = replace(snapshot, parts=tuple(part for part in snapshot.parts if part.path not in lost))
    with connect(home, snapshot) as connection:
        yield Source(home, snapshot, connection, lost)


def recipe_of(source: Source, arm: str) -> Recipe | None:
    """The settings that an arm ran with; None where the store does not say.

    A snapshot holds the recipe of the arm that sealed it, so the arm's is in the snapshot that brought its newest
    part. Snapshots only grow, which lets that one be found by halving.
    """
    folders = (f"/arm-{clean(arm)}/", f"/selection-{clean(arm)}/")
    mine = [part.path for part in source.snapshot.parts if any(folder in part.path for folder in folders)]
    raw = source.snapshot.recipe
    if mine:
        known = [number for number in numbers(source.store) if number <= source.snapshot.number]
        newest = max(mine, key=lambda path: ("/rounds/" in path, _round_of(path), path))
        first = bisect_left(known, True, key=lambda number: newest in load(source.store, number).by_path())
        raw = load(source.store, known[first]).recipe
    try:
        return Recipe.model_validate(raw)
    except (ValidationError, WinnowError):  # sealed without a recipe, or by a Winnow that had other settings
        return None


def _round_of(path: str) -> int:
    """The round whose folder a part stands in; -1 where it stands in none."""
    found = re.search(r"/round-(\d+)/", path)
    return int(found[1]) if found else -1


def summarise(source: Source) -> dict[str, Any]:
    """Everything that summary.json holds."""
    evaluated = source.rows(
        "SELECT round, arm, metric, value, ci_low, ci_high, n FROM evaluations WHERE prompt_set = $set ORDER BY ALL",
        set=PROMPT_SET,
    )
    closed = source.rows("SELECT * FROM rounds ORDER BY round, arm")
    made = source.rows("SELECT arm, count(*) AS images FROM samples GROUP BY arm ORDER BY arm")
    found = {row["arm"] for row in [*evaluated, *closed, *made]} - {BASE}
    planned = list(_arms(source))
    names = [arm for arm in planned if arm in found] + sorted(found - set(planned))
    arms = {arm: _arm(source, arm, evaluated, closed) for arm in names}
    first = recipe_of(source, names[0]) if names else None
    base = next((arm["rounds"][0]["metrics"] for arm in arms.values() if arm["rounds"][0]["metrics"]), {})
    summary = {
        "recipe": first.name if first else next((row["recipe"] for row in closed), None),
        "base_model": first.model if first else None,
        "snapshot": source.snapshot.number,
        "sealed": source.snapshot.created,
        "lost": list(source.lost),
        "planned_rounds": first.rounds if first else None,
        "guard_metric": first.guard.metric if first else None,
        "images": sum(row["images"] for row in made),
        "seconds": sum(row["seconds"] for row in closed),
        "base": base,
        "real": real_figures(first),
        "arms": arms,
        "stages": by_stage(source.snapshot),
        "tables": by_table(source.snapshot),
    }
    summary["effects"] = list(_effects(summary))
    summary["story"] = list(_story(summary))
    return summary


def main_arm(summary: dict[str, Any]) -> str | None:
    """The arm that the report looks into: the first that the guard judges, else the first."""
    return next((name for name, arm in summary["arms"].items() if arm["judged"]), next(iter(summary["arms"]), None))


def _arms(source: Source) -> list[str]:
    arms = source.snapshot.recipe.get("arms")
    return list(arms) if isinstance(arms, dict) else []


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _arm(source: Source, name: str, evaluated: list[dict[str, Any]], closed: list[dict[str, Any]]) -> dict[str, Any]:
    metrics: dict[int, dict[str, Figure]] = {}
    for row in evaluated:
        if row["arm"] == name:
            figure = {key: _finite(row[key]) for key in ("value", "ci_low", "ci_high")} | {"n": row["n"]}
            metrics.setdefault(row["round"], {})[row["metric"]] = figure
    verdicts = {row["round"]: row for row in closed if row["arm"] == name}
    told = ("verdict", "reason", "model", "parent_model", "seconds", "images")
    rounds = [
        {"round": number, "metrics": metrics.get(number, {})} | {key: verdicts.get(number, {}).get(key) for key in told}
        for number in sorted({0, *metrics, *verdicts})
    ]
    recipe = recipe_of(source, name)
    judged = recipe.guard.enabled if recipe else True
    last = verdicts[max(verdicts)] if verdicts else {}
    alarms = _alarms(source, recipe, name, max(verdicts, default=0)) if recipe and judged else []
    best = _best(source, recipe, name, max(metrics, default=0)) if recipe else None
    # A control arm ends with its newest model, whatever that is worth.
    kept = best if judged else max(verdicts, default=None)
    return {
        "judged": judged,
        "finished": last.get("verdict") in ("stop", "rollback"),
        "verdict": last.get("verdict"),
        # The guard's row says them in one breath.
        "reason": last["reason"].removesuffix("; ".join(["", *alarms])) if last else None,
        "alarms": alarms,
        "last_round": max(metrics, default=0),
        "best_round": best,
        "kept_round": kept,
        "model": verdicts.get(kept, {}).get("model"),
        "rounds": rounds,
    }


def _best(source: Source, recipe: Recipe, arm: str, newest: int) -> int | None:
    """The best round by the guard's own rule; None where its metric was not measured in every round."""
    try:
        measures = history(Run(source.store, recipe, newest, arm))
        planned, floor = max(recipe.rounds, newest), recipe.guard.diversity_floor
        return rule.verdict(measures, planned=planned, diversity_floor=floor).best_round
    except WinnowError:
        return None


def _alarms(source: Source, recipe: Recipe, arm: str, newest: int) -> list[str]:
    """What the guard warns of beside its verdict on a round."""
    try:
        return warnings(Run(source.store, recipe, newest, arm))
    except WinnowError:  # a part with evaluations is lost
        return []


def real_figures(recipe: Recipe | None) -> dict[str, float]:
    """What real scenes of the embedded world measure with the same judge; ``fd_real``, where it is known for as many
    of as many prompts."""
    card = WEIGHTS / "card.json"
    if recipe is None or recipe.model != "embedded" or not card.is_file():
        return {}
    parts, measured = json.loads(card.read_text(encoding="utf-8")).get("parts", {}), recipe.evaluate
    real, same = parts.get("real", {}), {"judge_accuracy": measured.judge, "diversity": measured.space}
    found = {metric: real[metric] for metric, by in same.items() if by == "scene-judge" and metric in real}
    prompts = measured.prompts or round(recipe.prompts.held_out * len(all_captions()))
    if (measured.space, measured.real, recipe.prompts.source) == ("scene-judge", "embedded", "embedded"):
        for least in parts.get("scenes", {}).get("least", ()):
            if (least["prompts"], least["images_per_prompt"]) == (prompts, measured.images_per_prompt):
                found["fd_real"] = least["fd_real"]
    return found


def _round(arm: dict[str, Any], number: int | None) -> dict[str, Figure]:
    return next((row["metrics"] for row in arm["rounds"] if row["round"] == number), {})


def _effects(summary: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What changed: each arm's best and last round against the base, and the judged arm against the controls."""
    arms = summary["arms"]
    for name, arm in arms.items():
        stations = {"best": arm["best_round"]} if arm["judged"] else {}
        if arm["last_round"] not in stations.values():
            stations["last"] = arm["last_round"]
        for which, number in stations.items():
            if number:
                yield from _compare((name, number, which), _round(arm, number), "base", summary["base"])
    main = main_arm(summary)
    if main is None or not arms[main]["kept_round"]:
        return
    kept = arms[main]["kept_round"]
    for name, arm in arms.items():
        if not arm["judged"] and arm["last_round"]:
            against = f"{name} round {arm['last_round']}"
            yield from _compare((main, kept, "best"), _round(arms[main], kept), against, _round(arm, arm["last_round"]))


def _compare(
    station: tuple[str, int, str], after: dict[str, Figure], against: str, before: dict[str, Figure]
) -> Iterator[dict[str, Any]]:
    arm, number, which = station
    for metric in HEADLINES:
        if metric not in after or metric not in before:
            continue
        old, new = before[metric]["value"], after[metric]["value"]
        change, error = new - old, noise(before[metric], after[metric])
        beyond = None if error is None else abs(change) > error
        said = judgement(metric, before[metric], after[metric])
        text = (
            f"{name_of(metric)}, {arm} round {number} ({which}) against {against}: "
            f"{shown(metric, old)} → {shown(metric, new)}, {said}"
        )
        yield {
            "arm": arm, "round": number, "which": which, "against": against, "metric": metric, "before": old,
            "after": new, "change": change, "error": error, "beyond_noise": beyond, "judgement": said,
            "text": text,
        }  # fmt: skip


def _story(summary: dict[str, Any]) -> Iterator[str]:
    """The run in a few sentences, each true of the tables, also where an effect did not appear."""
    arms, base = summary["arms"], summary["base"]
    if summary["lost"]:
        lost = len(summary["lost"])
        yield (
            f"{lost} sealed part{'s are' if lost > 1 else ' is'} missing, {summary['lost'][0]}{' first' * (lost > 1)}: "
            "the figures are without those rows. Restore them from a copy, or run their stages again."
        )
    if not arms:
        yield "The store holds no round yet."
        return
    listed = " and ".join(name if arm["judged"] else f"{name} (the control, not judged)" for name, arm in arms.items())
    planned = f"for up to {summary['planned_rounds']} rounds " if summary["planned_rounds"] else ""
    model = f"the model “{summary['base_model']}”" if summary["base_model"] else "a model"
    so_far = "" if all(arm["finished"] for arm in arms.values()) else " so far"
    yield (
        f"Recipe {summary['recipe'] or 'unknown'}: {model} trains on its own images {planned}in "
        f"{'the arms' if len(arms) > 1 else 'the arm'} {listed}; {summary['images']:,} images were made{so_far}."
    )
    if not base:
        yield "The base is not measured yet, so nothing can be compared."
        return
    if not any(arm["last_round"] for arm in arms.values()):
        figures = (f"{_within(m)} {shown(m, base[m]['value'])}" for m in HEADLINES if m in base)
        yield f"Only the base is measured: {', '.join(figures) or 'see the figures'}."
    for name, arm in arms.items():
        yield from _arm_story(name, arm, summary)
    if "judge_accuracy" in summary["real"]:
        real = shown("judge_accuracy", summary["real"]["judge_accuracy"])
        least = summary["real"].get("fd_real")
        near = "" if least is None else f", and as many of them are at a Fréchet distance of {shown('fd_real', least)}"
        yield f"The ceiling: the judge passes {real} of real scenes{near}."


def _arm_story(name: str, arm: dict[str, Any], summary: dict[str, Any]) -> Iterator[str]:
    last = arm["last_round"]
    if not last:
        return
    judged_best = arm["best_round"] if arm["judged"] else None
    told = judged_best or last
    which = f"best in round {told} of {last}" if judged_best else f"after round {told}"
    clauses = [
        _clause(effect) for effect in summary["effects"]
        if (effect["arm"], effect["round"], effect["against"]) == (name, told, "base") and effect["metric"] != "fd_d0"
    ]  # fmt: skip
    if clauses:
        yield f"{name}, {which}, against the base: {'; '.join(clauses)}."
    if judged_best == 0:
        yield f"No round of {name} beat the base."
    if arm["judged"] and arm["verdict"]:
        number = max(row["round"] for row in arm["rounds"] if row["verdict"])
        yield f"The guard's verdict on round {number} of {name}: {arm['verdict']} ({arm['reason']})."
    if arm["alarms"]:
        yield f"Alarms on that round, which do not decide: {'; '.join(arm['alarms'])}."
    if arm["judged"] and arm["kept_round"] is not None:
        model = f" ({arm['model']})" if arm["model"] else ""
        kept = "the base itself" if arm["kept_round"] == 0 else f"that of round {arm['kept_round']}"
        so_far = "" if arm["finished"] else f"{name} is not finished; so far, "
        yield f"{so_far}{'the' if so_far else 'The'} model of {name} to keep is {kept}{model}."


def _within(metric: str) -> str:
    """A headline's name inside of a sentence; Fréchet is a person."""
    name = name_of(metric)
    return name if metric.startswith("fd_") else name[0].lower() + name[1:]


def _clause(effect: dict[str, Any]) -> str:
    metric = effect["metric"]
    name, old, new = _within(metric), shown(metric, effect["before"]), shown(metric, effect["after"])
    if effect["beyond_noise"] is False:
        return f"{name} shows no change beyond noise ({old} → {new})"
    word = "rises" if effect["change"] > 0 else "falls" if effect["change"] else "stays"
    tail = f", {effect['judgement']}" if effect["judgement"] not in ("higher", "lower") else ""
    return f"{name} {word} from {old} to {new}{tail}"
