"""A run: what every stage is told about where and in which round it works."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from jobs.digest import digest
from schemas.errors import WinnowError
from schemas.ids import sample_id
from storage.query import arrow, stream
from storage.snapshot import latest

if TYPE_CHECKING:
    from jobs.recipe import Recipe

BASE = "base"  # the arm of what the base model made for everybody: D_0 and its own evaluation


@dataclass(frozen=True)
class Run:
    """One arm of one round in one store. Round 0 is the base; round r trains model r from model r - 1.

    ``recipe`` holds the settings of this arm. ``shard`` of ``n_shards``: the share of each stage's units that
    this process does.
    """

    store: Path
    recipe: Recipe
    round: int = 1
    arm: str = "curated"
    shard: int = 0
    n_shards: int = 1

    def at(self, round: int) -> Run:
        return replace(self, round=round)

    def base(self) -> Run:
        """Where the base model's own samples live."""
        return replace(self, round=0, arm=BASE)

    def query(self, sql: str, **params: Any) -> pa.Table:
        """Rows of the newest snapshot; ``$name`` in the SQL takes the parameter of that name."""
        return arrow(self.store, sql, params or None)

    def stream(self, sql: str, **params: Any) -> Iterator[pa.RecordBatch]:
        """As ``query``, a batch at a time and in no order."""
        return stream(self.store, sql, params or None)

    def here(self, sql: str, **params: Any) -> pa.Table:
        """As ``query``, where nothing but rows of this round is asked for: the parts of others are not even opened."""
        return arrow(self.store, sql, params or None, latest(self.store).of_round(self.round))

    def stream_here(self, sql: str, **params: Any) -> Iterator[pa.RecordBatch]:
        """As ``stream``, over the parts of this round alone."""
        return stream(self.store, sql, params or None, latest(self.store).of_round(self.round))

    def seed(self, *what: Any) -> int:
        """A 63-bit seed for one purpose, from the recipe's seed."""
        return sample_id(["seed", self.recipe.seed, *what])

    def start_model(self) -> str:
        """The model that this round starts from: the base's, what the round before made, or, where that one was
        rolled back, the best round's."""
        if self.round <= 1:
            return self.recipe.model
        sql = (
            "SELECT kept.model FROM rounds AS newest JOIN rounds AS kept ON kept.arm = newest.arm AND kept.round = "
            "CASE WHEN newest.verdict = 'rollback' THEN newest.best_round ELSE newest.round END "
            "WHERE newest.round = $round AND newest.arm = $arm"
        )
        rows = self.query(sql, round=self.round - 1, arm=self.arm)
        if not rows.num_rows:
            raise WinnowError(
                f"round {self.round} of arm {self.arm!r} starts from round {self.round - 1}, which has no verdict "
                f"yet; run 'winnow round --round {self.round - 1}' first"
            )
        model = rows["model"][0].as_py()
        inside = model.startswith("models/") and (self.sealed_model(model) or (self.store / model).exists())
        return str(self.store / model) if inside else model

    def sealed_model(self, name: str) -> bool:
        """Whether a model was trained and sealed in this store as ``name``; WinnowError where it was, and its folder is
        gone or not as it was then."""
        sealed = self.query("SELECT revision FROM models WHERE model = $name", name=name)["revision"].to_pylist()
        folder = self.store / name
        if sealed and not (folder.exists() and digest(folder) in sealed):
            wrong = "is not as it was trained" if folder.exists() else "is not here"
            raise WinnowError(f"{name}: {wrong}; restore it from a copy, or remove it and run 'winnow train' again")
        return bool(sealed)


def ids(table: pa.Table | pa.RecordBatch) -> np.ndarray:
    """The sample ids of a table, int64 [N]."""
    return table["sample_id"].to_numpy()
