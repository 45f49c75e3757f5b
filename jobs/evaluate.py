"""Stage ``evaluate``: what a round's model is worth, on prompts that no round trains on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from curate.alarm import agreement
from curate.arrays import matrix
from curate.drift import Interval, mean_over, wins
from jobs import samples
from jobs.digest import digest
from jobs.drift import drift
from jobs.embed import embed, vectors_of
from jobs.encoders import EncoderName
from jobs.generate import generate
from jobs.images import images_of, look
from jobs.run import BASE, Run, ids
from jobs.score import score, scores_of
from jobs.scorers import ScorerName
from jobs.select import choosing, fuse, selecting
from jobs.stage import Work, complete, units
from jobs.train import trained_model
from jobs.world import WEIGHTS
from schemas.errors import WinnowError
from schemas.settings import Settings
from schemas.tables import TABLES
from storage.snapshot import latest

if TYPE_CHECKING:
    from jobs.recipe import Recipe

PROMPT_SET = "held-out"
LOOKS = ("brightness", "saturation")
IMAGES = 256  # decoded at once


class Evaluate(Settings):
    """``scorers``: held out from selection. ``judge``: the scorer whose mean is ``judge_accuracy``. ``space``: the
    encoder of the distances and of diversity; ``also``: others, measured beside it. ``real``: real images in ``space``,
    a Parquet file of ``vector`` and, so that they compare like with like, ``prompt``; or "embedded". ``resamples``: of
    the bootstrap behind the intervals."""

    prompts: int | None = Field(None, ge=1)
    images_per_prompt: int = Field(4, ge=2)
    scorers: tuple[ScorerName, ...] = ()
    judge: ScorerName | None = None
    space: EncoderName | None = None
    also: tuple[EncoderName, ...] = ()
    real: str | None = None
    resamples: int = Field(200, ge=2)

    def metric_of(self, scorer: str) -> str:
        """What a scorer's mean is called among the metrics."""
        return "judge_accuracy" if scorer == self.judge else scorer


class Reference(Settings):
    """D_0: how many of the base's images, over how many of the training prompts (null: all). ``source``: images to take
    in instead, real ones for example: a folder, Parquet files, hub:org/name or embedded, with their captions in
    ``column``; those of a training prompt count, at most ``images_per_prompt`` of each."""

    source: str | None = None
    column: str = "text"
    prompts: int | None = Field(None, ge=1)
    images_per_prompt: int = Field(1, ge=1)


def real_path(name: str) -> Path:
    path = WEIGHTS / "real.parquet" if name == "embedded" else Path(name).expanduser()
    if not path.is_file():
        raise WinnowError(f"evaluate.real {name!r}: no such file; give 'embedded' or a Parquet file of 'vector'")
    return path


def real_vectors(name: str, prompts: list[str], columns: int | None = None) -> np.ndarray:
    """Features [M, D] of real images, M at least 2 and D ``columns`` (null: any): those of ``prompts`` where the file
    names prompts, so that what the prompts ask for is not mistaken for a distance."""
    path = real_path(name)
    try:
        table = pq.read_table(path)
        if "prompt" in table.column_names:
            table = table.filter(pc.field("prompt").isin(sorted(set(prompts))))
        found = matrix("features", np.stack(table["vector"].to_numpy()), columns=columns)
        if len(found) < 2:
            raise ValueError("one row, where a spread needs two")
        return found
    except (OSError, pa.ArrowException, LookupError, ValueError, WinnowError) as error:
        raise WinnowError(
            f"evaluate.real {name!r}: no features of real images for these prompts ({str(error)[:200]}); give "
            "'embedded' or a Parquet file of 'vector' and, if you like, 'prompt'"
        ) from error


def spaces(settings: Evaluate) -> tuple[str, ...]:
    """The encoders that drift is measured in, that of the guard first."""
    return tuple(dict.fromkeys([*([settings.space] if settings.space else []), *settings.also]))


def held_out(recipe: Recipe) -> tuple[str, ...]:
    """The scorers of the evaluation that never choose."""
    named = (*recipe.evaluate.scorers, *([recipe.evaluate.judge] if recipe.evaluate.judge else []))
    chooses = choosing(recipe)
    return tuple(name for name in dict.fromkeys(named) if name not in chooses)


