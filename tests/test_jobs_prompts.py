"""The stage: what is held out is a fair picture of what is trained on, what is kept is balanced, and real prompts go
through."""

import csv
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import rows as query
from conftest import sets
from endpoint import Server

from jobs import recipe as recipes
from jobs.prompts import Prompts, prompts, rows, texts
from jobs.run import Run
from jobs.world.scenes import parse
from storage.layout import create

DATA = Path(__file__).parents[2] / "shared" / "data" / "prompts"
real = pytest.mark.skipif(not DATA.is_dir(), reason="no real prompts beside the project")


def held_out(seed: int) -> list[str]:
    settings = Prompts(source="embedded", least_specificity=0, least_clarity=0, near=None, held_out=0.2)
    table = rows(settings, seed, texts(settings, seed))
    assert table.num_rows == 180 and set(table["split"].to_pylist()) == {"train", "eval"}
    return [text for text, split in zip(*(table[c].to_pylist() for c in ("text", "split")), strict=True)
            if split == "eval"]  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 7])
def test_held_out_prompts_are_of_every_kind(seed: int) -> None:
    scenes = [parse(text) for text in held_out(seed)]
    assert len(scenes) == 36
    assert set(Counter(scene.digit for scene in scenes).values()) <= {3, 4} and len({s.digit for s in scenes}) == 10
    assert min(Counter(scene.ink for scene in scenes).values()) >= 3
    assert min(Counter(scene.background for scene in scenes).values()) >= 9


def test_the_seed_decides_what_is_held_out() -> None:
    assert held_out(3) == held_out(3) != held_out(3 + 2**30)


def a_run(tmp_path: Path, **settings: Any) -> Run:
    changes = {"least_clarity": 0.5, "least_specificity": 0.25} | settings
    return Run(create(tmp_path / "store"), recipes.override(recipes.load("embedded"), sets({"prompts": changes})))


def test_balance_by_a_column(tmp_path: Path) -> None:
    lines = ["text,kind", *(f"a {c} fox in the snow,animals" for c in ("red", "grey", "white", "young", "old", "tame"))]
    lines += ["a stone bridge at night,places", "a village by the sea,places", "a glass vase on a shelf,"]
    (tmp_path / "p.csv").write_text("\n".join(lines) + "\n")
    run = a_run(tmp_path, source=str(tmp_path / "p.csv"), keep=5, near=None, balance={"column": "kind"})
    prompts(run)
    made = query(run.store, "SELECT * FROM prompts")
    assert Counter(row["category"] for row in made if row["kept"]) == {"animals": 2, "places": 2, "other": 1}
    dropped = [row for row in made if not row["kept"]]
    assert len(dropped) == 4
    said = re.compile(r"'animals' keeps 2 of 6: cluster \d is represented by 'a .*'")
    assert all(said.fullmatch(row["reason"]) for row in dropped)
    assert {row["cluster"] for row in made if row["kept"]} == set(range(5))


def test_categories_are_told_of_all_prompts_and_only_where_asked_for(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat on a mat\na dog in a bog\n\na cat on a mat!\na house\n")
    rules = {"cats": "cat", "all": "."}
    run = a_run(tmp_path, source=str(tmp_path / "p.txt"), keep=9, near=None, balance={"rules": rules})
    prompts(run)
    found = query(run.store, "SELECT text, category, kept FROM prompts")
    assert {(row["text"], row["category"], row["kept"]) for row in found} == {
        ("a cat on a mat", "cats", True), ("a cat on a mat!", "cats", False), ("a dog in a bog", "all", True),
        ("a house", "all", True), ("", "other", False),
    }  # fmt: skip
    settings = Prompts(source="embedded", least_specificity=0, least_clarity=0, near=None)
    assert set(rows(settings, 0, texts(settings, 0))["category"].to_pylist()) == {None}


@real
def test_parti_prompts_balanced_by_their_category(tmp_path: Path) -> None:
    source = DATA / "parti_prompts.tsv"
    run = a_run(tmp_path, source=str(source), keep=300, balance={"column": "Category"})
    prompts(run)
    made = query(run.store, "SELECT * FROM prompts")
    with source.open(encoding="utf-8", newline="") as file:
        kinds = Counter(row["Category"] for row in csv.DictReader(file, delimiter="\t"))
    assert Counter(row["category"] for row in made) == kinds and len(kinds) == 12
    kept = Counter(row["category"] for row in made if row["kept"])
    passed = Counter(row["category"] for row in made if row["kept"] or "represented by" in row["reason"])
    assert kept.total() == 300
    full = [kind for kind in kinds if kept[kind] == passed[kind]]  # who gave all that it had
    others = [kept[kind] for kind in kinds if kind not in full]
    assert max(others) - min(others) <= 1 and all(kept[kind] <= max(others) for kind in full)


@real
def test_real_prompts_go_through(tmp_path: Path) -> None:
    """8,000 prompts of users, odd ones among them: each is kept or has its reason, and none is of the benchmark."""
    source = DATA / "pickapic_train.txt"
    run = a_run(
        tmp_path, source=str(source), limit=8000, near=0.92, benchmark=str(DATA / "parti_prompts.tsv"), keep=1000,
        balance={"rules": {"people": r"\b(wo)?m[ae]n\b|\bgirl|\bboy", "animals": r"\b(cat|dog|horse|bird)s?\b"}},
    )  # fmt: skip
    prompts(run)
    made = query(run.store, "SELECT * FROM prompts")
    assert len(made) == 8000 and all(row["kept"] == (row["reason"] is None) for row in made)
    kept = [row for row in made if row["kept"]]
    counts = Counter(row["category"] for row in kept)
    assert len(kept) == 1000 and sorted(counts.values()) == [333, 333, 334]
    assert len({row["cluster"] for row in kept}) == 1000
    with (DATA / "parti_prompts.tsv").open(encoding="utf-8", newline="") as file:
        known = {re.sub(r"\W+", " ", row["Prompt"]).strip().lower() for row in csv.DictReader(file, delimiter="\t")}
    assert not known & {re.sub(r"\W+", " ", row["text"]).strip().lower() for row in kept}
    words = Counter(row["reason"].split(":")[0].split(" ")[0] for row in made if not row["kept"])
    assert {"unreadable", "too", "duplicate", "near", "unclear", "benchmark", "'people'"} <= set(words), words
    assert words["unclear"] + words["unspecific"] < 80  # the rules lean to keeping


@real
def test_real_prompts_are_asked_about_as_they_are(server: Server, tmp_path: Path) -> None:
    judge = {"kind": "endpoint", "url": server.url, "model": "m", "in_flight": 4}
    run = a_run(tmp_path, source=str(DATA / "pickapic_train.txt"), limit=600, near=None, judge=judge)
    prompts(run)
    kept = Counter(row["text"] for row in query(run.store, "SELECT text FROM prompts WHERE kept"))
    assert server.asked == kept and kept.total() > 550
