"""Stage ``prompts``: from a source of texts to curated prompts, split into training and held-out ones."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from curate.prompts import Judge as Judging
from curate.prompts import curate, judge_by_rules
from jobs.judge import Judge, judging, model
from jobs.progress import say
from jobs.run import Run
from jobs.stage import complete, units
from schemas.errors import WinnowError
from schemas.ids import digest, sample_id
from schemas.settings import Settings
from schemas.tables import TABLES
from storage.layout import create


class Prompts(Settings):
    """``keep``: how many prompts stay, the nearest to as many k-means centres; null keeps all that pass.
    ``held_out``: the share of them that is for evaluation only."""

    source: str = "embedded"
    column: str = "text"
    benchmark: str | None = None
    keep: int | None = Field(None, ge=2)
    held_out: float = Field(0.2, gt=0, le=0.5)
    longest: int = Field(1000, ge=1)
    least_clarity: float = Field(0.5, ge=0, le=1)
    least_specificity: float = Field(0.25, ge=0, le=1)
    near: float | None = Field(0.92, gt=0, le=1)
    judge: Judge = Judge()

    def spec(self) -> dict[str, Any]:
        """What of the settings decides the prompts: not how patiently a judge is asked, but all that it says."""
        judge = None if self.judge.kind == "rules" else model(self.judge).revision
        return self.model_dump(mode="json", exclude={"judge"}) | {"judge": judge}


def _embedded() -> list[str]:
    from jobs.world.scenes import all_captions

    return all_captions()


GOLDEN = (5**0.5 - 1) / 2
LONE = re.compile("[\ud800-\udfff]")  # half a character: JSON can hold it, UTF-8 cannot

#: Names for ``source:``; anything else is a file.
SOURCES = {"embedded": _embedded}


def _lines(path: Path) -> Iterator[str]:
    """Lines of a text file. What is not UTF-8 keeps a mark in its place, and is dropped with that as reason."""
    with open(path, encoding="utf-8-sig", errors="replace", newline="\n") as file:
        for line in file:
            yield line.rstrip("\r\n")


def _csv(path: Path, column: str, delimiter: str) -> list[str]:
    csv.field_size_limit(2**31 - 1)
    # With their line ends: a quoted text may go on in the next line. A NUL or a lone return would end the reading.
    lines = (line.replace("\0", "\ufffd").replace("\r", " ") + "\n" for line in _lines(path))
    rows = csv.DictReader(lines, delimiter=delimiter)
    names = {name.lower(): name for name in rows.fieldnames or []}
    name = names.get(column.lower(), names.get("prompt"))
    if name is None:
        raise WinnowError(f"{path}: no column {column!r}; set prompts.column to one of {', '.join(names.values())}")
    return [row[name] or "" for row in rows]


def _jsonl(path: Path, column: str) -> list[str]:
    texts = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise WinnowError(f"{path} line {number}: not JSON ({error}); mend or remove the line") from None
        value = row.get(column, row.get("prompt")) if isinstance(row, dict) else None
        if not isinstance(value, str):
            raise WinnowError(f"{path} line {number}: no text in {column!r}; set prompts.column to the right key")
        texts.append(value)
    return texts


def _parquet(path: Path, column: str) -> list[str]:
    names = pq.read_schema(path).names
    if column not in names:
        raise WinnowError(f"{path}: no column {column!r}; set prompts.column to one of {', '.join(names)}")
    return [text or "" for text in pq.read_table(path, columns=[column])[column].to_pylist()]


def read(source: str, column: str = "text") -> list[str]:
    """The texts of a named source or a .txt (one a line), .tsv, .csv, .jsonl or .parquet file."""
    if source in SOURCES:
        return SOURCES[source]()
    path = Path(source).expanduser()
    if not path.is_file():
        raise WinnowError(f"prompts source {source!r}: no such file; give a file or one of {', '.join(SOURCES)}")
    readers = {
        ".txt": lambda: list(_lines(path)),
        ".tsv": lambda: _csv(path, column, "\t"),
        ".csv": lambda: _csv(path, column, ","),
        ".jsonl": lambda: _jsonl(path, column),
        ".parquet": lambda: _parquet(path, column),
    }
    if path.suffix not in readers:
        raise WinnowError(f"prompts source {source!r}: unknown kind {path.suffix!r}; allowed: {', '.join(readers)}")
    try:
        texts = readers[path.suffix]()
    except (OSError, pa.ArrowInvalid, csv.Error) as error:
        raise WinnowError(f"prompts source {source!r}: cannot be read ({error}); mend the file") from error
    if not texts:
        raise WinnowError(f"prompts source {source!r}: the file is empty; give one prompt a line")
    return texts


def rows(settings: Prompts, seed: int, judge: Judging = judge_by_rules) -> pa.Table:
    """The prompts table of a source: every distinct text once, kept or with the reason why not."""
    texts = read(settings.source, settings.column)
    benchmark = read(settings.benchmark, "Prompt") if settings.benchmark else ()
    curated = curate(
        texts,
        keep=settings.keep,
        longest=settings.longest,
        least_clarity=settings.least_clarity,
        least_specificity=settings.least_specificity,
        near=settings.near,
        benchmark=benchmark,
        judge=judge,
        seed=seed % 2**31,
    )
    made: dict[int, dict[str, Any]] = {}
    kept = [i for i, prompt in enumerate(curated) if prompt.kept]
    if len(kept) < 2:
        reasons = sorted({p.reason for p in curated if p.reason})[:3]
        raise WinnowError(
            f"prompts source {settings.source!r}: {len(kept)} of {len(texts)} prompts pass, 2 are needed; "
            f"reasons were such as {'; '.join(reasons)}"
        )
    # Steps of the golden ratio through the source fall evenly on whatever blocks and periods it has, so that what is
    # held out is a fair picture of what is trained on.
    places = (np.arange(len(kept)) * GOLDEN + seed % 2**31 / 2**31) % 1
    held_out = {kept[at] for at in places.argsort()[: max(1, round(settings.held_out * len(kept)))]}
    for i, prompt in enumerate(curated):
        # A dropped text may repeat: its line number keeps the rows apart, so that every reason is kept.
        key = prompt.text if prompt.kept else [prompt.text, i]
        number = sample_id(["prompt", key])
        made[number] = {
            "prompt_id": number,
            "text": LONE.sub("\ufffd", prompt.text),
            "source": Path(settings.source).name,
            "split": "eval" if i in held_out else "train",
            "cluster": prompt.cluster if prompt.cluster >= 0 else None,
            "kept": prompt.kept,
            "reason": prompt.reason or None,
            "category": None,
        }
    return pa.Table.from_pylist(list(made.values()), schema=TABLES["prompts"].schema)


def prompts(run: Run, keep: bool = False) -> None:
    """Curate the recipe's source once a store. With ``keep``, prompts that the store has stay as they are."""
    create(run.store)
    settings = run.recipe.prompts
    if keep:
        held = run.query("SELECT min(source) AS source, count(*) AS n FROM prompts WHERE kept").to_pylist()[0]
        if held["n"]:
            if held["source"] != Path(settings.source).name:
                say(f"prompts: the {held['n']} that the store has, from {held['source']}, not {settings.source}")
            return
    seed = run.seed("prompts")
    content = [digest(sorted(read(settings.source, settings.column)))]
    if settings.benchmark:
        content.append(digest(sorted(read(settings.benchmark, "Prompt"))))
    one = pa.table({"sample_id": pa.array([seed])})
    spec = ["prompts", settings.spec(), content, run.recipe.seed]
    work = units("prompts", {}, one, 1, spec)
    complete(run, "prompts", "prompts", work, lambda: lambda _: rows(settings, seed, judging(run, settings.judge)))


def chosen(run: Run, split: str, n: int | None) -> pa.Table:
    """``n`` kept prompts of a split (prompt_id, text); training rounds go on where the last one stopped."""
    found = run.query(
        "SELECT prompt_id, text FROM prompts WHERE kept AND split = $split ORDER BY prompt_id", split=split
    )
    if not found.num_rows:
        raise WinnowError(f"prompts: the store has no kept {split} prompts; run 'winnow prompts' first")
    n = min(n or found.num_rows, found.num_rows)
    start = (run.round - 1) * n if split == "train" and run.round > 0 else 0
    return found.take(np.arange(start, start + n) % found.num_rows)
