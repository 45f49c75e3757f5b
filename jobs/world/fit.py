"""The training loop that every small model of the embedded world shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jobs.training.flat import averaging
from jobs.world.scenes import Handwriting, Scene, draw_scenes, render

#: Called after every step with the model's name, the step, the number of steps and the loss.
Progress = Callable[[str, int, int, float], None]


def pixels(images: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] → float32 [N, 3, H, W] in [−1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def fresh_scenes(
    hand: Handwriting, batch: int, rng: np.random.Generator
) -> Iterator[tuple[list[Scene], np.ndarray]]:
    """Endless batches of new scenes with their images, uint8 [batch, 16, 16, 3]."""
    while True:
        scenes = draw_scenes(batch, rng)
        yield scenes, render(scenes, hand, rng)


def cosine(step: int, steps: int, warmup: int = 100, floor: float = 0.02) -> float:
    """Learning-rate factor: linear warm-up, then a cosine down to ``floor``."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def fit(
    name: str,
    parameters: Iterable[nn.Parameter],
    loss: Callable[[], Tensor],
    steps: int,
    lr: float,
    progress: Progress,
    ema: float | None = None,
) -> None:
    """AdamW with clipping and ``cosine``; ``loss`` draws its own batch. ``ema``: end with averaged weights."""
    parameters = list(parameters)
    average = [p.detach().clone() for p in parameters]
    optimiser = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: cosine(s, steps))
    for step in range(steps):
        value = loss()
        optimiser.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        if ema is not None:
            with torch.no_grad():
                torch._foreach_lerp_(average, parameters, averaging(ema, step))
        progress(name, step, steps, value.item())
    if ema is not None:
        with torch.no_grad():
            for p, a in zip(parameters, average, strict=True):
                p.copy_(a)


def store(model: nn.Module, path: Path) -> None:
    """Save a network's tensors, floats as float16."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file({k: v.contiguous() for k, v in state.items()}, path)


Network = TypeVar("Network", bound=nn.Module)


def restore(model: Network, path: Path) -> Network:
    """Fill a network from ``store``'s file, in float32, ready to use."""
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})
    return model.eval()
