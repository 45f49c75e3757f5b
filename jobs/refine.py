"""Stage ``refine``: images of the round made anew in part or to a lower level, each attempt a child of its parent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from jobs import devices, models, samples
from jobs.generate import column, moved
from jobs.images import encode, images_of
from jobs.pool import ask, pool, scorers
from jobs.progress import say
from jobs.run import Run, ids
from jobs.sampler import sampler
from jobs.scorers import ScorerName, scorer
from jobs.stage import complete_both, units
from schemas.errors import WinnowError
from schemas.ids import digest, sample_id
from schemas.settings import Settings
from schemas.tables import TABLES
from storage.layout import clean
from storage.snapshot import Snapshot, latest
from storage.views import identifier

if TYPE_CHECKING:
    from jobs.refiner import Refiner


class Refine(Settings):
    """``where``: an SQL condition over the round's candidates, null: no refinement; at most ``limit`` of them. The
    columns are those of jobs/pool.py: a sample's own, ``distance``, and for each scorer "NAME" and "rank:NAME".

    ``mask``: the whole image; random cells, ``share`` of a ``grid`` × ``grid``; or a ``box``: left, top, right, bottom
    as shares of the sides. ``dilate``: latents that it grows on every side. ``paste``: pixels inside it over which the
    kept part blends into the new one, null: all pixels are the autoencoder's. ``level``: how far it is noised, of
    1 = pure noise, or a range to draw from; ``steps``: of a whole sampling, of which those below the level are taken.
    ``guidance`` null: that of ``generate``. ``model`` null: the one that made the round's images. ``accept``: always,
    or better, where ``scorer`` rises by more than ``margin``; ``batch``: images at once."""

    where: str | None = None
    limit: int | None = Field(None, ge=1)
    mask: Literal["whole", "random", "box"] = "whole"
    grid: int = Field(4, ge=2, le=64)
    share: float = Field(0.25, gt=0, le=1)
    box: tuple[float, float, float, float] = (0.25, 0.25, 0.75, 0.75)
    dilate: int = Field(0, ge=0)
    paste: int | None = Field(4, ge=0)
    level: float | tuple[float, float] = 0.4
    steps: int = Field(50, ge=1)
    loops: int = Field(1, ge=1)
    guidance: float | None = Field(None, ge=0)
    model: str | None = None
    accept: Literal["always", "better"] = "always"
    scorer: ScorerName | None = None
    margin: float = Field(0.0, ge=0)
    batch: int = Field(8, ge=1)

    @field_validator("where", mode="before")
    @classmethod
    def _text(cls, where: Any) -> Any:
        return str(where).lower() if isinstance(where, bool) else where  # YAML's true is SQL's, too

    @model_validator(mode="after")
    def _together(self) -> Refine:
        low, high = self.levels
        if not 0 < low <= high <= 1:
            raise WinnowError(f"refine.level is {self.level}; give a number in (0, 1], or two, low and high")
        left, top, right, bottom = self.box
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise WinnowError(f"refine.box is {list(self.box)}; give left < right and top < bottom from 0 to 1")
        if self.accept == "better" and self.scorer is None:
            raise WinnowError("refine.accept 'better' needs a scorer; set refine.scorer")
        return self

    @property
    def levels(self) -> tuple[float, float]:
        """The lowest and the highest level."""
        return self.level if isinstance(self.level, tuple) else (self.level, self.level)


def refine(run: Run) -> bool:
    """Refine the candidates that the recipe's condition names; True when all of them are there."""
    settings = run.recipe.refine
    if settings.where is None:
        raise WinnowError("refine.where is null; name the samples to refine by a condition, \"true\" for all of them")
    newest = latest(run.store)
    before = _without_refined(run, newest)
    rows = chosen(run, settings, before)
    late = run.query("SELECT 1 FROM selections WHERE round = $round AND selection = $arm LIMIT 1",
                     round=run.round, arm=run.arm).num_rows  # fmt: skip
    if late and before == newest:
        raise WinnowError(
            f"refine: round {run.round} of {run.arm!r} is selected already, so that no refined image would be chosen; "
            "refine a round before 'winnow select'"
        )
    if not rows.num_rows:
        say(f"refine {run.arm} round {run.round}: no sample is of refine.where")
        return True
    model = settings.model or run.start_model()
    making = run.recipe.generate.model_copy(
        update={"width": None, "height": None, **({"negative": None} if settings.model else {})}
    )
    guidance = making.guidance if settings.guidance is None else settings.guidance
    judge = scorer(settings.scorer) if settings.scorer else None
    revision = models.revision(model)
    spec = [
        "refine", settings.model_dump(mode="json", exclude={"where", "limit", "model"}), revision, guidance,
        making.format, making.dtype or str(devices.dtype()), moved(making), judge and judge.revision, run.recipe.seed,
        run.round, run.arm,
    ]  # fmt: skip
    folders = {"round": run.round, "arm": run.arm, "split": "train"} | samples.CHILDREN
    images = units("samples", folders, rows, settings.batch, spec)
    notes = units("refinements", {"round": run.round, "arm": run.arm}, rows, settings.batch, spec)

    def start() -> Callable[[pa.Table], tuple[pa.Table, pa.Table]]:
        from jobs.refiner import Refiner

        made = sampler(model, making, rows["prompt"].to_pylist())
        worker = Refiner(made.pipe, settings, guidance, judge, made.conditions)
        name = column(model, revision)
        return lambda some: _attempts(run, worker, name, digest(spec), samples.with_images(run, some, before))

    # Which were accepted is sealed first: no stage can see an image without it.
    return complete_both(run, "refine", "refinements", notes, images, start)


