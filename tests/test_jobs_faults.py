"""What may go wrong with a run: kill -9 at any moment, bad input, a broken model, a full disk."""

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ForkServer, World, files, rows, sets

from jobs.digest import digest
from jobs.models import revision
from storage.snapshot import latest
from storage.verify import verify

Winnow = Callable[..., Any]

#: One round of both arms, smaller still.
SMALL = {
    "threads": 1,
    "rounds": 1,
    "generate.prompts": 12,
    "generate.images_per_prompt": 2,
    "generate.steps": 2,
    "generate.batch": 8,
    "generate.retries": 8,
    "reference.prompts": 12,
    "reference.images_per_prompt": 2,
    "embed.batch": 16,
    "score.batch": 16,
    "distance.k": 3,
    "train.steps": 4,
    "train.batch": 4,
    "train.checkpoint": 1,
    "evaluate.prompts": 4,
    "evaluate.images_per_prompt": 2,
    "evaluate.resamples": 5,
}


def play(store: str) -> None:
    """What the killed processes run: both arms, as the demo does."""
    import warnings

    from jobs import recipe as recipes
    from jobs.round import loop
    from jobs.run import Run
    from storage.layout import create

    warnings.simplefilter("ignore")
    recipe = recipes.override(recipes.load("embedded-fast"), sets(SMALL))
    home = create(store)
    for arm in recipe.arms:
        loop(Run(home, recipe.for_arm(arm), 1, arm))


CONTENT = {
    "prompts": "SELECT prompt_id, text, split, kept, reason FROM prompts ORDER BY ALL",
    "samples": "SELECT sample_id, round, arm, split, prompt_id, seed, attempt FROM samples ORDER BY ALL",
    "scores": "SELECT sample_id, scorer, value FROM scores ORDER BY ALL",
    "distances": "SELECT sample_id, space, metric, value FROM distances ORDER BY ALL",
    "selections": "SELECT selection, round, sample_id, kept, rank, weight FROM selections ORDER BY ALL",
    "evaluations": "SELECT round, arm, metric, value, n FROM evaluations ORDER BY ALL",
    "rounds": "SELECT round, arm, model, parent_model, verdict, images FROM rounds ORDER BY ALL",
    "shards": "SELECT selection, round, path, rows FROM shards ORDER BY ALL",
}


def content(store: Path) -> dict[str, list[Any]]:
    return {name: [tuple(row.values()) for row in rows(store, sql)] for name, sql in CONTENT.items()}


