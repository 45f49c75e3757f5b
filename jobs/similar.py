"""``winnow similar`` and ``winnow search``: the samples of a store that are most like one of them, or like a text.

A question is answered by one pass over the vectors of an encoder, a batch at a time: that is exact, its memory stays
flat, and an index would have to read as much before it could answer its first question.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from curate.closest import Closest
from jobs.embed import matrix
from jobs.encoders import READERS, encoder
from jobs.sealed import sample_row
from schemas.errors import WinnowError
from storage.layout import check
from storage.query import arrow, stream


def similar(store: Path, sample: int, space: str | None = None, k: int = 10) -> pa.Table:
    """The k samples that are most like one by the cosine in ``space`` (null: the only one that it is embedded in)."""
    sql = "SELECT encoder, revision, vector FROM embeddings WHERE sample_id = $id AND encoder = coalesce($e, encoder)"
    found = arrow(check(store), sql, {"id": sample, "e": space})
    if not found.num_rows:
        sample_row(store, sample)  # says so where there is none
        raise WinnowError(
            f"sample {sample} has no vector{f' in {space!r}' if space else ''}: add an encoder to embed.encoders and "
            "run 'winnow embed', or name another by --space"
        )
    if found.num_rows > 1:
        raise WinnowError(
            f"sample {sample} is embedded in {', '.join(found['encoder'].to_pylist())}: choose one by --space"
        )
    [one] = found.to_pylist()
    return _closest(store, one["encoder"], one["revision"], np.array(one["vector"]), k, sample)


def search(store: Path, text: str, space: str | None = None, k: int = 10) -> pa.Table:
    """The k samples whose vectors are most like a text's, in a ``space`` of images and texts (null: the only one of
    those that the store has)."""
    spaces = arrow(check(store), "SELECT DISTINCT encoder FROM embeddings ORDER BY encoder")["encoder"].to_pylist()
    able = [name for name in spaces if name.partition(":")[0] in READERS] if space is None else [space]
    if len(able) != 1:
        what = f"can be searched in {', '.join(able)}: choose one by --space" if able else (
            f"has vectors of {', '.join(spaces) or 'no encoder'}, which read no text: add an open_clip, clip or siglip "
            "encoder to embed.encoders and run 'winnow embed', or name one of your own by --space"
        )  # fmt: skip
        raise WinnowError(f"{store}: {what}")
    loaded = encoder(able[0])
    read = loaded.texts
    if read is None:
        raise WinnowError(f"encoder {able[0]!r} reads no text; take an open_clip, clip or siglip one")
    if not text.strip():
        raise WinnowError("search: the text is empty; say what to look for")
    return _closest(store, able[0], loaded.revision, read([text])[0], k, None)


def _closest(store: Path, space: str, revision: str, query: np.ndarray, k: int, without: int | None) -> pa.Table:
    """sample_id, similarity, round, arm, split, prompt of the k nearest, the most similar first, by vectors that the
    same encoder made, of this revision: those of another are no neighbours."""
    best = Closest(query, k)
    for batch in stream(store, "SELECT sample_id, vector FROM embeddings WHERE encoder = $e AND revision = $r "
                        "AND sample_id <> $not",
                        {"e": space, "r": revision, "not": -1 if without is None else without}):  # fmt: skip
        best.add(batch["sample_id"].to_numpy(), matrix(batch["vector"], len(query), f"vectors of {space!r} in {store}"))
    numbers, likeness = best.found()
    if not len(numbers):
        raise WinnowError(
            f"{store}: has no other vectors of {space!r} in its revision {revision}; run 'winnow embed' first, or go "
            "back to the encoder that made those that it has"
        )
    rows = arrow(
        store, "SELECT sample_id, round, arm, split, prompt FROM samples WHERE sample_id IN (SELECT unnest($ids))",
        {"ids": numbers.tolist()},
    )  # fmt: skip
    order = {number: i for i, number in enumerate(numbers.tolist())}
    rows = rows.take(np.argsort([order[number] for number in rows["sample_id"].to_pylist()]))
    return rows.add_column(1, "similarity", pa.array(likeness))
