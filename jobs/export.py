"""Stage ``export``: a sealed selection as training shards, with its weights, its scores and its lineage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from jobs import shards, trainset
from jobs.images import Format
from jobs.progress import bar, say
from jobs.run import Run
from jobs.shards import SCORE, File
from jobs.stage import complete, units
from schemas.errors import WinnowError
from schemas.ids import digest
from schemas.settings import Settings
from schemas.tables import TABLES
from storage.commit import commit_folder
from storage.content import sha256_of
from storage.places import parts_of
from storage.snapshot import latest, refuse_second


class Export(Settings):
    """``accumulate``: train on the selections of all rounds so far, not on this one alone (arXiv 2404.01413).
    ``reference_share``: samples of D_0 (real images, where reference.source has them) for each selected one, of weight
    1. ``rows``: rows a shard.

    ``formats``: each is a folder of its own, and one can be added later. ``encode``: image files are written anew in
    this format (null: copied as stored). ``unweighted`` serves trainers that know no weights: "repeats" writes a second
    folder a format, with each row as often as its weight says and weight 1; "sampling" adds a list of keys drawn by
    weight, one a line. ``total``: rows then written or keys drawn (null: as many as there are rows)."""

    formats: tuple[Literal["parquet", "webdataset"], ...] = Field(("parquet",), min_length=1)
    accumulate: bool = False
    reference_share: float = Field(0.0, ge=0, le=1e6)
    rows: int = Field(1000, ge=1)
    encode: Format | None = None
    unweighted: Literal["repeats", "sampling"] | None = None
    total: int | None = Field(None, ge=1, le=10**9)

    @model_validator(mode="after")
    def _together(self) -> Export:
        if self.total is not None and self.unweighted is None:
            raise WinnowError(f"export.total is {self.total}, which only export.unweighted uses; set both or neither")
        if len(set(self.formats)) < len(self.formats):
            raise WinnowError(f"export.formats is {', '.join(self.formats)}; name each format once")
        return self


def export(run: Run) -> list[Path]:
    """Write the round's training set in every format, each with its manifest. Returns the files.

    Raises WinnowError where the selection is not weighed, a weight is no number of 0 or more, an image cannot be read
    or copied, or a file of an earlier run is missing or cut short.
    """
    settings = run.recipe.export
    paths = parts_of(latest(run.store))
    rows = trainset.rows_of(run, paths)
    schema = shards.schema_of([name.removeprefix(SCORE) for name in rows[0].column_names if name.startswith(SCORE)])
    # What is in the rows stands for how they came; and each set of rows can be added to a finished round.
    content = [settings.rows, settings.encode, trainset.digest_of(rows)]
    more = [*content, settings.unweighted, settings.total, run.recipe.seed]
    found = []
    if settings.unweighted == "sampling":
        keys = trainset.drawn(run, rows)
        found += _keep(run, "sampling", "", more, len(keys), len(keys), partial(shards.write_keys, keys=keys))
    sets = [("", rows, content)]
    if settings.unweighted == "repeats":
        sets.append(("repeats", trainset.repeated(run, rows), more))
    for kind, some, spec in sets:
        total = sum(table.num_rows for table in some)
        for format in settings.formats:
            write = partial(_write, run, format, paths, some, schema)
            found += _keep(run, format, kind, spec, total, settings.rows, write)
    return found


def _write(
    run: Run, format: str, paths: Sequence[str], rows: Sequence[pa.Table], schema: pa.Schema, folder: Path
) -> list[File]:
    total = sum(table.num_rows for table in rows)
    label = f"export {format} {run.arm} round {run.round}"
    kinds: set[str] = set()
    if format == "webdataset":
        told = shards.told_in_tars(schema, rows[0].slice(0, 1))
        if left := ", ".join(name.removeprefix(SCORE) for name in schema.names if name not in told.names):
            say(f"{label}: without scores of {left}, which the first row has none of; the Parquet shards have them")
        schema = told
    with bar(label, total) as advance:

        def counted() -> Iterator[pa.Table]:
            for table in trainset.tables(run, paths, rows, schema):
                if format == "webdataset":
                    kinds.update(shards.kinds(table))
                yield table
                advance(table.num_rows)

        files = shards.write(folder, format, schema, counted(), run.recipe.export.rows)
    if len(kinds) > 1:
        say(
            f"{label}: its images are {', '.join(sorted(kinds))}; `webdataset` reads them so, `datasets` one kind "
            "alone, for which set export.encode"
        )
    return files


def _keep(
    run: Run, form: str, kind: str, content: list[Any], total: int, rows: int, write: Callable[[Path], list[File]]
) -> list[Path]:
    """Commit the files of one format, ``rows`` of its ``total`` rows in each, and seal their manifest. ``kind``: of
    rows, "" for those with weights, whose folders no pattern of theirs is to take for these."""
    format = f"{form}-{kind}" if kind else form
    lead = f"{run.arm}-r{run.round}-{f'{kind}-' if kind else ''}{form}"
    name = f"shards/{lead}-{digest(['export', format, content], 12)}"
    one = pa.table({"sample_id": pa.array([run.seed(name)])})
    work = units("shards", {"round": run.round, "selection": run.arm, "format": format}, one, 1, name)
    refuse_second(run.store, latest(run.store), {unit.path for unit in work})  # before anything is written
    _refuse_unlisted(run.store, f"shards/{lead}-", name)
    listed = "SELECT path, bytes, sha256 FROM shards WHERE starts_with(path, $folder) ORDER BY path"
    made: list[File] = []

    def draft(folder: Path) -> None:
        made.extend(write(folder))
        if not (run.store / work[0].path).exists():  # no manifest yet, or one that is lost, too
            return
        came = {f"{name}/{file.name}": file.sha256 for file in made}
        for row in run.query(listed, folder=f"{name}/").to_pylist():
            if came.get(row["path"]) != row["sha256"]:
                raise WinnowError(
                    f"{row['path']}: was sealed and is lost, and comes out otherwise now (another library, or a scorer "
                    "that was added since); restore its folder from a copy, or take another STORE="
                )

    # Before the manifest is looked for: shards that were lost are written again, the same to the byte.
    folder = commit_folder(run.store, name, draft, synced=True)

    def manifest(_: pa.Table) -> pa.Table:
        # A run that was killed between the two leaves the folder without its manifest.
        files = made or [_read(path, rows, total) for path in sorted(folder.iterdir())]
        entries = [
            {"selection": run.arm, "round": run.round, "format": format, "path": f"{name}/{file.name}",
             "rows": file.rows, "bytes": file.bytes, "sha256": file.sha256}
            for file in files
        ]  # fmt: skip
        return pa.Table.from_pylist(entries, schema=TABLES["shards"].schema)

    complete(run, "export", "shards", work, lambda: manifest)
    sealed = run.query(listed, folder=f"{name}/")
    return [_sound(run.store, row["path"], row["bytes"]) for row in sealed.to_pylist()]


def _refuse_unlisted(store: Path, lead: str, name: str) -> None:
    """Folders whose names go on from ``lead`` and that no manifest lists: a pattern would load them with ``name``."""
    for folder in sorted((store / lead).parent.iterdir()):
        other = folder.relative_to(store).as_posix()
        if other != name and len(other) == len(name) and other.startswith(lead):
            raise WinnowError(
                f"{other}: was exported with other settings and never sealed, by a run that was stopped or refused; "
                "a pattern would load it beside this one; remove it, and export again"
            )


def _read(path: Path, rows: int, total: int) -> File:
    """What a file of an earlier run is."""
    number = int(path.stem.rpartition("-")[2])
    return File(path.name, min(rows, total - number * rows), path.stat().st_size, sha256_of(path))


def _sound(store: Path, path: str, bytes: int) -> Path:
    """The file at ``path``; WinnowError where its size is not as sealed."""
    file = store / path
    if not file.exists():
        raise WinnowError(f"{path}: the shard is missing; remove its folder and run 'winnow export' again")
    size = file.stat().st_size
    if size != bytes:
        raise WinnowError(f"{path}: has {size} bytes, was {bytes}; remove its folder and run 'winnow export' again")
    return file


def shards_of(run: Run) -> list[tuple[Path, str]]:
    """Path and SHA-256 of the round's Parquet shards, as the sealed manifest lists them."""
    found = run.query(
        "SELECT path, sha256 FROM shards WHERE selection = $arm AND round = $round AND format = 'parquet' "
        "ORDER BY path",
        arm=run.arm, round=run.round,
    )  # fmt: skip
    if not found.num_rows:
        raise WinnowError(
            f"shards: round {run.round} of {run.arm!r} is not exported as Parquet; run 'winnow export' first, with "
            "parquet in export.formats"
        )
    return [(run.store / row["path"], row["sha256"]) for row in found.to_pylist()]
