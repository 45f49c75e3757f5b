"""Stage ``train``: fine-tune the round's start model on its weighted shards."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from jobs import devices, models, trainset
from jobs.export import shards_of
from jobs.images import SIDE
from jobs.progress import say
from jobs.prompts import chosen
from jobs.run import Run
from jobs.training.buckets import Buckets
from schemas.errors import WinnowError
from schemas.ids import digest
from schemas.settings import Settings
from schemas.tables import TABLES, fingerprint
from storage.commit import commit, commit_folder
from storage.content import content_of, sha256_of
from storage.layout import part_path
from storage.places import parts_of, rows_at
from storage.snapshot import Spent, latest, seal

if TYPE_CHECKING:
    import torch

    from jobs.training.cache import Example


AT_ONCE = 64  # rows of a shard in memory
WAITING = 0.05  # the share of time spent waiting for data from which it is said


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
    ``neon`` w goes away from what training on unselected samples of its own does to a model (Neon, arXiv 2510.03597).
    With ``neon_on`` "selection", for a selection that is none: start − w · (trained − start). With "candidates" a
    second model is trained from the start, as long, on as many of the round's candidates, drawn at random and of
    weight 1, and the result is trained + w · (start − second).
    ``interpolate`` a goes a part of the way: start + a · (trained − start), which lies flatter than where the round's
    training ends (WiSE-FT, arXiv 2109.01903, section 3). Null: the whole of it.
    ``checkpoint``: steps between two resumable states, 0 for none. ``watch``: steps between two looks, 0 for none: at
    the loss of a share ``validation`` of the samples, the same ones in every round, which are held back, and at a sheet
    of ``sheet`` held-out prompts.
    """

    method: Literal["full", "lora", "none"] = "full"
    size: int | None = Field(None, ge=8, le=SIDE, multiple_of=8)
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
    neon_on: Literal["selection", "candidates"] = "selection"
    interpolate: float | None = Field(None, gt=0, lt=1)
    checkpoint: int = Field(100, ge=0)
    watch: int = Field(0, ge=0)
    validation: float = Field(0.0, ge=0, lt=1)
    sheet: int = Field(8, ge=0)

    @model_validator(mode="after")
    def _together(self) -> Train:
        if self.window and not 0 <= self.window[0] < self.window[1]:
            raise WinnowError(f"train.window is {list(self.window)}; give two timesteps, low and high")
        if self.validation and not self.watch:
            raise WinnowError(f"train.validation is {self.validation}, but nobody looks; set train.watch to some steps")
        if self.neon and self.interpolate:
            raise WinnowError("train.neon and train.interpolate both say how far a round goes; set one of them to null")
        if self.neon and self.neon_on == "candidates" and self.method == "lora":
            # The sum of two low-rank products is of twice their rank.
            raise WinnowError("train.neon_on 'candidates' adds two trainings up, which a LoRA cannot hold; set "
                              "train.method to 'full', or train.neon_on to 'selection'")
        return self


def _name(run: Run) -> str:
    shards = [sha for _, sha in shards_of(run)]
    # What changes memory or what is seen, and nothing of the weights but rounding, may change in the middle.
    apart = {"micro_batch", "checkpointing", "checkpoint", "watch", "sheet"}
    settings = run.recipe.train.model_dump(mode="json", exclude=apart)
    if settings["interpolate"] is None:  # models that were trained before there was this setting keep their names
        del settings["interpolate"]
    spec = ["train", models.revision(run.start_model()), shards, settings]
    return f"models/{run.arm}-r{run.round}-{digest([*spec, run.recipe.seed], 12)}"


def trained_model(run: Run) -> str:
    """The folder of the model that this round trained (the base's name in round 0)."""
    if run.round == 0 or run.recipe.train.method == "none":
        return run.start_model()
    name = _name(run)
    folder = run.store / name
    if not folder.exists():
        raise WinnowError(f"{folder}: round {run.round} of {run.arm!r} is not trained; run 'winnow train' first")
    run.sealed_model(name)
    return str(folder)


