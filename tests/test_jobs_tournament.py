"""Policies over the same candidates, compared; and the policies that people write themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import World, files, sets

from jobs import recipe as recipes
from jobs import samples
from jobs.pool import pool
from jobs.run import Run
from jobs.select import decide, needed, picked
from jobs.tournament import tournament
from jobs.weigh import by_advantage
from schemas.errors import WinnowError


def changed(world: World, **select: Any) -> Run:
    run = world.runs["curated"]
    return replace(run, recipe=recipes.override(run.recipe, [(["select", key], v) for key, v in select.items()]))


def kept(run: Run) -> Any:
    return decide(run, run.recipe.select, needed(run), samples.of(run, "train"))


def test_a_tournament_keeps_nothing_and_tells_what_each_would(world: World) -> None:
    before = files(world.store)
    run = world.runs["curated"]
    rows = {row["policy"]: row for row in tournament(run).to_pylist()}
    assert set(rows) == {"recipe", "best_of_n", "quantile_band", "top_k", "random", "diverse"}
    stored = world.rows("SELECT sample_id FROM selections WHERE selection = 'curated' AND round = 1 AND kept")
    own = rows["recipe"]
    assert own["kept"] == len(stored) == own["prompts"] * run.recipe.select.keep
    scores = world.rows(
        "SELECT avg(value) AS v FROM scores JOIN selections USING (sample_id) WHERE scorer = 'scene-clip' "
        "AND selection = 'curated' AND selections.round = 1 AND kept"
    )
    assert own["score:scene-clip"] == pytest.approx(scores[0]["v"])
    weights = world.rows("SELECT weight AS w FROM selections WHERE selection = 'curated' AND round = 1 AND kept")
    w = np.array([row["w"] for row in weights])
    assert own["ess"] == pytest.approx(w.sum() ** 2 / (w**2).sum())
    assert rows["best_of_n"]["overlap"]["recipe"] == 1 == own["overlap"]["recipe"]
    assert rows["random"]["overlap"]["recipe"] < 1
    assert rows["top_k"]["score:scene-clip"] == max(row["score:scene-clip"] for row in rows.values())
    assert files(world.store) == before


def test_a_tournament_heeds_what_people_picked(world: World, tmp_path: Path) -> None:
    run, by_hand = world.runs["curated"], {"picks": str(tmp_path / "ids")}
    (tmp_path / "ids").write_text("\n".join(map(str, samples.of(run, "train")["sample_id"].to_pylist()[:3])))
    own = {row["policy"]: row["kept"] for row in tournament(changed(world, **by_hand)).to_pylist()}
    assert own["recipe"] == own["top_k"] == 3  # the others have as large a budget
    entered = recipes.override(run.recipe, sets({"tournament.policies": {"by hand": by_hand}}))
    among = {row["policy"]: row["kept"] for row in tournament(replace(run, recipe=entered)).to_pylist()}
    assert among["by hand"] == 3 != among["recipe"]


def test_the_verb_prints_measures_and_overlaps(world: World, winnow: Callable[..., Any], tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(json.dumps(world.recipe.model_dump(mode="json")))
    words = ("tournament", "--recipe", recipe, "--store", world.store, "--round", 1)
    said = winnow(*words, "--set", "tournament.policies={mild: {policy: quantile_band, band: [0.0, 0.75]}}")
    assert said.status == 0 and "mild" in said.out and "overlap.mild" in said.out
    found = json.loads(winnow(*words, "--policy", "random", "--format", "json").out)
    assert [row["policy"] for row in found] == ["recipe", "random"]
    assert "there are recipe, best_of_n" in winnow(*words, "--policy", "best").line


def test_a_query_chooses_as_the_policy_does(world: World) -> None:
    keep = world.runs["curated"].recipe.select.keep
    query = f'SELECT sample_id, "rank:scene-clip" AS rank FROM candidates WHERE "rank:scene-clip" <= {keep} -- the best'
    asked, plain = kept(changed(world, policy="sql", sql=query)), kept(world.runs["curated"])
    np.testing.assert_array_equal(asked.kept, plain.kept)
    np.testing.assert_array_equal(asked.rank[asked.kept], plain.rank[plain.kept])
    assert set(asked.reason[~asked.kept]) == {"not among what the query gives"}
    assert kept(changed(world, policy="sql", sql="SELECT sample_id FROM candidates WHERE distance < 0")).kept.sum() == 0


def test_a_rank_without_a_score_is_null(world: World) -> None:
    sql = pool(world.runs["curated"], ["scene-clip", "of nobody"])
    found = world.rows(
        f'SELECT count(*) AS n, count("rank:scene-clip") AS ranked, count("rank:of nobody") AS others FROM ({sql})'
    )
    assert found[0]["n"] == found[0]["ranked"] > 0 == found[0]["others"]


def test_a_scorer_of_the_evaluation_alone_is_no_column_of_the_candidates(world: World) -> None:
    with pytest.raises(WinnowError, match="scene-judge"):
        kept(changed(world, policy="sql", sql='SELECT sample_id FROM candidates WHERE "scene-judge" = 1'))


def test_a_policy_that_keeps_nothing_is_a_row_and_one_that_fails_is_named(world: World) -> None:
    run = world.runs["curated"]

    def entered(**policies: Any) -> list[dict[str, Any]]:
        recipe = recipes.override(run.recipe, sets({"tournament.policies": policies}))
        return tournament(replace(run, recipe=recipe)).to_pylist()

    [_, high] = entered(high={"floors": {"scene-clip": 99.0}})
    assert high["kept"] == 0 and high["ess"] is None
    with pytest.raises(WinnowError, match="policy 'mine': select.sql.*nothing"):
        entered(mine={"policy": "sql", "sql": "SELECT nothing FROM candidates"})
    with pytest.raises(WinnowError, match="'recipe': the recipe's own has that name"):
        entered(recipe={"keep": 3})


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("SELECT nothing FROM candidates", "nothing"),
        ("SELECT seed FROM candidates", "no sample_id"),
        ("SELECT sample_id FROM candidates UNION ALL SELECT sample_id FROM candidates", "twice"),
        ("DROP TABLE samples", "select.sql"),
        ("SELECT * FROM read_csv('/etc/passwd')", "select.sql"),
        ("SELECT sample_id, 99999999999 AS rank FROM candidates", "rank 99999999999: give 1"),
        ("SELECT sample_id, -1 AS rank FROM candidates", "rank -1: give 1"),
    ],
)
def test_a_bad_query_is_refused_in_one_line(world: World, query: str, said: str) -> None:
    with pytest.raises(WinnowError, match=said) as caught:
        kept(changed(world, policy="sql", sql=query))
    assert "\n" not in str(caught.value)


def test_a_policy_of_ones_own(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "minepolicies").mkdir()
    (tmp_path / "minepolicies" / "firsts.py").write_text(
        "import numpy as np\nfrom curate.decision import Decision\n\n\n"
        "def first(scores, groups, ids, features=None, budget=None, rng=None):\n"
        "    kept = ids == ids.min()\n"
        "    return Decision(kept, np.ones(len(ids), int), np.where(kept, '', 'not first').astype(object))\n\n\n"
        "def nothing(*columns):\n    return None\n\n\n"
        "def fails(*columns):\n    raise OSError('gone\\naway')\n\n\n"
        "def silent(scores, groups, ids, *columns):\n"
        "    return Decision(ids == ids.min(), np.ones(len(ids), int), np.full(len(ids), '').astype(object))\n\n\n"
        "def few(*columns):\n    return Decision(np.ones(1, bool), np.ones(1, int), np.array(['']))\n\n\n"
        "def chatty(scores, groups, ids, *columns):\n"
        "    return Decision(ids == ids.min(), np.ones(len(ids)), np.full(len(ids), 'no').astype(object))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    decision = kept(changed(world, policy="minepolicies.firsts:first"))
    assert decision.kept.sum() == 1 and set(decision.reason[~decision.kept]) == {"not first"}
    with pytest.raises(WinnowError, match="must return a Decision"):
        kept(changed(world, policy="minepolicies.firsts:nothing"))
    with pytest.raises(WinnowError, match="it must be importable"):
        kept(changed(world, policy="minepolicies.firsts:missing"))
    with pytest.raises(WinnowError, match="policy 'minepolicies.firsts:fails': fails with OSError: gone away; mend it"):
        kept(changed(world, policy="minepolicies.firsts:fails"))
    with pytest.raises(WinnowError, match="firsts:silent': a row is dropped without a reason"):
        kept(changed(world, policy="minepolicies.firsts:silent"))
    with pytest.raises(WinnowError, match=r"firsts:few': kept is bool \[1\]"):
        kept(changed(world, policy="minepolicies.firsts:few"))
    decision = kept(changed(world, policy="minepolicies.firsts:chatty"))
    assert decision.rank.dtype == np.int64 and decision.reason[decision.kept].tolist() == [""]


def test_strata_are_the_prompts_own(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    decision = kept(changed(world, policy="strata", strata="cluster", budget=6))
    assert decision.kept.sum() == 6
    assert "no prompt has a cluster, so that all are one stratum" in capsys.readouterr().err
    assert any("in no class, which keeps 6" in reason for reason in decision.reason)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"select.policy": "sql"}, "go together"),
        ({"select.sql": "SELECT 1"}, "go together"),
        ({"select.policy": "strata"}, "'strata' needs select.budget"),
        ({"select.policy": "pareto"}, "two or more"),
        ({"select.policy": "best"}, "did you mean 'best_of_n'"),
        ({"distance.match": "prompt", "reference.images_per_prompt": 2}, "needs 11 images of D_0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes: dict[str, Any], said: str) -> None:
    from conftest import sets

    with pytest.raises(WinnowError, match=said):
        recipes.override(recipes.load("embedded"), sets(changes))


def measured(world: World, **changes: Any) -> dict[str, dict[str, Any]]:
    run = world.runs["curated"]
    return {row["policy"]: row for row in tournament(replace(run, recipe=recipes.override(run.recipe, sets(changes))))
            .to_pylist()}  # fmt: skip


def test_a_tournament_weighs_as_the_recipe_does_and_does_without_distances(world: World) -> None:
    run = world.runs["curated"]
    rows = measured(world, **{"weigh.by": "advantage", "distance.space": None})
    numbers = samples.of(run, "train")["sample_id"].to_numpy()[kept(run).kept]
    better = replace(run, recipe=recipes.override(run.recipe, sets({"weigh.by": "advantage"})))
    w = by_advantage(better, numbers)
    assert rows["recipe"]["ess"] == pytest.approx(w.sum() ** 2 / (w**2).sum())
    assert "distance" not in rows["recipe"] and "fd_d0" not in rows["recipe"]
    assert rows["random"]["spread"] == pytest.approx(measured(world)["random"]["spread"])


def test_weights_that_vanish_end_no_tournament(world: World) -> None:
    rows = measured(world, **{"weigh.beta": 0.0, "weigh.sigma2": 1e-6})
    assert {row["ess"] for row in rows.values()} == {None} and rows["recipe"]["distance"] > 0


def test_a_query_has_no_budget_beside_it(world: World) -> None:
    query = "SELECT sample_id FROM candidates"
    with pytest.raises(WinnowError, match="select.budget is 3, and the policy 'sql' keeps what its query gives"):
        changed(world, policy="sql", sql=query, budget=3)


def test_of_duplicates_among_what_a_query_gives_the_best_stays(world: World) -> None:
    run = changed(world, policy="sql", sql="SELECT sample_id FROM candidates", space="scene-clip", dedup=0.3)
    decision, plain = kept(run), kept(changed(world, keep=10**6, space="scene-clip", dedup=0.3))
    assert 0 < decision.kept.sum() < len(decision.kept)
    np.testing.assert_array_equal(decision.kept, plain.kept)


def test_what_people_picked_needs_no_scores(world: World, tmp_path: Path) -> None:
    numbers = samples.of(world.runs["curated"], "train")["sample_id"].to_pylist()[:3]
    (tmp_path / "ids").write_text("\n".join(map(str, numbers)))
    base = changed(world, picks=str(tmp_path / "ids"))
    run = replace(base, recipe=recipes.override(base.recipe, sets({"score.scorers": [], "weigh.by": "nothing"})))
    run.recipe.check_round()
    settings = run.recipe.select
    decision = decide(run, settings, needed(run), samples.of(run, "train"), picked(run, settings.picks))
    assert decision.kept.sum() == 3
