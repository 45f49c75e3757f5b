"""Stage ``weigh``: how much each kept sample counts, by its distance to D_0 (RSIDiff, equation 5), or by how much
better it is than all images of its prompt."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from curate import advantage
from curate import weigh as law
from jobs import samples
from jobs.distance import distances_of
from jobs.progress import say
from jobs.run import Run, ids
from jobs.score import scores_of
from jobs.select import fuse, selecting
from jobs.stage import Work, complete, units
from schemas.errors import WinnowError
from schemas.settings import Settings
from schemas.tables import TABLES


class Weigh(Settings):
    """``by``: "distance", "advantage", or "nothing" for weight 1. ``beta`` and ``sigma2`` in the unit of the distance;
    where null, beta is the ``quantile`` of D_0's distance to itself and sigma2 the spread from there to ``tail``. An
    advantage of a standard deviations counts exp(a / ``temperature``), at most ``most``."""

    by: Literal["distance", "advantage", "nothing"] = "distance"
    beta: float | None = None
    quantile: float = Field(0.9, ge=0, lt=1)
    sigma2: float | None = Field(None, gt=0)
    tail: float = Field(0.99, gt=0, le=1)
    temperature: float = Field(1.0, gt=0)
    most: float = Field(20.0, ge=1)

    @model_validator(mode="after")
    def _together(self) -> Weigh:
        if self.sigma2 is None and self.tail <= self.quantile:
            raise WinnowError(f"weigh.tail is {self.tail}; give more than weigh.quantile, {self.quantile}")
        return self


def kept(run: Run) -> pa.Table:
    """sample_id of the round's kept samples; WinnowError where nothing was selected yet."""
    found = run.here(
        "SELECT sample_id FROM selections WHERE kept AND selection = $arm AND round = $round ORDER BY sample_id",
        arm=run.arm, round=run.round,
    )  # fmt: skip
    if not found.num_rows:
        raise WinnowError(f"selections: round {run.round} of {run.arm!r} keeps nothing; run 'winnow select' first")
    return found


def scale_of(run: Run) -> tuple[float, float]:
    """beta and sigma2 of this run, from the recipe or calibrated on D_0."""
    settings = run.recipe.weigh
    if settings.beta is not None and settings.sigma2 is not None:
        return settings.beta, settings.sigma2
    _, own = distances_of(run.base(), "reference")
    beta = law.threshold(own, settings.quantile) if settings.beta is None else settings.beta
    sigma2 = law.decay(own, settings.quantile, settings.tail) if settings.sigma2 is None else settings.sigma2
    return beta, sigma2


def weigh(run: Run) -> None:
    """Weights of the round's kept samples."""
    settings = run.recipe.weigh
    rows = kept(run)
    if settings.by == "distance" and run.recipe.distance.space is None:
        raise WinnowError("weigh.by 'distance' needs distances; set distance.space, or weigh.by to 'nothing'")
    scale = scale_of(run) if settings.by == "distance" else None
    # Settings of the other way stay out: they change nothing.
    used = {"by", "temperature", "most"} if settings.by == "advantage" else {"by", "beta", "quantile", "sigma2", "tail"}
    spec = ["weigh", settings.model_dump(mode="json", include=used), run.recipe.distance.model_dump(mode="json"), scale]
    if settings.by == "advantage":
        spec.append([selecting(run.recipe), run.recipe.select.model_dump(mode="json", include={"fuse", "within"})])
    work = units("weights", {"round": run.round, "selection": run.arm}, rows, len(rows), spec)
    ways = {"distance": partial(_by_distance, run, scale), "advantage": partial(by_advantage, run)}
    complete(run, "weigh", "weights", work, lambda: _work(run, ways.get(settings.by), scale))


def _by_distance(run: Run, scale: tuple[float, float], numbers: np.ndarray) -> np.ndarray:
    known, values = distances_of(run, "train")
    return law.weights(_at(numbers, known, values), *scale)


def by_advantage(run: Run, numbers: np.ndarray) -> np.ndarray:
    """Weights [N] of these candidates by how much better than their prompt's others they are."""
    settings, rows = run.recipe, samples.of(run, "train")
    used, groups = selecting(settings), rows["prompt_id"].to_numpy()
    if not used:
        raise WinnowError("weigh.by 'advantage' needs scores; name scorers in score.scorers")
    scores = scores_of(run, "train", used)
    better = advantage.advantages(fuse(settings.select, [scores[name] for name in used], groups), groups)
    return advantage.weights(_at(numbers, ids(rows), better), settings.weigh.temperature, settings.weigh.most)


def _at(numbers: np.ndarray, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The value of each of ``numbers``, by those that are known."""
    order = np.argsort(known)
    return values[order[np.searchsorted(known, numbers, sorter=order)]]


def _work(
    run: Run, way: Callable[[np.ndarray], np.ndarray] | None, scale: tuple[float, float] | None
) -> Work:  # fmt: skip
    def work(rows: pa.Table) -> pa.Table:
        n = rows.num_rows
        weights = np.ones(n) if way is None else way(ids(rows))
        if way is not None:
            size = law.effective_sample_size(weights)
            settings = run.recipe.weigh
            how = "" if scale is None else "; beta {:.4g}, sigma2 {:.4g}".format(*scale)
            most = settings.most if settings.by == "advantage" else 1.0
            clipped = f"{np.count_nonzero(weights >= most)} at the largest, {most:g}"
            if scale is not None:
                clipped += f", {np.count_nonzero(weights <= law.FLOOR)} at the least, {law.FLOOR:.1g}"
            say(
                f"weigh {run.arm} round {run.round} by {settings.by}{how}; mean weight {weights.mean():.3f}, effective "
                f"samples {size:.0f} of {n}; {clipped}; train.normalise {run.recipe.train.normalise!r}"
            )
        columns = {
            "selection": pa.array([run.arm] * n),
            "round": pa.array(np.full(n, run.round, np.int32)),
            "sample_id": rows["sample_id"],
            "weight": pa.array(weights),
        }
        return pa.table(columns, schema=TABLES["weights"].schema)

    return work
