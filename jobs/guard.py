"""Stage ``guard``: may the round's new model live? Its verdict closes the round."""

from __future__ import annotations

import os
from dataclasses import replace

import pyarrow as pa
from pydantic import Field

from curate import guard as rule
from curate.alarm import alarms
from curate.drift import Interval, Z
from jobs.evaluate import LOOKS, held_out
from jobs.progress import say
from jobs.run import Run
from jobs.select import choosing
from jobs.stage import complete, units
from jobs.train import trained_model
from schemas.errors import WinnowError
from schemas.settings import Settings
from schemas.tables import TABLES

DISTANCES = ("fd_", "kid_", "cmmd_")  # metrics that fall as things get better


class Guard(Settings):
    """``metric``: the evaluation that decides, never one that selects. Distances (fd_, kid_, cmmd_) count down,
    everything else up. ``diversity_floor``: share of the base's diversity. ``enabled`` false judges nothing and always
    goes on."""

    enabled: bool = True
    metric: str = "fd_real"
    diversity_floor: float = Field(0.6, ge=0, le=1)
    patience: int = Field(1, ge=0)
    min_rounds: int = Field(1, ge=0)


def history(run: Run) -> list[rule.Measure]:
    """What the arm's rounds measured, from the base to this one."""
    settings = run.recipe.guard
    found = run.query(
        "SELECT round, metric, value, ci_low, ci_high FROM evaluations WHERE arm = $arm AND round <= $round "
        "AND metric IN ($metric, 'diversity')",
        arm=run.arm, round=run.round, metric=settings.metric,
    )  # fmt: skip
    rows = {(row["round"], row["metric"]): row for row in found.to_pylist()}
    sign = 1.0 if settings.metric.startswith(DISTANCES) else -1.0
    if settings.metric.startswith("win_rate:"):  # of the base against itself
        rows[0, settings.metric] = {"value": 0.5, "ci_low": 0.5, "ci_high": 0.5}
    measures = []
    for number in range(run.round + 1):
        deciding, spread = rows.get((number, settings.metric)), rows.get((number, "diversity"))
        if deciding is None or spread is None:
            missing = settings.metric if deciding is None else "diversity"
            raise WinnowError(
                f"evaluations: round {number} of arm {run.arm!r} has no {missing!r}; set guard.metric to a metric that "
                "is measured, or run 'winnow evaluate' first"
            )
        error = (deciding["ci_high"] - deciding["ci_low"]) / (2 * Z)
        measures.append(rule.Measure(number, sign * deciding["value"], error, spread["value"]))
    return measures


def warnings(run: Run) -> list[str]:
    """Alarms over the rounds of the arm so far; of metrics that every round has."""
    found = run.query(
        "SELECT metric, list([value, coalesce(ci_low, value), coalesce(ci_high, value)] ORDER BY round) AS rounds "
        "FROM evaluations WHERE arm = $arm AND round <= $round GROUP BY metric HAVING count(*) = $round + 1",
        arm=run.arm, round=run.round,
    ).to_pylist()  # fmt: skip
    series = {row["metric"]: [Interval(*three) for three in row["rounds"]] for row in found}
    recipe = run.recipe
    used, others = (map(recipe.evaluate.metric_of, names) for names in (choosing(recipe), held_out(recipe)))
    return alarms(
        {name: series[name] for name in used if name in series},
        {name: series[name] for name in others if name in series},
        {name: series[f"agreement:{name}"] for name in held_out(recipe) if f"agreement:{name}" in series},
        {name: series[name] for name in LOOKS if name in series},
    )


def guard(run: Run, seconds: float = 0.0) -> rule.Verdict:
    """Judge the round, commit its row of ``rounds``, and return the verdict (the committed one on a rerun)."""
    settings, planned = run.recipe.guard, run.recipe.rounds
    if run.round == 0:
        verdict = rule.Verdict("promote", 0, "the base")
    elif settings.enabled:
        run.recipe.check_guard()
        verdict = rule.verdict(
            history(run), planned=max(planned, run.round), min_rounds=min(settings.min_rounds, planned),
            patience=settings.patience, diversity_floor=settings.diversity_floor,
            higher="" if settings.metric.startswith(DISTANCES) else settings.metric,
        )  # fmt: skip
        verdict = replace(verdict, reason="; ".join([verdict.reason, *warnings(run)]))
    else:
        last = run.round >= planned
        why = "curated, nothing trained" if run.recipe.train.method == "none" else "control arm, not judged"
        verdict = rule.Verdict("stop" if last else "promote", run.round, why)

    def work(_: pa.Table) -> pa.Table:
        made = run.query(
            "SELECT count(*) AS n FROM samples WHERE round = $round AND arm = $arm",
            round=run.round, arm=run.arm if run.round else "base",
        )["n"][0].as_py()  # fmt: skip
        row = {
            "round": run.round, "arm": run.arm, "model": _relative(run, trained_model(run)),
            "parent_model": None if run.round == 0 else _relative(run, run.start_model()),
            "verdict": verdict.verdict, "reason": verdict.reason, "best_round": verdict.best_round,
            "seconds": seconds, "images": made,
            "recipe": run.recipe.name,
        }  # fmt: skip
        return pa.Table.from_pylist([row], schema=TABLES["rounds"].schema)

    one = pa.table({"sample_id": pa.array([run.seed("guard", run.arm, run.round)])})
    # The planned number of rounds is no part of it: a loop that is made longer keeps the rows it has.
    spec = ["guard", settings.model_dump(mode="json")]
    complete(run, "guard", "rounds", units("rounds", {"round": run.round, "arm": run.arm}, one, 1, spec), lambda: work)
    row = run.query("SELECT * FROM rounds WHERE round = $round AND arm = $arm", round=run.round, arm=run.arm)
    kept = row.to_pylist()[0]
    if kept["verdict"] != "promote" and verdict.verdict == "promote":
        # It ended for no other reason than that no more rounds were planned, and now there are.
        start = kept["best_round"] if kept["verdict"] == "rollback" else run.round
        say(
            f"round {run.round} of {run.arm}: {kept['verdict']} of {run.round} rounds, going on with {planned}, "
            f"from the model of round {start}"
        )
        return verdict
    return rule.Verdict(kept["verdict"], kept["best_round"], kept["reason"])


def _relative(run: Run, model: str) -> str:
    """Models of the store are named from its root, so that a store can be moved."""
    inside = os.path.isabs(model) and os.path.commonpath([model, run.store]) == str(run.store)
    return os.path.relpath(model, run.store) if inside else model
