"""Does this data keep the promises of its table?"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.errors import WinnowError
from schemas.tables import IMAGE, TABLES, Table, embedding_schema, table


def conform(name: str, data: pa.Table) -> pa.Table:
    """`data` with the columns of table `name` in order and the table's metadata.

    Raises WinnowError naming table, column and first key for a missing, unknown or wrongly typed column, a
    null where none may be, NaN or infinity in a `finite` column, and two rows with one key.
    """
    rules = table(name)
    data = _columns(rules, data)
    for column in rules.required:
        values = _bytes(data[column]) if data.schema.field(column).type == IMAGE else data[column]
        if values.null_count:
            row = pc.index(values.is_null(), True).as_py()
            where = _row(rules, data, row)
            raise WinnowError(f"{name}: {column} is null for {where}; give every row a value")
    for column in rules.finite:
        bad = _first_not_finite(data[column])
        if bad is not None:
            row, value = bad
            cure = "mend what computed it, or leave the row out"
            raise WinnowError(f"{name}: {column} is {value} for {_row(rules, data, row)}; {cure}")
    _unique(rules, data)
    return data


def _columns(rules: Table, data: pa.Table) -> pa.Table:
    schema = rules.schema
    came = set(data.column_names)
    if rules.name == "embeddings" and "vector" in came:
        kind = data.schema.field("vector").type
        if not pa.types.is_fixed_size_list(kind) or kind.list_size < 1:
            raise WinnowError(f"embeddings: vector is {kind}, allowed is float16[D]; use embedding_schema(D)")
        schema = embedding_schema(kind.list_size)
    missing = [column for column in schema.names if column not in came]
    unknown = sorted(came - set(schema.names))
    if missing or unknown or len(came) != data.num_columns:
        both = (("no", missing), ("unknown", unknown))
        what = [f"{label} {', '.join(names)}" for label, names in both if names]
        raise WinnowError(
            f"{rules.name}: columns do not match, {'; '.join(what) or 'a name is given twice'}; "
            f"the columns are {', '.join(schema.names)}"
        )
    data = data.select(schema.names)
    for field in schema:
        kind = data.schema.field(field.name).type
        if kind != field.type:
            # No silent casts: a first part with int64 and a second with double would read 2.7 as 3.
            raise WinnowError(
                f"{rules.name}: {field.name} is {kind}, allowed is {field.type}; "
                f'build the rows with schema=TABLES["{rules.name}"].schema'
            )
    return pa.Table.from_arrays(data.columns, schema=schema)


def _bytes(images: pa.ChunkedArray) -> pa.ChunkedArray:
    return pa.chunked_array([chunk.flatten()[0] for chunk in images.chunks], pa.binary())


def _first_not_finite(values: pa.ChunkedArray) -> tuple[int, Any] | None:
    """(row, value) of the first NaN, infinity or null inside a vector; None where all is well."""
    seen = 0
    for chunk in values.chunks:
        width = chunk.type.list_size if pa.types.is_fixed_size_list(chunk.type) else 1
        flat = chunk.flatten() if width > 1 or pa.types.is_fixed_size_list(chunk.type) else chunk
        numbers = np.asarray(flat.to_numpy(zero_copy_only=False), dtype=np.float64 if width == 1 else None)
        bad = ~np.isfinite(numbers)
        if bad.any():
            at = int(bad.argmax())
            return seen + at // width, numbers[at]
        seen += len(chunk)
    return None


def _row(rules: Table, data: pa.Table, row: int) -> str:
    return describe(data.select(rules.key).slice(row, 1).to_pylist()[0])


def describe(key: dict[str, Any]) -> str:
    """A key for people: "sample_id 12, scorer 'clip'"."""
    return ", ".join(f"{column} {value!r}" for column, value in key.items())


def _unique(rules: Table, data: pa.Table) -> None:
    keys = data.select(rules.key)
    counts = keys.group_by(list(rules.key)).aggregate([([], "count_all")])
    if counts.num_rows < keys.num_rows:
        twice = counts.filter(pc.field("count_all") > 1).slice(0, 1).drop_columns("count_all")
        key = describe(twice.select(rules.key).to_pylist()[0])
        raise WinnowError(f"{rules.name}: two rows for {key}; the key must be unique, drop one of the rows")


assert all(set(rules.key) <= set(rules.required) for rules in TABLES.values())
