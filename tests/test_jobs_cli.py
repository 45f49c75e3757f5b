"""The command line: every verb explains itself, answers in every format, and fails in one line."""

import io
import json
import os
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pyarrow.parquet as pq
import pytest
from conftest import TINY, World, files

from jobs.cli import app

VERBS = sorted(command.name or command.callback.__name__ for command in app.registered_commands if command.callback)
STAGES = ["prompts", "generate", "embed", "score", "distance", "select", "weigh", "export", "train", "evaluate"]
Winnow = Callable[..., Any]


def test_the_promised_verbs_are_there() -> None:
    assert {*STAGES, "round", "loop", "demo", "report", "sql", "explain", "verify", "base", "study"} <= set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_and_every_option_has_help(winnow: Winnow, verb: str) -> None:
    import typer.main

    said = winnow(verb, "--help")
    assert said.status == 0 and f"winnow {verb}" in said.out
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    assert command.help and command.help.strip().endswith((".", "]"))
    unexplained = [p.name for p in command.params if p.name not in ("help", "seed") and not getattr(p, "help", None)]
    if verb in STAGES:
        assert {"recipe", "store", "set"} <= {p.name for p in command.params}
    assert [name for name in unexplained if name not in ("set", "store", "source")] == []


def test_help_lists_every_verb(winnow: Winnow) -> None:
    said = winnow("--help")
    assert said.status == 0 and all(verb in said.out for verb in VERBS)


QUERY = "SELECT round, arm, verdict, seconds FROM rounds ORDER BY arm, round"


def test_sql_as_a_table(world: World, winnow: Winnow) -> None:
    said = winnow("sql", QUERY, "--store", world.store)
    assert said.status == 0 and all(word in said.out for word in ("round", "verdict", "curated", "naive", "promote"))
    images = winnow("sql", "SELECT image FROM samples LIMIT 1", "--store", world.store)
    assert "<image, " in images.out


def test_sql_as_json(world: World, winnow: Winnow) -> None:
    assert json.loads(winnow("sql", QUERY, "--store", world.store, "--format", "json").out) == world.rows(QUERY)
    whole = winnow("sql", "SELECT sum(7) AS n, 1.5::DECIMAL(4, 2) AS d", "--store", world.store, "--format", "json").out
    assert whole.strip() == '[{"n": 7, "d": 1.5}]'  # a sum of whole numbers is one
    query = "SELECT scores, weight, image FROM curated LIMIT 2"
    said = winnow("sql", query, "--store", world.store, "--format", "json")
    assert set(json.loads(said.out)[0]["scores"]) >= {"scene-clip"}


def test_sql_as_csv(world: World, winnow: Winnow) -> None:
    said = winnow("sql", QUERY, "--store", world.store, "--format", "csv")
    assert pandas.read_csv(io.StringIO(said.out)).to_dict("records") == world.rows(QUERY)
    nested = winnow("sql", "SELECT sample_id, scores FROM curated LIMIT 1", "--store", world.store, "--format", "csv")
    assert "scene-clip" in pandas.read_csv(io.StringIO(nested.out))["scores"][0]


def test_sql_as_parquet(
    world: World, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    from jobs.cli import main

    monkeypatch.setattr(sys, "argv", ["winnow", "sql", QUERY, "--store", str(world.store), "--format", "parquet"])
    with pytest.raises(SystemExit):
        main()
    out = capfdbinary.readouterr().out
    assert pq.read_table(io.BytesIO(out)).to_pylist() == world.rows(QUERY)


def test_sql_of_an_older_snapshot(world: World, winnow: Winnow) -> None:
    words = ("sql", "SELECT count(*) AS n FROM rounds", "--store", world.store, "--format", "json", "--snapshot")
    assert json.loads(winnow(*words, 1).out) == [{"n": 0}]
    assert "snapshot 9999" in winnow(*words, 9999).line


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("SELEC 1", "syntax error"), ("SELECT * FROM sample", "sample"), ("DROP VIEW samples", "only SELECT"),
        ("COPY samples TO 'x.csv'", "only SELECT"), ("", "empty"), ("SELECT nothing FROM rounds", "nothing"),
    ],
)  # fmt: skip
def test_a_wrong_query_is_one_line(world: World, winnow: Winnow, query: str, said: str) -> None:
    assert said in winnow("sql", query, "--store", world.store).line


