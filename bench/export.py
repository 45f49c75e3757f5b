"""Exports: what the stage takes beside writing the same bytes, and beside the usual writers of such files.

Ours is the whole stage: rows placed by DuckDB, images read from the store's parts, the SHA-256 and one fsync of each
file, the manifest and its seal. The raw write has its images in memory; the two libraries take theirs from the store's
parts too, as `datasets` maps them. None of the three hashes anything, and each flushes once, at the end. All write to
one disk, that of TMPDIR, and what they read is in the page cache.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench.ratio import Ratio, compare
from bench.selection import random_file, selection
from jobs import recipe as recipes
from jobs.export import export
from jobs.recipe import Recipe
from jobs.run import Run
from storage.durable import sync

ROWS, SIZE = 4000, 2**19
TURNS = 5
THEIRS = "theirs"


def run() -> list[Ratio]:
    """Parquet and tars, each against raw writing and against another library's writer."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arms = tuple(f"turn-{i}" for i in range(4 * (TURNS + 1)))  # each once: nothing of it is there yet
        made = selection(folder, ROWS, random_file(SIZE), export={"rows": ROWS // 4}, arms=arms)
        rows, image = _rows(made, folder), random_file(SIZE)(0)
        turns, what, found = iter(arms), f"{ROWS} images of {SIZE // 1024} KiB", []

        def raw(path: Path) -> None:
            with open(path, "wb") as file:
                for _ in range(ROWS):
                    file.write(image)

        for format, name, other in (("parquet", "Dataset.to_parquet", rows.to_parquet),
                                    ("webdataset", "TarWriter", partial(_tar, rows))):  # fmt: skip
            recipe = recipes.override(made.recipe, [(["export", "formats"], [format])])

            def ours(recipe: Recipe = recipe) -> None:
                export(Run(made.store, recipe, 1, next(turns)))

            def before() -> None:
                shutil.rmtree(made.store / "shards", ignore_errors=True)
                (folder / THEIRS).unlink(missing_ok=True)
                os.sync()

            for write, against in ((raw, "raw write"), (other, name)):
                theirs = partial(_flushed, write, folder / THEIRS)
                found.append(compare(f"export to {format}, ours / {against}", what, ours, theirs, TURNS, before))
        return found


def _flushed(write: Callable[[Path], object], path: Path) -> None:
    write(path)
    sync(path)


def _rows(made: Run, folder: Path) -> Any:
    """The stored samples as a dataset of `datasets`, mapped from its own file."""
    from datasets import Image, load_dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    files = str(made.store / "tables" / "samples" / "**" / "*.parquet")
    found = load_dataset("parquet", data_files=files, split="train", cache_dir=str(folder / "cache"))
    return found.cast_column("image", Image(decode=False))


def _tar(rows: Any, path: Path) -> None:
    import webdataset

    with webdataset.TarWriter(str(path)) as tar:
        for row in rows:
            tar.write(
                {"__key__": str(row["sample_id"]), "png": row["image"]["bytes"], "txt": row["prompt"],
                 "json": {"sample_id": row["sample_id"], "weight": 1.0}}
            )  # fmt: skip
