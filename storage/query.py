"""SQL over a snapshot: trusted for jobs, in a sandbox for users."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from threading import Timer
from typing import Any

import duckdb
import pyarrow as pa

from schemas.errors import WinnowError
from storage.layout import check
from storage.snapshot import Snapshot, latest, load
from storage.views import MISSING, literal, no_glob, views

RESULT_BYTES = 2 * 2**30  # the most that a user's query may return; DuckDB's memory limit does not count it

_OURS = {"python_enable_replacements": False}  # SQL must not see the Python variables of whoever calls
_SANDBOX = {
    **_OURS,
    "autoload_known_extensions": False,
    "autoinstall_known_extensions": False,
    "allow_community_extensions": False,
    "allow_persistent_secrets": False,
    "temp_directory": "",  # no spilling: a query that needs it fails with a clear error
}
# What DuckDB says of a file that it cannot read or make sense of; a bare duckdb.Error is one of them, too.
_READING = (duckdb.IOException, duckdb.InvalidInputException, duckdb.InternalException)
# The kinds of query in a syntax tree that only read. Others exist: DuckDB 2 parses
# "WITH x AS (COPY … TO 'file') SELECT 1" as a SELECT, and it writes the file.
_READS = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}


@contextmanager
def connect(
    root: str | Path, snapshot: Snapshot | int | None = None, memory: str = "2GB", threads: int = 1,
    sql: str | None = None,
) -> Iterator[duckdb.DuckDBPyConnection]:  # fmt: skip
    """A connection of its own with the views of `snapshot` (a number; None: the newest), or those of them that `sql`
    can mean. For trusted SQL: where it cannot read a part, or has no room to sort in, the block raises WinnowError.

    One thread by default: with more, the sum of doubles differs from run to run.
    """
    home = check(root)
    config = memory, threads, str(home / "staging" / "spill")
    try:
        connection = _opened(home, snapshot, sql, *config)
    except duckdb.Error as error:
        raise _unreadable(home, error) from error
    with connection:
        try:
            yield connection
        except duckdb.Error as error:
            _engine.cache_clear()  # a spill folder that is lost is not made again
            if type(error) is duckdb.Error or isinstance(error, _READING):
                raise _unreadable(home, error) from error
            if isinstance(error, duckdb.OutOfMemoryException):
                raise WinnowError(
                    f"{home}: a query needs more than its {memory} of memory and the room that staging/spill has "
                    f"({str(error).splitlines()[0]}); free some of the disk"
                ) from error
            raise


@lru_cache(maxsize=1)
def _engine(memory: str, threads: int, spill: str) -> duckdb.DuckDBPyConnection:
    """DuckDB itself, whose start takes longer than many a query; ``memory`` is for all connections to it. Their views
    are temporary, and seen by no other; files are read anew every time."""
    config = {"memory_limit": memory, "threads": threads, "temp_directory": spill, "enable_external_file_cache": False}
    return duckdb.connect(config=config | _OURS)


def _opened(
    home: Path, snapshot: Snapshot | int | None, sql: str | None, *config: Any
) -> duckdb.DuckDBPyConnection:  # fmt: skip
    """``_with_views``, with a new engine where this one fails: one query's internal error ends it for all."""
    try:
        return _with_views(_engine(*config).cursor(), home, snapshot, sql)
    except duckdb.Error:
        _engine.cache_clear()
        return _with_views(_engine(*config).cursor(), home, snapshot, sql)


def _with_views(
    connection: duckdb.DuckDBPyConnection, home: Path, snapshot: Snapshot | int | None, sql: str | None = None
) -> duckdb.DuckDBPyConnection:
    """The connection with the views; a view of a part that is missing says so once it is asked."""
    snapshot = _meant(home, snapshot)
    try:
        _create(connection, views(snapshot, home, sql=sql, kind="TEMP VIEW"))
    except duckdb.Error:
        absent = {part.path for part in snapshot.parts if not (home / part.path).exists()}
        _create(connection, views(snapshot, home, absent, sql, "TEMP VIEW"))
    return connection


def _meant(home: Path, snapshot: Snapshot | int | None) -> Snapshot:
    """The snapshot itself, that of the number, or the newest."""
    if snapshot is None:
        return latest(home)
    return load(home, snapshot) if isinstance(snapshot, int) else snapshot


def _create(connection: duckdb.DuckDBPyConnection, statements: list[str]) -> None:
    for statement in statements:
        connection.execute(statement)


def _unreadable(home: Path, error: Exception) -> WinnowError:
    """What to say of a DuckDB error over a store's views: the part that is missing, or that one cannot be read."""
    if MISSING in str(error):
        return WinnowError(_one_line(error).partition("Error: ")[2])
    return WinnowError(f"{home}: a part cannot be read ({_one_line(error)}); 'winnow verify' names it and the cure")


def arrow(
    root: str | Path, sql: str, params: list[Any] | None = None, snapshot: Snapshot | int | None = None
) -> pa.Table:
    """The result of one trusted statement as an Arrow table. Vectors come as list<float>, not float16."""
    with connect(root, snapshot, sql=sql) as connection:
        return connection.sql(sql, params=params).to_arrow_table()


