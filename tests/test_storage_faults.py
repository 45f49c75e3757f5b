"""What may happen to a store: kill -9, races, flipped bits. Real processes, no mocks."""

import hashlib
import random
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from schemas.errors import WinnowError
from schemas.tables import TABLES
from storage.commit import commit
from storage.layout import create
from storage.query import arrow
from storage.snapshot import latest, numbers, seal
from storage.verify import verify

WRITER = """
import sys
from pathlib import Path
import pyarrow as pa
from schemas.tables import TABLES
from storage.commit import commit, find
from storage.layout import create, part_path
from storage.snapshot import seal
place, who, shared, units = sys.argv[1], sys.argv[2], sys.argv[3] == "shared", int(sys.argv[4])
def scores(unit):
    names = dict(round=1, scorer="s" if shared else who, revision=who, value=0.5, truncated=False)
    rows = [dict(sample_id=unit * 10 + i, **names) for i in range(10)]
    return pa.Table.from_pylist(rows, schema=TABLES["scores"].schema)
print("ready", flush=True)
sys.stdin.readline()
root = create(place)
for unit in range(units):
    path = part_path("scores", {"round": 1} if shared else {"scorer": who}, f"u{unit}", "abc")
    part = find(root, path) or commit(root, "scores", path, scores(unit))
    seal(root, "score", [part], {"unit": unit})
    print(part.path, part.sha256, flush=True)
"""


def writer(root: Path, who: str, shared: bool, units: int) -> "subprocess.Popen[str]":
    arguments = [sys.executable, "-c", WRITER, str(root), who, "shared" if shared else "own", str(units)]
    return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def start(*processes: "subprocess.Popen[str]") -> None:
    """Let them go at the same moment, after their imports."""
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()


def finish(process: "subprocess.Popen[str]") -> list[str]:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return out.splitlines()


def test_kill_at_any_moment(tmp_path: Path) -> None:
    root, units, rng = tmp_path / "store", 60, random.Random(7)
    promised: dict[str, str] = {}  # what a writer has said is sealed
    for _ in range(15):
        process = writer(root, "w", True, units)
        start(process)
        time.sleep(rng.uniform(0.0, 0.25))
        process.kill()
        out, _ = process.communicate(timeout=60)
        for line in out.split("\n")[:-1]:
            path, sha256 = line.split(" ")
            assert promised.setdefault(path, sha256) == sha256
        if not (root / "winnow.json").exists():
            assert not promised
            continue
        report = verify(root)
        assert report.ok, report.problems
        sealed = {part.path: part.sha256 for part in latest(root).parts}
        assert promised.items() <= sealed.items()
        ids = Counter(arrow(root, "SELECT sample_id FROM scores")["sample_id"].to_pylist())
        assert len(ids) == 10 * len(sealed)
        assert set(ids.values()) <= {1}
    process = writer(root, "w", True, units)
    start(process)
    finish(process)
    assert verify(root).ok
    assert numbers(root) == list(range(1, units + 1))
    assert sorted(arrow(root, "SELECT sample_id FROM scores")["sample_id"].to_pylist()) == list(
        range(units * 10)
    )


def test_two_writers_of_the_same_parts(tmp_path: Path) -> None:
    # Their contents differ (`revision`), so that the later one would be seen.
    processes = [writer(tmp_path, who, True, 25) for who in ("one", "two")]
    start(*processes)
    assert finish(processes[0]) == finish(processes[1])
    report = verify(tmp_path)
    assert report.ok
    assert report.notes == ()
    assert arrow(tmp_path, "SELECT count(*) AS n FROM scores")["n"].to_pylist() == [250]


def test_two_sealers_of_different_parts(tmp_path: Path) -> None:
    processes = [writer(tmp_path, who, False, 20) for who in ("one", "two")]
    start(*processes)
    for process in processes:
        finish(process)
    assert numbers(tmp_path) == list(range(1, 41))
    assert len(latest(tmp_path).parts) == 40
    assert verify(tmp_path).ok