def examples(run: Run) -> Iterator[Example]:
    """The rows of the round's shards, whose SHA-256 is checked first; a few of them in memory.

    Raises WinnowError where a shard is missing or changed, or a weight is no number of 0 or more.
    """
    from jobs.training.cache import Example

    for path, sha in shards_of(run):
        if not path.exists():
            raise WinnowError(f"{path}: the shard is missing; remove its folder and run 'winnow export' again")
        if sha256_of(path) != sha:
            raise WinnowError(f"{path}: the shard is not as exported; remove its folder and export again")
        with pq.ParquetFile(path) as shard:
            for batch in shard.iter_batches(AT_ONCE, columns=["sample_id", "text", "weight", "image"]):
                for row in batch.to_pylist():
                    if not 0 <= row["weight"] < math.inf:
                        raise WinnowError(
                            f"{path}: sample {row['sample_id']} has the weight {row['weight']}, allowed are numbers of "
                            "0 or more; weigh and export again"
                        )
                    yield Example(row["sample_id"], row["text"], row["weight"], row["image"]["bytes"])


def train(run: Run) -> None:
    """Train unless the model of exactly these shards, start and settings is there; resume where it was stopped.

    Several processes of ``accelerate launch`` train one model together; the first of them writes.
    """
    if run.recipe.train.method == "none":
        raise WinnowError("train.method is 'none': nothing is trained; set it to 'full' or 'lora'")
    name = _name(run)
    progress = run.store / "checkpoints" / f"{Path(name).name}.safetensors"
    if (run.store / name).exists():
        if run.recipe.train.watch:
            say(f"{name}: is trained already, and train.watch looks at models while they train")
        # Its row may be lost, or a run was killed between the two.
        if _row_is_lost(run, name) or not run.sealed_model(name):
            _seal(run, name)
        _clear(progress)
        return
    began = time.perf_counter()
    import torch

    from jobs.training.cache import build
    from jobs.training.loop import check, fine_tune
    from jobs.training.watch import Watch

    group = devices.processes()
    settings, seed = run.recipe.train, run.seed("train", run.round)
    pipe, save = _start(run)
    check(pipe, settings)
    with group.main_process_first():  # it encodes what is not cached yet
        data = build(pipe, examples(run), run.store / "cache", settings.size, settings.buckets)
    turned = _turned(pipe)
    begun = [p.detach().to("cpu", copy=True) for p in turned] if settings.neon or settings.interpolate else []
    watch = None
    if settings.watch:
        texts = chosen(run, "eval", settings.sheet)["text"].to_pylist() if settings.sheet else []
        watch = Watch(run.store, f"reports/{Path(name).name}", settings.watch, texts, run.recipe.generate)
    else:
        _make_room(pipe)
    label = f"train {run.arm} round {run.round}"
    waited = fine_tune(pipe, data, settings, seed, progress, label, watch)
    if waited > WAITING:
        say(f"{label}: {waited:.0%} of the time went into waiting for data; is the store on a slow disk?")
    if settings.neon and settings.neon_on == "candidates":
        second = _self_trained(run, len(data), progress)
        with torch.no_grad():
            for now, start, other in zip(turned, begun, second, strict=True):
                now.add_((start - other).to(now.device), alpha=settings.neon)
    elif begun:  # a part of the way, or the other way
        way = settings.interpolate or -(settings.neon or 0.0)
        with torch.no_grad():
            for now, start in zip(turned, begun, strict=True):
                start = start.to(now.device)
                now.copy_(start + way * (now - start))
    if settings.neon and not all(bool(p.isfinite().all()) for p in turned):
        raise WinnowError(f"train: weights are not finite after a step of Neon of {settings.neon:g}; lower train.neon")
    if group.is_main_process:
        commit_folder(run.store, name, save)
        _seal(run, name, Spent("train", run.arm, run.round, round(time.perf_counter() - began, 3)))
        _clear(progress)
    group.wait_for_everyone()


def _seal(run: Run, name: str, spent: Spent | None = None) -> None:
    """Seal what the model's folder holds. One that was trained again, after it was lost, may differ in its last bits
    and is sealed besides."""
    folder, schema = run.store / name, TABLES["models"].schema
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    row = {"arm": run.arm, "round": run.round, "model": name, "revision": content_of(folder), "bytes": size}
    spec = digest([name, row["revision"], fingerprint(schema)])
    path = part_path("models", {"round": run.round, "model": Path(name).name}, "00000", spec)
    part = commit(run.store, "models", path, pa.Table.from_pylist([row], schema=schema))
    seal(run.store, "train", [part], run.recipe.model_dump(mode="json"), spent)


