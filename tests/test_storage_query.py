"""Views, and users' SQL: reads the store, reaches nothing else, writes nothing."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from contract import CONTRACT

from schemas.errors import WinnowError
from schemas.tables import TABLES, embedding_schema
from storage import query
from storage.commit import Part, commit
from storage.layout import create, part_path
from storage.query import arrow, connect, stream, user_query
from storage.snapshot import Snapshot, latest, seal
from storage.views import views

SCORERS = ("clip", 'a "quoted" scorer\'s', "CLIP")


def sample(i: int) -> dict[str, object]:
    return {
        "sample_id": i, "round": 1, "arm": "curated", "split": "train", "prompt_id": i // 2,
        "prompt": f"prompt {i}", "seed": i, "model": "m", "width": 4, "height": 4, "attempt": 0,
        "image": {"bytes": b"png", "path": None},
    }  # fmt: skip


def score(i: int, scorer: str) -> dict[str, object]:
    return {"sample_id": i, "round": 1, "scorer": scorer, "revision": "1", "value": i / 8, "truncated": False}


def choice(i: int) -> dict[str, object]:
    kept = i % 2 == 0
    return {
        "selection": "best",
        "round": 2,
        "sample_id": i,
        "kept": kept,
        "rank": i,
        "reason": "",
    }


def weight(i: int) -> dict[str, object]:
    return {"selection": "best", "round": 2, "sample_id": i, "weight": 1.0}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six samples, three scorers (none for sample 4), a selection that keeps 0, 2 and 4."""
    root = create(tmp_path_factory.mktemp("it's [a] store*"))
    parts = []

    def put(table: str, unit: str, data: pa.Table) -> None:
        parts.append(commit(root, table, part_path(table, {"round": 1}, unit, "abc"), data))

    def rows(table: str, unit: str, lines: list[dict[str, object]]) -> None:
        put(table, unit, pa.Table.from_pylist(lines, schema=TABLES[table].schema))

    rows("samples", "a", [sample(i) for i in range(3)])
    rows("samples", "b", [sample(i) for i in range(3, 6)])
    rows("scores", "a", [score(i, scorer) for i in range(4) for scorer in SCORERS])
    rows("selections", "a", [choice(i) for i in range(6)])
    rows("weights", "a", [weight(i) for i in (0, 2, 4)])
    for dim in (4, 6):
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(2 * dim).astype(np.float16)), dim)
        columns = [
            pa.array([0, 1], pa.int64()),
            pa.array([1, 1], pa.int32()),
            [f"e{dim}"] * 2,
            ["r"] * 2,
            vectors,
        ]
        put("embeddings", f"d{dim}", pa.table(columns, schema=embedding_schema(dim)))
    seal(root, "all", parts, {})
    return root


@pytest.mark.parametrize("name", CONTRACT)
def test_views_have_the_promised_columns_full_or_empty(root: Path, tmp_path: Path, name: str) -> None:
    full = arrow(root, f"SELECT * FROM {name}")
    empty = arrow(create(tmp_path / "s"), f"SELECT * FROM {name}")
    assert set(CONTRACT[name].split()) <= set(full.column_names)
    assert empty.num_rows == 0
    same = [column for column in full.column_names if column != "scores"]
    assert full.select(same).schema == empty.select(same).schema


def test_curated(root: Path) -> None:
    rows = user_query(root, "SELECT * FROM curated ORDER BY sample_id").to_pylist()
    assert [row["sample_id"] for row in rows] == [0, 2, 4]
    assert rows[1]["scores"] == {"clip": 0.25, "CLIP_": 0.25, SCORERS[1]: 0.25} or rows[1]["scores"] == {
        "CLIP": 0.25,
        "clip_": 0.25,
        SCORERS[1]: 0.25,
    }
    assert rows[1]["image"] == {"bytes": b"png", "path": None}
    assert (rows[1]["weight"], rows[1]["round"], rows[1]["prompt"]) == (1.0, 2, "prompt 2")
    assert rows[2]["scores"] is None
    dotted = user_query(root, "SELECT scores.clip AS a, scores['clip'] AS b FROM curated WHERE sample_id = 2")
    assert dotted.to_pylist() == [{"a": 0.25, "b": 0.25}]


def test_curated_without_scores(tmp_path: Path) -> None:
    root = create(tmp_path / "s")
    lines = {"samples": [sample(0)], "selections": [choice(0)]}
    tables = {name: pa.Table.from_pylist(rows, schema=TABLES[name].schema) for name, rows in lines.items()}
    seal(
        root,
        "all",
        [commit(root, name, f"tables/{name}/u-1.parquet", data) for name, data in tables.items()],
        {},
    )
    assert arrow(root, "SELECT sample_id, scores FROM curated").to_pylist() == [
        {"sample_id": 0, "scores": None}
    ]


