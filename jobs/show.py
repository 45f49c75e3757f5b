"""A query's result for people and programs."""

from __future__ import annotations

import itertools
import json
import math
import sys
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text

from schemas.errors import WinnowError

FORMATS = ("table", "json", "csv", "parquet")
WIDEST = 60


def show(result: pa.Table, format: str = "table") -> None:
    """Print a result on standard output as one of FORMATS; images are shown by their size in a table. Columns of one
    name are numbered: ``a``, ``a_1``."""
    result = _numbered(result)
    if format == "table":
        _table(result)
    elif format == "json":
        print(json.dumps(_finite(_listed(result)), default=_plain, ensure_ascii=False, allow_nan=False))
    elif format == "csv":
        for i, column in enumerate(result.columns):
            if pa.types.is_nested(column.type) or pa.types.is_binary(column.type) or pa.types.is_interval(column.type):
                texts = pa.array([value if value is None else _text(value) for value in _listed(column)], pa.string())
                result = result.set_column(i, result.column_names[i], texts)
        try:
            pc.write_csv(result, sys.stdout.buffer)
        except pa.ArrowException as error:  # such as of numbers of any length
            raise WinnowError(f"--format csv: {error}; cast that column to text") from error
    elif format == "parquet":
        if sys.stdout.isatty():
            raise WinnowError("--format parquet: not for a terminal; redirect it, as in > result.parquet")
        try:
            pq.write_table(result, sys.stdout.buffer)
        except pa.ArrowNotImplementedError as error:  # such as of an INTERVAL
            raise WinnowError(f"--format parquet: {error}; cast that column to text") from error
    else:
        raise WinnowError(f"--format {format!r}: unknown; allowed are {', '.join(FORMATS)}")


def _listed(values: Any) -> list[Any]:
    """The rows of a table, or the values of a column, as Python has them."""
    try:
        return list(values.to_pylist())
    except (OverflowError, ValueError, pa.ArrowException) as error:  # such as a date after the year 9999
        raise WinnowError(f"sql: a value is beyond what can be shown ({error}); cast its column to text") from error


def _numbered(result: pa.Table) -> pa.Table:
    names: list[str] = []
    for name in result.column_names:
        others = (f"{name}_{n}" for n in itertools.count(1))
        names.append(name if name not in names else next(other for other in others if other not in names))
    return result.rename_columns(names)


def _finite(value: Any) -> Any:
    """The same with null in place of NaN and infinity, of which JSON has none."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):  # a map is a list of pairs
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(result: pa.Table) -> None:
    shown = Table()
    for name in result.column_names:
        shown.add_column(Text(name))
    for row in _listed(result.slice(0, 1000)):
        shown.add_row(*(_short(value) for value in row.values()))
    # Off a terminal nothing is cut: other programs read it.
    console = Console(markup=False, emoji=False, width=None if sys.stdout.isatty() else 100_000)
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

    if isinstance(value, Decimal):  # as sums of whole numbers are
        return int(value) if value == value.to_integral_value() else float(value)
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)
