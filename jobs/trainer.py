"""The trainer: weighted denoising loss over a pipeline's latents, resumable to the bit.

The loss of a batch of n is Σ w_i · ‖prediction_i − target_i‖² / (n · D), w the sample weight (RSIDiff,
equation 6) and D the numbers in a latent: weights are not renormalised, so weight 2 counts as the sample twice
and weight 0 as its absence from the sum. What is predicted follows the scheduler: noise (ε), velocity (v) or
flow. Every random number comes from the seed and the step, so a resumed run draws what an uninterrupted one does.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from jobs import devices
from jobs.families import Conditions, family
from jobs.images import array, decode, square
from jobs.latents import encode
from jobs.progress import bar
from schemas.errors import WinnowError
from storage.durable import storage_errors

if TYPE_CHECKING:
    from jobs.train import Train

Objective = Literal["epsilon", "v_prediction", "flow"]


@dataclass(frozen=True)
class Example:
    """One training row: an image file with its text and weight."""

    sample_id: int
    text: str
    weight: float
    file: bytes


def objective(scheduler: Any) -> Objective:
    """What the pipeline's model predicts, from its scheduler's configuration."""
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    if kind in ("epsilon", "v_prediction"):
        return kind
    if kind == "flow_prediction":
        return "flow"
    raise WinnowError(f"model: its scheduler predicts {kind!r}; epsilon, v_prediction and flow can be trained")


def noised(
    kind: Objective, scheduler: Any, x: Tensor, noise: Tensor, draw: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, their timesteps [N] and the training target, from standard normal draws [N].

    ε and v: t uniform over the training steps, target ε or √ᾱ·ε − √(1−ᾱ)·x. Flow: σ = sigmoid(draw), logit-normal
    (arXiv 2403.03206, eq. 19), x_σ = (1−σ)·x + σ·ε, t = 1000·σ, target ε − x.
    """
    shape = (-1,) + (1,) * (x.ndim - 1)
    steps = scheduler.config.num_train_timesteps
    if kind == "flow":
        sigma = torch.sigmoid(draw)
        return torch.lerp(x, noise, sigma.view(shape)), sigma * steps, noise - x
    uniform = torch.special.ndtr(draw)
    t = (uniform * steps).long().clamp(0, steps - 1)
    alpha_bar = scheduler.alphas_cumprod.to(x.device)[t].view(shape)
    signal, spread = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    target = noise if kind == "epsilon" else signal * noise - spread * x
    return signal * x + spread * noise, t, target


