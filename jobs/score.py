"""Stage ``score``: how good each sample is for its prompt, by every scorer of the recipe."""

from __future__ import annotations

from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from jobs import samples
from jobs.images import images_of
from jobs.run import Run
from jobs.scorers import Scorer, ScorerName, scorer
from jobs.stage import Work, complete, units
from schemas.errors import WinnowError
from schemas.settings import Settings
from schemas.tables import TABLES


class Score(Settings):
    """``scorers``: what selection may use; ``batch``: images at once."""

    scorers: tuple[ScorerName, ...] = ()
    batch: int = Field(64, ge=1)


def score(run: Run, split: str = "train", scorers: tuple[str, ...] | None = None) -> bool:
    """Score the samples of one split with the recipe's scorers, or those given; True when all is there."""
    settings = run.recipe.score
    done = True
    for name in settings.scorers if scorers is None else scorers:
        loaded = scorer(name)
        for place, rows in samples.sets(run, split):
            folders = {"round": run.round, "arm": run.arm, "split": split, "scorer": name} | place
            work = units("scores", folders, rows, settings.batch, ["score", name, loaded.revision])
            done &= complete(run, f"score {name}", "scores", work, partial(_work, run, name, loaded))
    return done


def _work(run: Run, name: str, loaded: Scorer) -> Work:
    def work(rows: pa.Table) -> pa.Table:
        prompts = rows["prompt"].to_pylist()
        values, truncated = loaded.score(images_of(samples.with_images(run, rows)), prompts)
        n = rows.num_rows
        columns = {
            "sample_id": rows["sample_id"],
            "round": pa.array(np.full(n, run.round, np.int32)),
            "scorer": pa.array([name] * n),
            "revision": pa.array([loaded.revision] * n),
            "value": pa.array(np.asarray(values, np.float64)),
            "truncated": pa.array(truncated),
        }
        return pa.table(columns, schema=TABLES["scores"].schema)

    return work


def scores_of(run: Run, split: str, scorers: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Scores float64 [N] by scorer, in the order of ``samples.of``; WinnowError where one is missing."""
    found, expected = {}, samples.of(run, split).num_rows
    if not scorers:
        return found
    rows = run.here(
        "SELECT scorer, value FROM scores JOIN samples USING (sample_id) WHERE scorer IN (SELECT unnest($scorers)) "
        "AND samples.round = $round AND arm = $arm AND split = $split ORDER BY prompt_id, sample_id",
        scorers=list(scorers), round=run.round, arm=run.arm, split=split,
    )  # fmt: skip
    for name in scorers:
        values = rows["value"].filter(pc.equal(rows["scorer"], name))
        if len(values) != expected:
            raise WinnowError(
                f"scores: {len(values)} of {expected} {split} samples of round {run.round} are scored by {name!r}; "
                "run 'winnow score' first"
            )
        found[name] = values.to_numpy()
    return found
