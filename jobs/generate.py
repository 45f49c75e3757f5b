"""Stage ``generate``: n images for each prompt, each from its own stored seed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from jobs import devices, models
from jobs.images import SIDE, Format, encode, fault
from jobs.prompts import chosen
from jobs.rejection import Drafts, Reject, draft
from jobs.run import BASE, Run
from jobs.sampler import Sampler, sampler
from jobs.scorers import Scorer, scorer
from jobs.stage import Both, Made, Pair, Work, complete, complete_both, units
from schemas.errors import WinnowError
from schemas.ids import sample_id
from schemas.settings import Settings
from schemas.tables import TABLES

if TYPE_CHECKING:
    from torch import Tensor

    from jobs.evaluate import Evaluate, Reference

Split = Literal["reference", "train", "eval"]


class Negative(Settings):
    """``model``: one to be led away from, of the same architecture, such as one that was trained on its own samples;
    ``weight``: how far, 0 not at all. See jobs.negative."""

    model: str
    weight: float = Field(1.0, ge=0)


class Generate(Settings):
    """``prompts`` a round (null: all of them), images per prompt and how to sample. Sizes null: the model's own.
    ``shift``: above 1 takes more of a flow's steps at its noisy end (null: as the model's scheduler does).
    ``batch``: images sampled together, or in halves where the memory is too small. ``dtype`` null: bfloat16 on a
    GPU that has it, else float32. ``compile``: minutes of waiting, then faster steps. ``retries``: fresh seeds for
    an image that shows nothing. ``source``: images to take in instead, a folder, Parquet files or hub:org/name, with
    their captions in ``column``; of each prompt the same ``source_limit`` in every round (null: all of them).
    ``negative``: guidance away from another model. ``reject``: which of a round's candidates are finished; all images
    of a prompt are then begun together, also where they are more than ``batch``."""

    source: str | None = None
    column: str = "text"
    source_limit: int | None = Field(None, ge=1)
    prompts: int | None = Field(None, ge=1)
    images_per_prompt: int = Field(4, ge=1)
    steps: int = Field(50, ge=1)
    guidance: float = Field(7.5, ge=0)
    shift: float | None = Field(None, gt=0)
    negative: Negative | None = None
    width: int | None = Field(None, ge=8, le=SIDE, multiple_of=8)
    height: int | None = Field(None, ge=8, le=SIDE, multiple_of=8)
    batch: int = Field(8, ge=1)
    format: Format = "png"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    compile: bool = False
    retries: int = Field(2, ge=0)
    reject: Reject | None = None

    @field_validator("negative")
    @classmethod
    def _led(cls, negative: Negative | None) -> Negative | None:
        return negative if negative and negative.weight else None  # weight 0 leads nowhere, at twice the cost

    @model_validator(mode="after")
    def _limits(self) -> Generate:
        if self.source_limit and not self.source:
            raise WinnowError(
                "generate.source_limit is of generate.source, and there is none; set the source, or "
                "generate.images_per_prompt instead"
            )
        return self

    @model_validator(mode="after")
    def _rejects(self) -> Generate:
        if (reject := self.reject) is None:
            return self
        if self.source:
            raise WinnowError("generate.reject ends sampling early, and generate.source samples nothing; drop one")
        if reject.keep >= self.images_per_prompt:
            raise WinnowError(
                f"generate.reject.keep is {reject.keep} of {self.images_per_prompt} images a prompt, so that none is "
                "rejected; keep fewer, or raise generate.images_per_prompt"
            )
        if self.steps < 2:
            raise WinnowError("generate.reject needs a step before the last, and generate.steps is 1; raise it")
        if reject.scorer is None and self.guidance <= 1:
            raise WinnowError(
                f"generate.reject.by {reject.by!r} is of the two predictions that guidance makes, and "
                f"generate.guidance is {self.guidance:g}; raise it above 1, or reject by a scorer"
            )
        return self


def plan(run: Run, split: Split, prompts: int | None, per_prompt: int, model: str) -> pa.Table:
    """The rows to make, all columns but the image: same seeds for every model on the eval split, so that
    rounds are compared image by image."""
    settings = sampling(run)
    texts = chosen(run, "eval" if split == "eval" else "train", prompts)
    where = ["eval"] if split == "eval" else [split, run.round, run.arm]
    sampler = settings.model_dump(include={"steps", "guidance", "width", "height", "format"}) | moved(settings)
    rows = []
    for prompt_id, text in zip(texts["prompt_id"].to_pylist(), texts["text"].to_pylist(), strict=True):
        for k in range(per_prompt):
            seed = run.seed(*where, prompt_id, k)
            number = sample_id([model, sampler, split, run.round, run.arm, prompt_id, seed])
            rows.append({"sample_id": number, "prompt_id": prompt_id, "prompt": text, "seed": seed})
    return pa.Table.from_pylist(rows)


def sampling(run: Run) -> Generate:
    """The run's settings; the base's own samples are led away from nothing."""
    settings = run.recipe.generate
    return settings.model_copy(update={"negative": None}) if run.arm == BASE else settings


def moved(settings: Generate) -> dict[str, Any]:
    """What of the sampling differs from the model's own: nothing where shift and negative guidance are null."""
    found: dict[str, Any] = {}
    if settings.shift is not None:
        found["shift"] = settings.shift
    if settings.negative is not None:
        found["negative"] = [models.revision(settings.negative.model), settings.negative.weight]
    return found


