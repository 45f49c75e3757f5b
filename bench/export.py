"""Exports: what the stage takes beside writing the same bytes, and beside the usual writers of such files.

Ours is the whole stage: rows placed by DuckDB, images read from the store's parts, the SHA-256 and one fsync of each
file, the manifest and its seal. The others have their images in memory (datasets: in its memory-mapped file), hash
nothing, and flush once at the end. All write to one disk, that of TMPDIR; what they read is in memory already.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from bench.ratio import Ratio, compare
from bench.selection import random_file, selection
from jobs import recipe as recipes
from jobs.export import export
from jobs.recipe import Recipe
from jobs.run import Run
from storage.durable import sync

ROWS, SIZE = 1000, 2**19
TURNS = 5
THEIRS = "theirs"


def run() -> list[Ratio]:
    """Parquet and tars, each against raw writing and against another library's writer."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arms = tuple(f"turn-{i}" for i in range(4 * (TURNS + 1)))  # each once: nothing of it is there yet
        made = selection(folder, ROWS, random_file(SIZE), export={"rows": ROWS // 2}, arms=arms)
        rows = [row for part in sorted((made.store / "tables" / "samples").rglob("*.parquet"))
                for row in pq.read_table(part, columns=["sample_id", "prompt", "image"]).to_pylist()]  # fmt: skip
        turns, what, found = iter(arms), f"{ROWS} images of {SIZE // 1024} KiB", []
        for format, name, other in (("parquet", "Dataset.to_parquet", _datasets(made, folder)),
                                    ("webdataset", "TarWriter", _tars(rows, folder))):  # fmt: skip
            recipe = recipes.override(made.recipe, [(["export", "formats"], [format])])

            def ours(recipe: Recipe = recipe) -> None:
                export(Run(made.store, recipe, 1, next(turns)))

            def before() -> None:
                shutil.rmtree(made.store / "shards", ignore_errors=True)
                (folder / THEIRS).unlink(missing_ok=True)
                os.sync()

            for theirs, against in ((_raw(rows, folder), "raw write"), (other, name)):
                found.append(compare(f"export to {format}, ours / {against}", what, ours, theirs, TURNS, before))
        return found


def _writer(folder: Path, write: Callable[[Path], object]) -> Callable[[], None]:
    """Write a file, and flush it."""

    def theirs() -> None:
        write(folder / THEIRS)
        sync(folder / THEIRS)

    return theirs


def _raw(rows: list[dict[str, Any]], folder: Path) -> Callable[[], None]:
    def write(path: Path) -> None:
        with open(path, "wb") as file:
            for row in rows:
                file.write(row["image"]["bytes"])

    return _writer(folder, write)


def _datasets(made: Run, folder: Path) -> Callable[[], None]:
    from datasets import load_dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    files = str(made.store / "tables" / "samples" / "**" / "*.parquet")
    found = load_dataset("parquet", data_files=files, split="train", cache_dir=str(folder / "cache"))
    return _writer(folder, found.to_parquet)


def _tars(rows: list[dict[str, Any]], folder: Path) -> Callable[[], None]:
    import webdataset

    def write(path: Path) -> None:
        with webdataset.TarWriter(str(path)) as tar:
            for row in rows:
                tar.write(
                    {"__key__": str(row["sample_id"]), "png": row["image"]["bytes"], "txt": row["prompt"],
                     "json": {"sample_id": row["sample_id"], "weight": 1.0}}
                )  # fmt: skip

    return _writer(folder, write)
