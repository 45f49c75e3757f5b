"""Selection: the best of each prompt by five scorers' ranks, beside pandas and polars.

Ours also gives every sample its place and every reject its reason; the words say whether the same are kept.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import polars as pl

from bench.ratio import Ratio, compare
from curate.fuse import rank_fusion
from curate.select import best_of_n

ROWS, PROMPT = 1_000_000, 10  # samples, and how many a prompt has
NAMES = [f"scorer-{i}" for i in range(5)]
TURNS = 5


def table(count: int) -> pd.DataFrame:
    """sample_id, prompt_id and five scores that agree in part."""
    rng = np.random.default_rng(0)
    quality = rng.standard_normal(count)
    scores = {name: quality + rng.standard_normal(count) for name in NAMES}
    return pd.DataFrame({"sample_id": np.arange(count), "prompt_id": np.arange(count) // PROMPT} | scores)


def ours(rows: pd.DataFrame) -> np.ndarray:
    prompts, ids = rows["prompt_id"].to_numpy(), rows["sample_id"].to_numpy()
    return ids[best_of_n(rank_fusion(rows[NAMES].to_numpy(), prompts), prompts, ids).kept]


def by_pandas(rows: pd.DataFrame) -> np.ndarray:
    rank = rows.groupby("prompt_id")[NAMES].rank().sum(axis=1)
    return np.sort(rows["sample_id"].to_numpy()[rank.groupby(rows["prompt_id"]).idxmax()])


def by_polars(rows: pl.DataFrame) -> np.ndarray:
    rank = pl.sum_horizontal([pl.col(name).rank().over("prompt_id") for name in NAMES])
    best = rows.lazy().select("sample_id", "prompt_id", rank=rank)
    best = best.filter(pl.col("rank") == pl.col("rank").max().over("prompt_id"))
    return np.sort(best.group_by("prompt_id").agg(pl.col("sample_id").min()).collect()["sample_id"].to_numpy())


def run() -> list[Ratio]:
    """Seconds against each, all rows in memory."""
    rows = table(ROWS)
    kept, found = ours(rows), []
    for name, theirs in (("pandas", partial(by_pandas, rows)), ("polars", partial(by_polars, pl.from_pandas(rows)))):
        alike = len(np.intersect1d(kept, theirs())) / len(kept)
        what = f"best of {PROMPT} by five ranks, {ROWS:,} rows; {alike:.2%} of ours are theirs"
        found.append(compare(f"selection, ours / {name}", what, partial(ours, rows), theirs, TURNS))
    return found
