"""Objectives: what a diffusion model predicts, and at which noise levels it is trained.

    ε, v    x_t = √ᾱ·x + √(1−ᾱ)·ε at whole timesteps t; the model predicts ε, or v = √ᾱ·ε − √(1−ᾱ)·x
    flow    x_σ = (1−σ)·x + σ·ε at t = 1000·σ;           the model predicts ε − x

Timesteps are in the pipeline's own unit, 0…1000, and late steps are the low ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from schemas.errors import WinnowError

Kind = Literal["epsilon", "v_prediction", "flow"]
Density = Literal["uniform", "logit-normal"]
Window = tuple[int, int]


@dataclass(frozen=True)
class Objective:
    """``steps``: timesteps of the training process; ``alpha_bar``: ᾱ [steps] of ε and v models; ``shift``: moves the
    levels of a flow towards noise, as its scheduler does in sampling (arXiv 2403.03206, eq. 23)."""

    kind: Kind
    steps: int
    alpha_bar: Tensor | None = None
    shift: float = 1.0

    @property
    def density(self) -> Density:
        """How timesteps are drawn where nothing else is asked for."""
        return "logit-normal" if self.kind == "flow" else "uniform"

    def check(self, window: Window | None, min_snr: float | None) -> None:
        """WinnowError where this model cannot be trained so."""
        if window and not 0 <= window[0] < window[1] <= self.steps:
            raise WinnowError(
                f"train.window is {list(window)}; give two timesteps, low and high, from 0 to {self.steps}"
            )
        if min_snr is not None and self.kind == "flow":
            raise WinnowError("train.min_snr is for ε and v models, and this one is a flow; set it to null")

    def times(self, draw: Tensor, window: Window | None = None, density: Density | None = None) -> Tensor:
        """Timesteps [N] in the window [lo, hi) from standard normal draws [N]: whole ones for ε and v, any for a flow.

        Logit-normal (arXiv 2403.03206, eq. 19) or uniform; a window cuts the density and does not squeeze it.
        """
        lo, hi = window or (0, self.steps)
        even = (density or self.density) == "uniform"
        if (lo, hi) != (0, self.steps):
            share = torch.tensor([lo, hi], dtype=torch.float64, device=draw.device) / self.steps
            share = share / (self.shift - (self.shift - 1) * share)
            ends = torch.special.ndtri(share) if even else torch.logit(share)
            # In the tail of the two that is next to 0, where doubles are dense; ndtr itself is 0 there from 8.3 on.
            side = 1 if ends.sum() <= 0 else -1
            low, high = torch.special.erfc(-side * ends / math.sqrt(2)).sort().values / 2
            draw = side * torch.special.ndtri(low + torch.special.ndtr(side * draw.double()) * (high - low))
        share = torch.special.ndtr(draw) if even else torch.sigmoid(draw)
        share = (self.shift * share / (1 + (self.shift - 1) * share)).float()
        if self.kind == "flow":
            return (share * self.steps).clamp(lo, torch.tensor(float(hi)).nextafter(torch.tensor(0.0)).item())
        return (share * self.steps).long().clamp(lo, hi - 1)

    def _scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """What of the image and what of the noise is in x_t, each [N, 1, …]."""
        shape = (-1,) + (1,) * (like.ndim - 1)
        if self.alpha_bar is None:
            sigma = (t / self.steps).view(shape)
            return 1 - sigma, sigma
        kept = self.alpha_bar.to(like.device)[t].view(shape)
        return kept.sqrt(), (1 - kept).sqrt()

    def noisy(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of clean latents and noise [N, …] at timesteps [N]."""
        signal, spread = self._scales(t, x)
        return torch.lerp(x, noise, spread) if self.kind == "flow" else signal * x + spread * noise

    def target(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the model should predict at x_t, [N, …]."""
        if self.kind == "flow":
            return noise - x
        signal, spread = self._scales(t, x)
        return noise if self.kind == "epsilon" else signal * noise - spread * x

    def in_noise(self, t: Tensor) -> Tensor:
        """The factor [N] from a difference between two predictions at x_t to that between the ε they mean."""
        if self.kind == "epsilon":
            return torch.ones(len(t), device=t.device)
        signal, _ = self._scales(t, t)
        return signal

    def min_snr(self, t: Tensor, gamma: float) -> Tensor:
        """λ_t [N] of min-SNR-γ (arXiv 2303.09556): min(SNR, γ) / SNR for ε, min(SNR, γ) / (SNR + 1) for v."""
        assert self.alpha_bar is not None, "check() refuses it for a flow"
        kept = self.alpha_bar.to(t.device)[t]
        snr = kept / (1 - kept)
        if self.kind == "epsilon":
            return (gamma / snr).clamp(max=1)
        return snr.clamp(max=gamma) / (snr + 1)


def objective(scheduler: Any) -> Objective:
    """What a pipeline's model predicts, by its scheduler's configuration."""
    config, name = scheduler.config, type(scheduler).__name__
    # Those of flows alone do not say what is predicted, nor do some that are of none.
    flow = any(one.__name__.startswith("FlowMatch") for one in type(scheduler).__mro__)
    kind = config.get("prediction_type", "flow_prediction" if flow else None)
    if kind in ("epsilon", "v_prediction"):
        if not hasattr(scheduler, "alphas_cumprod"):
            raise WinnowError(
                f"model: a {name} has noise levels of its own; with epsilon and v_prediction, schedulers with "
                "alphas_cumprod (DDPM, DDIM, PNDM, Euler, DPM-Solver) can be trained"
            )
        return Objective(kind, config.num_train_timesteps, scheduler.alphas_cumprod)
    if kind == "flow_prediction":
        # Where the shift depends on the image's size (FLUX), sampling alone has it.
        fixed = not config.get("use_dynamic_shifting")
        shift = config.get("shift", config.get("flow_shift", 1.0))
        return Objective("flow", config.num_train_timesteps, shift=shift if fixed else 1.0)
    what = "does not say what the model predicts" if kind is None else f"predicts {kind!r}"
    raise WinnowError(f"model: its scheduler, {name}, {what}; epsilon, v_prediction and flow can be trained")
