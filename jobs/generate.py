"""Stage ``generate``: n images for each prompt, each from its own stored seed."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from threading import RLock
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from jobs import devices, models
from jobs.images import Format, encode, fault
from jobs.progress import say
from jobs.prompts import chosen
from jobs.run import BASE, Run
from jobs.stage import Made, Work, complete, units
from schemas.errors import WinnowError
from schemas.ids import sample_id
from schemas.settings import Settings
from schemas.tables import TABLES

if TYPE_CHECKING:
    from torch import Tensor

Split = Literal["reference", "train", "eval"]


class Negative(Settings):
    """``model``: one to be led away from, of the same architecture, such as one that was trained on its own samples;
    ``weight``: how far, 0 not at all. See jobs.negative."""

    model: str
    weight: float = Field(1.0, ge=0)


class Generate(Settings):
    """``prompts`` a round (null: all of them), images per prompt and how to sample. Sizes null: the model's own.
    ``batch``: images sampled together, or in halves where the memory is too small. ``dtype`` null: bfloat16 on a
    GPU that has it, else float32. ``compile``: minutes of waiting, then faster steps. ``retries``: fresh seeds for
    an image that shows nothing. ``source``: images to take in instead, a folder, Parquet files or hub:org/name, with
    their captions in ``column``. ``negative``: guidance away from another model."""

    source: str | None = None
    column: str = "text"
    prompts: int | None = Field(None, ge=1)
    images_per_prompt: int = Field(4, ge=1)
    steps: int = Field(50, ge=1)
    guidance: float = Field(7.5, ge=0)
    negative: Negative | None = None
    width: int | None = Field(None, ge=8, multiple_of=8)
    height: int | None = Field(None, ge=8, multiple_of=8)
    batch: int = Field(8, ge=1)
    format: Format = "png"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    compile: bool = False
    retries: int = Field(2, ge=0)


def plan(run: Run, split: Split, prompts: int | None, per_prompt: int, model: str) -> pa.Table:
    """The rows to make, all columns but the image: same seeds for every model on the eval split, so that
    rounds are compared image by image."""
    settings = sampling(run)
    texts = chosen(run, "eval" if split == "eval" else "train", prompts)
    where = ["eval"] if split == "eval" else [split, run.round, run.arm]
    sampler = settings.model_dump(include={"steps", "guidance", "width", "height", "format"}) | away(settings)
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


def away(settings: Generate) -> dict[str, Any]:
    """What of the sampling the negative guidance decides: nothing where there is none."""
    if settings.negative is None:
        return {}
    return {"negative": [models.revision(settings.negative.model), settings.negative.weight]}


class Sampler:
    """Images from texts and seeds, in two halves for two threads: the denoiser works on one batch while the
    autoencoder works on the batch before. ``texts``: those that will be asked for, in their order."""

    def __init__(self, pipe: Any, settings: Generate, texts: Iterable[str] = ()) -> None:
        from jobs.families import Conditions

        self.pipe, self.settings = pipe, settings
        self.conditions = Conditions(pipe, texts, forget=True)
        self.turn = RLock()  # a pipeline's scheduler counts its steps: one batch at a time
        self.fits: int | None = None  # how many images the memory has proved too small for, halved

    def __call__(self, texts: list[str], seeds: list[int]) -> np.ndarray:
        """Float images [N, H, W, 3] in [0, 1]; image i depends on text and seed i alone, but for rounding."""
        return self.decode(self.denoise(texts, seeds))

    def denoise(self, texts: list[str], seeds: list[int]) -> Tensor:
        """Their latents [N, C, h, w], on the device."""
        import torch

        with self.turn:
            size = min(self.fits or len(texts), len(texts))
            try:
                parts = [self._denoise(texts[i : i + size], seeds[i : i + size]) for i in range(0, len(texts), size)]
                return torch.cat(parts)
            except torch.OutOfMemoryError as error:
                if size == 1:
                    raise _too_large(error) from error
                self.fits = -(-size // 2)
            # Outside the handler, whose traceback holds on to the tensors.
            torch.cuda.empty_cache()
            say(f"generate: {size} images at once do not fit into the memory; going on with {self.fits}")
            return self.denoise(texts, seeds)

    def _denoise(self, texts: list[str], seeds: list[int]) -> Tensor:
        import torch

        settings, pipe, kind = self.settings, self.pipe, self.conditions.family
        told = self.conditions(texts)
        if kind.guided and settings.guidance > 1:
            nothing = self.conditions([None] * len(texts))
            told |= {f"negative_{key}": value for key, value in nothing.items()}
        made = pipe(
            **{key: value.to(pipe._execution_device) for key, value in told.items()},
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            width=settings.width,
            height=settings.height,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            output_type="latent",
        ).images
        return kind.unpack(pipe, made, settings.height, settings.width)

    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents [N, C, h, w] → float images [N, H, W, 3] in [0, 1]."""
        import torch

        from jobs.latents import decode

        with suppress(torch.OutOfMemoryError):
            return decode(self.pipe.vae, latents)
        with self.turn:  # beside a batch that is denoised they did not fit; alone they may
            torch.cuda.empty_cache()
            try:
                return decode(self.pipe.vae, latents)
            except torch.OutOfMemoryError as error:
                raise _too_large(error) from error