def stream(
    root: str | Path, sql: str, params: list[Any] | None = None, snapshot: Snapshot | int | None = None
) -> Iterator[pa.RecordBatch]:
    """As `arrow`, a batch of rows at a time: for what does not fit into memory twice. Without ORDER BY."""
    with connect(root, snapshot, sql=sql) as connection:
        try:
            yield from connection.sql(sql, params=params).to_arrow_reader(2048)
        except OSError as error:  # what Arrow makes of DuckDB's errors
            kind = duckdb.OutOfMemoryException if "Out of Memory Error" in str(error) else duckdb.IOException
            raise kind(str(error)) from error


def script(root: str | Path, snapshot: Snapshot | int | None = None) -> str:
    """The views of a snapshot as SQL that DuckDB runs without Winnow; it holds the paths of the store's parts."""
    home = check(root)
    return "".join(f"{statement};\n" for statement in views(_meant(home, snapshot), home))


def user_query(
    root: str | Path,
    sql: str,
    snapshot: Snapshot | int | None = None,
    memory: str = "2GB",
    seconds: float = 300.0,
) -> pa.Table:
    """The result of a user's SQL (of its last statement), which can read this store and nothing else.

    Only SELECT, DESCRIBE, SUMMARIZE, SHOW and EXPLAIN. Raises WinnowError, in one line, for anything that
    DuckDB or the sandbox refuses, and when `memory`, `seconds` or RESULT_BYTES run out.
    """
    home = check(root)
    statements = list(_read_only(sql))
    config = {"memory_limit": memory, "threads": 2, **_SANDBOX}
    with duckdb.connect(config=config) as connection:
        try:
            _with_views(connection, home, snapshot)
        except duckdb.Error as error:
            raise _unreadable(home, error) from error
        # The escaped form, too: DuckDB compares it with the paths in the views.
        allowed = ", ".join(literal(text) for text in {str(home), no_glob(home)})
        connection.execute(f"SET allowed_directories = [{allowed}]")
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        timer = Timer(seconds, connection.interrupt)
        timer.start()
        try:
            result = pa.table({})
            for statement in statements:
                result = _fetch(connection, statement)
            return result
        except (
            duckdb.Error,
            OSError,
        ) as error:  # while rows stream, Arrow reports DuckDB's errors as OSError
            reason = _one_line(error)
            if MISSING in reason:
                raise _unreadable(home, error) from error
            if "INTERRUPT" in reason:
                reason = f"not done after {seconds:g} s; narrow it with WHERE, or raise the limit"
            elif reason.startswith("Out of Memory"):
                reason = f"needs more memory than {memory}; select fewer columns or rows"
            raise WinnowError(f"sql: {reason}") from error
        finally:
            timer.cancel()


def _fetch(connection: duckdb.DuckDBPyConnection, statement: str) -> pa.Table:
    reader = connection.sql(statement).to_arrow_reader(10_000)
    batches, size = [], 0
    for batch in reader:
        batches.append(batch)
        size += batch.nbytes
        if size > RESULT_BYTES:
            limit = RESULT_BYTES // 2**20
            raise WinnowError(f"sql: the result is over {limit} MiB; add LIMIT or select fewer columns")
    return pa.Table.from_batches(batches, schema=reader.schema)


def _read_only(sql: str) -> Iterator[str]:
    """The statements of `sql`; WinnowError where one could do more than read."""
    try:
        sql.encode()
    except UnicodeEncodeError as error:
        raise WinnowError("sql: it is no UTF-8; write it in UTF-8") from error
    try:
        statements = duckdb.extract_statements(sql)
    except duckdb.Error as error:
        raise WinnowError(f"sql: {_one_line(error)}") from error
    if not statements:
        raise WinnowError('sql: empty; try "SELECT * FROM rounds"')
    for statement in statements:
        text = statement.query
        if statement.type == duckdb.StatementType.EXPLAIN:
            # EXPLAIN ANALYZE runs what it explains, so that must only read as well.
            text = re.sub(r"\A\s*explain\s+(analyze\s)?", "", text, flags=re.IGNORECASE)
        if not _reads(text):
            kind = str(statement.type).rsplit(".", 1)[-1]
            raise WinnowError(
                f"sql: {kind} statement that may do more than read; "
                "only SELECT, DESCRIBE, SUMMARIZE, SHOW and EXPLAIN of them are allowed"
            )
        yield statement.query


def _reads(text: str) -> bool:
    with duckdb.connect() as connection:
        row = connection.execute("SELECT json_serialize_sql(?)", [text]).fetchone()
    tree = json.loads(row[0]) if row else {"error": True}
    return not tree["error"] and _nodes(tree) <= _READS


def _nodes(tree: Any) -> set[str]:
    """The kinds of all query nodes in a syntax tree."""
    if isinstance(tree, list):
        return set().union(*map(_nodes, tree))
    if not isinstance(tree, dict):
        return set()
    here = tree.get("type")
    kinds = {here} if isinstance(here, str) and here.endswith("_NODE") else set()
    return kinds.union(*map(_nodes, tree.values()))


def _one_line(error: Exception) -> str:
    return str(error).split("\n\n")[0]
