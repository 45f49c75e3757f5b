"""A query's result for people and programs."""

from __future__ import annotations

import json
import sys

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from schemas.errors import WinnowError

FORMATS = ("table", "json", "csv", "parquet")
WIDEST = 60


def show(result: pa.Table, format: str = "table") -> None:
    """Print a result on standard output as one of FORMATS; images are shown by their size in a table."""
    if format == "table":
        _table(result)
    elif format == "json":
        print(json.dumps(result.to_pylist(), default=_plain, ensure_ascii=False))
    elif format == "csv":
        for i, column in enumerate(result.columns):
            if pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
                result = result.set_column(i, result.column_names[i], pa.array([_text(v) for v in column.to_pylist()]))
        pc.write_csv(result, sys.stdout.buffer)
    elif format == "parquet":
        if sys.stdout.isatty():
            raise WinnowError("--format parquet: not for a terminal; redirect it, as in > result.parquet")
        pq.write_table(result, sys.stdout.buffer)
    else:
        raise WinnowError(f"--format {format!r}: unknown; allowed are {', '.join(FORMATS)}")


def _table(result: pa.Table) -> None:
    shown = Table(*result.column_names)
    for row in result.slice(0, 1000).to_pylist():
        shown.add_row(*(_short(value) for value in row.values()))
    # Off a terminal nothing is cut: other programs read it.
    console = Console(markup=False) if sys.stdout.isatty() else Console(markup=False, width=100_000)
    console.print(shown)
    if result.num_rows > 1000:
        console.print(f"the first 1000 of {result.num_rows} rows")


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return f"<image, {len(value['bytes'])} bytes>"
    text = "" if value is None else _text(value)
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "…"


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=_plain, ensure_ascii=False)


def _plain(value: object) -> object:
    import base64

    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)