def test_what_the_formats_cannot_hold_is_not_lost(world: World, winnow: Winnow) -> None:
    def ask(sql: str, form: str) -> Any:
        return winnow("sql", sql, "--store", world.store, "--format", form)

    twice = "SELECT 1 AS a, 2 AS a, 3 AS a_1, ':cat:' AS \":dog:\""
    assert json.loads(ask(twice, "json").out) == [{"a": 1, "a_1": 2, "a_1_1": 3, ":dog:": ":cat:"}]
    said = ask(twice, "table").out
    assert all(word in said for word in ("a_1_1", ":dog:", ":cat:", " 2 "))
    nothing = "SELECT 'nan'::DOUBLE AS n, ['inf'::DOUBLE, 1] AS i"
    assert json.loads(ask(nothing, "json").out, parse_constant=pytest.fail) == [{"n": None, "i": [None, 1.0]}]
    assert ask("SELECT INTERVAL 1 DAY AS a", "csv").status == 0
    assert "--format parquet: " in ask("SELECT INTERVAL 1 DAY AS a", "parquet").line


def test_an_unknown_format_is_one_line(world: World, winnow: Winnow) -> None:
    line = winnow("sql", QUERY, "--store", world.store, "--format", "xml").line
    assert "allowed are table, json, csv, parquet" in line


def test_no_store_is_one_line(winnow: Winnow, tmp_path: Path) -> None:
    for words in (("sql", "SELECT 1"), ("verify",)):
        assert "no store here" in winnow(*words, "--store", tmp_path / "nowhere").line
    assert not (tmp_path / "nowhere").exists()


def test_a_traceback_with_debug_only(winnow: Winnow, tmp_path: Path) -> None:
    words = ("generate", "--recipe", "nothing", "--store", tmp_path / "store")
    assert "Traceback" not in winnow(*words).err
    said = winnow(*words, "--debug")
    assert said.status == 2 and "Traceback" in said.err and said.err.strip().splitlines()[-1].startswith("winnow: ")


def test_shards_count_from_0(winnow: Winnow, tmp_path: Path) -> None:
    assert "shards count from 0" in winnow("generate", "--store", tmp_path, "--shard", 2, "--of", 2).line


def test_an_unknown_split_is_named(winnow: Winnow, tmp_path: Path) -> None:
    assert "train, reference and eval" in winnow("generate", "--store", tmp_path, "--split", "test").line


@pytest.mark.parametrize("words", [["nothing"], ["generate", "--nothing", "1"], ["generate", "--round", "x"]])
def test_a_wrong_command_line_exits_with_2(winnow: Winnow, words: list[str]) -> None:
    said = winnow(*words)
    assert said.status == 2 and "Traceback" not in said.err and said.err


def test_verify_says_sound(world: World, winnow: Winnow) -> None:
    said = winnow("verify", "--store", world.store)
    assert said.status == 0 and said.out.strip().endswith("sound") and not said.err


def test_evaluate_prints_its_figures(world: World, winnow: Winnow, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(json.dumps(world.recipe.model_dump(mode="json")))
    before = files(world.store)
    said = winnow("evaluate", "--recipe", recipe, "--store", world.store, "--round", 2)
    lines = {line.split()[0] for line in said.out.splitlines()}
    assert {"judge_accuracy", "fd_real", "fd_d0", "diversity", "scene-clip", "win_rate:scene-reader"} <= lines
    assert files(world.store) == before


def test_explain_tells_of_kept_and_dropped(world: World, winnow: Winnow) -> None:
    for kept in (True, False):
        row = world.rows(f"SELECT * FROM selections WHERE selection = 'curated' AND kept = {kept} LIMIT 1")[0]
        said = winnow("explain", row["sample_id"], "--store", world.store)
        assert said.status == 0 and str(row["sample_id"]) in said.out
        assert "nearest in d0" in said.out  # by the recipe that the store was sealed with
        assert "scene-clip" in said.out and (row["reason"] in said.out if not kept else "weight" in said.out)
    assert "7" in winnow("explain", 7, "--store", world.store).line


def test_explain_tells_programs_the_same(world: World, winnow: Winnow) -> None:
    row = world.rows("SELECT * FROM selections WHERE selection = 'curated' AND round = 2 AND kept LIMIT 1")[0]
    story = json.loads(winnow("explain", row["sample_id"], "--store", world.store, "--format", "json").out)
    assert story["sample"]["sample_id"] == row["sample_id"] and "image" not in story["sample"]
    [choice] = story["selections"]
    assert choice["weight"] == row["weight"] and choice["rank"] == row["rank"] and choice["kept"] is True
    assert [one["scorer"] for one in story["scores"]] == ["scene-clip"] and story["scores"][0]["mates"] == 4
    near = [one["distance"] for one in story["nearest"]]
    assert {(one["metric"], one["space"]) for one in story["nearest"]} == {("l2", "scene-clip")}
    assert len(near) == 3 and near == sorted(near) and story["lineage"] == []
    # The mean of the ten nearest is what the distance says: the nearest three are no farther.
    assert near[-1] <= story["distances"][0]["value"] * 1.001
    assert [Path(one["folder"]).name[:10] for one in story["shards"]] == ["curated-r2"]
    [early] = world.rows("SELECT sample_id FROM selections WHERE selection = 'curated' AND round = 1 AND kept LIMIT 1")
    said = winnow("explain", early["sample_id"], "--store", world.store).out  # rounds accumulate
    assert "trained on in shards/curated-r1-" in said and ", shards/curated-r2-" in said
    assert "allowed are text and json" in winnow("explain", 7, "--store", world.store, "--format", "xml").line


def test_the_installed_command_keeps_foreign_rooms_out(tmp_path: Path) -> None:
    """A stranger's package ``storage`` on the path must stop the program."""
    (tmp_path / "storage").mkdir()
    (tmp_path / "storage" / "__init__.py").touch()
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parent.parent}"}
    words = [sys.executable, "-c", "from jobs.cli import main; main()", "verify"]
    said = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert said.returncode == 2 and said.stderr.count("\n") == 1, said.stderr
    assert f"found {tmp_path}/storage" in said.stderr