def sound(draw: Sampler, rows: list[dict[str, Any]], latents: Tensor) -> list[dict[str, Any]]:
    """The rows with the pixels of their ``latents``; those that show nothing are sampled again with their next seeds,
    and refused in the end."""
    settings = draw.settings
    made = [dict(row, attempt=0) for row in rows]
    todo = list(range(len(rows)))
    for attempt in range(settings.retries + 1):
        if attempt:
            for i in todo:
                made[i] |= {"attempt": attempt, "seed": sample_id(["retry", made[i]["seed"]])}
            latents = draw.denoise([made[i]["prompt"] for i in todo], [made[i]["seed"] for i in todo])
        faults = {}
        for i, image in zip(todo, draw.decode(latents), strict=True):
            why = fault(image)
            if why is None:
                made[i]["pixels"] = np.round(image * 255).astype(np.uint8)
            else:
                faults[i] = why
        todo = sorted(faults)
        if not todo:
            return made
    first = made[todo[0]]
    raise WinnowError(
        f"generate: {len(todo)} of {len(rows)} images show nothing, the first ({faults[todo[0]]}) for prompt "
        f"{first['prompt'][:60]!r} after {settings.retries + 1} seeds; check the model, its dtype and "
        "generate.guidance, or raise generate.retries"
    )


