"""SQL views over the parts of a snapshot."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb
import pyarrow as pa

from schemas.errors import WinnowError
from schemas.tables import IMAGE, TABLES, Table, fingerprint

if TYPE_CHECKING:
    from storage.commit import Part
    from storage.snapshot import Snapshot

MISSING = "sealed, but missing; restore it from a copy, or run its stage again"

_SQL_TYPES = {
    pa.int64(): "BIGINT", pa.int32(): "INTEGER", pa.float64(): "DOUBLE", pa.bool_(): "BOOLEAN",
    pa.string(): "VARCHAR", IMAGE: "STRUCT(bytes BLOB, path VARCHAR)",
    pa.list_(pa.float16()): "FLOAT[]",  # DuckDB has no half floats, and reads them as FLOAT
}  # fmt: skip


def identifier(name: str) -> str:
    """`name` as a quoted SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """`text` as a quoted SQL string."""
    return "'" + text.replace("'", "''") + "'"


def no_glob(path: str | Path) -> str:
    """`path` so that DuckDB takes it by the letter, also with *, ? and [ in it."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in str(path))


def scan(root: Path, paths: Iterable[str], filename: bool = False) -> str:
    """SQL of a table function that reads exactly these parts (relative paths)."""
    files = ", ".join(literal(no_glob(root / path)) for path in paths)
    # Folder names of the store's own path must not become columns, hence no hive partitioning.
    return f"read_parquet([{files}], hive_partitioning = false, filename = {str(filename).lower()})"


def of_another_layout(part: Part) -> bool:
    """Whether a part was written with other columns than this Winnow's table has."""
    return part.table not in TABLES or part.fingerprint.split("-")[0] != _layout(TABLES[part.table])


@lru_cache
def _layout(table: Table) -> str:
    return fingerprint(table.schema)


def views(
    snapshot: Snapshot, root: str | Path, absent: Collection[str] = (), sql: str | None = None, kind: str = "VIEW"
) -> list[str]:
    """CREATE OR REPLACE statements of this kind of view (or "TEMP VIEW") for every table (empty and typed where it has
    no parts), for `curated`, and for `opinions` and `win_rates` over the votes; or for those alone that `sql` can mean:
    each costs the opening of a file.

    A table with one of the `absent` parts gets a view that refuses to be read: the others can be, so that the
    stage that made the part can make it again. Only `weights` leaves it out: its rows are then not weighed.
    """
    home = Path(root).resolve()
    paths: dict[str, list[str]] = {name: [] for name in TABLES}
    for part in snapshot.parts:
        if of_another_layout(part):
            raise WinnowError(
                f"{part.path}: has other columns than this Winnow's table {part.table!r}; read the store with the "
                "Winnow that wrote it, or take another STORE="
            )
        paths[part.table].append(part.path)
    paths["weights"] = [path for path in paths["weights"] if path not in absent]
    lost = {name: path for name in TABLES for path in reversed(paths[name]) if path in absent}
    bodies = {name: _refusing(name, lost[name]) if name in lost else _table(name, home, paths[name]) for name in TABLES}
    bodies["selections"] = _weighted(bodies["selections"], bodies["weights"])
    bodies["strengths"] = f"SELECT * FROM ({bodies['strengths']}) QUALIFY basis = max(basis) OVER ()"
    if sql is None or "curated" in sql:
        scorers = () if "scores" in lost else _scorers(home, tuple(paths["scores"]))
        bodies["curated"] = _curated(scorers)
    bodies |= {"opinions": _OPINIONS, "win_rates": _WIN_RATES}
    for name in reversed(list(bodies)) if sql is not None else ():  # each reads such as stand before it
        if name in sql:
            sql += bodies[name]
        else:
            del bodies[name]
    return [f"CREATE OR REPLACE {kind} {identifier(name)} AS {body}" for name, body in bodies.items()]


def _columns(name: str, value: str) -> str:
    """Every column of a table, typed, with one value."""
    fields = TABLES[name].schema
    return ", ".join(f"{value}::{_SQL_TYPES[field.type]} AS {identifier(field.name)}" for field in fields)


def _refusing(name: str, path: str) -> str:
    # In each column as well: a constant NULL would let "WHERE sample_id = 3" be answered without reading.
    error = f"error({literal(f'{path}: {MISSING}')})"
    return f"SELECT {_columns(name, error)} FROM (SELECT {error} AS refused) WHERE refused IS NULL"


