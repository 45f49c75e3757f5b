"""Stage ``embed``: vectors of a round's samples in one or more spaces."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from jobs import samples
from jobs.encoders import Encoder, EncoderName, encoder
from jobs.images import images_of
from jobs.run import Run, ids
from jobs.stage import Work, complete, units
from schemas.errors import WinnowError
from schemas.settings import Settings
from schemas.tables import embedding_schema

LARGEST = int(np.finfo(np.float16).max)


class Embed(Settings):
    """``encoders``: the spaces that distances and diverse selection use; ``batch``: images at once."""

    encoders: tuple[EncoderName, ...] = ()
    batch: int = Field(64, ge=1)


def embed(run: Run, split: str = "train", encoders: tuple[str, ...] | None = None) -> bool:
    """Embed the samples of one split with the recipe's encoders, or those given; True when all is there."""
    settings = run.recipe.embed
    done = True
    for name in settings.encoders if encoders is None else encoders:
        loaded = encoder(name)
        for place, rows in samples.sets(run, split):
            folders = {"round": run.round, "arm": run.arm, "split": split, "encoder": name} | place
            work = units("embeddings", folders, rows, settings.batch, ["embed", name, loaded.revision])
            done &= complete(run, f"embed {name}", "embeddings", work, partial(_work, run, name, loaded))
    return done


def _work(run: Run, name: str, loaded: Encoder) -> Work:
    def work(rows: pa.Table) -> pa.Table:
        vectors = loaded.encode(images_of(samples.with_images(run, rows)), rows["prompt"].to_pylist())
        n, dim = vectors.shape
        beyond = np.isfinite(vectors) & (np.abs(vectors) > LARGEST)
        if beyond.any():
            given = vectors[beyond][0]
            raise WinnowError(f"encoder {name}: gave {given:.6g}; the store keeps float16, up to {LARGEST}: scale it")
        flat = pa.array(vectors.astype(np.float16).reshape(-1))
        columns = {
            "sample_id": rows["sample_id"].combine_chunks(),
            "round": pa.array(np.full(n, run.round, np.int32)),
            "encoder": pa.array([name] * n),
            "revision": pa.array([loaded.revision] * n),
            "vector": pa.FixedSizeListArray.from_arrays(flat, dim),
        }
        return pa.table(columns, schema=embedding_schema(dim))

    return work


def embedded(run: Run, encoder: str, split: str) -> np.ndarray:
    """Sample ids int64 [N] of a split in the order of ``samples.of``; WinnowError where not all are embedded."""
    numbers = ids(run.here(f"SELECT sample_id {_JOINED} ORDER BY prompt_id, sample_id", **_where(run, encoder, split)))
    if not len(numbers):
        raise WinnowError(
            f"embeddings: round {run.round} of arm {run.arm!r} has no {split} vectors of {encoder!r}; add it to "
            "embed.encoders and run 'winnow embed'"
        )
    expected = samples.of(run, split).num_rows
    if len(numbers) != expected:
        raise WinnowError(
            f"embeddings: {len(numbers)} of {expected} {split} samples of round {run.round} are embedded by "
            f"{encoder!r}; run 'winnow embed' first"
        )
    return numbers


def vectors_of(run: Run, encoder: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Sample ids int64 [N] and vectors float32 [N, D] of a split, in the order of ``samples.of``."""
    numbers = embedded(run, encoder, split)
    # Sorting rows with their vectors would need them all in memory twice: each goes to its place as it comes.
    order = np.argsort(numbers)
    vectors = np.empty((0, 0), np.float32)
    for batch in run.stream_here(f"SELECT sample_id, vector {_JOINED}", **_where(run, encoder, split)):
        if not len(vectors):
            vectors = np.empty((len(numbers), len(batch["vector"][0])), np.float32)
        some = matrix(batch["vector"], vectors.shape[1], f"{split} vectors of {encoder!r} in round {run.round}")
        vectors[order[np.searchsorted(numbers, ids(batch), sorter=order)]] = some
    return numbers, vectors


def matrix(vectors: pa.Array, columns: int, named: str) -> np.ndarray:
    """Stored vectors as float32 [N, columns]; WinnowError where one is longer or shorter."""
    if others := set(pc.unique(pc.list_value_length(vectors)).to_pylist()) - {columns}:
        raise WinnowError(
            f"embeddings: {named} have {columns} and {min(others)} numbers; embed in a new store by one revision of it"
        )
    return vectors.flatten().to_numpy(zero_copy_only=False).reshape(-1, columns)


_JOINED = (
    "FROM embeddings JOIN samples USING (sample_id) WHERE encoder = $encoder AND samples.round = $round "
    "AND arm = $arm AND split = $split"
)


def _where(run: Run, encoder: str, split: str) -> dict[str, Any]:
    return {"encoder": encoder, "round": run.round, "arm": run.arm, "split": split}
