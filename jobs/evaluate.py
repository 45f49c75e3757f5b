"""Stage ``evaluate``: what a round's model is worth, on prompts that no round trains on."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from curate.drift import Interval, bootstrap, diversity, frechet, mean_over, moments, wins
from jobs import samples
from jobs.digest import digest
from jobs.embed import embed, vectors_of
from jobs.encoders import EncoderName
from jobs.generate import generate
from jobs.run import BASE, Run, ids
from jobs.score import score, scores_of
from jobs.scorers import ScorerName
from jobs.stage import Work, complete, units
from jobs.train import trained_model
from jobs.world import WEIGHTS
from schemas.errors import WinnowError
from schemas.settings import Settings
from schemas.tables import TABLES

PROMPT_SET = "held-out"


class Evaluate(Settings):
    """``scorers``: held out from selection. ``judge``: the scorer whose mean is ``judge_accuracy``. ``space``: the
    encoder of the Fréchet distances and of diversity. ``real``: real images in that space, a Parquet file of
    ``vector`` and, so that ``fd_real`` compares like with like, ``prompt``; or "embedded". ``resamples``: of the
    bootstrap behind the intervals."""

    prompts: int | None = Field(None, ge=1)
    images_per_prompt: int = Field(4, ge=2)
    scorers: tuple[ScorerName, ...] = ()
    judge: ScorerName | None = None
    space: EncoderName | None = None
    real: str | None = None
    resamples: int = Field(200, ge=2)


class Reference(Settings):
    """D_0: how many of the base's images, over how many of the training prompts (null: all)."""

    prompts: int | None = Field(None, ge=1)
    images_per_prompt: int = Field(1, ge=1)


def real_path(name: str) -> Path:
    path = WEIGHTS / "real.parquet" if name == "embedded" else Path(name).expanduser()
    if not path.is_file():
        raise WinnowError(f"evaluate.real {name!r}: no such file; give 'embedded' or a Parquet file of 'vector'")
    return path


