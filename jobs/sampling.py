"""Sampling step by step, from noise or from clean latents that are noised again, for every family of pipelines.

The same numbers as the pipeline's own call, but between two steps the caller sees the latents, what the model takes
the clean ones to be, and how far the prompt moved its prediction. With a mask, only what lies inside is made anew:
outside, the latents are at every level what the original is there with the same noise (RePaint, arXiv 2201.09865,
without its resampling), and the original itself at the end.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jobs.families import Condition, family
from jobs.objective import Kind, objective
from schemas.errors import WinnowError


@dataclass(frozen=True)
class Step:
    """After one step: ``x`` [N, C, h, w]; ``t``: the timestep in 0…1000 that it began at; ``clean``: the estimate of
    the clean latents there; ``gap`` [N]: RMS of conditional − unconditional prediction, null without guidance;
    ``evaluations``: passes of the network a sample, so far."""

    x: Tensor
    t: float
    clean: Tensor
    gap: Tensor | None
    evaluations: int


def noise(shape: Sequence[int], seeds: Sequence[int], device: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers [N, C, h, w], for each seed those that a pipeline's call draws first."""
    drawn = [torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) for seed in seeds]
    return torch.stack(drawn).to(device)


def starts(pipe: Any, steps: int, like: Tensor) -> list[float]:
    """The timesteps of a walk over latents of the shape of ``like`` [N, C, h, w], falling; a walk can begin at each."""
    return _starts(pipe, deepcopy(pipe.scheduler), steps, like)


def _starts(pipe: Any, scheduler: Any, steps: int, like: Tensor) -> list[float]:
    scheduler.set_timesteps(device=like.device, **family(pipe).timing(pipe, steps, like))
    if _plms(scheduler):
        return scheduler.timesteps.unique().flip(0).tolist()
    # A scheduler of the second order has two for each step, and begins at the first of them.
    return scheduler.timesteps[:: scheduler.order].tolist()


def begin(times: Sequence[float], level: float) -> int:
    """Which of the timesteps ``times``, falling in 0…1000, is the first at or below ``level`` in (0, 1]."""
    if not 0 < level <= 1:
        raise WinnowError(f"level {level}: not a level of noise; give more than 0 and at most 1")
    for i, t in enumerate(times):
        if t <= 1000 * level + 1e-3:
            return i
    raise WinnowError(
        f"level {level}: the last of {len(times)} steps is at {times[-1] / 1000:.3g}; raise the level or the steps"
    )


def _plms(scheduler: Any) -> bool:
    """Whether it is PNDM, which takes the first step twice, for its history; WinnowError for its Runge-Kutta form."""
    if not hasattr(scheduler, "plms_timesteps"):
        return False
    if not scheduler.config.skip_prk_steps:
        raise WinnowError("model: its PNDM scheduler has Runge-Kutta steps; set skip_prk_steps in its configuration")
    return True


