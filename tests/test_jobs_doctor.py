"""The doctor names what cannot run, with its cure; the diff of two rounds is that of the tables."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import World

from jobs.world import WEIGHTS

Winnow = Callable[..., Any]


def findings(out: str) -> dict[str, tuple[str, str]]:
    lines = [line.split(maxsplit=1) for line in out.splitlines()]
    return {rest.split(": ", 1)[0]: (verdict, rest.split(": ", 1)[1]) for verdict, rest in lines}


def test_the_embedded_default_runs_here(winnow: Winnow, tmp_path: Path) -> None:
    said = winnow("doctor", "--recipe", "embedded", "--store", tmp_path / "none" / "yet", "--prompts", 180)
    found = findings(said.out)
    assert said.status == 0 and not said.err, said.out
    assert all(verdict == "ok" for verdict, _ in found.values()), found
    assert {"python", "packages", "device", "disk", "Hub", "model embedded", "scorer scene-clip", "scorer scene-judge",
            "encoder scene-clip", "evaluate.real", "round"} <= set(found)  # fmt: skip
    assert not (tmp_path / "none").exists()


def test_what_is_missing_is_named_with_its_cure(
    winnow: Winnow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    changes = {
        "model": "/no/such/model", "prompts.source": "none.txt", "evaluate.real": "none.parquet",
        "prompts.judge": "{kind: endpoint, url: 'http://127.0.0.1:9/v1', model: m, key_env: NO_SUCH_KEY}",
        "score.scorers": "[scene-clip, 'nobody.wrote:this']", "evaluate.also": "['nobody.wrote:that']",
        "select.policy": "nobody.wrote:it", "select.picks": str(tmp_path / "picks.txt"),
    }  # fmt: skip
    words = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    said = winnow("doctor", "--recipe", "embedded", "--store", tmp_path, "--prompts", 180, *words)
    found = findings(said.out)
    assert said.status == 2
    wrong = {name for name, (verdict, _) in found.items() if verdict == "wrong"}
    assert wrong == {"model /no/such/model", "prompts.source", "evaluate.real", "prompts.judge",
                     "scorer nobody.wrote:this", "encoder nobody.wrote:that", "policy", "select.picks"}  # fmt: skip
    assert "give a diffusers pipeline folder" in found["model /no/such/model"][1]
    assert found["prompts.judge"][1] == "NO_SUCH_KEY is not set; export the key in it"
    assert "must be importable" in found["scorer nobody.wrote:this"][1]


def test_the_scorer_of_early_rejection_and_a_judge_of_its_own_are_looked_for(winnow: Winnow, tmp_path: Path) -> None:
    asked = ("--set", "generate.reject={by: hps-v2.1:/nowhere, keep: 2}")
    asked += ("--set", "prompts.judge={kind: local, model: ./no}")
    said = winnow("doctor", "--recipe", "embedded", "--store", tmp_path / "s", *asked)
    assert said.status == 2 and "scorer hps-v2.1:/nowhere" in said.out and "judge ./no" in said.out


@pytest.mark.parametrize("text", [
    "no JSON", "[]", "{}", '{"_class_name": "UNet2DConditionModel", "sample_size": "a"}',
    '{"_class_name": "UNet2DConditionModel", "sample_size": 8, "block_out_channels": 3}',
])  # fmt: skip
def test_a_damaged_model_and_an_odd_path_end_no_findings(winnow: Winnow, tmp_path: Path, text: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(WEIGHTS / "pipeline", model)
    (model / "unet" / "config.json").write_text(text)
    words = ("--set", f"model={model}", "--set", "prompts.source=~nobody/x.txt")
    words += ("--set", f"generate.source={'x' * 300}")
    said = winnow("doctor", "--recipe", "embedded", "--store", tmp_path / "s", "--prompts", 180, *words)
    found = findings(said.out)
    assert said.status == 2 and not said.err, said.err
    assert found["disk"][0] == "note" and "how much is needed is unknown" in found["disk"][1], found
    assert found["prompts.source"][0] == found["generate.source"][0] == "wrong" and "round" in found


def test_a_round_that_a_loop_would_refuse_is_wrong(winnow: Winnow, tmp_path: Path) -> None:
    where = ("doctor", "--recipe", "embedded", "--store", tmp_path, "--prompts", 180)
    said = winnow(*where, "--set", "guard.metric=scene-clip")
    assert said.status == 2 and findings(said.out)["round"][0] == "wrong" and "which selects" in said.out


def test_a_full_disk_and_an_old_package_are_seen(
    winnow: Winnow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib import metadata

    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.1" if name == "duckdb" else version(name))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    said = winnow("doctor", "--recipe", "embedded", "--store", tmp_path, "--prompts", 180)
    found = findings(said.out)
    assert said.status == 2 and found["disk"][0] == "wrong" and "take another STORE=" in found["disk"][1]
    assert found["packages"] == ("wrong", "duckdb is 0.1, needed is >=1.4; run 'make setup'")


def test_the_diff_of_two_rounds(world: World, winnow: Winnow) -> None:
    said = winnow("diff", 1, 2, "--store", world.store)
    assert said.status == 0 and not said.err
    lines = said.out.splitlines()
    assert lines[:2] == ["curated round 1 → curated round 2", "recipe: the same"]
    count = {
        row["round"]: row
        for row in world.rows("SELECT round, count(*) AS n, count_if(kept) AS kept FROM selections "
                              "WHERE selection = 'curated' GROUP BY round")
    }  # fmt: skip
    [kept] = [line for line in lines if line.startswith("kept: ")]
    for row in count.values():
        assert f"{row['kept']} of {row['n']} samples" in kept
    [shared] = world.rows(
        "SELECT count(*) AS n FROM (SELECT DISTINCT prompt_id FROM curated WHERE selection = 'curated' AND round = 1 "
        "INTERSECT SELECT DISTINCT prompt_id FROM curated WHERE selection = 'curated' AND round = 2)"
    )
    assert kept.endswith(f"; {shared['n']} prompts in both")
    values = world.rows("SELECT value FROM evaluations WHERE arm = 'curated' AND metric = 'fd_real' AND round > 0 "
                        "ORDER BY round")  # fmt: skip
    [line] = [line for line in lines if line.startswith("Fréchet distance to real images: ")]
    assert f"{values[0]['value']:.4g} ±" in line and f"→ {values[1]['value']:.4g} ±" in line
    assert line.rpartition(", ")[2] in ("better", "worse", "within noise")
    assert any(line.startswith("verdict: promote: ") for line in lines)


def test_the_diff_of_two_arms_shows_their_recipes(world: World, winnow: Winnow) -> None:
    lines = winnow("diff", "curated:1", "naive:1", "--store", world.store).out.splitlines()
    assert "recipe select.policy: 'best_of_n' → 'random'" in lines
    assert "recipe guard.enabled: True → False" in lines
    assert lines[0] == "curated round 1 → naive round 1"


def test_a_round_that_is_not_there_is_one_line(world: World, winnow: Winnow) -> None:
    for word in ("9", "curated:9", "x", "nobody:1", "²"):
        assert "write 2 or arm:2" in winnow("diff", 1, word, "--store", world.store).line
