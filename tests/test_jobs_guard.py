"""The verdict's reason tells alarms, from what the rounds measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from jobs import recipe as recipes
from jobs.guard import guard, history, warnings
from jobs.run import Run
from schemas.errors import WinnowError
from schemas.tables import TABLES
from storage.commit import commit
from storage.layout import create, part_path
from storage.snapshot import seal

#: By round: clip rises while the reader falls from its best, and pictures darken.
HISTORY = {
    "scene-clip": (0.2, 0.3, 0.4, 0.5), "scene-reader": (0.3, 0.5, 0.4, 0.35), "judge_accuracy": (0.4, 0.5, 0.6, 0.7),
    "agreement:scene-reader": (0.6, 0.5, 0.4, 0.1), "brightness": (0.5, 0.45, 0.4, 0.3),
    "fd_real": (50.0, 40.0, 30.0, 20.0), "diversity": (100.0, 95.0, 95.0, 90.0),
    "win_rate:scene-reader": (0.5, 0.6, 0.7, 0.8),
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Run:
    recipe = recipes.load("embedded")
    store = create(tmp_path / "store")
    for number in range(4):
        rows = [{"round": number, "arm": "curated", "metric": metric, "prompt_set": "held-out", "value": values[number],
                 "ci_low": values[number] - 0.02, "ci_high": values[number] + 0.02, "n": 8}
                for metric, values in HISTORY.items() if number or not metric.startswith("win_rate")]  # fmt: skip
        path = part_path("evaluations", {"round": number, "arm": "curated"}, "0", "0")
        part = commit(store, "evaluations", path, pa.Table.from_pylist(rows, schema=TABLES["evaluations"].schema))
        seal(store, "evaluate", [part], recipe.model_dump(mode="json"))
    return Run(store, recipe.for_arm("curated"), 3)


def test_alarms_are_read_from_the_store(run: Run) -> None:
    assert warnings(run) == [
        "reward hacking: since round 1 scene-clip rose while held-out scene-reader fell from 0.5 to 0.35",
        "disagreement: the selecting score ranks with scene-reader at 0.10, 0.60 at the base",
        "brightness moved from 0.500 to 0.300",
    ]
    assert warnings(run.at(1)) == []
    assert warnings(run.at(0)) == []


def test_they_are_said_beside_the_verdict_and_do_not_make_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.guard.trained_model", lambda run: "embedded")  # which is not what is judged by
    assert [";" in guard(run.at(number)).reason for number in range(3)] == [False, False, True]
    verdict = guard(run)
    assert verdict.verdict == "promote" and verdict.best_round == 3
    assert verdict.reason.startswith("best is round 3") and "; reward hacking: " in verdict.reason
    [row] = run.query("SELECT reason FROM rounds WHERE round = 3").to_pylist()
    assert row["reason"] == verdict.reason and guard(run) == verdict


def test_a_win_rate_can_decide_though_the_base_has_none(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.guard.trained_model", lambda run: "embedded")
    by = replace(run, recipe=recipes.override(run.recipe, [(["guard", "metric"], "win_rate:scene-reader")]))
    assert [one.distance for one in history(by)] == [-0.5, -0.6, -0.7, -0.8] and history(by)[0].distance_se == 0
    verdicts = [guard(by.at(number)) for number in range(4)]
    assert [one.best_round for one in verdicts] == [0, 1, 2, 3] and "at win_rate:scene-reader 0.8" in verdicts[3].reason


@pytest.mark.parametrize("metric", ["scene-clip", "win_rate:scene-clip", "fd_d0", "brightness"])
def test_the_stage_alone_refuses_a_metric_that_selects_or_says_nothing(run: Run, metric: str) -> None:
    by = replace(run, recipe=recipes.override(run.recipe, [(["guard", "metric"], metric)]))
    with pytest.raises(WinnowError, match=f"guard.metric is '{metric}', which (selects|is not measured)"):
        guard(by.at(1))
