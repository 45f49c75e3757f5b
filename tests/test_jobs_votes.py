"""Votes: on disk at once, sealed soon, taken back without a trace in the results, and a source of picks."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from voting import samples, voting_store

from curate.bradley_terry import bradley_terry
from jobs import votes
from jobs.label.ballot import pairs, picks, sides
from jobs.label.booth import Booth
from jobs.label.serve import results
from jobs.run import Run
from schemas.errors import WinnowError
from schemas.tables import TABLES
from storage.commit import commit
from storage.layout import part_path
from storage.query import user_query
from storage.snapshot import latest, numbers, seal


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return voting_store(tmp_path / "store")


def ask(store: Path, sql: str) -> list[dict[str, Any]]:
    return user_query(store, sql).to_pylist()


def test_a_vote_is_a_row_on_disk_at_once_and_in_sql_once_it_is_sealed(store: Path) -> None:
    row = votes.cast(store, "ada", "keep", 2**62 + 5, None, "keep", 1.5)
    [file] = (store / "tables" / "votes").rglob("*.parquet")
    assert pq.read_table(file).to_pylist() == [row]
    assert ask(store, "SELECT * FROM votes") == []
    assert votes.gather(store) == 1 and ask(store, "SELECT * FROM votes") == [row]
    before = numbers(store)
    assert votes.gather(store) == 0 and numbers(store) == before
    assert [*(store / "staging").iterdir()] == []


def test_sealing_keeps_the_recipe_that_the_run_has(store: Path) -> None:
    row = samples("naive", 1, "train", 1, 1)[0] | {"round": 2}
    path = part_path("samples", {"round": 2}, "00000", "y")
    table = pa.Table.from_pylist([row], schema=TABLES["samples"].schema)
    seal(store, "generate", [commit(store, "samples", path, table)], {"name": "mine"})
    votes.cast(store, "ada", "keep", 1, None, "keep")
    votes.gather(store)
    assert latest(store).recipe == {"name": "mine"} and latest(store).stage == "label"


def test_the_last_vote_counts_and_what_was_taken_back_does_not(store: Path) -> None:
    def opinions() -> list[tuple[str, int, str]]:
        votes.gather(store)
        found = ask(store, "SELECT voter, sample_id, choice FROM opinions ORDER BY ALL")
        return [(row["voter"], row["sample_id"], row["choice"]) for row in found]

    votes.cast(store, "ada", "keep", 1, None, "keep")
    last = votes.cast(store, "ada", "keep", 1, None, "drop")
    votes.cast(store, "bob", "keep", 1, None, "keep")
    assert opinions() == [("ada", 1, "drop"), ("bob", 1, "keep")]
    votes.cast(store, "ada", "keep", 1, None, votes.RETRACT, retracts=last["vote_id"])
    assert opinions() == [("ada", 1, "keep"), ("bob", 1, "keep")]  # the one before is in force again
    assert len(ask(store, "SELECT * FROM votes")) == 4
    one = votes.cast(store, "ada", "appeal", 1, 2, "left")
    votes.cast(store, "ada", "appeal", 2, 1, "left")  # the same pair, the other way round
    assert ("ada", 2, "left") in opinions() and ("ada", 1, "left") not in opinions()
    assert one["vote_id"] in [row["vote_id"] for row in votes.standing(store)]


def wilson(wins: int, n: int) -> tuple[float, float]:
    z, p = 1.96, wins / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def vote_all(store: Path) -> dict[tuple[str, str], int]:
    """Votes of three people on all pairs by a rule, with the sides that the ballot gives; wins by (winner, loser)."""
    ballot = pairs(store, ["base", "curated:1", "naive:1"], 100)
    arm = {row["sample_id"]: row["arm"] for row in ask(store, "SELECT sample_id, arm FROM samples")}
    wins: dict[tuple[str, str], int] = {}
    booth = Booth(store, ballot)
    for number, voter in enumerate(("ada", "bob", "eve")):
        for count, task in enumerate(ballot.order(voter)):
            left, right = sides(task.ids, voter)
            best = max((left, right), key=lambda n: (arm[n] == "curated", arm[n] == "base"))
            if (count + number) % 4 == 0:
                best = left + right - best
            choice = "skip" if count % 7 == 6 else "left" if best == left else "right"
            booth.cast(voter, "appeal", left, right, choice, 0.5)
            if choice != "skip":
                pair = arm[best], arm[left + right - best]
                wins[pair] = wins.get(pair, 0) + 1
    booth.seal()
    return wins


def test_win_rates_and_strengths_are_those_of_the_votes(store: Path) -> None:
    wins = vote_all(store)
    name = {"base": "base", "curated": "curated round 1", "naive": "naive round 1"}
    found = ask(store, "SELECT * FROM win_rates")
    assert len(found) == 6 and {row["question"] for row in found} == {"appeal"}
    by = {(row["contestant"], row["opponent"]): row for row in found}
    for one, two in (("base", "curated"), ("curated", "base"), ("naive", "base"), ("curated", "naive")):
        row = by[name[one], name[two]]
        n = wins.get((one, two), 0) + wins.get((two, one), 0)
        assert (row["wins"], row["n"]) == (wins.get((one, two), 0), n)
        assert row["rate"] == pytest.approx(row["wins"] / n)
        assert (row["ci_low"], row["ci_high"]) == pytest.approx(wilson(row["wins"], n))
    names = ["base", "curated", "naive"]
    expected = bradley_terry([[wins.get((a, b), 0) for b in names] for a in names])
    strong = {row["contestant"]: row for row in votes.strengths(store).to_pylist()}
    for arm, value, error in zip(names, expected.value, expected.error, strict=True):
        row = strong[name[arm]]
        assert (row["strength"], row["ci_low"]) == pytest.approx((value, value - 1.96 * error))
    assert [*strong] == ["curated round 1", "base", "naive round 1"]
    before = numbers(store)
    assert votes.strengths(store).num_rows == 3 and numbers(store) == before
    lines = results(store)
    assert any(line.startswith("appeal: 108 votes of 3 voters") for line in lines)
    assert any("base is preferred over naive round 1 in" in line for line in lines)


def test_the_newest_strengths_are_shown(store: Path) -> None:
    vote_all(store)
    first = votes.strengths(store).to_pylist()
    ballot = pairs(store, ["base", "curated:1"], 3)
    left, right = sides(ballot.tasks[0].ids, "new")
    Booth(store, ballot).cast("new", "appeal", left, right, "left", 1.0)
    second = votes.strengths(store).to_pylist()
    assert {row["basis"] for row in first} != {row["basis"] for row in second} and len(second) == 3
    assert ask(store, "SELECT count(DISTINCT basis) AS n FROM strengths") == [{"n": 1}]


def test_sides_are_random_and_stay_and_orders_differ(store: Path) -> None:
    ballot = pairs(store, ["base", "curated:1", "naive:1"], 100)
    assert len(ballot.tasks) == 36 and ballot == pairs(store, ["base", "curated:1", "naive:1"], 100)
    drawn = [sides(task.ids, f"voter {v}") == tuple(sorted(task.ids)) for v in range(40) for task in ballot.tasks]
    assert 0.46 < np.mean(drawn) < 0.54  # 1,440 of them: standard error 0.013
    assert ballot.order("ada") != ballot.order("bob") and ballot.order("ada") == ballot.order("ada")
    few = pairs(store, ["base", "curated:1", "naive:1"], 10)
    assert set(few.tasks) < set(ballot.tasks)
    seeds = {row["sample_id"]: (row["prompt"], row["seed"]) for row in ask(store, "SELECT * FROM samples")}
    assert all(seeds[task.ids[0]] == seeds[task.ids[1]] for task in ballot.tasks)


def test_a_booth_goes_on_where_it_was(store: Path) -> None:
    ballot = pairs(store, ["base", "curated:1"], 5)
    booth = Booth(store, ballot)
    first = booth.view("ada")
    booth.cast("ada", "appeal", int(first["left"]), int(first["right"]), "left", 1.0)
    second = booth.view("ada")
    assert second["question"] == "faithfulness" and (second["left"], second["right"]) == (first["left"], first["right"])
    again = Booth(store, ballot)  # nobody sealed before the first one died
    assert again.view("ada") == second and again.view("bob")["done"] == 0
    assert again.undo("ada") and again.view("ada") == first and not again.undo("ada") and not again.undo("bob")
    assert Booth(store, ballot).view("ada") == first


def test_undoing_brings_the_vote_before_back_also_after_a_restart(store: Path) -> None:
    ballot = picks(store, "curated", 1)
    booth = Booth(store, ballot)
    number = ballot.tasks[0].ids[0]
    booth.cast("ada", "keep", number, None, "keep", 1.0)
    booth.cast("ada", "keep", number, None, "drop", 1.0)
    for booth in (booth, Booth(store, ballot)):  # noqa: B020
        assert booth.view("ada")["groups"][0]["images"][0]["choice"] == "drop"
    booth.undo("ada")
    assert booth.view("ada")["groups"][0]["images"][0]["choice"] == "keep"
    assert Booth(store, ballot).view("ada") == booth.view("ada")


def test_what_the_ballot_does_not_ask_is_refused(store: Path) -> None:
    ballot = pairs(store, ["base", "curated:1"], 5)
    booth = Booth(store, ballot)
    left, right = sides(ballot.tasks[0].ids, "ada")
    other = ballot.tasks[1].ids[0]
    for asked in ((right, left, "left"), (left, other, "left"), (left, None, "left"), (left, right, "keep")):
        with pytest.raises(WinnowError, match="not on this ballot|does not stand left"):
            booth.cast("ada", "appeal", *asked, 1.0)
    with pytest.raises(WinnowError, match="not on this ballot"):
        booth.cast("ada", "keep", left, None, "keep", 1.0)
    with pytest.raises(WinnowError, match="not on this ballot"):
        booth.image(2**62 + 1500)
    assert booth.view("ada")["done"] == 0 and not (store / "tables" / "votes").exists()


def test_sheets_keep_prompts_whole(store: Path) -> None:
    ballot = picks(store, None, None)
    assert [len(task.ids) for task in ballot.tasks] == [24, 16]
    assert all(len(numbers) == 4 for task in ballot.tasks for _, numbers in task.groups)
    booth = Booth(store, ballot)
    number = ballot.tasks[1].ids[0]
    [row] = ask(store, f"SELECT image FROM samples WHERE sample_id = {number}")
    assert booth.image(number) == row["image"]["bytes"]
    assert booth.view("ada", 99)["at"] == 1 and booth.view("ada", -3)["at"] == 0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda store: picks(store, "curated", 7), "round 7 of arm 'curated' has no candidates"),
        (lambda store: picks(store, "nobody", None), "arm 'nobody' has no candidates"),
        (lambda store: pairs(store, ["base", "curated"], 5), "write base, or arm:round such as curated:1"),
        (lambda store: pairs(store, ["base", "curated:9"], 5), r"\(base, curated:9\) have held-out images"),
    ],
)
def test_what_cannot_be_asked_is_one_line(store: Path, call: Any, said: str) -> None:
    with pytest.raises(WinnowError, match=said):
        call(store)


def test_votes_are_a_source_of_picks(store: Path) -> None:
    from jobs import recipe as recipes
    from jobs.select import select

    changes = {"select.picks": "votes", "select.policy": "random", "select.scorers": [], "score.scorers": []}
    recipe = recipes.override(recipes.load("embedded-fast"), [(key.split("."), v) for key, v in changes.items()])
    run = Run(store, recipe, 1, "curated")
    with pytest.raises(WinnowError, match=r"nobody has kept a candidate of round 1 of 'curated'; run 'winnow label"):
        select(run)
    ballot = picks(store, "curated", 1)
    a, b, c, d = ballot.tasks[0].ids[:4]
    for voter, number, choice in (("ada", a, "keep"), ("bob", a, "keep"), ("ada", b, "keep"), ("bob", b, "drop"),
                                  ("ada", c, "drop"), ("bob", d, "keep")):  # fmt: skip
        votes.cast(store, voter, "keep", number, None, choice)
    select(run)
    rows = ask(store, "SELECT sample_id, kept, reason FROM selections")
    assert len(rows) == 40 and {row["sample_id"] for row in rows if row["kept"]} == {a, d}
    assert {row["reason"] for row in rows if not row["kept"]} == {"not picked by hand"}


def test_a_contestant_is_asked_about_once_and_never_beside_itself(store: Path) -> None:
    asked = pairs(store, ["base", "curated:1"], 1000).tasks
    assert pairs(store, ["base:0", "curated:1", "curated:01", "base"], 1000).tasks == asked
    image = asked[0].ids[0]
    votes.cast(store, "ada", "appeal", image, image, "left")  # as an earlier page asked
    votes.gather(store)
    assert ask(store, "SELECT * FROM win_rates") == [] and votes.strengths(store).num_rows == 0
    with pytest.raises(WinnowError, match="write base, or arm:round"):
        pairs(store, ["base", "curated:²"], 5)
