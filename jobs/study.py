"""``make study`` and its sisters: does the demo's effect hold over seeds and more rounds, and what does each part of
the round do? Figures and plots into results/."""

from __future__ import annotations

import base64
import json
import math
import multiprocessing
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from jobs import models
from jobs import recipe as recipes
from jobs.demo import play_arms
from jobs.machine import machine
from jobs.metrics import name_of
from jobs.plots import Line, curve
from jobs.progress import say
from jobs.recipe import Recipe
from jobs.round import loop, prepare
from jobs.run import Run
from jobs.studies import Study, named
from jobs.summary import real_figures
from schemas import ids
from schemas.errors import WinnowError
from storage.layout import create
from storage.query import arrow

METRICS = ("judge_accuracy", "fd_real", "kid_real", "fd_d0", "diversity")
APART = {"name", "arms", "threads", "rounds", "guard", "tournament", "publish"}  # change no figure of a round
BASE = {"model", "prompts", "generate", "reference", "embed", "score", "evaluate"}  # what the base's images hang on
COUNTS = {"prompts", "images_per_prompt", "source_limit"}  # but these, which choose among them

Settings = Sequence[tuple[list[str], Any]]


def study(store: Path, seeds: int, rounds: int, out: Path, settings: Settings) -> Path:
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
    recipe = recipes.override(recipes.load("embedded"), list(settings))
    real = real_figures(recipe)
    found = {"seeds": seeds, "rounds": rounds, "settings": _told(recipe), "machine": machine(), "outcomes": outcomes,
             "table": table}  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    (out / "study.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "study.md").write_text(page(found))
    for metric in METRICS:
        (out / f"study-{metric}.svg").write_bytes(picture(table, metric, real.get(metric)))
    return out / "study.md"


def _told(recipe: Recipe) -> str:
    """The settings that a table of figures must name."""
    made, kept, trained = recipe.generate, recipe.select, recipe.train
    shift = "" if made.shift is None else f" shifted by {made.shift:g}"
    return (f"{made.steps} sampling steps{shift}, {kept.policy} {kept.keep} of {made.images_per_prompt}, "
            f"{trained.steps} training steps at {trained.lr:g}")  # fmt: skip


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


def picture(table: list[dict[str, Any]], metric: str, ceiling: float | None, arms: Sequence[str] = ()) -> bytes:
    """An SVG of one metric over the rounds, a line an arm, its band one standard error of the seeds. ``ceiling``: what
    real images measure."""
    lines = []
    for arm in arms or sorted({row["arm"] for row in table}):
        rows = [row for row in table if row["arm"] == arm and row["metric"] == metric]
        values, halves = [row["mean"] for row in rows], [row["se"] or 0.0 for row in rows]
        if rows:  # an arm may not be played yet
            lines.append(Line(arm, [row["round"] for row in rows], values, halves))
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
        f"Made by `make study`: {found['seeds']} seeds, {found['rounds']} rounds, on {found['machine']}; "
        f"{found['settings']}. "
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


def compare(names: list[str], store: Path, seeds: int, out: Path, settings: Settings, workers: int) -> list[Path]:
    """Play what the named studies ask for and ``out``/studies.json lacks, ``workers`` arms at a time, one thread each.

    What two studies ask for is played once, and every arm that ends is noted at once: a study that was stopped goes on.
    Returns the pages, ``out``/study-NAME.md.
    """
    studies = {name: named(name) for name in names}
    file = out / "studies.json"
    runs = json.loads(file.read_text()) if file.exists() else {}
    out.mkdir(parents=True, exist_ok=True)
    wanted: dict[tuple[int, str], tuple[Path, Recipe]] = {}
    for seed in range(seeds):
        for study in studies.values():
            for arm in study.arms:
                recipe = arm_of(study, arm, seed, settings)
                key = key_of(recipe)
                if len({row["round"] for row in runs.get(key, {}).get("rows", ())}) <= study.rounds:
                    wanted.setdefault((seed, key), (_home(store, seed, recipe), recipe))
    failed: WinnowError | None = None
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        firsts: dict[Path, Future[None]] = {}
        for (_, key), (home, recipe) in wanted.items():
            if home not in firsts:
                firsts[home] = pool.submit(_prepare, home, key, recipe)
        for first in as_completed(firsts.values()):
            first.result()
        played = {pool.submit(_loop, home, key, recipe): (seed, key)
                  for (seed, key), (home, recipe) in wanted.items()}  # fmt: skip
        for one in as_completed(played):
            seed, key = played[one]
            try:
                rows = one.result()
            except WinnowError as error:  # the others took hours, too
                failed = error
                say(f"study: {key} of seed {seed} failed: {error}")
                continue
            runs[key] = {"seed": seed, "machine": machine(), "rows": rows}
            draft = file.with_suffix(".draft")
            draft.write_text(json.dumps(runs, indent=1) + "\n")
            draft.replace(file)
            say(f"study: {len(runs)} arms are there, {key} of seed {seed} is the last one")
    if failed:
        raise failed
    return [_write(name, study, runs, seeds, out, settings) for name, study in studies.items()]


def end_with_parent() -> None:
    """Let a worker end where its study is killed: it would play on for hours, beside the next one."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        parent.join()
        os._exit(1)

    if parent is not None:
        threading.Thread(target=wait, daemon=True).start()


def arm_of(study: Study, arm: str, seed: int, settings: Settings = ()) -> Recipe:
    """The recipe of a study's arm: the embedded default as the study and then the arm change it, without a guard, so
    that every round is played."""
    common = Recipe.model_validate(recipes.merge(recipes.load("embedded").model_dump(), study.common))
    values = recipes.merge(recipes.override(common, list(settings)).model_dump(), study.arms[arm])
    fixed = {"seed": seed, "rounds": study.rounds, "threads": 1, "guard": {"enabled": False}, "arms": {"curated": {}}}
    return Recipe.model_validate({**values, **fixed})


def key_of(recipe: Recipe) -> str:
    """What an arm is known by: equal keys, equal figures, also after the recipes have got another setting."""
    told = recipe.model_dump(mode="json", exclude=APART, exclude_defaults=True)
    return ids.digest([models.revision(recipe.model), told], 12)


def _home(store: Path, seed: int, recipe: Recipe) -> Path:
    """Where an arm is played: with those of the same base, whose images are made and judged once."""
    base = recipe.model_dump(mode="json", include=BASE)
    base["generate"] = {name: value for name, value in base["generate"].items() if name not in COUNTS}
    return store / f"seed-{seed}-{ids.digest(base, 8)}"


def _run(home: Path, key: str, recipe: Recipe) -> Run:
    import torch

    torch.set_num_threads(1)
    return Run(create(home), recipe, 1, key)


def _prepare(home: Path, key: str, recipe: Recipe) -> None:
    prepare(_run(home, key, recipe))


def _loop(home: Path, key: str, recipe: Recipe) -> list[dict[str, Any]]:
    """Play an arm; returns its evaluations."""
    run = _run(home, key, recipe)
    loop(run)
    rows = run.query("SELECT round, metric, value FROM evaluations WHERE arm = $arm ORDER BY ALL", arm=key)
    return rows.to_pylist()


def _write(name: str, study: Study, runs: dict[str, Any], seeds: int, out: Path, settings: Settings) -> Path:
    """The study's page and its plots, of the runs that are there."""
    rows, machines, lacking = [], set(), 0
    for seed in range(seeds):
        for arm in study.arms:
            found = runs.get(key_of(arm_of(study, arm, seed, settings)))
            if found is None:
                lacking += 1
                continue
            machines.add(found["machine"])
            rows += [{"seed": seed, "arm": arm} | row for row in found["rows"] if row["round"] <= study.rounds]
    table, bases = summarise(rows), _bases(study, settings)
    arms = list(study.arms)
    real = real_figures(arm_of(study, arms[0], 0, settings))
    for metric in METRICS:
        (out / f"study-{name}-{metric}.svg").write_bytes(picture(table, metric, real.get(metric), arms))
    smaller = ", made smaller" if study.common else ""
    lines = [
        f"# Study: {study.question[0].lower()}{study.question[1:]}", "",
        f"Made by `make study-{name}`: {seeds} seeds, {study.rounds} rounds of the embedded default{smaller}, on "
        f"{'; '.join(sorted(machines))}. Mean over the seeds ± standard error.", "",
        f"The paper: {study.paper}", "",
        *([f"{lacking} of {seeds * len(study.arms)} runs are not played yet.", ""] if lacking else []),
        " ".join(f"![{name_of(metric)}](study-{name}-{metric}.svg)" for metric in METRICS), "",
        *_by_round(study, table, seeds, bases, real), "", *_apart(study, rows, seeds, bases),
    ]  # fmt: skip
    page = out / f"study-{name}.md"
    page.write_text("\n".join(lines) + "\n")
    return page


def _bases(study: Study, settings: Settings) -> dict[str, Path]:
    """By arm what tells its base apart: the same path, the same images of the base, and the same D_0."""
    return {arm: _home(Path(), 0, arm_of(study, arm, 0, settings)) for arm in study.arms}


def _by_round(
    study: Study, table: list[dict[str, Any]], seeds: int, bases: dict[str, Path], real: dict[str, float]
) -> list[str]:  # fmt: skip
    """A table of every base, of every arm after every round, and of what ``real`` scenes measure."""
    first = next(iter(study.arms))
    cells = {(row["arm"], row["round"], row["metric"]): row for row in table}
    lines = ["| arm | round | " + " | ".join(METRICS) + " |", "|---|---|" + "---|" * len(METRICS)]
    firsts = {bases[arm]: arm for arm in reversed(study.arms)}  # by base, the first arm that starts from it
    places = [(arm, 0) for arm in study.arms if firsts[bases[arm]] == arm]
    places += [(arm, n) for arm in study.arms for n in range(1, study.rounds + 1)]
    for arm, number in places:
        figures = [_cell(cells.get((arm, number, metric)), seeds) for metric in METRICS]
        what = arm if number else "the base" if bases[arm] == bases[first] else f"the base of {arm!r}"
        lines.append(f"| {what} | {number} | {' | '.join(figures)} |")
    figures = [_cell({"mean": real[m], "se": None, "values": [real[m]]}, 1) if m in real else "" for m in METRICS]
    return [*lines, f"| real scenes | | {' | '.join(figures)} |"]


def _apart(study: Study, rows: list[dict[str, Any]], seeds: int, bases: dict[str, Path]) -> list[str]:
    """A table of what sets the arms apart from the first, seed by seed, after the last round; distances to another D_0
    are left out."""
    end = {(row["arm"], row["seed"], row["metric"]): row["value"] for row in rows if row["round"] == study.rounds}
    first, *others = study.arms
    lines = [f'After round {study.rounds}, less what "{first}" has with the same seed:', ""]
    lines += ["| arm | " + " | ".join(METRICS) + " |", "|---|" + "---|" * len(METRICS)]
    for arm in others:
        pairs = [
            {"arm": arm, "round": study.rounds, "metric": metric,
             "value": end[arm, seed, metric] - end[first, seed, metric]}
            for metric in METRICS for seed in range(seeds)
            if (arm, seed, metric) in end and (first, seed, metric) in end
            and (metric != "fd_d0" or bases[arm] == bases[first])
        ]  # fmt: skip
        cells = {row["metric"]: row for row in summarise(pairs)}
        lines.append(f"| {arm} | {' | '.join(_cell(cells.get(metric), seeds) for metric in METRICS)} |")
    return lines
