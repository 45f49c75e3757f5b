"""Snapshots: sealing is cumulative, refuses double keys, and a rerun is a no-op."""

import hashlib
import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import WinnowError
from schemas.tables import TABLES
from storage.commit import Part, commit, find
from storage.layout import create, part_path
from storage.query import arrow
from storage.snapshot import Snapshot, Spent, latest, load, numbers, seal
from storage.verify import verify


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return create(tmp_path / "store=1")  # a "=" in the path must not become a column


def scores(ids: list[int], value: float = 0.5, scorer: str = "clip") -> pa.Table:
    rows = [
        {"sample_id": i, "round": 1, "scorer": scorer, "revision": "1", "value": value, "truncated": False}
        for i in ids
    ]
    return pa.Table.from_pylist(rows, schema=TABLES["scores"].schema)


def put(root: Path, unit: str, ids: list[int], scorer: str = "clip") -> Part:
    return commit(root, "scores", part_path("scores", {"round": 1}, unit, "abc"), scores(ids, scorer=scorer))


def test_time_travel(root: Path) -> None:
    assert latest(root) == Snapshot(number=0)
    one = seal(root, "score", [put(root, "a", [1, 2])], {"steps": 3})
    two = seal(root, "score", [put(root, "b", [3])], {"steps": 4})
    assert (one.number, two.number, numbers(root)) == (1, 2, [1, 2])
    assert latest(root) == load(root, 2) == two
    assert load(root, 1) == one
    assert one.recipe == {"steps": 3}
    assert set(one.parts) < set(two.parts)
    count = "SELECT count(*) AS n FROM scores"
    assert [arrow(root, count, snapshot=s)["n"][0].as_py() for s in (1, one, 2, None)] == [2, 2, 3, 3]


def test_what_stages_took_is_kept(root: Path) -> None:
    one, two = Spent("score clip", "curated", 1, 2.5), Spent("train", "curated", 1, 60.0)
    parts = [put(root, "a", [1])]
    assert seal(root, "score", parts, {}, one).spent == (one,)
    assert seal(root, "score", parts, {}, one).number == 1  # nothing new, so that it counts once
    assert seal(root, "select", [put(root, "b", [2])], {}).spent == (one,)
    trained = seal(root, "train", [], {}, two)
    assert (trained.number, trained.spent, trained.parts) == (3, (one, two), load(root, 2).parts)
    assert latest(root) == trained and verify(root).ok


def test_a_snapshot_of_earlier_times_says_nothing_of_time(root: Path) -> None:
    seal(root, "score", [put(root, "a", [1])], {})
    file = root / "snapshots/000001.json"
    body = json.loads(file.read_text())
    del body["spent"], body["sha256"]
    seal_of_body = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps({"sha256": seal_of_body, **body}))
    assert load(root, 1).spent == () and seal(root, "score", [put(root, "b", [2])], {}).number == 2


def test_one_round_is_without_the_parts_of_others(root: Path) -> None:
    def part(folders: dict[str, str | int], number: int) -> Part:
        return commit(root, "scores", part_path("scores", folders, "a", "0"), scores([number]))

    named = [({"round": 1}, 1), ({"round": 11, "scorer": "clip"}, 2), ({"scorer": "round-2"}, 3)]
    sealed = seal(root, "score", [part(folders, number) for folders, number in named], {})
    ids = "SELECT sample_id FROM scores ORDER BY 1"
    for number, expected in ((1, [1, 3]), (11, [2, 3]), (4, [3])):
        assert arrow(root, ids, snapshot=sealed.of_round(number))["sample_id"].to_pylist() == expected


def test_an_unsealed_part_is_not_seen(root: Path) -> None:
    seal(root, "score", [put(root, "a", [1])], {})
    put(root, "b", [2])
    assert arrow(root, "SELECT sample_id FROM scores")["sample_id"].to_pylist() == [1]