def _row_is_lost(run: Run, name: str) -> bool:
    """Whether the part that tells of a model was sealed and is not there."""
    place = part_path("models", {"round": run.round, "model": Path(name).name}, "", "").rpartition("/")[0]
    parts = (part.path for part in latest(run.store).parts if part.path.rpartition("/")[0] == place)
    return any(not (run.store / path).exists() for path in parts)


def _turned(pipe: Any) -> list[torch.nn.Parameter]:
    """What neon and interpolation move. Of a LoRA's B·A, which starts at nothing, moving B moves all."""
    from jobs.families import family

    return [p for n, p in family(pipe).model(pipe).named_parameters() if p.requires_grad and "lora_A" not in n]


def _self_trained(run: Run, count: int, progress: Path) -> list[torch.Tensor]:
    """The round's start after training on ``count`` of its own candidates, whatever they are worth; on the CPU."""
    from jobs.training.cache import build
    from jobs.training.loop import fine_tune

    group, settings, seed = devices.processes(), run.recipe.train, run.seed("neon", run.round)
    pipe, _ = _start(run)
    with group.main_process_first():
        data = build(pipe, unselected(run, count), run.store / "cache", settings.size, settings.buckets)
    _make_room(pipe)
    kept = progress.with_name(f"{progress.stem}-second{progress.suffix}")
    fine_tune(pipe, data, settings, seed, kept, f"train {run.arm} round {run.round}, second model")
    if group.is_main_process:
        _clear(kept)
    return [p.detach().cpu() for p in _turned(pipe)]


def unselected(run: Run, count: int) -> Iterator[Example]:
    """``count`` of the round's candidates (all, if there are fewer), drawn at random, of weight 1."""
    from jobs.training.cache import Example

    paths = parts_of(latest(run.store))
    for stored in rows_at(run.store, paths, trainset.at_random(run, paths, count), ["sample_id", "prompt", "image"]):
        for row in stored.to_pylist():
            yield Example(row["sample_id"], row["prompt"], 1.0, row["image"]["bytes"])


def _save(pipe: Any, folder: Path) -> None:
    for name, part in pipe.components.items():
        if name.startswith("tokenizer") and hasattr(part, "backend_tokenizer"):
            # A call leaves its padding there, and a cache that knows every text calls nothing: the same model has to
            # be the same files.
            part.backend_tokenizer.no_padding()
            part.backend_tokenizer.no_truncation()
    pipe.save_pretrained(folder)
    # Where its parts were loaded from is no property of a model, and would give equal ones different revisions.
    for file in folder.rglob("*.json"):
        held = json.loads(file.read_text())
        if isinstance(held, dict) and held.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(held, indent=2) + "\n")


def _clear(progress: Path) -> None:
    """Remove the state of a training that is done, and what a killed process left of it."""
    from jobs.training.state import drafts_of

    for file in (progress, *drafts_of(progress)):
        file.unlink(missing_ok=True)


def _make_room(pipe: Any) -> None:
    """Take from the GPU what the trainer has in its cache already: it may be larger than what is trained."""
    if pipe.device.type == "cuda":
        for name, part in pipe.components.items():
            if part is not None and name.startswith(("vae", "text_encoder")):
                part.to("cpu")


def _start(run: Run) -> tuple[Any, Callable[[Path], None]]:
    """The pipeline that the round starts from, its trainable weights in float32, and what saves them."""
    import torch

    from jobs import lora

    settings = run.recipe.train
    start = run.start_model()
    base, adapter = models.layers(start)
    if settings.method == "full":
        if adapter:
            raise WinnowError(f"train.method 'full' cannot go on from the LoRA {adapter}; set train.method to 'lora'")
        # In float32 whatever it samples in: the small steps of training are lost in bfloat16.
        pipe = models.load(start, torch.float32)
        return pipe, partial(_save, pipe)
    for name in ("neon", "interpolate"):
        if adapter and getattr(settings, name):
            raise WinnowError(f"train.{name} cannot move a LoRA that goes on from another; set it to null")
    own = getattr(torch, settings.precision) if settings.precision else devices.dtype()
    pipe = models.load(base, {"vae": torch.float32, "default": own})
    lora.attach(pipe, settings.rank, run.seed("lora"), adapter)
    return pipe, partial(lora.save, pipe, base=lora.Base(base, models.revision(base), settings.rank))