def real_moments(name: str, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and covariance [D, D] of real images' features: those of ``prompts`` where the file names prompts, so
    that what the prompts ask for is not mistaken for a distance."""
    path = real_path(name)
    try:
        table = pq.read_table(path)
        if "prompt" in table.column_names:
            table = table.filter(pc.field("prompt").isin(sorted(set(prompts))))
        vectors = np.stack(table["vector"].to_numpy()).astype(np.float64)
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise WinnowError(
            f"evaluate.real {name!r}: no features of real images for these prompts ({str(error)[:200]}); give "
            "'embedded' or a Parquet file of 'vector' and, if you like, 'prompt'"
        ) from error
    mean, cov, _ = moments(vectors)
    return mean, cov


def evaluate(run: Run) -> bool:
    """Generate, embed and score the held-out prompts with this round's model, and measure. Returns whether all is
    measured, not left to other shards."""
    settings = run.recipe.evaluate
    where = run.base() if run.round == 0 else run
    model = trained_model(run)
    used = dict.fromkeys([*run.recipe.score.scorers, *settings.scorers, *([settings.judge] if settings.judge else [])])
    # Each step needs all of the one before: where other shards still work at it, this one has nothing more to do.
    if not generate(where, "eval", model):
        return False
    if settings.space and not (
        embed(where, "eval", (settings.space,)) and embed(run.base(), "reference", (settings.space,))
    ):
        return False
    if not score(where, "eval", tuple(used)):
        return False
    rows = samples.of(where, "eval")
    one = pa.table({"sample_id": pa.array([run.seed("evaluate", run.arm, run.round)])})
    d0 = ids(samples.of(run.base(), "reference")).tolist() if settings.space else []
    real = digest(real_path(settings.real)) if settings.real else None
    spec = ["evaluate", settings.model_dump(mode="json"), real, list(used), ids(rows).tolist(), d0]
    work = units("evaluations", {"round": run.round, "arm": run.arm}, one, 1, spec)
    return complete(run, "evaluate", "evaluations", work, lambda: _work(run, where, rows, tuple(used)))


def _work(run: Run, where: Run, rows: pa.Table, used: tuple[str, ...]) -> Work:
    def work(_: pa.Table) -> pa.Table:
        measured = {**_scored(run, where, rows, used), **_spread(run, where, rows)}
        made = [
            {"round": run.round, "arm": run.arm, "metric": metric, "prompt_set": PROMPT_SET, "value": value,
             "ci_low": low, "ci_high": high, "n": rows.num_rows}
            for metric, (value, low, high) in measured.items()
        ]  # fmt: skip
        return pa.Table.from_pylist(made, schema=TABLES["evaluations"].schema)

    return work


def _scored(run: Run, where: Run, rows: pa.Table, used: tuple[str, ...]) -> dict[str, Interval]:
    """Mean of each scorer, and how often the round beats the base on the same prompt and seed."""
    settings = run.recipe.evaluate
    prompts = rows["prompt_id"].to_numpy()
    mine = scores_of(where, "eval", used)
    theirs = scores_of(run.base(), "eval", used) if where.arm != BASE else mine
    a, b = _pairs(rows, samples.of(run.base(), "eval")) if where.arm != BASE else ([], [])
    found = {}
    for name in used:
        n, seed = settings.resamples, run.seed("bootstrap", name) % 2**31
        metric = "judge_accuracy" if name == settings.judge else name
        found[metric] = mean_over(mine[name], prompts, n, seed)
        if a:
            found[f"win_rate:{metric}"] = mean_over(wins(mine[name][a], theirs[name][b]), prompts[a], n, seed)
    return found


def _pairs(mine: pa.Table, theirs: pa.Table) -> tuple[list[int], list[int]]:
    """Rows of both tables that were made from the same prompt and seed. Their order by id does not pair them, and
    an image that was sampled again has a seed of its own."""
    keys = [list(zip(t["prompt_id"].to_pylist(), t["seed"].to_pylist(), strict=True)) for t in (mine, theirs)]
    place = {key: i for i, key in enumerate(keys[1])}
    pairs = [(i, place[key]) for i, key in enumerate(keys[0]) if key in place]
    return [i for i, _ in pairs], [j for _, j in pairs]


def _spread(run: Run, where: Run, rows: pa.Table) -> dict[str, Interval]:
    """Fréchet distances to D_0 and to real images, and diversity within a prompt. They describe this very set of
    prompts (real images are matched to it), so their intervals resample the images within each prompt."""
    settings = run.recipe.evaluate
    if settings.space is None:
        return {}
    _, mine = vectors_of(where, settings.space, "eval")
    _, d0 = vectors_of(run.base(), settings.space, "reference")
    prompts = rows["prompt_id"].to_numpy()
    n, seed = settings.resamples, run.seed("bootstrap", "spread") % 2**31
    targets = {"fd_d0": moments(d0)[:2]}
    if settings.real:
        targets["fd_real"] = real_moments(settings.real, rows["prompt"].to_pylist())
    found = {}
    for metric, target in targets.items():
        to_target = partial(_frechet_to, target=target)
        found[metric] = _around(to_target(mine), bootstrap(to_target, mine, n=n, rng=seed, strata=prompts))
    spread = bootstrap(diversity, mine, prompts, n=n, rng=seed, strata=prompts)
    found["diversity"] = _around(diversity(mine, prompts), spread)
    return found


def _around(value: float, interval: tuple[float, float]) -> Interval:
    """The bootstrap's width around the value itself: a resample repeats rows, which shifts these statistics, so
    the percentiles alone may leave the value out."""
    half = (interval[1] - interval[0]) / 2
    return Interval(value, max(0.0, value - half), value + half)


def _frechet_to(x: np.ndarray, target: tuple[np.ndarray, np.ndarray]) -> float:
    mean, cov, _ = moments(x)
    return frechet(mean, cov, *target)
