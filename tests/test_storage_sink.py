"""Files that are hashed while they are written, and rows read from their places."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import WinnowError
from schemas.tables import TABLES
from storage import sink as sinks
from storage.commit import commit
from storage.layout import create
from storage.places import parts_of, places, rows_at
from storage.query import arrow
from storage.sink import Sink
from storage.snapshot import latest, seal


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 5000), max_size=60), st.integers(1, 4096), st.integers(0, 4))
def test_a_file_holds_what_was_written_and_its_hash(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], block: int, ahead: int
) -> None:
    path = tmp_path_factory.mktemp("sink") / "file"
    data = [os.urandom(size) for size in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sinks, "BLOCK", block)
        patch.setattr(sinks, "AHEAD", ahead)
        with Sink(path) as sink:
            for i, some in enumerate(data):
                assert sink.write(memoryview(some) if i % 2 else some) == len(some)
            sink.finish()
    found = sink.result()
    whole = b"".join(data)
    assert path.read_bytes() == whole and sink.bytes == len(whole)
    assert found == hashlib.sha256(whole).hexdigest() == sink.result()


def test_what_waits_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "BLOCK", 1)
    go, waits = threading.Event(), threading.Event()
    with Sink(tmp_path / "file") as sink:
        sink._writer.submit(go.wait)

        def fill() -> None:
            for i in range(100):
                sink.write(bytes([i]))
            waits.set()

        maker = threading.Thread(target=fill)
        maker.start()
        assert not waits.wait(0.2) and sink.bytes <= sinks.AHEAD + 2
        go.set()
        maker.join(10)
        sink.finish()
    sink.result()
    assert (tmp_path / "file").read_bytes() == bytes(range(100))


def test_a_broken_disk_is_told_and_nothing_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(28, "No space left on device")

    def fsync(handle: int) -> None:
        raise full

    monkeypatch.setattr(os, "fsync", fsync)
    with Sink(tmp_path / "file") as sink:
        sink.write(b"data")
        sink.finish()
    with pytest.raises(OSError, match="No space left"):
        sink.result()
    before = threading.active_count()
    with pytest.raises(ValueError, match="mine"), Sink(tmp_path / "other") as sink:
        sink.write(bytes(2 * sinks.BLOCK))
        raise ValueError("mine")
    assert sink.closed and threading.active_count() <= before
    with pytest.raises(FileExistsError), Sink(tmp_path / "other"):
        pass


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two parts of 250 and 30 samples, in row groups of 100; the first in path order has the greater ids."""
    root = create(tmp_path_factory.mktemp("stored") / "s [1]*")
    made = []
    for name, numbers in (("b", range(1, 31)), ("a", range(1000, 1250))):
        fixed = {"round": 1, "arm": "a", "split": "train", "prompt_id": 1, "seed": 1, "model": "m", "width": 1,
                 "height": 1, "attempt": 0}  # fmt: skip
        rows = [fixed | {"sample_id": n, "prompt": f"p{n}", "image": {"bytes": b"%d" % n, "path": None}}
                for n in numbers]  # fmt: skip
        data = pa.Table.from_pylist(rows, schema=TABLES["samples"].schema)
        made.append(commit(root, "samples", f"tables/samples/{name}-1.parquet", data))
    seal(root, "x", made, {})
    return root


def test_places_are_those_of_the_files(stored: Path) -> None:
    paths = parts_of(latest(stored))
    assert paths == ["tables/samples/a-1.parquet", "tables/samples/b-1.parquet"]
    found = arrow(stored, f"SELECT * FROM ({places(stored, paths)}) ORDER BY part, row").to_pylist()
    assert [(row["sample_id"], row["part"], row["row"]) for row in found] == [
        *((1000 + i, 0, i) for i in range(250)), *((1 + i, 1, i) for i in range(30))
    ]  # fmt: skip


@settings(deadline=None)
@given(st.lists(st.integers(0, 279), min_size=1, max_size=150))
def test_rows_come_as_asked(stored: Path, wanted: list[int]) -> None:
    at = np.sort(wanted)
    part, row = (at >= 250).astype(int), np.where(at >= 250, at - 250, at)
    ids = np.where(at >= 250, at - 249, at + 1000)
    asked = pa.table({"part": part, "row": row, "sample_id": ids})
    found = list(rows_at(stored, parts_of(latest(stored)), asked, ["prompt", "image"]))
    came = [one for table in found for one in table.to_pylist()]
    assert [(one["sample_id"], one["prompt"], one["image"]["bytes"]) for one in came] == [
        (n, f"p{n}", b"%d" % n) for n in ids.tolist()
    ]
    assert all(table.column_names == ["sample_id", "prompt", "image"] for table in found)


def test_rows_that_are_not_there_are_refused(stored: Path) -> None:
    paths = parts_of(latest(stored))
    for part, row, number, said in ((0, 250, 1250, "a-1.parquet: not readable"), (0, 5, 1, "other samples"),
                                    (1, 99, 1, "b-1.parquet: not readable")):  # fmt: skip
        asked = pa.table({"part": [part], "row": [row], "sample_id": [number]})
        with pytest.raises(WinnowError, match=said):
            list(rows_at(stored, paths, asked, ["prompt"]))
    with pytest.raises(WinnowError, match="c.parquet: sealed, but missing"):
        list(rows_at(stored, ["c.parquet"], pa.table({"part": [0], "row": [0], "sample_id": [1]}), ["prompt"]))
    with pytest.raises(ValueError, match="stored order"):
        list(rows_at(stored, paths, pa.table({"part": [0, 0], "row": [5, 4], "sample_id": [1005, 1004]}), ["prompt"]))
