"""The training loop: weighted denoising loss over cached latents, resumable to the bit.

The loss of a batch of n rows is

    Σ w_i · λ(t_i) · ‖prediction_i − target_i‖² / (D · total)

with w the sample weight (RSIDiff, equation 6), λ 1 or min-SNR, D the numbers in a latent, and by ``normalise``

    none    total = n: weight 2 counts as the sample twice, weight 0 as its absence from the sum
    mean    total = n · mean of w over the whole set: the same learning rate whatever the weights' level
    batch   total = Σ w of the batch: every step is as long, also where a batch happens to be light

Every random number of ours comes from the seed and the step, so a resumed run draws what an uninterrupted one does, and
processes that share a batch draw what one process does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from jobs import devices
from jobs.families import Condition, family
from jobs.objective import Objective, objective
from jobs.progress import bar
from jobs.training import heap
from jobs.training.cache import Cache
from jobs.training.flat import Flat, averaging
from jobs.training.lanes import Lanes
from jobs.training.loader import Loader, batches
from jobs.training.state import State
from schemas.errors import WinnowError

if TYPE_CHECKING:
    from jobs.train import Train

LOOKS = 4  # timesteps at which a row that is held back is looked at
GRAIN = 2**20  # rows are held back by their ids modulo this
AT_ONCE = 2**24  # numbers of gradients that processes add up in one message


def weighted_loss(prediction: Tensor, target: Tensor, weights: Tensor, total: float) -> tuple[Tensor, Tensor]:
    """Σ w_i ‖prediction_i − target_i‖² / (D · total), a scalar, and each row's own mean square [N]."""
    each = (prediction.float() - target.float()).square().flatten(1).mean(1)
    return (weights * each).sum() / total, each.detach()


def lr_factor(step: int, steps: int, floor: float, warmup: int = 0) -> float:
    """Cosine from 1 down to ``floor``, its first ``warmup`` steps rising linearly from nothing: Adam's first steps
    know no variance yet, and at full rate they undo more of a trained model than the rest can mend."""
    rise = min(1.0, (step + 1) / (warmup + 1))
    return rise * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps)))


@dataclass(frozen=True)
class Batch:
    """This process's share of a step: ``rows`` [n] of the data, and for each its latents, noise [n, C, h, w], timestep
    [n], condition and weight [n]; ``total``: what the loss of the whole batch is divided by."""

    rows: np.ndarray
    latents: Tensor
    noise: Tensor
    t: Tensor
    told: Condition
    weights: Tensor
    total: float

    def _each(self, change: Callable[[Tensor], Tensor], rows: np.ndarray) -> Batch:
        latents, noise, t, weights = map(change, (self.latents, self.noise, self.t, self.weights))
        told = {key: change(value) for key, value in self.told.items()}
        return Batch(rows, latents, noise, t, told, weights, self.total)

    def pinned(self) -> Batch:
        """The same in memory that a GPU reads on its own."""
        return self._each(Tensor.pin_memory, self.rows)

    def part(self, some: slice, device: torch.device) -> Batch:
        """Some of its rows, on the device."""
        return self._each(lambda tensor: tensor[some].to(device, non_blocking=True), self.rows[some])


def check(pipe: Any, settings: Train) -> Objective:
    """What the pipeline's model predicts; WinnowError where it cannot be trained as the settings ask."""
    found = objective(pipe.scheduler)
    found.check(settings.window, settings.min_snr)
    processes = devices.processes().num_processes
    if settings.batch < processes:
        raise WinnowError(f"train.batch is {settings.batch}, for {processes} processes; give at least as many")
    return found