def _without_refined(run: Run, snapshot: Snapshot) -> Snapshot:
    """The snapshot without what this stage has added to the round: what is lost of that is made again from the rest."""
    arm = f"round-{run.round}/arm-{clean(run.arm)}/"
    own = f"tables/refinements/{arm}", f"tables/samples/{arm}split-train/from-refine/"
    return replace(snapshot, parts=tuple(part for part in snapshot.parts if not part.path.startswith(own)))


def chosen(run: Run, settings: Refine, snapshot: Snapshot | None = None) -> pa.Table:
    """sample_id, prompt_id, prompt of the candidates that the condition is true of, in a fixed order, as of a snapshot
    (null: the newest). The condition is the user's own text: it is asked in the sandbox, and what it gives can only
    leave candidates out."""
    rows = samples.of(run, "train", snapshot)
    candidates = rows.filter(rows["parent_id"].is_null())
    found = scorers(run, snapshot)
    asked = (
        f"SELECT sample_id FROM ({pool(run, found, 'parent_id IS NULL')}) "
        # On lines of its own: a comment in it must not hide what follows.
        f"WHERE (\n{settings.where}\n)"
    )
    try:
        answer = ask(run, asked, snapshot)
        if answer.column_names != ["sample_id"]:
            raise WinnowError("sql: it is more than a condition")
    except WinnowError as error:
        reason = " ".join(str(error).removeprefix("sql: ").split())[:300]
        raise WinnowError(
            f"refine.where {settings.where!r}: {reason}; write a condition over a sample's columns, such as "
            f"{identifier(found[0] if found else 'width')} > 0.5"
        ) from error
    kept = candidates.filter(np.isin(ids(candidates), answer["sample_id"].to_numpy()))
    return kept.slice(0, settings.limit)


def _attempts(run: Run, worker: Refiner, model: str, spec: str, rows: pa.Table) -> tuple[pa.Table, pa.Table]:
    """All loops over some samples with their images: the rows of ``samples`` and of ``refinements``, loop by loop."""
    settings, format = worker.settings, run.recipe.generate.format
    images, rows = images_of(rows), rows.drop_columns(["image"])
    made: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    for size in dict.fromkeys(image.size for image in images):
        some = [i for i, image in enumerate(images) if image.size == size]
        ours = rows.take(some).to_pylist()
        now = [row["sample_id"] for row in ours]
        seeds = [[run.seed("refine", first, loop) for first in now] for loop in range(1, settings.loops + 1)]
        firsts = list(now)
        told = worker(np.stack([np.asarray(images[i]) for i in some]), [row["prompt"] for row in ours], seeds)
        for loop, attempts in enumerate(told, 1):
            for i, row in enumerate(ours):
                number = sample_id(["refine", spec, firsts[i], loop])
                file = {"bytes": encode(attempts.pixels[i], format), "path": f"{number}.{format}"}
                level = attempts.levels[i]
                made.append({
                    "sample_id": number, "round": run.round, "arm": run.arm, "split": "train", "image": file,
                    "prompt_id": row["prompt_id"], "prompt": row["prompt"], "seed": seeds[loop - 1][i], "model": model,
                    "width": size[0], "height": size[1], "parent_id": now[i], "attempt": 0,
                    "refiner": f"{settings.mask} t={1000 * level:.0f} loop {loop}",
                })  # fmt: skip
                notes.append({
                    "sample_id": number, "parent_id": now[i], "round": run.round, "mask": attempts.regions[i],
                    "level": level, "loop": loop, "evaluations": attempts.evaluations[i], "scorer": settings.scorer,
                    "score_before": None if attempts.before is None else float(attempts.before[i]),
                    "score_after": None if attempts.after is None else float(attempts.after[i]),
                    "accepted": bool(attempts.accepted[i]),
                })  # fmt: skip
                now[i] = number if attempts.accepted[i] else now[i]
    return (
        pa.Table.from_pylist(made, schema=TABLES["samples"].schema),
        pa.Table.from_pylist(notes, schema=TABLES["refinements"].schema),
    )


def not_accepted(run: Run) -> np.ndarray:
    """The samples of the round, int64, that a refinement made and did not accept."""
    found = run.here(
        "SELECT sample_id FROM refinements JOIN samples USING (sample_id) WHERE NOT accepted "
        "AND samples.round = $round AND arm = $arm ORDER BY sample_id",
        round=run.round, arm=run.arm,
    )  # fmt: skip
    return ids(found)