@pytest.fixture(scope="module")
def whole(forks: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """An uninterrupted run, and how long it took."""
    home = tmp_path_factory.mktemp("whole")
    began = time.perf_counter()
    forks.start("test_jobs_faults:play", str(home / "store"), log=home / "log")
    assert forks.wait() == 0, (home / "log").read_text()
    return home / "store", time.perf_counter() - began


def same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return one == pytest.approx(other, rel=1e-5, abs=1e-5)
    return one == other


def test_killed_runs_end_like_an_uninterrupted_one(
    whole: tuple[Path, float], forks: ForkServer, tmp_path: Path
) -> None:
    store, (expected, seconds) = tmp_path / "store", whole
    rng = random.Random(0)
    first_seen: dict[str, tuple[int, int]] = {}
    kills = done = 0
    for attempt in range(60):
        # Half of the kills come by the clock, half at the n-th file operation, which no slow machine moves.
        by_clock = attempt % 2 == 0
        last = kills >= 12
        events = 0 if by_clock or last else rng.randint(1, 400)
        child = forks.start("test_jobs_faults:play", str(store), log=tmp_path / "log", events=events)
        if by_clock and not last:
            time.sleep(rng.uniform(0.02, 0.3) * seconds)
            os.kill(child, signal.SIGKILL)
        status = forks.wait()
        if (store / "winnow.json").exists():
            assert verify(store).ok  # sound at every moment
            now = files(store / "tables") | files(store / "snapshots")
            assert all(now[path] == first_seen[path] for path in first_seen), "a committed file was touched"
            first_seen = now
        if status == 0:
            done += 1
            if last or attempt > 40:
                break
        else:
            assert status == -9, (tmp_path / "log").read_text()
            kills += 1
    assert kills >= 10 and done >= 1, (kills, done)

    got, should = content(store), content(expected)
    for name in CONTENT:
        assert len(got[name]) == len(should[name]), name
        for one, other in zip(got[name], should[name], strict=True):
            assert all(map(same, one, other)), (name, one, other)
    assert verify(store).ok
    report = verify(store)
    assert not [note for note in report.notes if note.startswith("tables/")], report.notes
    assert not list((store / "checkpoints").glob("*"))


def test_the_kills_struck_at_work(whole: tuple[Path, float], forks: ForkServer, tmp_path: Path) -> None:
    """A kill amid a stage leaves what is committed, and the rerun does not make it again."""
    store = tmp_path / "store"
    for events in (40, 80, 120, 160):
        forks.start("test_jobs_faults:play", str(store), log=tmp_path / "log", events=events)
        assert forks.wait() == -9
    before = files(store / "tables")
    assert before
    forks.start("test_jobs_faults:play", str(store), log=tmp_path / "log")
    assert forks.wait() == 0, (tmp_path / "log").read_text()
    after = files(store / "tables")
    assert before.items() <= after.items() and len(after) == len(latest(store).parts)


def test_a_shard_of_the_work_waits_for_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two processes share a stage; the one that ends last seals it, and nothing is doubled."""
    from dataclasses import replace

    from jobs import recipe as recipes
    from jobs.generate import generate
    from jobs.prompts import prompts
    from jobs.run import Run
    from storage.layout import create

    recipe = recipes.override(recipes.load("embedded-fast"), sets(SMALL))
    run = Run(create(tmp_path / "store"), recipe.for_arm("curated"))
    prompts(run)
    generate(replace(run, shard=1, n_shards=3))
    assert "2 of 3 units are left to other shards" in capsys.readouterr().err
    assert rows(run.store, "SELECT count(*) AS n FROM samples") == [{"n": 0}]
    generate(replace(run, shard=0, n_shards=3))
    generate(replace(run, shard=2, n_shards=3))
    assert rows(run.store, "SELECT count(*) AS n, count(DISTINCT sample_id) AS ids FROM samples") == [
        {"n": 24, "ids": 24}
    ]


def test_shards_of_an_evaluation_wait_for_each_other(tmp_path: Path) -> None:
    """Each process does what it can of every step; the one that comes when all is there measures."""
    from dataclasses import replace

    from jobs import recipe as recipes
    from jobs.evaluate import evaluate
    from jobs.generate import generate
    from jobs.prompts import prompts
    from jobs.run import Run
    from storage.layout import create

    recipe = recipes.override(recipes.load("embedded-fast"), sets(SMALL | {"score.batch": 4}))
    run = Run(create(tmp_path / "store"), recipe.for_arm("curated"), 0)
    prompts(run)
    generate(run, "reference")
    first, second = replace(run, shard=0, n_shards=2), replace(run, shard=1, n_shards=2)
    turns = [(who, evaluate(who)) for _ in range(4) for who in (second, first)]
    done = [whole for _, whole in turns]
    assert done == sorted(done) and not done[0] and done[-1]
    assert rows(run.store, "SELECT count(*) AS n FROM evaluations WHERE metric = 'judge_accuracy'") == [{"n": 1}]


@pytest.mark.parametrize(
    ("verb", "change"),
    [
        ("generate", {"generate.steps": 3}),
        ("select", {"select.keep": 2}),
        ("weigh", {"weigh.quantile": 0.5}),
        ("evaluate", {"evaluate.resamples": 6}),
        ("loop", {"generate.guidance": 2.0}),
    ],
)
def test_a_second_set_beside_the_first_is_refused(
    winnow: Winnow, copy: Path, verb: str, change: dict[str, Any]
) -> None:
    before = files(copy / "tables")
    which = () if verb == "loop" else ("--round", 1)
    line = winnow(verb, "--recipe", "embedded-fast", "--store", copy, *which, *options(change)).line
    assert "made with other settings" in line and "tables/" in line and "STORE=" in line
    assert files(copy / "tables") == before and verify(copy).ok


def test_a_lost_part_is_made_again_by_its_stage(winnow: Winnow, copy: Path) -> None:
    """The cure that verify names, for every stage of a round."""
    where = ("--recipe", "embedded-fast", "--store", copy, "--round", 1, *options({}))
    verbs = {"samples": "generate", "embeddings": "embed", "scores": "score", "distances": "distance",
             "selections": "select", "weights": "weigh"}  # fmt: skip
    for table, verb in verbs.items():
        part = sorted((copy / "tables" / table / "round-1").rglob("*.parquet"))[0]
        part = next(p for p in sorted((copy / "tables" / table / "round-1").rglob("*.parquet")) if "eval" not in str(p))
        kept = part.read_bytes()
        part.unlink()
        said = winnow("verify", "--store", copy)
        assert said.status == 2 and "run its stage again" in said.out
        assert winnow(verb, *where, *(("--arm", "naive") if "naive" in str(part) else ())).status == 0, (table, part)
        assert part.read_bytes() == kept and verify(copy).ok


def test_what_is_lost_of_a_model_or_of_the_held_out_images_is_made_again(winnow: Winnow, copy: Path) -> None:
    where = ("--recipe", "embedded-fast", "--store", copy, "--round", 1, *options({}))
    for verb, folder in (("train", "models"), ("evaluate", "samples/round-1/arm-curated/split-eval")):
        part = next((copy / "tables" / folder).rglob("*.parquet"))
        kept = part.read_bytes()
        part.unlink()
        assert winnow("verify", "--store", copy).status == 2
        said = winnow(verb, *where)
        assert said.status == 0, said.err
        assert part.read_bytes() == kept and verify(copy).ok


def test_two_processes_with_other_settings_do_not_both_seal(tmp_path: Path) -> None:
    """Each looks before it works, and they work at the same time: the second to seal is refused."""
    from jobs import recipe as recipes
    from jobs.generate import generate
    from jobs.prompts import prompts
    from jobs.run import Run
    from jobs.stage import complete, units
    from schemas.errors import WinnowError
    from storage.layout import create

    recipe = recipes.override(recipes.load("embedded-fast"), sets(SMALL))
    run = Run(create(tmp_path / "store"), recipe.for_arm("curated"))
    prompts(run)
    generate(run)
    made = pa.concat_tables(pq.read_table(path) for path in (run.store / "tables" / "samples").rglob("*.parquet"))

    def again(of: Run, spec: str, first: Callable[[], None]) -> None:
        ids = pa.array([number + len(spec) for number in made["sample_id"].to_pylist()])
        place = made.column_names.index("sample_id")
        moved = made.set_column(place, "sample_id", ids).set_column(
            made.column_names.index("round"), "round", pa.array([2] * len(made), pa.int32())
        )
        work = units("samples", {"round": 2, "arm": "curated", "split": "train"}, moved, len(moved), spec)

        def start() -> Callable[[pa.Table], pa.Table]:
            first()
            return lambda some: some

        complete(of, "generate", "samples", work, start)

    with pytest.raises(WinnowError, match="is sealed already, made with other settings"):
        again(run, "a", lambda: again(run, "of others", lambda: None))
    assert rows(run.store, "SELECT count(*) AS n FROM samples WHERE round = 2") == [{"n": len(made)}]
    assert verify(run.store).ok


def test_a_damaged_first_snapshot_stops_no_loop(winnow: Winnow, copy: Path) -> None:
    (copy / "snapshots" / "000001.json").write_text("{}")
    said = winnow("loop", "--recipe", "embedded-fast", "--store", copy, *options({}))
    assert said.status == 0, said.err


def test_a_loop_can_be_made_longer(winnow: Winnow, copy: Path) -> None:
    where = ("--recipe", "embedded-fast", "--store", copy)
    closed = rows(copy, "SELECT verdict, reason FROM rounds WHERE arm = 'naive' AND round = 1")
    assert closed[0]["verdict"] == "stop"
    said = winnow("loop", *where, "--arm", "naive", *options({}), "--rounds", 2)
    assert said.status == 0 and "round 1 of naive: stop of 1 rounds, going on with 2" in said.err, said.err
    assert rows(copy, "SELECT max(round) AS n FROM rounds WHERE arm = 'naive'") == [{"n": 2}]
    assert "naive round 2" in (copy / "summary.json").read_text()  # renewed after the round
    assert rows(copy, "SELECT verdict FROM rounds WHERE arm = 'naive' AND round = 1") == [{"verdict": "stop"}]
    assert verify(copy).ok


def test_prompt_settings_that_changed_are_said(winnow: Winnow, copy: Path) -> None:
    where = ("--recipe", "embedded-fast", "--store", copy)
    said = winnow("loop", *where, *options({"prompts.held_out": 0.3}))
    assert "prompts.held_out has changed since; the store keeps the prompts that it has" in said.err
    assert "has changed" not in winnow("loop", *where, *options({})).err


def test_sealing_beside_a_lost_part_is_one_line(winnow: Winnow, copy: Path) -> None:
    next(path for path in (copy / "tables" / "scores").rglob("*.parquet") if "curated" in str(path)).unlink()
    where = ("--recipe", "embedded-fast", "--store", copy, "--arm", "naive", "--round", 2)
    line = winnow("round", *where, *options({"rounds": 2})).line
    assert "winnow verify" in line or "sealed, but missing" in line


def test_a_loop_takes_the_prompts_that_the_store_has(winnow: Winnow, tmp_path: Path) -> None:
    store = tmp_path / "store"
    mine = tmp_path / "mine.txt"
    inks, digits = ("red", "white", "pink"), ("one", "two", "six")
    mine.write_text("\n".join(f"a {ink} {digit} on a blue background" for ink in inks for digit in digits))
    where = ("--recipe", "embedded-fast", "--store", store, *options({"generate.prompts": None}))
    assert winnow("prompts", *where, "--source", mine).status == 0
    said = winnow("loop", *where)
    assert said.status == 0 and "from mine.txt, not embedded" in said.err, said.err
    texts = {row["prompt"] for row in rows(store, "SELECT DISTINCT prompt FROM samples")}
    assert texts == set(mine.read_text().splitlines())


# Bad input: one line that names the thing and the cure, exit status 2.

GOOD = "model: embedded\nprompts: {source: embedded, least_specificity: 0, least_clarity: 0, near: null}\nthreads: 1\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: embedded\nmodle: x\n", ["'modle'", "did you mean 'model'?"]),
        ("model: embedded\ngenerate: {step: 5}\n", ["'generate.step'", "did you mean 'steps'?", "allowed keys"]),
        ("model: embedded\ngenerate: {steps: many}\n", ["generate.steps", "'many'", "integer"]),
        ("model: embedded\ngenerate: {steps: 0}\n", ["generate.steps", "greater than or equal to 1"]),
        ("model: embedded\ngenerate: 7\n", ["generate", "7"]),
        ("model: embedded\nselect: {policy: best}\n", ["select.policy", "'best'", "best_of_n"]),
        ("model: embedded\nweigh: {sigma2: .nan}\n", ["weigh.sigma2", "nan"]),
        ("model: embedded\nscore: {scorers: [scene-clop]}\n", ["'scene-clop'", "did you mean 'scene-clip'?"]),
        ("model: embedded\nembed: {encoders: [vea:x]}\n", ["'vea:x'", "did you mean 'vae'?"]),
        ("model: embedded\narms: {curated: {train: {stesp: 1}}}\n", ["arm curated", "'train.stesp'", "'steps'"]),
        ("model: embedded\narms: {curated: {train: {lr: -1}}}\n", ["arm curated", "train.lr", "greater than 0"]),
        ("model: embedded\narms: {curated: [1]}\n", ["arms.curated"]),
        ("model: embedded\narms: {}\n", ["arms", "at least 1"]),
        ("prompts: {source: embedded}\n", ["'model'", "missing"]),
        ("model: [\n", ["not YAML"]),
        ("- model\n", ["list"]),
        ("just words\n", ["str"]),
        ("model: embedded\n? [a, b]\n: 1\n", ["not YAML", "line 2: a key is a list"]),
        ("model: embedded\narms: {base: {}}\n", ["'base'", "take another name"]),
        ("", ["NoneType"]),
    ],
)
def test_a_wrong_recipe_is_named(winnow: Winnow, tmp_path: Path, text: str, said: list[str]) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    line = winnow("generate", "--recipe", recipe, "--store", tmp_path / "store").line
    assert all(word in line for word in said), line
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", ["nothing", "/no/such.yaml", "."])
def test_a_missing_recipe_is_named(winnow: Winnow, tmp_path: Path, name: str) -> None:
    assert name in winnow("generate", "--recipe", name, "--store", tmp_path / "store").line


def test_a_recipe_of_other_bytes_is_named(winnow: Winnow, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"model: \xff\xfe\n")
    assert "cannot be read" in winnow("generate", "--recipe", tmp_path / "mine.yaml", "--store", tmp_path / "s").line


@pytest.mark.parametrize(
    "text", ["steps", "=5", "generate.steps=", "generate.steps=two", "generate=5", "a: b=[", "x.y=1"]
)
def test_a_wrong_set_is_named(winnow: Winnow, tmp_path: Path, text: str) -> None:
    line = winnow("generate", "--store", tmp_path / "store", "--set", text).line
    assert text.partition("=")[0].split(".")[0] in line or "--set" in line, line


def test_a_missing_model_is_named(winnow: Winnow, tmp_path: Path) -> None:
    where = ("--store", tmp_path / "store", "--set", f"model={tmp_path / 'nowhere'}")
    assert winnow("prompts", *where).status == 0
    assert f"model '{tmp_path / 'nowhere'}': no such folder" in winnow("generate", *where).line


def test_an_unknown_arm_is_named(winnow: Winnow, tmp_path: Path) -> None:
    line = winnow("generate", "--store", tmp_path / "store", "--arm", "curious").line
    assert "arm 'curious'" in line and "curated, naive" in line


@pytest.mark.parametrize(
    ("verb", "said"),
    [
        ("generate", "winnow prompts"), ("embed", "winnow generate"), ("score", "winnow generate"),
        ("select", "winnow generate"), ("weigh", "winnow select"), ("export", "winnow weigh"),
        ("train", "winnow export"),
    ],
)  # fmt: skip
def test_a_stage_out_of_turn_says_which_comes_first(winnow: Winnow, tmp_path: Path, verb: str, said: str) -> None:
    assert said in winnow(verb, "--store", tmp_path / "store").line


def test_a_round_out_of_turn_says_which_comes_first(winnow: Winnow, tmp_path: Path) -> None:
    assert winnow("prompts", "--store", tmp_path / "store").status == 0
    assert "winnow round --round 4" in winnow("generate", "--store", tmp_path / "store", "--round", 5).line


DIRTY = [
    (b"a red fox in the deep snow\n", ""),
    (b"two green birds on a thin wire\n", ""),
    (b"an old boat under a stone bridge\n", ""),
    (b"caf\xff au lait on a wooden table\n", "U+FFFD"),
    (b"\n", "empty"),
    (b"   \t \n", "empty"),
    (b"a black cat\0sleeping on a chair\n", "U+0000"),
    (b"x" * 100_000 + b"\n", "too long"),
    (b"A red  fox in the deep snow.\r\n", "duplicate of"),
    (b"a red fox in the deep snow\n", "duplicate of"),
    (b"1234 5678\n", "no letters"),
    ("ein blauer Bär im grünen Wald über dem Fluß\n".encode(), ""),
    ("三只红色的鸟在树上\n".encode(), ""),
]


def test_dirty_prompts_are_dropped_with_their_reason(winnow: Winnow, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"".join(text for text, _ in DIRTY))
    said = winnow("prompts", "--store", tmp_path / "store", "--source", tmp_path / "prompts.txt")
    assert said.status == 0, said.err
    found = rows(tmp_path / "store", "SELECT text, kept, reason, source, split FROM prompts")
    assert len(found) == len(DIRTY)
    reasons = [row["reason"] or "" for row in found]
    for _, why in DIRTY:
        match = [reason for reason in reasons if (why in reason if why else not reason)]
        assert match, (why, reasons)
    assert {row["text"] for row in found if row["kept"]} == {t.decode().strip() for t, why in DIRTY if not why}
    assert {row["source"] for row in found} == {"prompts.txt"}


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("p.txt", b"", ["empty"]),
        ("p.txt", b"a red fox in the snow\n", ["1 of 1 prompts pass, 2 are needed"]),
        ("p.txt", b"\n\n\n", ["0 of 3", "empty"]),
        ("p.md", b"a red fox\n", ["'.md'", ".txt, .tsv, .csv, .jsonl, .parquet"]),
        ("p.csv", b"", ["p.csv"]),
        ("p.csv", b"words,more\na,b\n", ["no column 'text'", "words, more"]),
        ("p.csv", b'text\n"a\rb" c\rd,"e\n', ["p.csv"]),
        ("p.tsv", b"Category\tChallenge\nx\ty\n", ["no column", "Category, Challenge"]),
        ("p.jsonl", b'{"text": "a"}\n{"text": \n', ["line 2", "not JSON"]),
        ("p.jsonl", b'{"text": "a"}\n{"words": "b"}\n', ["line 2", "'text'"]),
        ("p.jsonl", b"[1]\n", ["line 1"]),
        ("p.jsonl", b'{"text": "a \\ud800 fox"}\n{"text": "b \\ud800"}\n', ["0 of 2", "U+D800"]),
        ("p.parquet", b"PAR1nonsense", ["cannot be read"]),
    ],
)
def test_useless_prompt_files_are_named(
    winnow: Winnow, tmp_path: Path, name: str, data: bytes, said: list[str]
) -> None:
    (tmp_path / name).write_bytes(data)
    line = winnow("prompts", "--store", tmp_path / "store", "--source", tmp_path / name).line
    assert all(word in line for word in said) and name in line, line


def test_a_lone_surrogate_is_dropped_with_its_reason(winnow: Winnow, tmp_path: Path) -> None:
    texts = ["a red fox in the deep snow", "a boat under \ud800 bridge", "two birds on a wire"]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    said = winnow("prompts", "--store", tmp_path / "store", "--source", tmp_path / "p.jsonl")
    assert said.status == 0, said.err
    found = rows(tmp_path / "store", "SELECT reason FROM prompts WHERE NOT kept")
    assert len(found) == 1 and "U+D800" in found[0]["reason"]


@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "jsonl", "parquet"])
def test_every_kind_of_prompt_file_gives_the_same_prompts(tmp_path: Path, kind: str) -> None:
    from jobs.sources import read

    texts = ["a red fox, sleeping", 'a sign that says "open"', "ein Bär im Wald", "a\tboat"]
    if kind == "tsv":
        texts[3] = "a boat"
    path = tmp_path / f"p.{kind}"
    if kind == "txt":
        path.write_text("\ufeff" + "\r\n".join(texts))
    elif kind in ("csv", "tsv"):
        import csv

        with open(path, "w", encoding="utf-8-sig", newline="") as file:
            writer = csv.writer(file, delimiter="," if kind == "csv" else "\t")
            writer.writerows([["Text", "n"], *([text, 1] for text in texts)])
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts) + "\n\n")
    else:
        pq.write_table(pa.table({"text": texts, "n": range(4)}), path)
    assert [text.removeprefix("\ufeff") for text in read(str(path))] == texts


def test_a_quoted_text_may_go_on_in_the_next_line(tmp_path: Path) -> None:
    from jobs.sources import read

    (tmp_path / "p.csv").write_bytes(b'text,n\r\n"a red fox\r\nin the snow",1\r\na bird,2\r\n')
    assert [" ".join(text.split()) for text in read(str(tmp_path / "p.csv"))] == ["a red fox in the snow", "a bird"]


def test_a_second_source_for_one_store_is_refused(winnow: Winnow, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a red fox in the deep snow\ntwo green birds on a wire\n")
    assert winnow("prompts", "--store", tmp_path / "store").status == 0
    line = winnow("prompts", "--store", tmp_path / "store", "--source", tmp_path / "p.txt").line
    assert "made with other settings, models or inputs" in line and "STORE" in line


def test_a_store_of_another_format_is_refused(winnow: Winnow, tmp_path: Path) -> None:
    (tmp_path / "winnow.json").write_text('{"format": 99}')
    assert "format 99" in winnow("generate", "--store", tmp_path).line
    assert "format 99" in winnow("sql", "SELECT 1", "--store", tmp_path).line


@pytest.fixture
def copy(whole: tuple[Path, float], tmp_path: Path) -> Path:
    shutil.copytree(whole[0], tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damaged_parts_are_named(winnow: Winnow, copy: Path, damage: str) -> None:
    part = sorted((copy / "tables" / "samples").rglob("*.parquet"))[0]
    data = bytearray(part.read_bytes())
    if damage == "truncated":
        part.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[len(data) // 3] ^= 4
        part.write_bytes(data)
    else:
        part.unlink()
    said = winnow("verify", "--store", copy)
    assert said.status == 2 and not said.err
    assert f"wrong: {part.relative_to(copy).as_posix()}: " in said.out and "1 wrong" in said.out


def test_a_changed_shard_is_not_trained_on(winnow: Winnow, copy: Path) -> None:
    shard = next((copy / "shards").glob("curated-*/*.parquet"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    for model in (copy / "models").glob("curated-*"):
        shutil.rmtree(model)
    options = [word for key, value in SMALL.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    line = winnow("train", "--recipe", "embedded-fast", "--store", copy, "--round", 1, *options).line
    assert "not as exported" in line and shard.name in line
    # The cure that it names.
    shutil.rmtree(shard.parent)
    assert winnow("export", "--recipe", "embedded-fast", "--store", copy, "--round", 1, *options).status == 0
    assert winnow("train", "--recipe", "embedded-fast", "--store", copy, "--round", 1, *options).status == 0


def test_a_changed_model_is_not_gone_on_with(winnow: Winnow, copy: Path, tmp_path: Path) -> None:
    """A flipped bit of a trained weight makes images, only others."""
    words = ["--recipe", "embedded-fast", "--store", copy, "--round", 1, *options({})]
    publishing = ["publish", "--what", "model", "--to", "me/it", "--store", copy, "--round", 1, "--unanswered"]
    weights = next((copy / "models").glob("curated-*/unet/*.safetensors"))
    model = weights.parents[1].relative_to(copy).as_posix()
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    said = winnow("verify", "--store", copy)
    assert said.status == 2 and f"wrong: {model}: revision is" in said.out and "1 wrong" in said.out
    for verb in ("train", "evaluate"):
        assert f"{model}: is not as it was trained; restore it" in winnow(verb, *words).line
    assert "is not as it was trained; 'winnow verify'" in winnow(*publishing, "--dry-run", tmp_path / "out").line
    assert not (tmp_path / "out").exists()
    # The cure that it names; and a store can do without a model.
    shutil.rmtree(copy / model)
    digest.cache_clear()  # as in another process
    said = winnow("verify", "--store", copy)
    assert said.status == 0 and f"{model}: not here" in said.out
    assert winnow("train", *words).status == 0 and weights.read_bytes() == data
    assert winnow("verify", "--store", copy).status == 0
    assert winnow(*publishing, "--dry-run", tmp_path / "out").status == 0


def test_a_round_does_not_start_from_a_changed_model(winnow: Winnow, copy: Path) -> None:
    words = ["--recipe", "embedded-fast", "--store", copy, "--arm", "naive", "--round", 2, *options({"rounds": 2})]
    weights = next((copy / "models").glob("naive-*/unet/*.safetensors"))
    model, data = weights.parents[1], weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert f"models/{model.name}: is not as it was trained; restore it from a copy" in winnow("generate", *words).line
    shutil.rmtree(model)
    digest.cache_clear()
    assert f"models/{model.name}: is not here; restore it from a copy" in winnow("generate", *words).line
    assert not rows(copy, "SELECT 1 FROM samples WHERE round = 2")


def test_a_model_that_a_killed_run_left_is_sealed_by_the_next(winnow: Winnow, copy: Path) -> None:
    for part in (copy / "tables" / "models").rglob("*.parquet"):
        part.unlink()
    for number in (copy / "snapshots").glob("*.json"):
        body = json.loads(number.read_text())
        body.pop("sha256")
        body["parts"] = [part for part in body["parts"] if part["table"] != "models"]
        number.write_text(json.dumps({"sha256": sha256(json.dumps(body, sort_keys=True).encode()).hexdigest(), **body}))
    assert winnow("verify", "--store", copy).status == 0
    assert not rows(copy, "SELECT * FROM models")
    winnow("train", "--recipe", "embedded-fast", "--store", copy, "--round", 1, *options({}))
    [row] = rows(copy, "SELECT arm, round, model, revision, bytes FROM models")
    held = [path for path in (copy / row["model"]).rglob("*") if path.is_file()]
    assert (row["arm"], row["round"], row["bytes"]) == ("curated", 1, sum(path.stat().st_size for path in held))
    assert revision(str(copy / row["model"])) == row["revision"]


def options(changes: dict[str, Any]) -> list[str]:
    return [word for key, value in (SMALL | changes).items() for word in ("--set", f"{key}={json.dumps(value)}")]


BROKEN = """
import numpy as np
from jobs.encoders import Encoder
from jobs.scorers import Scorer

def nan():
    def score(images, prompts):
        values = np.arange(len(images), dtype=float)
        values[len(images) // 2] = np.nan
        return values, np.zeros(len(images), bool)
    return Scorer("nan", "1", score)

def short():
    return Scorer("short", "1", lambda images, prompts: (np.zeros(1), np.zeros(1, bool)))

def vectors():
    return Encoder("vectors", "1", lambda images, prompts: np.full((len(images), 3), np.inf))

def nothing():
    return 5

def cannot():
    raise RuntimeError("no such weights")

def single():
    return Scorer("single", "1", lambda images, prompts: np.zeros(len(images)))

def texts():
    return Scorer("texts", "1", lambda images, prompts: (["good"] * len(images), np.zeros(len(images), bool)))

def cut():
    return Scorer("cut", "1", lambda images, prompts: (np.zeros(len(images)), np.zeros(1, bool)))

def flat():
    return Encoder("flat", "1", lambda images, prompts: np.zeros((len(images), 0)))

def words():
    return Encoder("words", "1", lambda images, prompts: np.full((len(images), 3), "x"))

def big():
    return Encoder("big", "1", lambda images, prompts: np.full((len(images), 3), 1e6))

def raises():
    def score(images, prompts):
        raise RuntimeError("first line\\nsecond line")
    return Scorer("raises", "1", score)
"""


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brokenscorers").mkdir()
    (tmp_path / "brokenscorers" / "__init__.py").touch()
    (tmp_path / "brokenscorers" / "bad.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("brokenscorers")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    ("verb", "key", "name", "said"),
    [
        ("score", "score.scorers", "brokenscorers.bad:nan", ["value is nan", "sample_id"]),
        ("score", "score.scorers", "brokenscorers.bad:short", ["gave (1,) for"]),
        ("score", "score.scorers", "brokenscorers.bad:nothing", ["gave a int", "Scorer"]),
        ("score", "score.scorers", "brokenscorers.bad:absent", ["absent", "importable"]),
        ("score", "score.scorers", "brokenscorers.missing:x", ["brokenscorers.missing", "importable"]),
        ("score", "score.scorers", "brokenscorers.bad:cannot", ["bad:cannot", "RuntimeError: no such weights"]),
        ("score", "score.scorers", "brokenscorers.bad:BROKEN", ["bad:BROKEN", "importable"]),
        ("score", "score.scorers", "brokenscorers.bad:single", ["bad:single", "ndarray where a pair is needed"]),
        ("score", "score.scorers", "brokenscorers.bad:texts", ["bad:texts", "could not convert string"]),
        ("score", "score.scorers", "brokenscorers.bad:cut", ["gave (1,) as truncated for"]),
        ("embed", "embed.encoders", "brokenscorers.bad:vectors", ["vector is inf", "sample_id"]),
        ("embed", "embed.encoders", "brokenscorers.bad:flat", ["0) for", "give [N, D]"]),
        ("embed", "embed.encoders", "brokenscorers.bad:words", ["bad:words", "could not convert string"]),
        ("embed", "embed.encoders", "brokenscorers.bad:big", ["gave 1e+06", "up to 65504: scale it"]),
    ],
)
def test_a_users_broken_model_loses_nothing(
    winnow: Winnow, copy: Path, broken: None, verb: str, key: str, name: str, said: list[str]
) -> None:
    before = files(copy / "tables")
    where = ("--recipe", "embedded-fast", "--store", copy, "--round", 1, *options({key: ["scene-clip", name]}))
    found = winnow(verb, *where)
    assert found.status == 2 and all(word in found.line for word in said), found.err
    assert files(copy / "tables") == before and verify(copy).ok


def test_an_error_of_a_users_model_is_one_line_and_a_traceback_with_debug(
    winnow: Winnow, copy: Path, broken: None
) -> None:
    where = ("score", "--recipe", "embedded-fast", "--store", copy, "--round", 1)
    said = winnow(*where, *options({"score.scorers": ["brokenscorers.bad:raises"]}))
    assert said.status == 2 and said.err.count("\n") == 1, said.err
    assert "scorer 'brokenscorers.bad:raises': fails with RuntimeError: first line second line" in said.err
    assert "--debug" in said.err
    said = winnow(*where, *options({"score.scorers": ["brokenscorers.bad:raises"]}), "--debug")
    assert said.status == 2 and "Traceback" in said.err and "bad.py" in said.err


def limited(store: str) -> None:
    """A run that may write no file above 4 kB, as on a full disk."""
    from jobs.cli import main

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, 4_000))
    sys.argv = ["winnow", "generate", "--recipe", "embedded-fast", "--store", store, *options({})]
    main()


def limited_training(store: str) -> None:
    """The training of a finished store's round anew, on a disk with room for 100 kB."""
    from jobs.cli import main

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    sys.argv = ["winnow", "train", "--recipe", "embedded-fast", "--store", store, "--round", "1"]
    sys.argv += options(json.loads((Path(store) / "change").read_text()))
    main()


@pytest.mark.parametrize("checkpoint", [2, 0])
def test_a_disk_full_of_models_loses_nothing(forks: ForkServer, copy: Path, winnow: Winnow, checkpoint: int) -> None:
    """Where the trainer keeps its state, and where it saves its model."""
    (copy / "change").write_text(json.dumps({"train.checkpoint": checkpoint, "train.clip": 0.5}))
    before = files(copy / "models")
    forks.start("test_jobs_faults:limited_training", str(copy), log=copy / "log")
    forks.wait()
    said = (copy / "log").read_text()
    line = said.splitlines()[0]
    assert line.startswith("winnow: ") and "free space" in line and "everything committed is safe" in line, said
    assert files(copy / "models") == before and not list((copy / "staging").iterdir())
    assert not list((copy / "checkpoints").glob("*"))


def test_a_full_disk_loses_nothing(forks: ForkServer, tmp_path: Path, winnow: Winnow) -> None:
    store = tmp_path / "store"
    assert winnow("prompts", "--recipe", "embedded-fast", "--store", store, *options({})).status == 0
    forks.start("test_jobs_faults:limited", str(store), log=tmp_path / "log")
    forks.wait()
    said = (tmp_path / "log").read_text()
    assert "File too large" in said and "free space" in said and "everything committed is safe" in said, said
    assert verify(store).ok and not list((store / "staging").iterdir())
    assert not list((store / "tables" / "samples").rglob("*.parquet"))
    # With room again it goes on.
    assert winnow("generate", "--recipe", "embedded-fast", "--store", store, *options({})).status == 0
    assert rows(store, "SELECT count(*) AS n FROM samples") == [{"n": 24}]


def test_one_image_is_no_reference(winnow: Winnow, tmp_path: Path) -> None:
    words = ["--recipe", "embedded-fast", "--store", tmp_path, *options(
        {"reference.prompts": 1, "reference.images_per_prompt": 1, "distance.space": None, "weigh.by": "nothing"}
    )]  # fmt: skip
    assert winnow("prompts", *words).status == winnow("generate", *words, "--split", "reference").status == 0
    line = winnow("evaluate", *words, "--round", 0).line
    assert "D_0 has 1 image, and a distance to it needs two; raise reference.images_per_prompt" in line
    assert not rows(tmp_path, "SELECT 1 FROM samples WHERE split = 'eval'")


def test_weights_need_distances(winnow: Winnow, copy: Path) -> None:
    where = ("--recipe", "embedded-fast", "--store", copy, "--round", 1)
    line = winnow("weigh", *where, *options({"distance.space": None})).line
    assert "distance.space" in line and "nothing" in line


def test_floors_that_leave_nothing_are_named(winnow: Winnow, tmp_path: Path) -> None:
    where = ("--recipe", "embedded-fast", "--store", tmp_path / "store")
    for verb in ("prompts", "generate", "score"):
        assert winnow(verb, *where, *options({})).status == 0
    line = winnow("select", *where, *options({"select.floors": {"scene-clip": 5.0}})).line
    assert "floors" in line and "lower them" in line


def test_a_world_of_nan_distances_is_refused(world: World) -> None:
    """The store itself refuses what is not finite, whoever computed it."""
    from schemas.errors import WinnowError
    from schemas.tables import TABLES
    from storage.commit import commit

    row = {"sample_id": 1, "round": 1, "space": "x", "metric": "m", "reference": "d0", "value": float(np.nan)}
    bad = pa.Table.from_pylist([row], schema=TABLES["distances"].schema)
    with pytest.raises(WinnowError, match="value is nan"):
        commit(world.store, "distances", "tables/distances/x.parquet", bad)
    assert not (world.store / "tables" / "distances" / "x.parquet").exists()