def weighted_loss(prediction: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Σ w_i ‖prediction_i − target_i‖² / (N · D): scalar."""
    each = (prediction.float() - target.float()).square().flatten(1).mean(1)
    return (weights * each).mean()


def lr_factor(step: int, steps: int, floor: float, warmup: int = 0) -> float:
    """Cosine from 1 down to ``floor``, its first ``warmup`` steps rising linearly from nothing: Adam's first steps
    know no variance yet, and at full rate they undo more of a trained model than the rest can mend."""
    rise = min(1.0, (step + 1) / (warmup + 1))
    return rise * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps)))


@lru_cache(maxsize=2)
def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The sample order of one epoch."""
    return np.random.default_rng([seed % 2**63, epoch]).permutation(n)


def batch_rows(seed: int, step: int, batch: int, n: int) -> np.ndarray:
    """Rows of a step's batch [batch]: epochs run on into each other, so every batch is full."""
    first = step * batch
    places = np.arange(first, first + batch)
    epochs = {int(e): order(seed, int(e), n) for e in np.unique(places // n)}
    return np.array([epochs[int(place // n)][place % n] for place in places])


def latents_of(pipe: Any, rows: list[Example], size: int | None) -> Tensor:
    """Scaled latents of the rows' images, float32 [N, C, h, w] on the CPU; a few images are decoded at a time."""
    vae, parts = pipe.vae.float(), []
    for start in range(0, len(rows), 16):
        pictures = [decode(row.file, f"sample {row.sample_id}") for row in rows[start : start + 16]]
        parts.append(encode(vae, array([square(picture, size) for picture in pictures] if size else pictures)))
    if len({part.shape[1:] for part in parts}) > 1:
        raise WinnowError("train: the images have several sizes; set train.size")
    return torch.cat(parts)


def fine_tune(
    pipe: Any, rows: list[Example], settings: Train, seed: int, progress: Path, label: str = "train"
) -> None:
    """Fine-tune in place what of the pipeline's denoiser wants gradients, on latents of ``rows``; state is kept in the
    file ``progress``.

    Raises WinnowError where a weight is negative or not finite, all are zero, or the loss is not finite.
    """
    weights = torch.tensor([row.weight for row in rows])
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()) or not bool((weights > 0).any()):
        raise WinnowError("train: weights must be finite, at least 0 and not all 0; weigh and export again")
    made_by, kind = family(pipe), objective(pipe.scheduler)
    texts = [row.text for row in rows]
    conditions = Conditions(pipe, sorted(set(texts)))
    conditions([*sorted(set(texts)), None])
    latents = latents_of(pipe, rows, settings.size)
    if any(side % made_by.patch for side in latents.shape[2:]):
        sides = "×".join(str(side * pipe.vae_scale_factor) for side in latents.shape[:1:-1])
        raise WinnowError(
            f"train: images of {sides} pixels do not fit this model; it takes multiples of "
            f"{made_by.patch * pipe.vae_scale_factor}, set train.size to one"
        )
    model = made_by.model(pipe).train()
    if settings.checkpointing:
        model.enable_gradient_checkpointing()
    device = next(model.parameters()).device
    parameters = [p for p in model.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in parameters]
    optimiser = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=devices.dtype() == torch.bfloat16)

    def loss_of(some: np.ndarray, noise: Tensor, draw: Tensor, dropped: Tensor) -> Tensor:
        told = conditions([None if gone else texts[i] for i, gone in zip(some, dropped, strict=True)])
        told = {key: value.to(device) for key, value in told.items()}
        noisy, t, target = noised(kind, pipe.scheduler, latents[some].to(device), noise.to(device), draw.to(device))
        with mixed:
            prediction = made_by.predict(pipe, noisy, t, told)
        return weighted_loss(prediction, target, weights[some].to(device))

    parts = math.ceil(settings.batch / (settings.micro_batch or settings.batch))
    first = _resume(progress, parameters, average, optimiser)
    with bar(label, settings.steps) as advance:
        advance(first)
        for step in range(first, settings.steps):
            some = batch_rows(seed, step, settings.batch, len(rows))
            random = torch.Generator().manual_seed((seed + step) % 2**63)
            noise = torch.randn((len(some), *latents.shape[1:]), generator=random)
            draw = torch.randn(len(some), generator=random)
            dropped = torch.rand(len(some), generator=random) < settings.prompt_dropout
            for group in optimiser.param_groups:
                group["lr"] = settings.lr * lr_factor(step, settings.steps, settings.lr_floor, settings.lr_warmup)
            optimiser.zero_grad()
            total = 0.0
            for part in np.array_split(np.arange(len(some)), parts):
                # Its share of the batch's mean, so that the gradients add up to the same step.
                loss = loss_of(some[part], noise[part], draw[part], dropped[part]) * (len(part) / len(some))
                loss.backward()
                total += loss.item()
            if not math.isfinite(total):
                first_few = ", ".join(str(rows[i].sample_id) for i in some[:5])
                raise WinnowError(f"train: the loss is {total} at step {step} (samples {first_few}, …); lower train.lr")
            nn.utils.clip_grad_norm_(parameters, settings.clip)
            optimiser.step()
            with torch.no_grad():
                torch._foreach_lerp_(average, parameters, 1 - min(settings.ema, (1 + step) / (10 + step)))
            advance()
            if settings.checkpoint and (step + 1) % settings.checkpoint == 0 and step + 1 < settings.steps:
                _keep(progress, step + 1, parameters, average, optimiser)
    with torch.no_grad():
        for p, a in zip(parameters, average, strict=True):
            p.copy_(a)
    model.eval()


def _keep(
    progress: Path, step: int, parameters: list[nn.Parameter], average: list[Tensor], optimiser: torch.optim.Optimizer
) -> None:
    progress.parent.mkdir(parents=True, exist_ok=True)
    weights = [p.detach() for p in parameters]
    state = {"step": step, "parameters": weights, "average": average, "optimiser": optimiser.state_dict()}
    draft = progress.with_suffix(f".{os.getpid()}")
    try:
        with storage_errors(progress.parent, progress.name), open(draft, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, progress)
    finally:
        draft.unlink(missing_ok=True)


def _resume(
    progress: Path, parameters: list[nn.Parameter], average: list[Tensor], optimiser: torch.optim.Optimizer
) -> int:
    """The step to go on from, 0 where nothing was kept."""
    if not progress.exists():
        return 0
    try:
        state = torch.load(progress, map_location="cpu", weights_only=True)
        optimiser.load_state_dict(state["optimiser"])
        with torch.no_grad():
            for mine, kept in zip([*parameters, *average], [*state["parameters"], *state["average"]], strict=True):
                mine.copy_(kept)
        return int(state["step"])
    except Exception as error:  # torch has many ways to say that a file is not what it wrote
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise WinnowError(
            f"{progress}: the kept state cannot be read ({reason}); remove it to train this round from its start"
        ) from error