def _noised(scheduler: Any, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The clean latents at the level of timestep t []; schedulers that count their steps go by the count."""
    add = scheduler.scale_noise if hasattr(scheduler, "scale_noise") else scheduler.add_noise
    return add(clean, noise=noise, **{"timestep" if hasattr(scheduler, "scale_noise") else "timesteps": t.view(1)})


def _estimate(kind: Kind, x: Tensor, made: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
    """The clean latents by a prediction at x = signal · clean + spread · ε."""
    if kind == "flow":
        return x - spread * made
    if kind == "epsilon":
        return (x - spread * made) / signal
    # v is of signal² + spread² = 1, and some schedulers keep x at another size.
    size = signal.square() + spread.square()
    return (signal * x - spread * size.sqrt() * made) / size


def shifted(pipe: Any, shift: float) -> Any:
    """The pipeline, of the same parts, whose scheduler moves a flow's levels: σ → shift · σ / (1 + (shift − 1) · σ)
    (arXiv 2403.03206, eq. 23). The pipeline given keeps its own, by which it is trained."""
    scheduler = pipe.scheduler
    kind, name = objective(scheduler).kind, type(scheduler).__name__
    if kind != "flow":
        raise WinnowError(f"generate.shift moves the levels of a flow, and this model predicts {kind}; set it to null")
    key = next((key for key in ("shift", "flow_shift") if key in scheduler.config), None)
    sized = scheduler.config.get("use_dynamic_shifting")
    if key is None or (sized and key == "flow_shift"):
        why = "shifts by the image's size" if sized else "has no shift"
        raise WinnowError(f"generate.shift: the model's {name} {why}; set it to null")
    other = copy(pipe)
    other.scheduler = scheduler.from_config(scheduler.config, **{key: shift}, use_dynamic_shifting=False)
    return other


@torch.no_grad()
def walk(
    pipe: Any, told: Condition, untold: Condition | None, noise: Tensor, steps: int, guidance: float,
    clean: Tensor | None = None, level: float = 1.0, mask: Tensor | None = None,
    random: list[torch.Generator] | None = None,
) -> Generator[Step, Sequence[int] | None, None]:  # fmt: skip
    """The steps of one batch, of ``steps`` from pure noise.

    ``noise`` [N, C, h, w] sets device and precision; ``untold``: the condition of no text, for families that are
    guided by a second pass, and unused at guidance ≤ 1. With ``clean`` latents, the walk begins with them at the first
    timestep at or below ``level`` · 1000; with a ``mask`` [N, 1, h, w] too, only what it is true for changes.
    ``random``: for schedulers that draw noise in each step. Sent some rows, the walk goes on with these alone. It has a
    scheduler of its own, so that several walks can take turns.
    """
    kind, scheduler, n = family(pipe), deepcopy(pipe.scheduler), len(noise)
    predicts, dtype = objective(scheduler).kind, kind.model(pipe).dtype
    guided = kind.guided and guidance > 1
    passes = getattr(kind.model(pipe), "passes", 1) * (2 if guided else 1)
    if guided:
        assert untold is not None, "guidance takes the condition of no text"
        told = {key: torch.cat([untold[key], value]) for key, value in told.items()}
    elif not kind.guided:
        told = told | {"guidance": noise.new_full((n,), guidance, dtype=torch.float32)}
    every = _starts(pipe, scheduler, steps, noise)
    first = begin(every, level) * scheduler.order if clean is not None else 0
    times = scheduler.timesteps[first:]
    if first and _plms(scheduler):
        times = times.new_tensor([*every[first : first + 2], *every[first + 1 :]])
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    more = {"generator": random} if "generator" in inspect.signature(scheduler.step).parameters else {}
    x = _noised(scheduler, clean, noise, times[0]) if clean is not None else noise
    if clean is None:
        x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    one, none = noise.new_ones(1, 1, 1, 1), noise.new_zeros(1, 1, 1, 1)

    for i, t in enumerate(times):
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        signal, spread = _noised(scheduler, one, none, t), _noised(scheduler, none, one, t)
        seen = torch.cat([seen, seen]) if guided else seen
        made = kind.predict(pipe, seen.to(dtype), t.expand(len(seen)), told).to(x.dtype)
        gap = None
        if guided:
            without, made = made.chunk(2)
            gap = (made - without).float().square().flatten(1).mean(1).sqrt()
            made = without + guidance * (made - without)
        estimate = _estimate(predicts, x, made, signal, spread)
        x = scheduler.step(made, t, x, return_dict=False, **more)[0]
        if mask is not None:
            assert clean is not None, "a mask keeps clean latents"
            last = i == len(times) - 1
            x = torch.where(mask, x, clean if last else _noised(scheduler, clean, noise, times[i + 1]))
        rows = yield Step(x, float(t), estimate, gap, (i + 1) * passes)
        if rows is not None:
            some = torch.as_tensor(rows, device=x.device)
            twice = torch.cat([some, some + len(x)]) if guided else some
            told = {key: value[twice] for key, value in told.items()}
            _keep(scheduler, x.shape, some)
            x, clean, mask = (None if part is None else part[some] for part in (x, clean, mask))
            noise, more = noise[some], {key: [given[row] for row in rows] for key, given in more.items() if given}


def _keep(scheduler: Any, shape: torch.Size, rows: Tensor) -> None:
    """Leave of a scheduler's history, tensors of the latents' own shape, these rows."""

    def some(value: Any) -> Any:
        return value[rows] if isinstance(value, Tensor) and value.shape == shape else value

    for name, value in vars(scheduler).items():
        setattr(scheduler, name, [some(one) for one in value] if isinstance(value, list) else some(value))
