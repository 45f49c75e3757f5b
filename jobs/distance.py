"""Stage ``distance``: how far a round's samples lie from D_0, the base model's own samples."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from curate import distance as far
from jobs import samples
from jobs.embed import vectors_of
from jobs.run import Run, ids
from jobs.stage import Work, complete, units
from schemas.errors import WinnowError
from schemas.settings import Settings
from schemas.tables import TABLES

REFERENCE = "d0"


class Distance(Settings):
    """``space``: an encoder of ``embed.encoders``; null computes nothing. ``kind``: mean over D_0 (the paper),
    knn, center or mahalanobis; ``k`` is for knn alone."""

    space: str | None = None
    kind: Literal["mean", "knn", "center", "mahalanobis"] = "mean"
    metric: Literal["l2", "mse", "cosine"] = "l2"
    k: int = Field(10, ge=1)

    @property
    def name(self) -> str:
        """What the ``metric`` column says, such as "mean-l2" or "knn10-l2"."""
        if self.kind == "mahalanobis":
            return self.kind
        return f"{self.kind}{self.k if self.kind == 'knn' else ''}-{self.metric}"


def distance(run: Run, split: str = "train") -> None:
    """Distances of a split to D_0; those of D_0 itself (split "reference") leave each row out."""
    settings = run.recipe.distance
    if settings.space is None:
        return
    vectors_of(run, settings.space, split)  # all are embedded, or it says which encoder is to be run
    d0 = vectors_of(run.base(), settings.space, "reference")[0]
    spec = ["distance", settings.model_dump(mode="json"), sorted(d0.tolist())]
    for place, rows in samples.sets(run, split):
        rows = rows.select(["sample_id"])
        folders = {"round": run.round, "arm": run.arm, "split": split, "space": settings.space} | place
        work = units("distances", folders, rows, len(rows), spec)
        complete(run, "distance", "distances", work, lambda: _work(run, split, settings))


def _work(run: Run, split: str, settings: Distance) -> Work:
    def work(rows: pa.Table) -> pa.Table:
        assert settings.space is not None
        _, reference = vectors_of(run.base(), settings.space, "reference")
        if split == "reference":
            values = far.self_distance(reference, settings.kind, settings.metric, settings.k)
        else:
            numbers, x = vectors_of(run, settings.space, split)
            values = far.distance(x[np.isin(numbers, ids(rows))], reference, settings.kind, settings.metric, settings.k)
        n = rows.num_rows
        columns = {
            "sample_id": rows["sample_id"],
            "round": pa.array(np.full(n, run.round, np.int32)),
            "space": pa.array([settings.space] * n),
            "metric": pa.array([settings.name] * n),
            "reference": pa.array([REFERENCE] * n),
            "value": pa.array(values),
        }
        return pa.table(columns, schema=TABLES["distances"].schema)

    return work


def distances_of(run: Run, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Sample ids [N] and distances to D_0 [N] of a split by the recipe's metric."""
    settings = run.recipe.distance
    found = run.query(
        "SELECT sample_id, value FROM distances JOIN samples USING (sample_id) WHERE samples.round = $round "
        "AND arm = $arm AND split = $split AND space = $space AND metric = $metric ORDER BY prompt_id, sample_id",
        round=run.round, arm=run.arm, split=split, space=settings.space, metric=settings.name,
    )  # fmt: skip
    if not found.num_rows:
        raise WinnowError(
            f"distances: round {run.round} of arm {run.arm!r} has no {split} distances {settings.name!r} in "
            f"{settings.space!r}; run 'winnow distance' first"
        )
    return found["sample_id"].to_numpy(), found["value"].to_numpy()
