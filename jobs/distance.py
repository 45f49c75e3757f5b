"""Stage ``distance``: how far a round's samples lie from D_0, the base model's own samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from curate import distance as far
from jobs import samples
from jobs.embed import embedded, vectors_of
from jobs.progress import say
from jobs.run import Run, ids
from jobs.stage import Work, complete, units
from schemas.errors import WinnowError, about
from schemas.settings import Settings
from schemas.tables import TABLES
from storage.snapshot import latest

REFERENCE = "d0"
EXACT = 20_000  # rows of D_0 up to which searching all of them takes less than building an index
COPIED = 2**30  # bytes of D_0 in float32 beyond which an index that holds them is asked for by name


class Distance(Settings):
    """``space``: an encoder of ``embed.encoders``; null computes nothing. ``kind``: mean over D_0 (the paper),
    knn, center or mahalanobis; ``k`` and ``index`` are for knn alone. ``match``: the whole of D_0, or of each sample's
    own prompt. ``index``: auto is ivf for more than 20,000 images of D_0 whose copy in it takes 1 GiB or less, else
    exact; D_0's own distances are found in the same way."""

    space: str | None = None
    kind: Literal["mean", "knn", "center", "mahalanobis"] = "mean"
    metric: Literal["l2", "mse", "cosine"] = "l2"
    k: int = Field(10, ge=1)
    match: Literal["whole", "prompt"] = "whole"
    index: Literal["auto", "exact", "ivf", "ivfpq", "hnsw"] = "auto"

    @property
    def name(self) -> str:
        """What the ``metric`` column says, such as "mean-l2" or "knn10-l2"."""
        if self.kind == "mahalanobis":
            return self.kind
        return f"{self.kind}{self.k if self.kind == 'knn' else ''}-{self.metric}"

    @property
    def reference(self) -> str:
        """What the ``reference`` column says: the whole of D_0, or its images of the same prompt."""
        return REFERENCE if self.match == "whole" else f"{REFERENCE}-prompt"


def distance(run: Run, split: str = "train") -> None:
    """Distances of a split to D_0; those of D_0 itself (split "reference") leave each row out."""
    settings = run.recipe.distance
    if settings.space is None:
        return
    d0 = embedded(run.base(), settings.space, "reference")
    spec = ["distance", settings.model_dump(mode="json"), sorted(d0.tolist())]
    for place, rows in samples.sets(run, split):
        rows = rows.select(["sample_id"])
        folders = {"round": run.round, "arm": run.arm, "split": split, "space": settings.space} | place
        work = units("distances", folders, rows, len(rows), spec)
        complete(run, "distance", "distances", work, lambda: _work(run, split, settings))


def _work(run: Run, split: str, settings: Distance) -> Work:
    def work(rows: pa.Table) -> pa.Table:
        named = f"{settings.reference}, {settings.name} in {settings.space!r}"
        with about(f"distance of round {run.round} of {run.arm!r} to {named}"):
            values = _own(run, settings) if split == "reference" else _far(run, split, settings, ids(rows))
        n = rows.num_rows
        columns = {
            "sample_id": rows["sample_id"],
            "round": pa.array(np.full(n, run.round, np.int32)),
            "space": pa.array([settings.space] * n),
            "metric": pa.array([settings.name] * n),
            "reference": pa.array([settings.reference] * n),
            "value": pa.array(values),
        }
        return pa.table(columns, schema=TABLES["distances"].schema)

    return work


def _own(run: Run, settings: Distance) -> np.ndarray:
    """Distances of D_0 to itself [M]."""
    d0 = _d0(run, settings)
    if settings.match == "prompt":
        prompts = samples.of(run, "reference")["prompt_id"].to_numpy()
        return far.self_matched(d0.vectors, prompts, settings.kind, settings.metric, settings.k)
    if d0.ready is None:
        return far.self_distance(d0.vectors, settings.kind, settings.metric, settings.k)
    values, recall = far.self_by_index(d0.ready, settings.k, settings.metric)
    _tell("of D_0 to itself", recall, settings)
    return values


def _far(run: Run, split: str, settings: Distance, wanted: np.ndarray) -> np.ndarray:
    """Distances to D_0 of these samples of a split [N]."""
    numbers, x = vectors_of(run, str(settings.space), split)
    some = np.isin(numbers, wanted)
    x = x if some.all() else x[some]
    d0 = _d0(run.base(), settings)
    if settings.match == "prompt":
        mine, theirs = (samples.of(*of)["prompt_id"].to_numpy() for of in ((run, split), (run.base(), "reference")))
        return far.matched(x, mine[some], d0.vectors, theirs, settings.kind, settings.metric, settings.k)
    if d0.ready is None:
        return far.distance(x, d0.vectors, settings.kind, settings.metric, settings.k)
    values, recall = far.knn_by_index(x, d0.ready, settings.k, settings.metric)
    _tell(f"{run.arm} round {run.round}", recall, settings)
    return values


def _tell(what: str, recall: float, settings: Distance) -> None:
    say(f"distance {what}: the index finds {recall:.1%} of the {settings.k} nearest of D_0")


@dataclass(frozen=True)
class D0:
    """D_0's vectors [M, D], and the index over them where the settings want one."""

    vectors: np.ndarray
    ready: far.Reference | None


_kept: dict[tuple[str, ...], D0] = {}  # the newest alone: all rounds of a loop measure against one D_0


def _d0(base: Run, settings: Distance) -> D0:
    parts = (part for part in latest(base.store).of_round(base.round).parts if part.table == "embeddings")
    held = (part.sha256 for part in parts if "/split-reference/" in part.path)
    key = str(base.store), settings.model_dump_json(), *held
    if key not in _kept:
        _kept.clear()
        _, vectors = vectors_of(base, str(settings.space), "reference")
        index = _best_index(vectors) if settings.index == "auto" else settings.index
        whole = settings.kind == "knn" and settings.match == "whole" and index != "exact"
        _kept[key] = D0(vectors, far.indexed(vectors, settings.metric, index) if whole else None)
    return _kept[key]


def _best_index(d0: np.ndarray) -> str:
    if len(d0) <= EXACT:
        return "exact"
    if 4 * d0.size <= COPIED:
        return "ivf"
    held = 4 * d0.size / 2**30
    say(f"distance: an index would hold {held:.1f} GiB, so all pairs are compared; distance.index: ivf asks for it")
    return "exact"


def distances_of(run: Run, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Sample ids [N] and distances to D_0 [N] of a split by the recipe's metric."""
    settings = run.recipe.distance
    found = run.here(
        "SELECT sample_id, value FROM distances JOIN samples USING (sample_id) WHERE samples.round = $round "
        "AND arm = $arm AND split = $split AND space = $space AND metric = $metric AND reference = $reference "
        "ORDER BY prompt_id, sample_id",
        round=run.round, arm=run.arm, split=split, space=settings.space, metric=settings.name,
        reference=settings.reference,
    )  # fmt: skip
    if not found.num_rows:
        raise WinnowError(
            f"distances: round {run.round} of arm {run.arm!r} has no {split} distances {settings.name!r} in "
            f"{settings.space!r}; run 'winnow distance' first"
        )
    if found.num_rows != (expected := samples.of(run, split).num_rows):
        raise WinnowError(
            f"distances: {found.num_rows} of {expected} {split} samples of round {run.round} have distances "
            f"{settings.name!r} in {settings.space!r}; run 'winnow distance' first"
        )
    return found["sample_id"].to_numpy(), found["value"].to_numpy()
