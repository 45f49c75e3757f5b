"""Stage ``train``: fine-tune the round's start model on its weighted shards."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from jobs import models
from jobs.export import shards_of
from jobs.run import Run
from schemas.errors import WinnowError
from schemas.ids import digest
from schemas.settings import Settings
from storage.commit import commit_folder

if TYPE_CHECKING:
    from jobs.trainer import Example


class Train(Settings):
    """``method`` lora trains layers of ``rank`` on the attention (alpha is the rank), full every weight of the
    denoiser, none nothing: the round ends with its shards. ``size``: images are cut to a square of that many pixels
    (null: they are all of one size). ``batch`` rows make a step; ``micro_batch`` of them are on the device at once
    (null: all), and ``checkpointing`` trades time for memory. ``lr`` rises over ``lr_warmup`` steps, and decays to
    ``lr`` × ``lr_floor`` over ``steps``; ``ema`` 0 keeps the last weights; ``checkpoint``: steps between two resumable
    states, 0 for none. ``prompt_dropout`` keeps classifier-free guidance alive."""

    method: Literal["full", "lora", "none"] = "full"
    size: int | None = Field(None, ge=8, multiple_of=8)
    rank: int = Field(16, ge=1)
    steps: int = Field(750, ge=1)
    batch: int = Field(12, ge=1)
    micro_batch: int | None = Field(None, ge=1)
    checkpointing: bool = False
    lr: float = Field(1e-6, gt=0)
    lr_floor: float = Field(1.0, ge=0, le=1)
    lr_warmup: int = Field(0, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    ema: float = Field(0.0, ge=0, lt=1)
    clip: float = Field(1.0, gt=0)
    prompt_dropout: float = Field(0.0, ge=0, le=1)
    checkpoint: int = Field(100, ge=0)


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
    from jobs.trainer import Example

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
    """Train unless the model of exactly these shards, start and settings is there; resume where it was stopped."""
    if run.recipe.train.method == "none":
        raise WinnowError("train.method is 'none': nothing is trained; set it to 'full' or 'lora'")
    name = _name(run)
    if (run.store / name).exists():
        return
    import torch

    from jobs import lora
    from jobs.trainer import fine_tune

    progress = run.store / "checkpoints" / f"{Path(name).name}.pt"
    settings, seed = run.recipe.train, run.seed("train", run.round)
    base, adapter = models.layers(run.start_model())
    if settings.method == "full":
        # In float32 whatever it samples in: the small steps of training are lost in bfloat16.
        pipe = models.load(run.start_model(), torch.float32)
        save = pipe.save_pretrained
        if adapter:
            raise WinnowError(f"train.method 'full' cannot go on from the LoRA {adapter}; set train.method to 'lora'")
    else:
        pipe = models.load(base)
        lora.attach(pipe, settings.rank, run.seed("lora"), adapter)
        save = partial(lora.save, pipe, base=lora.Base(base, models.revision(base), settings.rank))
    fine_tune(pipe, examples(run), settings, seed, progress, f"train {run.arm} round {run.round}")
    commit_folder(run.store, name, save)
    progress.unlink(missing_ok=True)