def test_vectors_of_two_lengths(root: Path) -> None:
    out = arrow(root, "SELECT vector FROM embeddings WHERE encoder = $1 AND sample_id = 1", ["e6"])
    assert out["vector"].to_pylist() == [[6.0, 7.0, 8.0, 9.0, 10.0, 11.0]]
    out = arrow(root, "SELECT list_sum(vector) AS s FROM embeddings ORDER BY encoder, sample_id")
    assert out["s"].to_pylist() == [6, 22, 15, 51]


def test_parts_with_different_columns_are_refused(root: Path) -> None:
    odd = Part("scores", "tables/scores/odd.parquet", 1, 1, "00", "feed")
    with pytest.raises(WinnowError, match="odd.parquet: has other columns than this Winnow's table 'scores'"):
        views(Snapshot(1, "", (*latest(root).parts, odd)), root)


def test_connect_is_trusted_and_sees_no_python(root: Path) -> None:
    secret = pa.table({"a": [1]})
    with connect(root, memory="500MB") as connection:
        assert connection.sql("SELECT count(*) FROM samples").fetchall() == [(6,)]
        with pytest.raises(Exception, match="secret does not exist"):
            connection.sql("SELECT * FROM secret")
    assert secret.num_rows == 1


def test_each_connection_has_views_of_its_own(root: Path, tmp_path: Path) -> None:
    empty = create(tmp_path / "empty")
    with connect(root) as one, connect(root, Snapshot()) as two, connect(empty) as three:
        counts = [some.sql("SELECT count(*) FROM samples").fetchall() for some in (one, two, three)]
        assert counts == [[(6,)], [(0,)], [(0,)]]
    with connect(root, sql="FROM samples") as four, pytest.raises(duckdb.CatalogException):
        four.sql("SELECT * FROM scores")


def test_a_part_is_read_anew_every_time(copy: Path) -> None:
    part = next(part for part in latest(copy).parts if part.table == "samples")
    before = arrow(copy, "SELECT * FROM samples ORDER BY sample_id")
    changed = pq.read_table(copy / part.path)
    time = (copy / part.path).stat()
    pq.write_table(changed.set_column(changed.column_names.index("seed"), "seed", pa.array([7] * len(changed))),
                   copy / part.path)  # fmt: skip
    os.utime(copy / part.path, ns=(time.st_atime_ns, time.st_mtime_ns))
    after = arrow(copy, "SELECT * FROM samples ORDER BY sample_id")
    assert after["seed"].to_pylist().count(7) >= len(changed) and after != before


def test_an_engine_that_broke_is_started_again(root: Path) -> None:
    kept = query._engine("2GB", 1, str(root.resolve() / "staging" / "spill"))
    kept.close()
    assert arrow(root, "SELECT count(*) AS n FROM samples")["n"].to_pylist() == [6]


def test_a_lost_spill_folder_costs_one_query(root: Path) -> None:
    def spilling() -> int:
        with connect(root, memory="60MB") as connection:
            rows = connection.sql("SELECT a FROM range(6000000) t(a) ORDER BY hash(a) LIMIT 3 OFFSET 5000000")
            return len(rows.fetchall())

    assert spilling() == 3
    shutil.rmtree(root / "staging" / "spill")  # which DuckDB makes when it first spills, and not again
    with pytest.raises(WinnowError, match="No such file"):
        spilling()
    assert spilling() == 3


@pytest.mark.parametrize("read", [arrow, lambda *given: list(stream(*given))])
def test_a_disk_too_full_to_sort_on_is_named(root: Path, read: Callable[..., Any]) -> None:
    """DuckDB takes the room that is left as its limit."""
    with connect(root) as connection:
        connection.execute("SET memory_limit = '60MB'; SET max_temp_directory_size = '1MB'")
    with pytest.raises(WinnowError, match="more than its 2GB of memory and the room that staging/spill has.*free some"):
        read(root, "SELECT a, hash(a) AS h FROM range(6000000) t(a) ORDER BY h")
    assert len(read(root, "SELECT sample_id FROM samples"))


def test_a_damaged_part_is_named_as_one_or_read(copy: Path) -> None:
    part = next(part for part in latest(copy).parts if part.table == "samples")
    whole, said = (copy / part.path).read_bytes(), 0
    for place in range(4, len(whole), len(whole) // 60):
        (copy / part.path).write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            arrow(copy, "SELECT * FROM samples")
        except WinnowError as error:
            assert "winnow verify" in str(error)
            said += 1
    assert said > 10
    (copy / part.path).write_bytes(whole)
    assert arrow(copy, "SELECT count(*) AS n FROM samples")["n"].to_pylist() == [6]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM scores",
        "FROM scores LIMIT 1",
        "VALUES (1)",
        "DESCRIBE scores",
        "SUMMARIZE scores",
        "SHOW TABLES",
        "EXPLAIN SELECT * FROM curated",
        "explain analyze SELECT * FROM curated",
        "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t WHERE n < 3) SELECT * FROM t",
        "PIVOT scores ON scorer IN ('clip') USING avg(value)",
        "SELECT 1; SELECT 2",
    ],
)
def test_reading_is_allowed(root: Path, sql: str) -> None:
    assert user_query(root, sql).num_rows > 0


