"""Training of a region-wise model on a benchmark's images, resumable to the bit.

The loss of a batch is the mean over all regions of

    w · ( ‖x̂ − x‖² / (D max(t, 0.1)²)  +  NLL · ½ (e / σ² + log σ²)  +  KIND · cross-entropy of the region's class )

The first is the velocity's error for t > 0.1; e is ‖x̂ − x‖² / D, detached: the certainty head learns how wrong the
model is, and does not make it worse. w makes up for levels that are drawn more often than others (``times.draw``);
clean regions (t = 0) are context and cost nothing.
Every random number comes from the seed and the step, so a resumed run draws what an uninterrupted one does.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from jobs.devices import device, dtype
from jobs.ipr import times
from jobs.ipr.grid import Grid
from jobs.ipr.model import Prediction, RegionTransformer, Shape
from jobs.progress import bar
from jobs.training.flat import Flat, averaging
from jobs.training.state import State
from schemas.errors import WinnowError

NLL = 0.01
FLOOR = 0.1  # of t in the weight
BETAS = (0.9, 0.99)
DRAWERS = 8  # processes at most


class Task(Protocol):
    """A benchmark: images that obey a rule over the whole image, and the check of that rule."""

    name: str
    grid: Grid
    classes: int

    def draw(self, n: int, rng: np.random.Generator, hand: str = "model") -> tuple[np.ndarray, np.ndarray | None]:
        """Real images uint8 [n, H, W, C], and each region's class int64 [n, R], None where there are none."""
        ...

    def valid(self, images: np.ndarray) -> np.ndarray:
        """Which images uint8 [N, H, W, C] obey the rule: bool [N]."""
        ...

    def details(self, images: np.ndarray, valid: np.ndarray) -> dict[str, float]:
        """What else there is to say of images [N, H, W, C] of which these are ``valid``."""
        ...

    def figures(self) -> dict[str, float]:
        """How good the checker is, on what neither it nor the model has seen."""
        ...


@dataclass(frozen=True)
class Training:
    """``steps`` of ``batch`` images; AdamW at ``lr`` that rises for ``warmup`` steps and falls by a cosine to 0;
    ``ema``: of the weights that are kept; ``kind``: weight of the class loss; ``keep``: steps between two states."""

    steps: int
    batch: int = 128
    lr: float = 1.5e-3
    warmup: int = 100
    ema: float = 0.998
    weight_decay: float = 0.01
    clip: float = 1.0
    kind: float = 0.0
    keep: int = 500


def loss(
    found: Prediction, x: Tensor, t: Tensor, weights: Tensor, classes: Tensor | None, kind: float = 0.0
) -> Tensor:
    """The loss above: regions x [N, R, D], levels t and weights [N, R], classes [N, R] or None."""
    error = (found.x - x).square().mean(2)
    surprise = 0.5 * (error.detach() * torch.exp(-found.log_var) + found.log_var)
    each = error / t.clamp(min=FLOOR).square() + NLL * surprise
    if kind and classes is not None and found.logits is not None:
        named = nn.functional.cross_entropy(found.logits.flatten(0, 1), classes.flatten(), reduction="none")
        each = each + kind * named.view_as(t)
    return (weights * each).mean()


def rate(step: int, how: Training) -> float:
    """The learning rate's factor: a linear rise, then a cosine to 0."""
    if step < how.warmup:
        return (step + 1) / how.warmup
    return 0.5 * (1 + float(np.cos(np.pi * (step - how.warmup) / max(1, how.steps - how.warmup))))