def test_an_interrupt_says_how_to_go_on(winnow: Winnow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import jobs.prompts

    monkeypatch.setattr(jobs.prompts, "prompts", lambda run: os.kill(os.getpid(), signal.SIGINT))
    said = winnow("prompts", "--store", tmp_path / "store")
    assert said.status == 130 and "run the same command again" in said.err and "Traceback" not in said.err


def test_demo_ends_with_the_path_of_its_report(tmp_path: Path, winnow: Winnow) -> None:
    """The very command, in the fast recipe cut down further."""
    said = winnow("demo", "--fast", "--store", tmp_path / "demo", "--rounds", 1, *settings({}))
    assert said.status == 0, said.err
    report = Path(said.out.splitlines()[-1])
    assert report == tmp_path / "demo" / "report.html" and report.is_file()
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert set(summary["arms"]) == {"curated", "naive"}
    for arm in summary["arms"].values():
        assert [row["round"] for row in arm["rounds"]] == [0, 1]
        for row in arm["rounds"]:
            assert {"judge_accuracy", "fd_real", "fd_d0", "diversity", "scene-clip"} <= set(row["metrics"])


def test_study_writes_its_figures(tmp_path: Path, winnow: Winnow) -> None:
    from jobs.study import METRICS

    small = {"generate.images_per_prompt": 2, "select.keep": 1, "train.lr_warmup": 1}
    where = ("study", "--store", tmp_path / "study", "--out", tmp_path / "out", "--seeds", 2, "--rounds", 1)
    arms = {"arms.naive.generate.images_per_prompt": 2, "reference.images_per_prompt": 2}
    said = winnow(*where, *settings(small | arms))
    assert said.status == 0, said.err
    page = (tmp_path / "out" / "study.md").read_text()
    assert "2 seeds, 1 rounds" in page and "## Arm naive" in page
    found = json.loads((tmp_path / "out" / "study.json").read_text())
    for row in found["table"]:
        assert len(row["values"]) == 2 and row["mean"] == pytest.approx(sum(row["values"]) / 2)
        assert row["se"] == pytest.approx(abs(row["values"][0] - row["values"][1]) / 2, rel=1e-9, abs=1e-12)
    pictures = [line for line in page.split("(") if ".svg)" in line]
    assert len(pictures) == len(METRICS)
    for picture in pictures:
        assert (tmp_path / "out" / picture.partition(")")[0]).read_text().startswith("<svg")


def test_studies_share_their_runs_and_play_only_what_is_lacking(
    tmp_path: Path, winnow: Winnow, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs import studies
    from jobs.study import METRICS, arm_of, key_of

    replace, small = {"export": {"accumulate": False}}, {"select": {"keep": 1}}
    one = studies.Study("Which is it?", "Nothing.", {"both": {}, "last": replace}, 1, small)
    other = studies.Study("And this?", "Nothing.", {"it": {}, "all": {"select": {"keep": 2}}}, 1, small)
    monkeypatch.setattr(studies, "STUDIES", {"one": one, "other": other})
    where = ("--store", tmp_path / "study", "--out", tmp_path / "out", "--seeds", 1, "--workers", 2)
    tiny = {"generate.images_per_prompt": 2, "train.lr_warmup": 1, "reference.images_per_prompt": 2}
    said = winnow("study", "one", "other", *where, *settings(tiny))
    assert said.status == 0, said.err
    runs = json.loads((tmp_path / "out" / "studies.json").read_text())
    assert len(runs) == 3  # "both" is "it"
    page = (tmp_path / "out" / "study-one.md").read_text()
    assert "| both | 1 |" in page and "| last | 1 |" in page and "not played" not in page
    ends = {key: {row["metric"]: row["value"] for row in run["rows"] if row["round"] == 1} for key, run in runs.items()}
    sets = [(key.split("."), value) for key, value in (TINY | tiny).items()]
    both, last = (ends[key_of(arm_of(one, arm, 0, sets))]["diversity"] for arm in one.arms)
    bars = len(METRICS) + 2
    [line] = [line for line in page.splitlines() if line.startswith("| last | ") and line.count("|") == bars]
    assert float(line.split("|")[-2]) == pytest.approx(last - both, abs=0.1)
    # Nothing is played again.
    (tmp_path / "study").rename(tmp_path / "gone")
    assert winnow("study", "other", *where, *settings(tiny)).status == 0 and not (tmp_path / "study").exists()


def test_an_arm_that_fails_costs_no_other_and_other_steps_have_a_base_of_their_own(
    tmp_path: Path, winnow: Winnow, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs import studies

    arms = {"it": {}, "none": {"select": {"floors": {"scene-clip": 99.0}}}, "steps": {"generate": {"steps": 3}}}
    monkeypatch.setattr(studies, "STUDIES", {"one": studies.Study("What?", "Nothing.", arms, 1, {})})
    where = ("--store", tmp_path / "study", "--out", tmp_path / "out", "--seeds", 1, "--workers", 1)
    few = {"generate.images_per_prompt": 2, "train.lr_warmup": 1, "reference.images_per_prompt": 2, "select.keep": 1}
    said = winnow("study", "one", *where, *settings(few))
    assert said.status == 2 and "floors {'scene-clip': 99.0} leave none" in said.err.splitlines()[-1]
    runs = json.loads((tmp_path / "out" / "studies.json").read_text())
    kinds = [{(row["round"], row["metric"]): row["value"] for row in run["rows"]} for run in runs.values()]
    assert len(kinds) == 2 and kinds[0][0, "fd_real"] != kinds[1][0, "fd_real"]


def test_a_killed_study_leaves_no_worker_behind(tmp_path: Path) -> None:
    words = ["study", "whole", "--store", str(tmp_path / "study"), "--out", str(tmp_path / "out"), "--workers", "1"]
    script = "from jobs.cli import main; main()"
    with subprocess.Popen([sys.executable, "-c", script, *words], stdout=subprocess.PIPE) as study:
        end = time.monotonic() + 120
        while not list(tmp_path.glob("study/seed-*")):  # a worker makes it
            assert study.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        study.kill()
        assert study.stdout is not None
        read, _, _ = select.select([study.stdout], [], [], 60)  # its end comes when no process holds it any more
        assert read and study.stdout.read() == b""


def test_an_unknown_study_is_refused_before_any_work(tmp_path: Path, winnow: Winnow) -> None:
    said = winnow("study", "effect", "colour", "--store", tmp_path / "study")
    assert said.status == 2 and "study 'colour': unknown; there are effect, ablation, " in said.err
    assert not (tmp_path / "study").exists()


def settings(changes: dict[str, Any]) -> list[str]:
    return [word for key, value in (TINY | changes).items() for word in ("--set", f"{key}={json.dumps(value)}")]


def test_make_passes_a_query_on_as_it_is() -> None:
    query = "SELECT 'it''s' AS a WHERE \"round\" = 'x'"
    home = Path(__file__).parents[1]
    said = subprocess.run(["make", "-n", "sql", f"Q={query}"], capture_output=True, text=True, cwd=home)
    line = next(line for line in said.stdout.splitlines() if "winnow sql" in line)
    assert shlex.split(line)[-1] == query, line


def test_out_of_memory_names_the_cure(world: World, winnow: Winnow, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    import jobs.report

    def full(_: Path) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(jobs.report, "report", full)
    line = winnow("report", "--store", world.store).line
    assert "out of memory (CUDA out of memory. Tried" in line and "train.micro_batch" in line