class Trainer:
    """A pipeline's denoiser under training. What of it wants gradients is trained, in place."""

    def __init__(self, pipe: Any, data: Cache, settings: Train, seed: int) -> None:
        self.pipe, self.data, self.settings, self.seed = pipe, data, settings, seed
        self.family, self.objective, self.group = family(pipe), check(pipe, settings), devices.processes()
        if not np.isfinite(data.weights).all() or (data.weights < 0).any() or not (data.weights > 0).any():
            raise WinnowError("train: weights must be finite, at least 0 and not all 0; weigh and export again")
        # By the sample's id, a hash: the same in every round, and for every copy of a row.
        back = data.sample_ids % GRAIN < settings.validation * GRAIN
        if back.all():
            raise WinnowError(
                f"train.validation {settings.validation} holds back all {len(data)} rows; give less, or select more"
            )
        self.held_back, self.kept = np.flatnonzero(back), np.flatnonzero(~back)
        if not (data.weights[self.kept] > 0).any():
            raise WinnowError(
                f"train.validation {settings.validation} holds back every row of a weight above 0; give less, or "
                "select more"
            )
        self.model = self.family.model(pipe).train()
        if settings.checkpointing:
            self.model.enable_gradient_checkpointing()
        self.device = next(self.model.parameters()).device
        self.flat = Flat([p for p in self.model.parameters() if p.requires_grad])
        self.weights = self.flat.whole
        # Without an average the weights stand for it.
        self.average = self.weights.detach().clone() if settings.ema else self.weights.detach()
        self.optimiser = torch.optim.AdamW([self.weights], settings.lr, weight_decay=settings.weight_decay, fused=True)
        self.state = State(self.weights, self.average, self.optimiser)
        self.lanes = Lanes(pipe, self.family, self.flat, settings.micro_batch or settings.batch)

    def loss(self, batch: Batch, pipe: Any = None) -> tuple[Tensor, Tensor]:
        """The loss of these rows, and each row's own mean square [N]; by the twin ``pipe`` of a lane."""
        settings, goal = self.settings, self.objective
        t = batch.t
        noisy, target = goal.noisy(batch.latents, batch.noise, t), goal.target(batch.latents, batch.noise, t)
        precision = getattr(torch, settings.precision) if settings.precision else devices.dtype()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
            prediction = self.family.predict(pipe or self.pipe, noisy, t, batch.told)
        weights = batch.weights if settings.min_snr is None else batch.weights * goal.min_snr(t, settings.min_snr)
        return weighted_loss(prediction, target, weights, batch.total)

    def batch(self, step: int, rows: np.ndarray) -> Batch:
        """This process's share of the step: all processes draw for the whole batch and take their own rows."""
        data, settings = self.data, self.settings
        random = torch.Generator().manual_seed((self.seed + step) % 2**63)
        noise = torch.randn((len(rows), *data.shapes[data.bucket[rows[0]]]), generator=random)
        t = self.objective.times(torch.randn(len(rows), generator=random), settings.window, settings.times)
        dropped = torch.rand(len(rows), generator=random) < settings.prompt_dropout
        weights = torch.from_numpy(data.weights[rows])
        level = {"none": 1.0, "mean": float(data.weights.mean()), "batch": float(weights.mean()) or 1.0}
        mine = slice(self.group.process_index, None, self.group.num_processes)
        found = Batch(
            rows[mine], data.latents(rows[mine]), noise[mine], t[mine],
            data.conditions(rows[mine], dropped[mine].numpy()), weights[mine], len(rows) * level[settings.normalise],
        )  # fmt: skip
        return found.pinned() if self.device.type == "cuda" else found

    def fixed(self, row: int) -> Batch:
        """One row at LOOKS timesteps spread over the window, with noise that is always the same: for validation."""
        rows = np.full(LOOKS, row)
        random = torch.Generator().manual_seed(int(self.data.sample_ids[row]) % 2**63)
        noise = torch.randn((LOOKS, *self.data.shapes[self.data.bucket[row]]), generator=random)
        draw = torch.special.ndtri((torch.arange(LOOKS) + 0.5) / LOOKS)
        t = self.objective.times(draw, self.settings.window, self.settings.times)
        told = self.data.conditions(rows, np.zeros(LOOKS, bool))
        return Batch(rows, self.data.latents(rows), noise, t, told, torch.ones(LOOKS), LOOKS)

    def _passes(self, batch: Batch, pipe: Any, rows: slice) -> tuple[Tensor, Tensor]:
        """Forth and back for some rows of the batch."""
        loss, each = self.loss(batch.part(rows, self.device), pipe)
        loss.backward()
        return loss.detach(), each

    def step(self, step: int, batch: Batch) -> float:
        """One step of the optimiser; returns the whole batch's loss."""
        settings = self.settings
        for some in self.optimiser.param_groups:
            some["lr"] = settings.lr * lr_factor(step, settings.steps, settings.lr_floor, settings.lr_warmup)
        self.optimiser.zero_grad(set_to_none=False)
        if self.lanes.drops:  # its masks are the step's own, so that a resumed run draws the same
            torch.manual_seed((self.seed + step + (self.group.process_index << 40)) % 2**63)
        total, bad = torch.zeros(1, device=self.device), []
        n = len(batch.rows)
        size = settings.micro_batch or n
        for start in range(0, n, size):
            for loss, each in self.lanes(partial(self._passes, batch), slice(start, min(start + size, n))):
                total += loss
                bad.append(each)
        value = float(self._sum(total))
        if not math.isfinite(value):
            self._refuse(step, value, batch.rows[~torch.cat(bad).isfinite().cpu().numpy()])
        self._sum(self.weights.grad)
        norm = float(nn.utils.clip_grad_norm_([self.weights], settings.clip))
        if not math.isfinite(norm):
            raise WinnowError(
                f"train: the gradient is {norm} at step {step}, with a loss of {value:.4g}; what was kept before "
                "stays; lower train.lr, or set train.precision to float32"
            )
        self.optimiser.step()
        if settings.ema:
            with torch.no_grad():
                self.average.lerp_(self.weights, averaging(settings.ema, step))
        return value

    def check(self, step: int) -> None:
        """WinnowError where a step has spoilt the weights: such a state is neither kept nor the end."""
        if not all(bool(whole.isfinite().all()) for whole in (self.weights, self.average)):
            raise WinnowError(
                f"train: weights are not finite after step {step}; what was kept before stays; lower train.lr"
            )

    def _refuse(self, step: int, value: float, rows: np.ndarray) -> None:
        bad = list(dict.fromkeys(self.data.sample_ids[rows].tolist()))  # a small set comes more than once in a batch
        names = ", ".join(map(str, bad[:5]))
        which = f"samples {names}{', …' if len(bad) > 5 else ''}" if bad else "no single one of its samples here"
        raise WinnowError(
            f"train: the loss is {value} at step {step} ({which}); what was kept before stays; lower train.lr, or look "
            "at these samples"
        )

    def _sum(self, whole: Tensor) -> Tensor:
        """Summed over the processes, in place."""
        if self.group.num_processes > 1:
            from accelerate.utils import reduce

            for part in whole.split(AT_ONCE):
                part.copy_(reduce(part, "sum"))
        return whole

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the model has the weights that training would end with."""
        held = self.weights.detach().clone() if self.settings.ema else None
        self.take_average()
        self.model.eval()
        try:
            yield
        finally:
            if held is not None:
                with torch.no_grad():
                    self.weights.copy_(held)
            self.model.train()

    @torch.no_grad()
    def take_average(self) -> None:
        """Give the model the averaged weights."""
        if self.settings.ema:
            self.weights.copy_(self.average)


#: Called after each step with the trainer, the number of steps done and the step's loss.
Watch = Callable[[Trainer, int, float], None]


def fine_tune(
    pipe: Any, data: Cache, settings: Train, seed: int, progress: Path, label: str = "train", watch: Watch | None = None
) -> float:
    """Fine-tune in place what of the pipeline's denoiser wants gradients; state is kept in the file ``progress``.
    Returns the share of the time that steps waited for data.

    Started by ``accelerate launch`` or ``torchrun``, every process does its share of each batch, and all end with the
    same weights. Raises WinnowError where a weight is negative or not finite, all are zero, or the loss is not finite;
    the state last kept stays.
    """
    trainer = Trainer(pipe, data, settings, seed)
    first = trainer.state.resume(progress)
    begun = time.perf_counter()
    rows = (trainer.kept[some] for some in batches(data.bucket[trainer.kept], settings.batch, seed, first))
    steps = range(first, settings.steps)
    shares = (trainer.batch(step, some) for step, some in zip(steps, rows, strict=False))
    shown = bar(label, settings.steps, not trainer.group.is_main_process)
    with heap.kept(), trainer.lanes, Loader(shares) as loader, shown as advance:
        advance(first)
        for step, batch in zip(steps, loader, strict=True):
            loss = trainer.step(step, batch)
            done = step + 1
            advance()
            if not trainer.group.is_main_process:
                continue
            if settings.checkpoint and done % settings.checkpoint == 0 and done < settings.steps:
                trainer.check(done)
                trainer.state.keep(progress, done)
            if watch:
                watch(trainer, done, loss)
    trainer.check(settings.steps)
    trainer.take_average()
    trainer.flat.release()
    trainer.model.eval()
    return loader.waited / max(time.perf_counter() - begun, 1e-9)