def generate(run: Run, split: Split = "train", model: str | None = None) -> bool:
    """Make the samples of one split: a round's candidates, D_0 (the base's reference samples), or the held-out
    prompts' images of ``model``; the first two are taken in where the recipe has a source of them. Returns whether all
    of them are there, not left to other shards."""
    own: Generate | Reference = run.recipe.generate
    most = run.recipe.generate.source_limit
    if split == "reference":
        run, own, most = run.base(), run.recipe.reference, run.recipe.reference.images_per_prompt
    if own.source and split != "eval":
        from jobs.own import take_in

        return take_in(run, split, own, most)
    asked: Generate | Reference | Evaluate = run.recipe.evaluate if split == "eval" else own
    prompts, per_prompt = asked.prompts, asked.images_per_prompt
    settings = sampling(run)
    reject = settings.reject if split == "train" else None
    model = model or (run.recipe.model if run.arm == BASE else run.start_model())
    revision = models.revision(model)
    rows = plan(run, split, prompts, per_prompt, revision)
    # How many images of how many prompts stands in the rows: arms that differ in it share the base's samples.
    apart = {"prompts", "images_per_prompt", "retries", "compile", "source", "column", "source_limit", "shift",
             "negative", "reject"}  # fmt: skip
    dtype = settings.dtype or str(devices.dtype())
    making = settings.model_dump(mode="json", exclude=apart) | {"dtype": dtype} | moved(settings)
    spec = ["generate", revision, making, run.round, run.arm, split]
    folders = {"round": run.round, "arm": run.arm, "split": split}
    if reject is None:
        work = units("samples", folders, rows, settings.batch, spec)
        return complete(run, f"generate {split}", "samples", work, lambda: _work(run, split, model, revision, rows))
    judge = scorer(reject.scorer) if reject.scorer else None
    spec = [*spec, reject.model_dump(mode="json"), judge and judge.revision]
    whole = max(1, settings.batch // per_prompt) * per_prompt  # all images of a prompt are compared
    notes = units("drafts", {"round": run.round, "arm": run.arm}, rows, whole, spec)
    images = units("samples", folders, rows, whole, spec)
    return complete_both(
        run, f"generate {split}", "drafts", notes, images,
        lambda: _rejecting(run, reject, judge, model, revision, rows),
    )  # fmt: skip


def column(model: str, revision: str) -> str:
    """A model as the rows that it made name it: its Hub id or the name of its folder, and its revision."""
    return f"{model if models.locate(model) == model else models.locate(model).name}@{revision}"


def _files(run: Run, split: Split, draw: Sampler, name: str, rows: list[dict[str, Any]], latents: Tensor) -> pa.Table:
    """The rows of ``samples`` for planned rows with their latents."""
    done, format = [], draw.settings.format
    for row in sound(draw, rows, latents):
        pixels = row.pop("pixels")
        file = {"bytes": encode(pixels, format), "path": f"{row['sample_id']}.{format}"}
        height, width = pixels.shape[:2]
        done.append(row | {"round": run.round, "arm": run.arm, "split": split, "model": name,
                           "width": width, "height": height, "image": file})  # fmt: skip
    return pa.Table.from_pylist(done, schema=TABLES["samples"].schema)


def _work(run: Run, split: Split, model: str, revision: str, planned: pa.Table) -> Work:
    draw = sampler(model, sampling(run), planned["prompt"].to_pylist())
    files = partial(_files, run, split, draw, column(model, revision))

    def work(some: pa.Table) -> Made:
        rows = some.to_pylist()
        finish = partial(files, rows, draw.denoise([row["prompt"] for row in rows], [row["seed"] for row in rows]))
        # On a CPU the two halves would take the cores from each other, and threads that wait for each other lose both.
        return finish() if devices.device() == "cpu" else finish

    return work


def _rejecting(run: Run, reject: Reject, judge: Scorer | None, model: str, revision: str, planned: pa.Table) -> Both:
    """The same with early rejection: the finished samples, and of every begun one what was decided."""
    draw = sampler(model, sampling(run), planned["prompt"].to_pylist())
    files = partial(_files, run, "train", draw, column(model, revision))
    step = reject.step(draw.settings.steps)

    def told(rows: list[dict[str, Any]], made: Drafts) -> pa.Table:
        notes = [
            {key: row[key] for key in ("sample_id", "prompt_id", "prompt", "seed")}
            | {"round": run.round, "arm": run.arm, "criterion": reject.by, "step": step, "kept": bool(kept),
               "value": float(value) if np.isfinite(value) else None, "evaluations": int(spent)}
            for row, kept, value, spent in zip(rows, made.kept, made.values, made.evaluations, strict=True)
        ]  # fmt: skip
        return pa.Table.from_pylist(notes, schema=TABLES["drafts"].schema)

    def work(some: pa.Table) -> Pair | Callable[[], Pair]:
        rows, groups = some.to_pylist(), some["prompt_id"].to_numpy()
        made = draft(draw, reject, judge, [row["prompt"] for row in rows], [row["seed"] for row in rows], groups)
        finished = [row for row, kept in zip(rows, made.kept, strict=True) if kept]

        def finish() -> Pair:
            return files(finished, made.latents), told(rows, made)

        return finish() if devices.device() == "cpu" else finish

    return work
