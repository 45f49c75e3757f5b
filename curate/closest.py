"""The rows nearest to one query, out of batches that come one after the other."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from curate.arrays import Float64s, Ints, matrix, vector
from schemas.errors import WinnowError


class Closest:
    """The k rows of the highest cosine similarity to query [D] so far; equal ones by their ids."""

    def __init__(self, query: ArrayLike, k: int) -> None:
        query = vector("query", query)
        length = np.linalg.norm(query)
        if not length > 0:
            raise WinnowError("the query is all zeros, so it has no direction: take another sample")
        if k < 1:
            raise WinnowError(f"k is {k}: ask for 1 or more")
        self.query, self.k = query / length, k
        self.ids, self.likeness = np.empty(0, np.int64), np.empty(0)

    def add(self, ids: ArrayLike, rows: ArrayLike) -> None:
        """Take another batch: ids [n], rows [n, D]. A row of all zeros has similarity 0."""
        x = matrix("vectors", rows, columns=len(self.query)).astype(np.float64)
        lengths = np.linalg.norm(x, axis=1)
        # One row after the other: a product of matrices rounds by the size of the batch, and equal rows would differ.
        likeness = np.divide(np.vecdot(x, self.query), lengths, out=np.zeros(len(x)), where=lengths > 0)
        self.ids = np.concatenate([self.ids, np.asarray(ids, np.int64)])
        self.likeness = np.concatenate([self.likeness, likeness])
        best = np.lexsort((self.ids, -self.likeness))[: self.k]
        self.ids, self.likeness = self.ids[best], self.likeness[best]

    def found(self) -> tuple[Ints, Float64s]:
        """Ids and similarities in [-1, 1], the most similar first."""
        return self.ids, self.likeness.clip(-1, 1)
