"""Models of late steps: U-Nets that are trained, through Winnow's trainer, on a window of the timesteps alone.

From random weights in the base's own shape, beside its text encoder and autoencoder, on the scenes that the base was
trained on. Every model has the same number of steps in all; a model of two windows spends half of them on each.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from jobs import models
from jobs.images import encode
from jobs.objective import Window
from jobs.progress import say
from jobs.train import Train
from jobs.training.cache import Cache, Example, build
from jobs.training.loop import fine_tune
from jobs.world.scenes import Handwriting, caption, draw_scenes, render
from schemas.ids import digest

COMPOSITION, DETAIL, BOTH = (250, 500), (0, 250), (0, 500)
SCENES = 20_000
BORDER = 250.0  # of the timesteps, between two models that share a walk
HOW = Train(batch=128, lr=2e-3, lr_warmup=50, lr_floor=0.02, ema=0.99, prompt_dropout=0.1, checkpoint=100)


@dataclass(frozen=True)
class Late:
    """A model of ``windows``, trained in this order, each for ``share`` of the steps; ``split``: what was trained first
    stays the model of its own window, and the last one is for the rest."""

    name: str
    windows: tuple[Window, ...]
    share: float = 1.0
    split: bool = False


MODELS = (
    Late("composition", (COMPOSITION,)),
    Late("details", (DETAIL,)),
    Late("both at once", (BOTH,)),
    Late("composition, then details", (COMPOSITION, DETAIL), 0.5, True),
    Late("details, then composition", (DETAIL, COMPOSITION), 0.5, True),
    Late("all timesteps", ((0, 1000),)),  # a control: as little training, and no window
)


def examples(hand: Handwriting, n: int, seed: int) -> Iterator[Example]:
    """Scenes of the generator's handwriting, as training rows."""
    rng = np.random.default_rng([seed, 11])
    scenes = draw_scenes(n, rng)
    for i, (scene, image) in enumerate(zip(scenes, render(scenes, hand, rng), strict=True)):
        yield Example(i, caption(scene), 1.0, encode(image, "png"))


class Experts(nn.Module):
    """A denoiser of two: at a timestep of BORDER or more the one, below it the other."""

    def __init__(self, high: nn.Module, low: nn.Module) -> None:
        super().__init__()
        self.high, self.low = high, low
        self.config, self.dtype, self.device = high.config, high.dtype, high.device

    def forward(self, noisy: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
        """The answer of one of them: all images of a walk are at one timestep."""
        return (self.high if float(t.reshape(-1)[0]) >= BORDER else self.low)(noisy, t, *args, **kwargs)


def trained(home: Path, data: Cache, late: Late, steps: int, seed: int) -> tuple[Any, dict[str, Any]]:
    """The denoiser and what it cost; trained where it is not there yet, and taken up where that was broken off."""
    networks, seconds, name = [], 0.0, ""
    for at, window in enumerate(late.windows):
        settings = HOW.model_copy(update={"window": window, "steps": round(late.share * steps)})
        spec = [late.windows[: at + 1], settings.model_dump(mode="json"), len(data), seed, models.revision("embedded")]
        name, start = digest(spec, 12), networks[-1] if networks else None
        network, spent = _once(home, data, settings, name, start, seed)
        networks.append(network)
        seconds += spent
    told = {"windows": [list(window) for window in late.windows], "steps": len(networks) * settings.steps,
            "batch": settings.batch, "cpu_seconds": round(seconds, 1)}  # fmt: skip
    if not late.split:
        return networks[-1], told
    high, low = networks if late.windows[0] == COMPOSITION else networks[::-1]
    return Experts(high, low), told


def _once(home: Path, data: Cache, settings: Train, name: str, start: Any, seed: int) -> tuple[Any, float]:
    """One window: from random weights, or from those of ``start``."""
    from diffusers import UNet2DConditionModel

    folder = home / "models" / name
    if not (folder / "card.json").exists():
        pipe = models.load("embedded", torch.float32)
        torch.manual_seed(seed)
        pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config)
        if start is not None:
            pipe.unet.load_state_dict(start.state_dict())
        progress, begun = home / f"{name}.safetensors", time.process_time()
        done: list[int] = []
        label = f"train {settings.window}"
        fine_tune(pipe, data, settings, seed, progress, label, lambda _, step, __: done.append(step))
        # Of a training that was broken off this process knows its own steps alone.
        spent = (time.process_time() - begun) * settings.steps / len(done)
        pipe.unet.save_pretrained(folder)
        (folder / "card.json").write_text(json.dumps({"cpu_seconds": spent}))  # last: the model is whole
        progress.unlink(missing_ok=True)
        say(f"late: window {settings.window}, {settings.steps} steps in {spent:.0f} CPU-seconds")
    network = UNet2DConditionModel.from_pretrained(folder).eval()
    return network, json.loads((folder / "card.json").read_text())["cpu_seconds"]


def cached(home: Path, hand: Handwriting, n: int, seed: int) -> Cache:
    """The scenes as the trainer reads them."""
    return build(models.load("embedded", torch.float32), examples(hand, n, seed), home / "cache")