def test_a_rerun_seals_nothing(root: Path) -> None:
    parts = [put(root, "a", [1]), put(root, "b", [2])]
    first = seal(root, "score", parts, {})
    assert seal(root, "score", [parts[1], put(root, "a", [1])], {"other": 1}) == first
    assert seal(root, "nothing", [], {}) == first
    assert numbers(root) == [1]


def test_one_key_in_two_parts_is_refused(root: Path) -> None:
    message = (
        r"scores: two rows for sample_id 2, scorer 'clip', in .*a-abc.parquet and .*b-abc.parquet; nothing"
    )
    a, b = put(root, "a", [1, 2]), put(root, "b", [2, 3])
    with pytest.raises(WinnowError, match=message):
        seal(root, "score", [a, b], {})
    seal(root, "score", [a], {})
    with pytest.raises(WinnowError, match=message):
        seal(root, "score", [b], {})
    assert numbers(root) == [1]
    seal(
        root, "score", [put(root, "c", [1, 2], scorer="other")], {}
    )  # same samples, another scorer: another key


def test_other_content_under_a_sealed_name_is_refused(root: Path) -> None:
    part = put(root, "a", [1])
    seal(root, "score", [part], {})
    (root / part.path).unlink()
    other = put(root, "a", [7])
    with pytest.raises(WinnowError, match="a-abc.parquet: sealed with SHA-256"):
        seal(root, "score", [other], {})


def test_a_part_must_be_there(root: Path) -> None:
    part = put(root, "a", [1])
    (root / part.path).unlink()
    with pytest.raises(WinnowError, match="commit the part before"):
        seal(root, "score", [part], {})


def test_missing_and_damaged_snapshots(root: Path) -> None:
    with pytest.raises(WinnowError, match="snapshot 3: .*nothing is sealed yet"):
        load(root, 3)
    seal(root, "score", [put(root, "a", [1])], {})
    with pytest.raises(WinnowError, match="snapshot 3: .*there are 1 to 1"):
        load(root, 3)
    file = root / "snapshots/000001.json"
    body = json.loads(file.read_text())
    body["parts"][0]["rows"] = 5
    for text in (json.dumps(body), "{", "[]", "[" * 200_000):
        file.write_text(text)
        with pytest.raises(WinnowError, match=r"000001.json: damaged .*; restore it"):
            latest(root)


UNITS = {"a": [1, 2], "b": [3], "c": [4, 5, 6], "d": [2, 7], "e": []}  # a and d share a key
actions = st.lists(
    st.tuples(st.sampled_from(["commit", "seal"]), st.sets(st.sampled_from(sorted(UNITS)), min_size=1)),
    max_size=8,
)


@settings(max_examples=40, deadline=None)
@given(actions)
def test_any_order_of_commits_seals_and_reruns(todo: list[tuple[str, set[str]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = create(folder)
        committed: dict[str, Part] = {}
        sealed: set[str] = set()
        history: list[set[str]] = []
        for act, units in todo:
            if act == "commit":
                for unit in sorted(units):
                    part = put(root, unit, UNITS[unit])
                    assert committed.setdefault(unit, part) == part
                continue
            wanted = units & committed.keys()
            parts = [part for part in (find(root, committed[unit].path) for unit in sorted(wanted)) if part]
            if {"a", "d"} <= sealed | wanted and not wanted <= sealed:
                with pytest.raises(WinnowError, match="two rows for sample_id 2"):
                    seal(root, "score", parts, {})
            else:
                seal(root, "score", parts, {})
                if not wanted <= sealed:
                    sealed |= wanted
                    history.append(set(sealed))
        assert numbers(root) == list(range(1, len(history) + 1))
        for number, names in enumerate(history, start=1):
            ids = arrow(root, "SELECT sample_id FROM scores ORDER BY 1", snapshot=number)[
                "sample_id"
            ].to_pylist()
            assert ids == sorted(i for name in names for i in UNITS[name])
        report = verify(root)
        assert report.ok
        assert len(report.notes) == len(committed.keys() - sealed)