def evaluate(run: Run) -> bool:
    """Generate, embed and score the held-out prompts with this round's model, and measure. Returns whether all is
    measured, not left to other shards."""
    settings = run.recipe.evaluate
    where = run.base() if run.round == 0 else run
    model = trained_model(run)
    used = dict.fromkeys([*run.recipe.score.scorers, *settings.scorers, *([settings.judge] if settings.judge else [])])
    d0 = (part for part in latest(run.store).parts if part.table == "samples" and "/split-reference/" in part.path)
    if spaces(settings) and sum(part.rows for part in d0) == 1:  # not asked for: what is lost is made again first
        raise WinnowError(
            "D_0 has 1 image, and a distance to it needs two; raise reference.images_per_prompt or reference.prompts, "
            "or set evaluate.space to null"
        )
    # Each step needs all of the one before: where other shards still work at it, this one has nothing more to do.
    if not generate(where, "eval", model):
        return False
    if not (embed(where, "eval", spaces(settings)) and embed(run.base(), "reference", spaces(settings))):
        return False
    if not score(where, "eval", tuple(used)):
        return False
    rows = samples.of(where, "eval")
    one = pa.table({"sample_id": pa.array([run.seed("evaluate", run.arm, run.round)])})
    reference = ids(samples.of(run.base(), "reference")).tolist() if spaces(settings) else []
    real = digest(real_path(settings.real)) if settings.real else None
    spec = ["evaluate", settings.model_dump(mode="json"), real, list(used), ids(rows).tolist(), reference]
    work = units("evaluations", {"round": run.round, "arm": run.arm}, one, 1, spec)
    return complete(run, "evaluate", "evaluations", work, lambda: _work(run, where, rows, tuple(used)))


def _work(run: Run, where: Run, rows: pa.Table, used: tuple[str, ...]) -> Work:
    def work(_: pa.Table) -> pa.Table:
        measured = {
            **_scored(run, where, rows, used), **_agreement(run, where, rows), **_looks(run, where, rows),
            **_spread(run, where, rows),
        }  # fmt: skip
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
        metric = settings.metric_of(name)
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
    """Drift in each space; metrics of a space beyond the first one are named with it, such as "fd_d0@dinov2:…"."""
    settings, prompts = run.recipe.evaluate, rows["prompt_id"].to_numpy()
    seed, found = run.seed("bootstrap", "spread") % 2**31, {}
    for space in spaces(settings):
        _, mine = vectors_of(where, space, "eval")
        targets = {"d0": vectors_of(run.base(), space, "reference")[1]}
        if settings.real and space == settings.space:
            targets["real"] = real_vectors(settings.real, rows["prompt"].to_pylist(), mine.shape[1])
        named = "" if space == settings.space else f"@{space}"
        measured = drift(mine, prompts, targets, settings.resamples, seed)
        found |= {metric + named: interval for metric, interval in measured.items()}
    return found


def _agreement(run: Run, where: Run, rows: pa.Table) -> dict[str, Interval]:
    """How the score that selects ranks the images of a prompt beside each scorer that does not: Spearman's correlation,
    averaged over the prompts."""
    select, prompts = run.recipe.select, rows["prompt_id"].to_numpy()
    used = selecting(run.recipe) if select.policy != "random" else ()
    others = held_out(run.recipe)
    if not used or not others:
        return {}
    scores = scores_of(where, "eval", (*used, *others))
    mine = fuse(select, [scores[name] for name in used], prompts)
    found = {}
    for name in others:
        values = agreement(mine, scores[name], prompts)
        if len(values):
            seed = run.seed("bootstrap", "agreement", name) % 2**31
            found[f"agreement:{name}"] = mean_over(values, np.arange(len(values)), run.recipe.evaluate.resamples, seed)
    return found


def _looks(run: Run, where: Run, rows: pa.Table) -> dict[str, Interval]:
    """Mean brightness and saturation of the images, in [0, 1]."""
    seen = []
    for start in range(0, rows.num_rows, IMAGES):
        seen += [look(image) for image in images_of(samples.with_images(where, rows.slice(start, IMAGES)))]
    prompts, n = rows["prompt_id"].to_numpy(), run.recipe.evaluate.resamples
    return {
        name: mean_over(values, prompts, n, run.seed("bootstrap", name) % 2**31)
        for name, values in zip(LOOKS, np.transpose(seen), strict=True)
    }