def one_part(root: Path, unit: str, ids: list[int]) -> str:
    names = {"round": 1, "scorer": "s", "revision": "r", "value": 0.5, "truncated": False}
    data = pa.Table.from_pylist([{"sample_id": i, **names} for i in ids], schema=TABLES["scores"].schema)
    part = commit(root, "scores", f"tables/scores/{unit}-1.parquet", data)
    seal(root, "score", [part], {})
    return part.path


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        ("flip", "sha256 is|not readable"),
        ("truncate", "not readable"),
        ("remove", "missing"),
        ("swap", "rows is 1"),
    ],
)
def test_verify_names_the_wrong_part(tmp_path: Path, damage: str, what: str) -> None:
    root = create(tmp_path / "s")
    one_part(root, "good", [1])
    bad = one_part(root, "bad", [2, 3])
    one_part(root, "later", [4])
    file = root / bad
    whole = bytearray(file.read_bytes())
    whole[100] ^= 1
    if damage == "flip":
        file.write_bytes(whole)
    elif damage == "truncate":
        file.write_bytes(whole[:200])
    elif damage == "remove":
        file.unlink()
    else:
        file.write_bytes((root / "tables/scores/good-1.parquet").read_bytes())
    seen = []
    report = verify(root, lambda done, total: seen.append((done, total)))
    assert len(report.problems) == 1
    assert report.problems[0].startswith("tables/scores/bad-1.parquet: ")
    assert re.search(what, report.problems[0])
    assert "(sealed in snapshot 2); restore it" in report.problems[0]
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_verify_finds_every_flipped_byte(tmp_path: Path) -> None:
    root = create(tmp_path / "s")
    file = root / one_part(root, "u", [1])
    whole = file.read_bytes()
    for at in range(0, len(whole), 61):
        broken = bytearray(whole)
        broken[at] ^= 16
        file.write_bytes(broken)
        assert not verify(root).ok, at


def test_verify_notes_and_snapshots(tmp_path: Path) -> None:
    root = create(tmp_path / "s")
    for unit in range(3):
        one_part(root, f"u{unit}", [unit])
    (root / "staging/123-left").write_text("")
    (root / "tables/scores/loose.parquet").write_text("")
    report = verify(root)
    assert report.ok
    assert [note.split(":")[0] for note in report.notes] == [
        "tables/scores/loose.parquet",
        "staging/123-left",
    ]
    (root / "snapshots/000002.json").unlink()
    (root / "snapshots/000001.json").write_text("{}")
    problems = verify(root).problems
    assert [problem.split(": ")[1].split(" ")[0].rstrip(";") for problem in problems] == [
        "missing",
        "damaged",
    ]


def test_verify_names_parts_of_another_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = create(tmp_path / "s")
    path = one_part(root, "old", [1])
    scores = TABLES["scores"]
    newer = replace(scores, schema=scores.schema.append(pa.field("device", pa.string())))
    monkeypatch.setitem(TABLES, "scores", newer)
    assert re.match(rf"{path}: has other columns than this Winnow's table", verify(root).problems[0])
    with pytest.raises(WinnowError, match=f"{path}: has other columns .* another STORE="):
        arrow(root, "SELECT 1")


def test_verify_hashes_the_shards(tmp_path: Path) -> None:
    root = create(tmp_path / "s")
    shards = {"shards/a/1.parquet": b"one", "shards/a/2.parquet": b"two", "shards/a/3.parquet": b"three"}
    (root / "shards/a").mkdir()
    rows = []
    for path, data in shards.items():
        (root / path).write_bytes(data)
        sha = hashlib.sha256(data).hexdigest()
        rows.append(
            {"selection": "a", "round": 1, "format": "parquet", "path": path, "rows": 1, "bytes": len(data),
             "sha256": sha}
        )  # fmt: skip
    manifest = pa.Table.from_pylist(rows, schema=TABLES["shards"].schema)
    seal(root, "export", [commit(root, "shards", "tables/shards/u-1.parquet", manifest)], {})
    assert verify(root).ok
    (root / "shards/a/2.parquet").write_bytes(b"tvo")
    (root / "shards/a/3.parquet").unlink()
    (root / "shards/a/3.parquet").mkdir()  # which is no file either
    other = "tables/samples/x.parquet"
    seal(root, "feed", [commit(root, "samples", other, TABLES["samples"].schema.empty_table())], {})
    (root / other).write_bytes(b"no Parquet")  # hides no shard
    part, two, three = verify(root).problems
    assert part.startswith(f"{other}: ")
    assert two.startswith("shards/a/2.parquet: sha256 is") and "winnow export" in two
    assert three.startswith("shards/a/3.parquet: missing;") and "winnow export" in three
