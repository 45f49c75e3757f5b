"""Stage ``export``: a sealed selection as training shards, Hugging Face Parquet with image, text and weight."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from jobs import samples
from jobs.run import Run
from jobs.stage import complete, units
from schemas.errors import WinnowError
from schemas.ids import digest
from schemas.settings import Settings
from schemas.tables import IMAGE, TABLES, with_features
from storage.commit import commit_folder

SCHEMA = with_features(
    pa.schema(
        {
            "image": IMAGE,
            "text": pa.string(),
            "weight": pa.float64(),
            "sample_id": pa.int64(),
            "prompt_id": pa.int64(),
            "round": pa.int32(),
        }
    )
)


GROUP = 100  # rows: what a reader must hold to show one


class Export(Settings):
    """``accumulate``: train on the selections of all rounds so far, not on this one alone (arXiv 2404.01413).
    ``reference_share``: samples of D_0 for each selected one, of weight 1. ``rows``: rows a shard."""

    accumulate: bool = False
    reference_share: float = Field(0.0, ge=0)
    rows: int = Field(1000, ge=1)


def rows_of(run: Run) -> pa.Table:
    """sample_id, prompt_id, prompt, round and weight of every training row, in a fixed order."""
    settings = run.recipe.export
    first = 1 if settings.accumulate else run.round
    chosen = run.query(
        "SELECT sample_id, prompt_id, prompt, selections.round AS round, weight FROM selections "
        "JOIN samples USING (sample_id) WHERE kept AND selection = $arm AND selections.round BETWEEN $first AND $last "
        "ORDER BY selections.round, sample_id",
        arm=run.arm, first=first, last=run.round,
    )  # fmt: skip
    if run.round not in chosen["round"].to_pylist() or chosen["weight"].null_count:
        raise WinnowError(f"round {run.round} of {run.arm!r} is not selected and weighed; run 'winnow weigh' first")
    extra = round(settings.reference_share * chosen.num_rows)
    if not extra:
        return chosen
    d0 = samples.of(run.base(), "reference")
    some = np.random.default_rng(run.seed("reference", run.round)).permutation(d0.num_rows)[:extra]
    d0 = d0.take(np.sort(some))
    d0 = d0.append_column("round", pa.array(np.zeros(len(d0), np.int32)))
    d0 = d0.append_column("weight", pa.array(np.ones(len(d0))))
    return pa.concat_tables([chosen, d0.select(chosen.column_names).cast(chosen.schema)])


def export(run: Run) -> None:
    """Write the shards of this round's training set and their manifest."""
    settings = run.recipe.export
    rows = rows_of(run)
    content = [rows[name].to_pylist() for name in ("sample_id", "weight")]
    name = f"{run.arm}-r{run.round}-{digest(['export', settings.model_dump(mode='json'), content], 12)}"
    folder = run.store / "shards" / name

    def write(draft: Path) -> None:
        for number, start in enumerate(range(0, rows.num_rows, settings.rows)):
            some = samples.with_images(run, rows.slice(start, settings.rows))
            shard = some.rename_columns({"prompt": "text"}).select(SCHEMA.names).cast(SCHEMA)
            # Images are compressed already: plain pages, copied as they are stored.
            path = draft / f"train-{number:05d}.parquet"
            with pq.ParquetWriter(path, SCHEMA, compression="none", use_dictionary=False) as writer:
                for first in range(0, shard.num_rows, GROUP):
                    writer.write_table(shard.slice(first, GROUP).combine_chunks())

    # Before the manifest is looked for: shards that were lost are written again, the same to the byte.
    commit_folder(run.store, f"shards/{name}", write)

    def manifest(_: pa.Table) -> pa.Table:
        made = []
        for path in sorted(folder.glob("*.parquet")):
            with open(path, "rb") as file:
                sha = hashlib.file_digest(file, "sha256").hexdigest()
            made.append(
                {"selection": run.arm, "round": run.round, "path": path.relative_to(run.store).as_posix(),
                 "rows": pq.read_metadata(path).num_rows, "bytes": path.stat().st_size, "sha256": sha}
            )  # fmt: skip
        return pa.Table.from_pylist(made, schema=TABLES["shards"].schema)

    one = pa.table({"sample_id": pa.array([run.seed(name)])})
    work = units("shards", {"round": run.round, "selection": run.arm}, one, 1, name)
    complete(run, "export", "shards", work, lambda: manifest)


def shards_of(run: Run) -> list[tuple[Path, str]]:
    """Path and SHA-256 of the round's shards, as the sealed manifest lists them."""
    found = run.query(
        "SELECT path, sha256 FROM shards WHERE selection = $arm AND round = $round ORDER BY path",
        arm=run.arm, round=run.round,
    )  # fmt: skip
    if not found.num_rows:
        raise WinnowError(f"shards: round {run.round} of {run.arm!r} is not exported; run 'winnow export' first")
    return [(run.store / row["path"], row["sha256"]) for row in found.to_pylist()]
