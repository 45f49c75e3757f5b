"""Stage ``train``: fine-tune the round's start model on its weighted shards."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from jobs import devices, models
from jobs.export import shards_of
from jobs.prompts import chosen
from jobs.run import Run
from jobs.training.buckets import Buckets
from schemas.errors import WinnowError
from schemas.ids import digest
from schemas.settings import Settings
from storage.commit import commit_folder

if TYPE_CHECKING:
    from jobs.training.cache import Example


class Train(Settings):
    """How a round's model is trained.

    ``method``: "lora" trains layers of ``rank`` on the attention (alpha is the rank), "full" every weight of the
    denoiser, "none" nothing: the round ends with its shards.
    ``size``: images are cut to a square of that many pixels (null: they are all of one size). ``buckets``: to one of
    several shapes of that area, the nearest to their own (without ``size``: batches are of images of one size each).
    ``batch`` rows make a step; ``micro_batch`` of them are on a device at once (null: all), and ``checkpointing``
    trades time for memory. ``precision`` of the passes, null: bfloat16 on a GPU that has it; what is trained is kept
    in float32.
    ``lr`` rises over ``lr_warmup`` steps and decays to ``lr`` × ``lr_floor`` over ``steps``; ``ema`` 0 keeps the last
    weights.
    ``window``: timesteps [lo, hi) of the pipeline that are trained, [0, 500] for late steps (null: all). ``times``:
    how they are drawn, null: logit-normal for a flow, else uniform. ``min_snr``: γ of min-SNR weighting.
    ``normalise``: what the weighted sum is divided by, see jobs.training.loop.
    ``prompt_dropout`` keeps classifier-free guidance alive.
    ``neon`` w: go from the start the other way, start − w · (trained − start), for a model that was trained on its own
    unselected samples (Neon, arXiv 2510.03597).
    ``checkpoint``: steps between two resumable states, 0 for none. ``watch``: steps between two looks at the loss of
    ``validation`` rows that are held back and at a sheet of ``sheet`` held-out prompts, 0 for none.
    """

    method: Literal["full", "lora", "none"] = "full"
    size: int | None = Field(None, ge=8, multiple_of=8)
    buckets: Buckets | None = None
    rank: int = Field(16, ge=1)
    steps: int = Field(750, ge=1)
    batch: int = Field(12, ge=1)
    micro_batch: int | None = Field(None, ge=1)
    checkpointing: bool = False
    precision: Literal["float32", "bfloat16"] | None = None
    lr: float = Field(1e-6, gt=0)
    lr_floor: float = Field(1.0, ge=0, le=1)
    lr_warmup: int = Field(0, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    ema: float = Field(0.0, ge=0, lt=1)
    clip: float = Field(1.0, gt=0)
    window: tuple[int, int] | None = None
    times: Literal["uniform", "logit-normal"] | None = None
    min_snr: float | None = Field(None, gt=0)
    normalise: Literal["none", "mean", "batch"] = "none"
    prompt_dropout: float = Field(0.0, ge=0, le=1)
    neon: float | None = Field(None, gt=0)
    checkpoint: int = Field(100, ge=0)
    watch: int = Field(0, ge=0)
    validation: int = Field(0, ge=0)
    sheet: int = Field(8, ge=0)


def _name(run: Run) -> str:
    shards = [sha for _, sha in shards_of(run)]
    spec = ["train", models.revision(run.start_model()), shards, run.recipe.train.model_dump(mode="json")]
    return f"models/{run.arm}-r{run.round}-{digest([*spec, run.recipe.seed], 12)}"


def trained_model(run: Run) -> str:
    """The folder of the model that this round trained (the base's name in round 0)."""
    if run.round == 0 or run.recipe.train.method == "none":
        return run.start_model()
    folder = run.store / _name(run)
    if not folder.exists():
        raise WinnowError(f"{folder}: round {run.round} of {run.arm!r} is not trained; run 'winnow train' first")
    return str(folder)


def examples(run: Run) -> list[Example]:
    """The rows of the round's shards, checked against their SHA-256."""
    from jobs.training.cache import Example

    rows = []
    for path, sha in shards_of(run):
        if not path.exists():
            raise WinnowError(f"{path}: the shard is missing; remove its folder and run 'winnow export' again")
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha:
                raise WinnowError(f"{path}: the shard is not as exported; remove its folder and export again")
        shard: pa.Table = pq.read_table(path, columns=["sample_id", "text", "weight", "image"])
        rows += [Example(r["sample_id"], r["text"], r["weight"], r["image"]["bytes"]) for r in shard.to_pylist()]
    return rows


def train(run: Run) -> None:
    """Train unless the model of exactly these shards, start and settings is there; resume where it was stopped.

    Several processes of ``accelerate launch`` train one model together; the first of them writes.
    """
    if run.recipe.train.method == "none":
        raise WinnowError("train.method is 'none': nothing is trained; set it to 'full' or 'lora'")
    name = _name(run)
    if (run.store / name).exists():
        return
    import torch

    from jobs.families import family
    from jobs.training.cache import build
    from jobs.training.loop import fine_tune
    from jobs.training.watch import Watch

    group = devices.processes()
    progress = run.store / "checkpoints" / f"{Path(name).name}.safetensors"
    settings, seed = run.recipe.train, run.seed("train", run.round)
    pipe, save = _start(run)
    with group.main_process_first():  # it encodes what is not cached yet
        data = build(pipe, examples(run), run.store / "cache", settings.size, settings.buckets)
    # Of B·A, which starts at nothing, turning B turns all.
    turned = [p for n, p in family(pipe).model(pipe).named_parameters() if p.requires_grad and "lora_A" not in n]
    begun = [p.detach().clone() for p in turned] if settings.neon else []
    watch = None
    if settings.watch:
        texts = chosen(run, "eval", settings.sheet)["text"].to_pylist() if settings.sheet else []
        watch = Watch(run.store, f"reports/{Path(name).name}", settings.watch, texts, run.recipe.generate)
    fine_tune(pipe, data, settings, seed, progress, f"train {run.arm} round {run.round}", watch)
    with torch.no_grad():
        for now, start in zip(turned if begun else [], begun, strict=True):
            now.copy_(start - settings.neon * (now - start))
    if group.is_main_process:
        commit_folder(run.store, name, save)
        progress.unlink(missing_ok=True)
    group.wait_for_everyone()


def _start(run: Run) -> tuple[Any, Callable[[Path], None]]:
    """The pipeline that the round starts from, its trainable weights in float32, and what saves them."""
    import torch

    from jobs import lora

    settings = run.recipe.train
    base, adapter = models.layers(run.start_model())
    if settings.method == "full":
        if adapter:
            raise WinnowError(f"train.method 'full' cannot go on from the LoRA {adapter}; set train.method to 'lora'")
        # In float32 whatever it samples in: the small steps of training are lost in bfloat16.
        pipe = models.load(run.start_model(), torch.float32)
        return pipe, pipe.save_pretrained
    if adapter and settings.neon:
        raise WinnowError("train.neon cannot turn round a LoRA that goes on from another; set it to null")
    pipe = models.load(base)
    lora.attach(pipe, settings.rank, run.seed("lora"), adapter)
    return pipe, partial(lora.save, pipe, base=lora.Base(base, models.revision(base), settings.rank))