def _table(name: str, root: Path, paths: list[str]) -> str:
    if paths:
        columns = ", ".join(identifier(column) for column in TABLES[name].schema.names)
        return f"SELECT {columns} FROM {scan(root, paths)}"
    return f"SELECT {_columns(name, 'NULL')} WHERE false"


def _weighted(selections: str, weights: str) -> str:
    """Selections with their weights: 0 for a reject, NULL for a kept row that is not weighed yet."""
    return (
        f"SELECT selection, round, sample_id, kept, rank, CASE WHEN kept THEN weight ELSE 0.0 END AS weight, reason "
        f"FROM ({selections}) LEFT JOIN ({weights}) USING (selection, round, sample_id)"
    )


@lru_cache(maxsize=16)  # parts never change, so their scorers do not either
def _scorers(root: Path, paths: tuple[str, ...]) -> tuple[str, ...]:
    if not paths:
        return ()
    with duckdb.connect() as connection:
        sql = f"SELECT DISTINCT scorer FROM {scan(root, paths)} ORDER BY scorer"
        rows = connection.execute(sql).fetchall()
    return tuple(row[0] for row in rows)


def _curated(scorers: tuple[str, ...]) -> str:
    """One row a kept selection row, with the scores as a struct that has one field a scorer."""
    fields: dict[str, str] = {}
    for scorer in scorers:
        # Struct fields ignore case: a second scorer that differs in case only gets a longer name.
        name = scorer
        while name.lower() in (known.lower() for known in fields):
            name += "_"
        fields[name] = f"max(value) FILTER (WHERE scorer = {literal(scorer)})"
    pairs = ", ".join(f"{identifier(name)} := {value}" for name, value in fields.items())
    struct = f"struct_pack({pairs or 'none := NULL::DOUBLE'}) AS scores"
    scores = f"SELECT sample_id, {struct} FROM scores GROUP BY sample_id"
    return (
        "SELECT chosen.selection, chosen.sample_id, chosen.round, made.prompt_id, made.prompt, made.image, "
        "chosen.weight, chosen.rank, scored.scores, made.seed, made.model, made.width, made.height, "
        "made.arm, made.split, made.parent_id, made.refiner, chosen.reason "
        "FROM selections AS chosen JOIN samples AS made USING (sample_id) "
        f"LEFT JOIN ({scores}) AS scored USING (sample_id) WHERE chosen.kept"
    )


# The votes that stand: none that was taken back, and of one voter over the same images only the last.
_OPINIONS = (
    "SELECT vote_id, voter, question, sample_id, other_id, choice, seconds, voted_at FROM votes "
    "ANTI JOIN (SELECT retracts FROM votes) AS gone ON votes.vote_id = gone.retracts WHERE choice <> 'retract' "
    "QUALIFY row_number() OVER (PARTITION BY voter, question, least(sample_id, other_id), "
    "greatest(sample_id, other_id) ORDER BY voted_at DESC, vote_id DESC) = 1"
)

# By question and pair of contestants, seen from both sides. Intervals: Wilson's, 95 %, votes taken as independent.
_CONTESTANT = "CASE WHEN {0}.round = 0 THEN {0}.arm ELSE {0}.arm || ' round ' || {0}.round END"
_WIN_RATES = (
    f"WITH decided AS (SELECT question, {_CONTESTANT.format('one')} AS contestant, {_CONTESTANT.format('two')} AS "
    "opponent, (choice = 'left')::INTEGER AS won FROM opinions JOIN samples AS one USING (sample_id) "
    "JOIN samples AS two ON two.sample_id = other_id WHERE choice IN ('left', 'right') AND contestant <> opponent), "
    "sides AS (FROM decided UNION ALL SELECT question, opponent, contestant, 1 - won FROM decided), "
    "counts AS (SELECT question, contestant, opponent, count(*) AS n, sum(won)::BIGINT AS wins, wins / n AS rate "
    "FROM sides GROUP BY question, contestant, opponent) "
    "SELECT question, contestant, opponent, n, wins, rate, "
    "(rate + 1.9208 / n - half) / (1 + 3.8416 / n) AS ci_low, (rate + 1.9208 / n + half) / (1 + 3.8416 / n) AS "
    "ci_high FROM (SELECT *, 1.96 * sqrt(rate * (1 - rate) / n + 0.9604 / n / n) AS half FROM counts)"
)
