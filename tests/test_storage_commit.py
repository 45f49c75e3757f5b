"""Commit: promises of the tables, first writer wins, equal bytes for equal data, nothing left behind."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.errors import WinnowError
from schemas.tables import TABLES, embedding_schema
from storage.commit import commit, commit_folder, find, write_file
from storage.layout import check, clean, create, part_path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return create(tmp_path / "a store's [1]")


def scores(ids: list[int], value: Any = 0.5, scorer: str = "clip") -> pa.Table:
    rows = [
        {"sample_id": i, "round": 1, "scorer": scorer, "revision": "1", "value": value, "truncated": False}
        for i in ids
    ]
    return pa.Table.from_pylist(rows, schema=TABLES["scores"].schema)


def samples(ids: list[int], image: bytes | None = b"png") -> pa.Table:
    row = {
        "round": 1, "arm": "curated", "split": "train", "prompt_id": 1, "prompt": "a seven", "seed": 3,
        "model": "m", "width": 4, "height": 4, "attempt": 0, "image": {"bytes": image, "path": None},
    }  # fmt: skip
    return pa.Table.from_pylist([{"sample_id": i, **row} for i in ids], schema=TABLES["samples"].schema)


def embeddings(vectors: np.ndarray) -> pa.Table:
    """vectors: [n, D] float16."""
    n, dim = vectors.shape
    flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), dim)
    ids = pa.array(range(n), pa.int64())
    return pa.table(
        [ids, pa.array([1] * n, pa.int32()), ["dino"] * n, ["r"] * n, flat], schema=embedding_schema(dim)
    )


def place(unit: str = "u0", table: str = "scores") -> str:
    return part_path(table, {"round": 1}, unit, "abc")


def test_part_path_is_clean() -> None:
    path = part_path("scores", {"round": 3, "scorer": "a/b: ü=c"}, "../unit 7", "0f")
    assert re.fullmatch(r"tables/scores/round-3/scorer-a_b____c-[0-9a-f]{8}/unit_7-[0-9a-f]{8}-0f\.parquet", path)
    assert re.fullmatch(r"tables/rounds/x-[0-9a-f]{8}-1\.parquet", part_path("rounds", {}, "..", "1"))


def test_commit_then_find(root: Path) -> None:
    part = commit(root, "scores", place(), scores([1, 2]))
    assert (part.table, part.rows, part.path) == ("scores", 2, "tables/scores/round-1/u0-abc.parquet")
    assert find(root, part.path) == part
    assert part.bytes == (root / part.path).stat().st_size
    assert find(root, place("u1")) is None
    assert list((root / "staging").iterdir()) == []
    assert pq.read_schema(root / part.path).equals(TABLES["scores"].schema, check_metadata=True)


def test_find_takes_a_sealed_part_at_its_word_only_if_its_size_is_right(root: Path) -> None:
    part = commit(root, "scores", place(), scores([1, 2]))
    assert find(root, part.path, {part.path: part}) is part
    (root / part.path).write_bytes(b"PAR1")
    with pytest.raises(WinnowError, match="not readable"):
        find(root, part.path, {part.path: part})


@pytest.mark.parametrize("table", ["samples", "embeddings", "scores"])
def test_equal_data_gives_equal_bytes_however_it_is_chunked(root: Path, table: str) -> None:
    rng = np.random.default_rng(0)
    data = {
        "samples": samples(list(range(250)), image=rng.bytes(3000)),
        "embeddings": embeddings(rng.normal(size=(50, 6)).astype(np.float16)),
        "scores": scores(list(range(90))),
    }[table]
    third = data.num_rows // 3
    pieces = pa.concat_tables([data.slice(0, third), data.slice(third)])
    reordered = pieces.select(list(reversed(data.column_names)))
    parts = [commit(root, table, place(f"u{i}", table), d) for i, d in enumerate([data, pieces, reordered])]
    assert len({part.sha256 for part in parts}) == 1
    assert pq.read_table(root / parts[1].path).equals(data)


def test_images_are_plain_and_in_small_groups(root: Path) -> None:
    part = commit(root, "samples", place("u", "samples"), samples(list(range(250))))
    metadata = pq.read_metadata(root / part.path)
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [100, 100, 50]
    columns = [metadata.row_group(0).column(i) for i in range(metadata.num_columns)]
    image = next(column for column in columns if column.path_in_schema == "image.bytes")
    assert image.compression == "UNCOMPRESSED"
    assert not image.has_dictionary_page
    assert {column.compression for column in columns if column is not image} == {"ZSTD"}


def test_large_images_make_smaller_groups(root: Path) -> None:
    part = commit(root, "samples", place("u", "samples"), samples(list(range(5)), image=bytes(20 * 2**20)))
    metadata = pq.read_metadata(root / part.path)
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [3, 2]


def test_an_empty_part_is_a_part(root: Path) -> None:
    part = commit(root, "scores", place(), scores([]))
    assert part.rows == 0
    assert find(root, part.path) == part


def test_first_writer_wins(root: Path) -> None:
    first = commit(root, "scores", place(), scores([1]))
    assert commit(root, "scores", place(), scores([2])) == first
    assert pq.read_table(root / first.path)["sample_id"].to_pylist() == [1]


def vector_with(value: float) -> pa.Table:
    vectors = np.zeros((3, 4), np.float16)
    vectors[1, 2] = value
    return embeddings(vectors)


@pytest.mark.parametrize(
    ("table", "data", "message"),
    [
        ("scores", scores([1, 2, 1]), "scores: two rows for sample_id 1, scorer 'clip'"),
        ("scores", scores([12], float("nan")), "scores: value is nan for sample_id 12, scorer 'clip'"),
        ("scores", scores([12], float("-inf")), "scores: value is -inf for sample_id 12"),
        ("scores", scores([12], None), "scores: value is null for sample_id 12"),
        ("embeddings", vector_with(np.nan), "embeddings: vector is nan for sample_id 1, encoder 'dino'"),
        ("embeddings", vector_with(np.inf), "embeddings: vector is inf for sample_id 1"),
        ("samples", samples([4], image=None), "samples: image is null for sample_id 4"),
        (
            "scores",
            scores([1]).drop_columns("round"),
            "scores: columns do not match, no round; the columns are",
        ),
        ("scores", scores([1]).append_column("x", pa.array([1])), "unknown x; the columns are"),
        (
            "scores",
            scores([1]).set_column(4, "value", pa.array([1])),
            "scores: value is int64, allowed is double; build the rows with schema",
        ),
        (
            "embeddings",
            vector_with(0).set_column(4, "vector", pa.array([[0.5]] * 3, pa.list_(pa.float32(), 1))),
            "embeddings: vector is .*float.*, allowed is",
        ),
        (
            "embeddings",
            vector_with(0).set_column(4, "vector", pa.array([[0.5]] * 3, pa.list_(pa.float16()))),
            "use embedding_schema",
        ),
        ("score", scores([1]), "table 'score': no such table|not a place"),
    ],
)
def test_broken_promises_are_refused(root: Path, table: str, data: pa.Table, message: str) -> None:
    with pytest.raises(WinnowError, match=message):
        commit(root, table, f"tables/{table}/u-1.parquet", data)
    assert not (root / f"tables/{table}/u-1.parquet").exists()
    assert list((root / "staging").iterdir()) == []


@pytest.mark.parametrize(
    "path", ["tables/scores/../x.parquet", "tables/samples/a.parquet", "a.parquet", "tables/scores/a"]
)
def test_parts_stay_in_their_folder(root: Path, path: str) -> None:
    with pytest.raises(WinnowError, match=r"make the path with part_path\(\)"):
        commit(root, "scores", path, scores([1]))


@pytest.mark.parametrize("damage", ["truncated", "empty"])
def test_find_names_a_damaged_file(root: Path, damage: str) -> None:
    part = commit(root, "scores", place(), scores([1]))
    whole = (root / part.path).read_bytes()
    (root / part.path).write_bytes(whole[:-20] if damage == "truncated" else b"")
    with pytest.raises(WinnowError, match="u0-abc.parquet: not readable .* move the file out"):
        find(root, part.path)


def test_commit_folder_keeps_the_first(root: Path) -> None:
    def write(text: str) -> Any:
        return lambda folder: [(folder / "in").mkdir(), (folder / "in" / "a").write_text(text)]

    final = commit_folder(root, "models/round-1", write("one"))
    assert commit_folder(root, "models/round-1", write("two")) == final == root / "models/round-1"
    assert (final / "in" / "a").read_text() == "one"

    def late(folder: Path) -> None:  # another process finishes while this one still writes
        write("mine")(folder)
        commit_folder(root, "models/round-2", write("theirs"))

    assert (commit_folder(root, "models/round-2", late) / "in" / "a").read_text() == "theirs"
    assert list((root / "staging").iterdir()) == []


def test_commit_folder_that_fails_leaves_nothing(root: Path) -> None:
    def fails(folder: Path) -> None:
        (folder / "a").write_text("half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        commit_folder(root, "models/m", fails)
    with pytest.raises(WinnowError, match="nothing was written"):
        commit_folder(root, "models/m", lambda folder: None)
    assert not (root / "models/m").exists()
    assert list((root / "staging").iterdir()) == []


def test_write_file_replaces(root: Path) -> None:
    write_file(root, "reports/a/r.html", b"one")
    assert write_file(root, "reports/a/r.html", b"two").read_bytes() == b"two"


def test_create_and_check(tmp_path: Path) -> None:
    with pytest.raises(WinnowError, match="no store here"):
        check(tmp_path / "s")
    root = create(tmp_path / "s")
    assert create(root) == check(root) == root
    (root / "winnow.json").write_text('{"format": 99}')
    with pytest.raises(
        WinnowError, match=r"winnow.json: the store has format 99, this Winnow reads format 1; use"
    ):
        create(root)
    (root / "winnow.json").write_text("not json")
    with pytest.raises(WinnowError, match="not readable"):
        check(root)
    (tmp_path / "file").write_text("")
    with pytest.raises(WinnowError, match="file: "):
        create(tmp_path / "file")


FULL = """
import resource, sys
import pyarrow as pa
from schemas.errors import WinnowError
from schemas.tables import TABLES
from storage.commit import commit, commit_folder, write_file
root = sys.argv[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
row = dict(round=1, arm="a", split="train", prompt_id=1, prompt="p", seed=1, model="m")
row |= dict(width=4, height=4, attempt=0)
rows = [{"sample_id": i, **row, "image": {"bytes": bytes(1000), "path": None}} for i in range(100)]
data = pa.Table.from_pylist(rows, schema=TABLES["samples"].schema)
for act in (
    lambda: commit(root, "samples", "tables/samples/u-1.parquet", data),
    lambda: commit_folder(root, "models/m", lambda folder: (folder / "w").write_bytes(bytes(100_000))),
    lambda: write_file(root, "reports/r.html", bytes(100_000)),
):
    try:
        act()
    except WinnowError as error:
        print(error)
"""


def test_a_full_disk_is_one_line_and_leaves_nothing(root: Path) -> None:
    part = commit(root, "scores", place(), scores([1]))
    write_file(root, "reports/r.html", b"old")
    done = subprocess.run([sys.executable, "-c", FULL, str(root)], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for line, name in zip(lines, ["tables/samples/u-1.parquet", "models/m", "reports/r.html"], strict=True):
        assert line.startswith(f"{name}: File too large, ")
        assert "MiB left; free space" in line
        assert line.endswith("everything committed is safe")
    assert list((root / "staging").iterdir()) == []
    assert not (root / "tables/samples/u-1.parquet").exists()
    assert not (root / "models/m").exists()
    assert (root / "reports/r.html").read_bytes() == b"old"
    assert find(root, part.path) == part


def test_names_that_are_cleaned_stay_apart() -> None:
    long = "open_clip:local-dir:/home/somebody/with/a/very/long/path/to/their/models/of/this/year/epoch-"
    names = [clean(name) for name in (f"{long}1", f"{long}2", "a b", "a_b", "a-b", "_a", "a")]
    assert len(set(names)) == len(names) and max(map(len, names)) <= 80
    assert clean("scene-clip") == "scene-clip" and clean(3) == "3"


def test_a_lost_part_that_comes_out_otherwise_is_refused(root: Path) -> None:
    path = part_path("scores", {"round": 1}, "u", "abc")
    sealed = commit(root, "scores", path, scores([1, 2]))
    (root / path).unlink()
    with pytest.raises(WinnowError, match="sealed and is lost, and comes out otherwise"):
        commit(root, "scores", path, scores([1, 3]), sealed)
    assert not (root / path).exists() and not list((root / "staging").iterdir())
    assert commit(root, "scores", path, scores([1, 2]), sealed) == sealed
