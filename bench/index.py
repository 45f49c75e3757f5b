"""Indexes over D_0: the 10 nearest through each, beside the exact search of the same rows.

D_0 and a round's samples as in ``bench.scale``: float16 rows that form clusters. An index is filled once for a D_0 and
then searched every round, so filling it is told in the words and not timed.
"""

from __future__ import annotations

import time
from functools import partial

import numpy as np

from bench.ratio import Ratio, compare
from bench.scale import D0, DIM, ROUND, K, clustered
from curate.distance import indexed, knn_by_index, knn_distance
from curate.neighbours import INDEXES

TURNS = 3


def run() -> list[Ratio]:
    """Seconds of a round through each index, beside all pairs."""
    (x, ref), found = (clustered(n, np.random.default_rng(n)) for n in (ROUND, D0)), []
    exact = knn_distance(x, ref, K)
    for name in INDEXES[1:]:
        begun = time.perf_counter()
        filled = indexed(ref, "l2", name)
        filling = time.perf_counter() - begun
        values, recall = knn_by_index(x, filled, K)
        more = float(np.mean(values / exact - 1))
        what = (
            f"{K}-NN, {ROUND:,} × {D0:,} of {DIM}; recall {recall:.1%}, distances {more:.2%} too large on average; "
            f"filled in {filling:.1f} s"
        )
        ours = partial(knn_by_index, x, filled, K)
        found.append(compare(f"k-NN, {name} / exact", what, ours, partial(knn_distance, x, ref, K), TURNS))
    return found