def _too_large(error: Exception) -> WinnowError:
    return WinnowError(
        f"generate: one image does not fit into the memory ({str(error).splitlines()[0][:120]}); lower generate.width "
        "and height, or take a smaller model or generate.dtype"
    )


def sampler(model: str, settings: Generate, texts: Iterable[str] = ()) -> Sampler:
    """The sampler of a model, in the precision and layout that the settings ask for."""
    import torch

    from jobs.families import family

    pipe = models.load(model, getattr(torch, settings.dtype) if settings.dtype else None)
    kind = family(pipe)
    network = kind.model(pipe)
    fits = kind.patch * pipe.vae_scale_factor
    for key, side in (("width", settings.width), ("height", settings.height)):
        if side and side % fits:
            raise WinnowError(f"generate.{key} is {side}: this model takes multiples of {fits}; give one")
    if pipe.vae.dtype == torch.float16 and pipe.vae.config.get("force_upcast"):
        pipe.vae.float()  # SDXL's overflows in float16
    if pipe.device.type == "cuda":
        network.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    if settings.negative:
        from jobs.negative import lead_away

        lead_away(pipe, settings.negative)
    if settings.compile:
        kind.model(pipe).compile()
    return Sampler(pipe, settings, texts)


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
    prompts' images of ``model``. Returns whether all of them are there, not left to other shards."""
    settings = run.recipe.generate
    if split == "train" and settings.source:
        from jobs.own import take_in

        return take_in(run, settings)
    if split == "reference":
        run, prompts, per_prompt = run.base(), run.recipe.reference.prompts, run.recipe.reference.images_per_prompt
    elif split == "eval":
        prompts, per_prompt = run.recipe.evaluate.prompts, run.recipe.evaluate.images_per_prompt
    else:
        prompts, per_prompt = settings.prompts, settings.images_per_prompt
    settings = sampling(run)
    model = model or (run.recipe.model if run.arm == BASE else run.start_model())
    revision = models.revision(model)
    rows = plan(run, split, prompts, per_prompt, revision)
    # How many images of how many prompts stands in the rows: arms that differ in it share the base's samples.
    apart = {"prompts", "images_per_prompt", "retries", "compile", "source", "column", "negative"}
    dtype = settings.dtype or str(devices.dtype())
    making = settings.model_dump(mode="json", exclude=apart) | {"dtype": dtype} | away(settings)
    spec = ["generate", revision, making, run.round, run.arm, split]
    folders = {"round": run.round, "arm": run.arm, "split": split}
    work = units("samples", folders, rows, settings.batch, spec)
    return complete(run, f"generate {split}", "samples", work, lambda: _work(run, split, model, revision, rows))


def column(model: str, revision: str) -> str:
    """A model as the rows that it made name it: its Hub id or the name of its folder, and its revision."""
    return f"{model if models.locate(model) == model else models.locate(model).name}@{revision}"


def _work(run: Run, split: Split, model: str, revision: str, planned: pa.Table) -> Work:
    settings = sampling(run)
    draw = sampler(model, settings, planned["prompt"].to_pylist())
    name = column(model, revision)

    def files(rows: list[dict[str, Any]], latents: Tensor) -> pa.Table:
        done = []
        for row in sound(draw, rows, latents):
            pixels = row.pop("pixels")
            file = {"bytes": encode(pixels, settings.format), "path": f"{row['sample_id']}.{settings.format}"}
            height, width = pixels.shape[:2]
            done.append(row | {"round": run.round, "arm": run.arm, "split": split, "model": name,
                               "width": width, "height": height, "image": file})  # fmt: skip
        return pa.Table.from_pylist(done, schema=TABLES["samples"].schema)

    def work(some: pa.Table) -> Made:
        rows = some.to_pylist()
        finish = partial(files, rows, draw.denoise([row["prompt"] for row in rows], [row["seed"] for row in rows]))
        # On a CPU the two halves would take the cores from each other, and threads that wait for each other lose both.
        return finish() if devices.device() == "cpu" else finish

    return work
