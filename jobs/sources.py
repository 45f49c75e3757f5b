"""Sources of prompts: texts of a file, a folder of Parquet files, a dataset on the Hub, or the embedded world."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import WinnowError

TAB = "\t"
#: One row of a source: its text, and its category where one is asked for.
Row = tuple[str, str]


def _embedded() -> list[str]:
    from jobs.world.scenes import all_captions

    return all_captions()


#: Names for ``source:``. Others are ``hub:org/name``, ``hub:org/name@split``, a file or a folder.
SOURCES: dict[str, Callable[[], list[str]]] = {"embedded": _embedded}


def label(source: str) -> str:
    """How the table of prompts calls a source: a file without its folders."""
    return source if source.startswith("hub:") else Path(source).name


def read(source: str, column: str = "text", limit: int | None = None) -> list[str]:
    """The texts of a source, at most ``limit``; see `rows`."""
    return [text for text, _ in rows(source, column, limit=limit)]


def rows(source: str, column: str = "text", category: str | None = None, limit: int | None = None) -> list[Row]:
    """(text, category) of each row of a source: a .txt file (one text a line), a .tsv, .csv, .jsonl or .parquet file,
    a folder of .parquet files, ``hub:org/name[@split]`` (streamed; split ``train`` by default) or a name in SOURCES.

    ``column`` holds the text, whatever its case; where it is missing, a column ``prompt`` does. ``category``: the
    column with the category, "" where a row has none; without it all are "".
    """
    try:
        path = Path(source).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # such as a name of 5,000 letters, or nobody's home
        why = str(error)[:100]
        raise WinnowError(f"prompts source {source[:60]!r}: cannot be read ({why}); give a file") from error
    kinds: dict[str, Callable[[], Iterable[Row]]] = {
        ".txt": lambda: _plain(_lines(path), source, category),
        ".tsv": lambda: _csv(path, column, category, TAB),
        ".csv": lambda: _csv(path, column, category, ","),
        ".jsonl": lambda: _jsonl(path, column, category),
        ".parquet": lambda: _parquet(path, column, category),
    }
    if source in SOURCES:
        found: Iterable[Row] = _plain(SOURCES[source](), source, category)
    elif source.startswith("hub:"):
        found = _hub(source, column, category)
    elif path.is_dir():
        files = sorted(path.glob("*.parquet"))
        if not files:
            raise WinnowError(f"prompts source {source!r}: the folder holds no .parquet file; give a folder that does")
        found = itertools.chain.from_iterable(_parquet(file, column, category) for file in files)
    elif not path.is_file():
        names = ", ".join([*SOURCES, "hub:org/name"])
        raise WinnowError(f"prompts source {source!r}: no such file; give a file, a folder or one of {names}")
    elif path.suffix not in kinds:
        raise WinnowError(f"prompts source {source!r}: unknown kind {path.suffix!r}; allowed: {', '.join(kinds)}")
    else:
        found = kinds[path.suffix]()
    try:
        made = list(itertools.islice(found, limit))
    except (OSError, pa.ArrowException, csv.Error, UnicodeDecodeError, KeyError) as error:
        raise WinnowError(f"prompts source {source!r}: cannot be read ({error}); mend the file") from error
    if not made:
        raise WinnowError(f"prompts source {source!r}: it is empty; give one prompt a line or row")
    return made


def _plain(texts: Iterable[str], source: str, category: str | None) -> Iterator[Row]:
    if category is not None:
        raise WinnowError(
            f"prompts source {source!r}: has no columns, so no {category!r}; use prompts.balance.rules, or a table"
        )
    return ((text, "") for text in texts)


def _lines(path: Path) -> Iterator[str]:
    """Lines of a text file. What is not UTF-8 keeps a mark in its place, and is dropped with that as reason."""
    with open(path, encoding="utf-8-sig", errors="replace", newline="\n") as file:
        for line in file:
            yield line.rstrip("\r\n")


def _columns(names: Sequence[str], column: str, category: str | None, where: object) -> tuple[str, str | None]:
    """The names that the two columns have there."""

    def place(wanted: str, key: str, *others: str) -> str:
        if (name := _named(names, wanted, *others)) is None:
            raise WinnowError(f"{where}: no column {wanted!r}; set {key} to one of {', '.join(names)}")
        return name

    text = place(column, "prompts.column", "prompt")
    return text, place(category, "prompts.balance.column") if category is not None else None


def _named(names: Sequence[str], wanted: str, *others: str) -> str | None:
    """The first of the names that is as wanted, or so whatever its case, or one of the others."""
    lower = {name.lower(): name for name in reversed(names)}
    found = (wanted, lower.get(wanted.lower()), *(lower.get(other) for other in others))
    return next((name for name in found if name in names), None)


def _csv(path: Path, column: str, category: str | None, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    # With their line ends: a quoted text may go on in the next line. A NUL or a lone return would end the reading.
    lines = (line.replace("\0", "\ufffd").replace("\r", " ") + "\n" for line in _lines(path))
    taken: list[str] = []  # by the row that is being read
    kept = (taken.append(line) or line for line in itertools.dropwhile(str.isspace, lines))
    table = csv.DictReader(kept, delimiter=delimiter)
    names = list(table.fieldnames or [])
    text, kind = _columns(names, column, category, path)
    taken.clear()
    for row in table:
        where = f"{path} row {table.line_num - len(taken) + 1}"
        if len(taken) > 1 and "".join(taken).count('"') % 2:  # the reader takes the file's end for the quote's
            raise WinnowError(f"{where}: a quote begins there and does not end; end it, or double it within quotes")
        if None in row:
            raise WinnowError(
                f"{where}: has more fields than the {len(names)} of the header; put quotes round texts that hold a "
                f"{'tab' if delimiter == TAB else 'comma'}"
            )
        taken.clear()
        yield row[text] or "", (row[kind] or "") if kind else ""


def _jsonl(path: Path, column: str, category: str | None) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise WinnowError(f"{path} line {number}: not JSON ({error}); mend or remove the line") from None
        row = row if isinstance(row, dict) else {}
        text = _named(list(row), column, "prompt")
        if text is None or not isinstance(row[text], str | None):
            raise WinnowError(f"{path} line {number}: no text in {column!r}; set prompts.column to the right key")
        kind = None if category is None else _named(list(row), category)
        if category is not None and kind is None:
            raise WinnowError(f"{path} line {number}: no {category!r}; set prompts.balance.column to one of its keys")
        yield row[text] or "", "" if kind is None else _word(row[kind])


def _parquet(path: Path, column: str, category: str | None) -> Iterator[Row]:
    with pq.ParquetFile(path) as file:
        text, kind = _columns(file.schema_arrow.names, column, category, path)
        held = file.schema_arrow.field(text).type
        held = held.value_type if pa.types.is_dictionary(held) else held
        if not (pa.types.is_string(held) or pa.types.is_large_string(held) or pa.types.is_string_view(held)):
            raise WinnowError(f"{path}: column {text!r} holds {held}, not text; set prompts.column to another")
        for batch in file.iter_batches(columns=[text, *([kind] if kind else [])]):
            texts = batch.column(text).to_pylist()
            kinds = batch.column(kind).to_pylist() if kind else [""] * len(texts)
            yield from ((one or "", _word(other)) for one, other in zip(texts, kinds, strict=True))


def _word(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)


def _hub(source: str, column: str, category: str | None) -> Iterator[Row]:
    match = re.fullmatch(r"hub:([\w.-]+/[\w.-]+|[\w.-]+)(?:@([\w.-]+))?", source)
    if not match:
        raise WinnowError(f"prompts source {source!r}: no dataset's name; write hub:org/name or hub:org/name@split")
    name, split = match[1], match[2] or "train"
    from datasets import load_dataset

    try:
        data = load_dataset(name, split=split, streaming=True)
        names = data.column_names
        if names is None:  # not said beforehand by every kind of file
            first = next(iter(data), None)
            if first is None:
                return
            names = list(first)
        text, kind = _columns(names, column, category, f"prompts source {source!r}")
        for number, row in enumerate(data.select_columns([text, *([kind] if kind else [])])):
            if not isinstance(row[text], str | None):
                raise WinnowError(
                    f"prompts source {source!r}: row {number} of column {text!r} holds {type(row[text]).__name__}, not "
                    "text; set prompts.column to another"
                )
            yield row[text] or "", _word(row[kind]) if kind else ""
    except WinnowError:
        raise
    except Exception as error:  # the clients underneath have errors of their own, and have changed before
        raise WinnowError(f"prompts source {source!r}: {_hub_reason(error, split)}") from error


def _hub_reason(error: BaseException, split: str) -> str:
    words = " ".join(f"{error}".split())[:200] or type(error).__name__
    if "gated" in words:
        return "is gated; ask for access on its page, then log in with 'hf auth login'"
    if type(error).__name__ == "DatasetNotFoundError" or "doesn't exist" in words:
        return "no such dataset on the Hub, or a private one; check the name, or log in with 'hf auth login'"
    if "Bad split" in words or "Unknown split" in words:
        return f"has no split {split!r} ({words}); write hub:org/name@split"
    if isinstance(error, ConnectionError) or any(word in words.lower() for word in ("reach", "connect", "offline")):
        return f"the Hub cannot be reached ({words}); check the network, or give a local folder of Parquet files"
    return f"cannot be read ({words}); give a local folder of Parquet files"