def files(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "sql",
    [
        "COPY (SELECT 1) TO '{root}/x.csv'",
        "WITH x AS (COPY (SELECT 1) TO '{root}/x.csv') SELECT 1",
        "SELECT 1; COPY (SELECT 1) TO '{root}/x.csv'",
        "EXPLAIN ANALYZE COPY (SELECT 1) TO '{root}/x.csv'",
        "EXPLAIN /* */ ANALYZE COPY (SELECT 1) TO '{root}/x.csv'",
        "EXPLAIN (ANALYZE) COPY (SELECT 1) TO '{root}/x.csv'",
        "EXPLAIN ANALYZE WITH x AS (COPY (SELECT 1) TO '{root}/x.csv') SELECT 1",
        "SELECT * FROM query('WITH x AS (COPY (SELECT 1) TO ''x.csv'') SELECT 1')",
        "EXPORT DATABASE '{root}/x'",
        "ATTACH '{root}/x.db'",
        "SET lock_configuration = false",
        "SET enable_external_access = true",
        "INSTALL httpfs",
        "LOAD httpfs",
        "CREATE TABLE t (a INT)",
        "DROP VIEW scores",
        "PRAGMA version",
        "CALL pragma_version()",
        "SELECT * FROM read_text('/etc/hostname')",
        "SELECT * FROM read_blob('/proc/self/environ')",
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM read_parquet('{outside}')",
        "SELECT * FROM '{outside}'",
        "SELECT * FROM glob('/etc/*')",
        "SELECT * FROM read_text('{root}/../outside.parquet')",
        "SELECT * FROM read_text('https://example.org/x')",
        "SELECT * FROM enable_logging(storage = 'file', storage_path = '{root}/x')",
        "SELECT getenv('HOME')",
    ],
)
def test_everything_else_is_refused_and_writes_nothing(root: Path, sql: str) -> None:
    outside = root.parent / "outside.parquet"
    outside.write_bytes((root / latest(root).parts[0].path).read_bytes())
    before = files(root.parent)
    quoted = {"root": str(root).replace("'", "''"), "outside": str(outside).replace("'", "''")}
    with pytest.raises(WinnowError, match="^sql: ") as caught:
        user_query(root, sql.format(**quoted))
    assert "\n" not in str(caught.value)
    assert files(root.parent) == before


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELEC 1", "sql: Parser Error: syntax error at or near"),
        ("SELECT * FROM scoress", 'Did you mean "scores"'),
        (" ", "sql: empty"),
        ("DELETE FROM scores", "sql: DELETE statement .*only SELECT, DESCRIBE"),
    ],
)
def test_errors_help(root: Path, sql: str, message: str) -> None:
    with pytest.raises(WinnowError, match=message):
        user_query(root, sql)


def test_time_and_memory_are_capped(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = "SELECT count(*) FROM range(1000000000000) a, range(1000000) b WHERE a.range * b.range % 7 = 3"
    with pytest.raises(WinnowError, match="sql: not done after 0.5 s; narrow it"):
        user_query(root, endless, seconds=0.5)
    with pytest.raises(WinnowError, match="sql: needs more memory than 50MB"):
        user_query(root, "SELECT * FROM range(30000000) ORDER BY hash(range)", memory="50MB")
    monkeypatch.setattr(query, "RESULT_BYTES", 2**20)
    with pytest.raises(WinnowError, match="sql: the result is over 1 MiB; add LIMIT"):
        user_query(root, "SELECT * FROM range(1000000000000)")


def test_a_root_behind_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    assert user_query(tmp_path / "link", "SELECT count(*) AS n FROM samples")["n"].to_pylist() == [6]


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root, tmp_path / "copy"))


def test_a_missing_part_is_refused_by_its_table_alone(copy: Path) -> None:
    lost = next(part for part in latest(copy).parts if part.table == "samples")
    (copy / lost.path).unlink()
    assert arrow(copy, "SELECT count(*) AS n FROM scores")["n"][0].as_py() > 0
    for sql in ("SELECT count(*) FROM samples", "SELECT * FROM samples WHERE sample_id = 1", "SELECT * FROM curated"):
        for ask in (arrow, user_query):
            with pytest.raises(WinnowError, match=f"^(sql: )?{lost.path}: sealed, but missing; restore it"):
                ask(copy, sql)


def test_rows_of_a_missing_weights_part_are_not_weighed(copy: Path) -> None:
    before = arrow(copy, "SELECT weight FROM selections WHERE kept")["weight"]
    assert not before.null_count
    for part in latest(copy).parts:
        if part.table == "weights":
            (copy / part.path).unlink()
    after = arrow(copy, "SELECT weight FROM selections WHERE kept")["weight"]
    assert after.null_count == len(after) == len(before)