def train(
    task: Task, shape: Shape, how: Training, seed: int, to: Path, card: dict[str, Any] | None = None
) -> RegionTransformer:
    """Train on ``task`` and write ``to``/model.safetensors (the averaged weights, float32) and config.json, which
    tells the settings, what it took and what ``card`` says.

    While it lasts, the state is in ``to``.state: a run that was killed goes on from it, to the same weights.
    """
    torch.manual_seed(seed)
    model = RegionTransformer(task.grid, shape).to(device())
    flat = Flat(list(model.parameters()))
    average = flat.whole.detach().clone()
    optimiser = torch.optim.AdamW([flat.whole], lr=how.lr, betas=BETAS, weight_decay=how.weight_decay)
    state, kept = State(flat.whole, average, optimiser), to.with_name(f"{to.name}.state") / "state.safetensors"
    settings = {"task": task.name, "shape": asdict(shape), "training": asdict(how), "seed": seed, **(card or {})}
    _same_run(kept.with_name("settings.json"), settings)
    begun = state.resume(kept)
    wall, cpu = time.perf_counter(), time.process_time()
    with bar(f"train {task.name}", how.steps) as advance:
        advance(begun)
        for step, drawn in enumerate(_loader(_Batches(task, how, seed), begun), begun):
            for group in optimiser.param_groups:
                group["lr"] = how.lr * rate(step, how)
            x, t, w, *told = (tensor.to(device(), non_blocking=True) for tensor in drawn)
            e = _noise(x, seed, step) if device() == "cuda" else told.pop(0)
            with torch.autocast(device(), torch.bfloat16, enabled=dtype() == torch.bfloat16):
                found = model(torch.lerp(x, e, t[..., None]), t)
            found = Prediction(*(part if part is None else part.float() for part in found))
            value = loss(found, x, t, w, told[0] if told else None, how.kind)
            optimiser.zero_grad(set_to_none=False)
            value.backward()
            nn.utils.clip_grad_norm_([flat.whole], how.clip)
            optimiser.step()
            with torch.no_grad():
                average.lerp_(flat.whole, averaging(how.ema, step))
            if (step + 1) % how.keep == 0 and step + 1 < how.steps:
                state.keep(kept, step + 1)
            advance()
    with torch.no_grad():
        flat.whole.copy_(average)
    flat.release()
    last = float(value.detach()) if begun < how.steps else None
    figures = {
        "parameters": flat.whole.numel(), "last_loss": last, "timed_from_step": begun,
        "seconds": round(time.perf_counter() - wall, 1), "cpu_seconds": round(time.process_time() - cpu, 1),
        "threads": torch.get_num_threads(), "cores": os.cpu_count(), "device": device(),
    }  # fmt: skip
    save(model, settings | {"figures": figures}, to)
    shutil.rmtree(kept.parent, ignore_errors=True)
    return model.eval()


class _Batches(Dataset[list[Tensor]]):
    """The batch of each step, by its number: regions x [B, R, D], levels t and weights [B, R], noise ε like x (not for
    a GPU, which draws it faster), and each region's class [B, R] where the task has any."""

    def __init__(self, task: Task, how: Training, seed: int) -> None:
        self.task, self.how, self.seed = task, how, seed

    def __getitem__(self, step: int) -> list[Tensor]:
        rng = np.random.default_rng([self.seed, step])
        images, classes = self.task.draw(self.how.batch, rng)
        regions = self.task.grid.cut(images)
        levels, weights = times.draw(len(regions), self.task.grid.regions, rng)
        noise = [] if device() == "cuda" else [rng.standard_normal(regions.shape, np.float32)]
        drawn = [regions, levels, weights, *noise, *([] if classes is None else [classes])]
        return [torch.from_numpy(array) for array in drawn]


def _noise(x: Tensor, seed: int, step: int) -> Tensor:
    """Standard normal like x, drawn where x is."""
    start = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1
    return torch.randn(x.shape, generator=torch.Generator(x.device).manual_seed(int(start)), device=x.device)


def _loader(batches: _Batches, begun: int) -> DataLoader[list[Tensor]]:
    """The batches from a step on. Drawing one takes longer than a GPU takes for its step, so there processes of their
    own draw ahead."""
    ahead = min(DRAWERS, os.cpu_count() or 1) if device() == "cuda" else 0
    return DataLoader(
        batches, batch_size=None, sampler=range(begun, batches.how.steps), num_workers=ahead,
        pin_memory=ahead > 0, prefetch_factor=4 if ahead else None,
    )  # fmt: skip


def _same_run(file: Path, settings: dict[str, Any]) -> None:
    """Refuse to go on from a state that other settings have made."""
    text = json.dumps(settings, indent=1)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    elif file.read_text() != text:
        raise WinnowError(f"{file.parent}: a run with other settings was stopped there; remove it, or go on with those")


def save(model: RegionTransformer, config: dict[str, Any], to: Path) -> None:
    """Write the checkpoint folder; a run that is killed meanwhile leaves the old one."""
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=".draft-") as name:
        draft = Path(name) / to.name
        draft.mkdir()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, draft / "model.safetensors")
        whole = {"grid": asdict(model.grid), **config}
        (draft / "config.json").write_text(json.dumps(whole, indent=1) + "\n")
        shutil.rmtree(to, ignore_errors=True)
        draft.rename(to)


def load(folder: Path) -> tuple[RegionTransformer, dict[str, Any]]:
    """A checkpoint's model, ready to sample, and its config."""
    try:
        config = json.loads((folder / "config.json").read_text())
        model = RegionTransformer(Grid(**config["grid"]), Shape(**config["shape"]))
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise WinnowError(f"{folder}: no model of regions ({reason}); train it with --train") from error
    return model.to(device()).eval(), config
