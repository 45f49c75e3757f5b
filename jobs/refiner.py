"""Refinement, one operation: T times, choose a region, noise it again to a level, denoise it, accept or keep.

A mask over the whole image is iterative refinement, with a model of late steps its repair; random regions are iterative
partial refinement (arXiv 2605.19317) on a model that knows one noise level at a time, so that what stays is at every
step noised as much as what changes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from jobs import masks, sampling
from jobs.families import Conditions, family
from jobs.images import fault
from jobs.latents import decode, encode
from jobs.memory import Halves
from jobs.refine import Refine
from jobs.scorers import Scorer
from schemas.errors import WinnowError


@dataclass(frozen=True)
class Attempts:
    """What one loop made of N images: ``pixels`` uint8 [N, H, W, 3]; by image, which region as text, the level in
    (0, 1] of timesteps / 1000, passes of the network, whether it was ``accepted``, and the score of the image before
    and after, null without a scorer. The next loop goes on from what was accepted."""

    pixels: np.ndarray
    regions: list[str]
    levels: list[float]
    evaluations: list[int]
    before: np.ndarray | None
    after: np.ndarray | None
    accepted: np.ndarray


class Refiner:
    """``guidance``: as a pipeline's; ``judge``: whose scores are told, and decide where settings.accept is "better";
    ``conditions``: those of the pipeline, where some are known already."""

    def __init__(
        self, pipe: Any, settings: Refine, guidance: float, judge: Scorer | None = None,
        conditions: Conditions | None = None,
    ) -> None:  # fmt: skip
        self.pipe, self.settings, self.guidance, self.judge = pipe, settings, guidance, judge
        self.conditions = conditions or Conditions(pipe)
        self.halves = Halves("refine", "leave images of that size out with refine.where, or take a smaller model")

    def __call__(self, images: np.ndarray, prompts: list[str], seeds: Sequence[Sequence[int]]) -> Iterator[Attempts]:
        """Loops over images uint8 [N, H, W, 3]; ``seeds``: by loop, then by image. What becomes of an image depends
        on it, its prompt and its seeds alone, but for rounding."""
        pipe, judge = self.pipe, self.judge
        height, width = images.shape[1:3]
        fits = family(pipe).patch * pipe.vae_scale_factor
        if height % fits or width % fits:
            raise WinnowError(
                f"refine: an image is of {width}×{height} pixels, and this model takes multiples of {fits}; leave such "
                "images out with refine.where"
            )
        kind = family(pipe)
        told = self._on_device(self.conditions(prompts))
        guided = kind.guided and self.guidance > 1
        untold = self._on_device(self.conditions([None] * len(prompts))) if guided else None
        # Latents go from loop to loop: what is kept is not worn away by the autoencoder.
        now, current = encode(pipe.vae, images).to(pipe.device), images.copy()
        before = self._scores(current, prompts)
        for some in seeds:
            made, inside, regions, levels, evaluations = self._once(now, told, untold, some)
            fresh = decode(pipe.vae, made)
            sound = np.array([fault(image) is None for image in fresh])
            fresh = np.nan_to_num(fresh)
            if self.settings.paste is not None:
                share = masks.share_of_new(inside, height, width, self.settings.paste)
                fresh = share * fresh + (1 - share) * (current / np.float32(255))
            pixels = np.round(fresh * 255).astype(np.uint8)
            after, accepted = self._scores(pixels, prompts), sound
            if self.settings.accept == "better":
                assert before is not None and after is not None
                accepted = sound & (after > before + self.settings.margin)
            yield Attempts(pixels, regions, levels, evaluations, before, after, accepted)
            now = torch.where(torch.from_numpy(accepted).to(now.device).view(-1, 1, 1, 1), made, now)
            current = np.where(accepted[:, None, None, None], pixels, current)
            if judge:
                before = np.where(accepted, after, before)

    def _on_device(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value.to(self.pipe.device) for key, value in condition.items()}

    def _scores(self, pixels: np.ndarray, prompts: list[str]) -> np.ndarray | None:
        if self.judge is None:
            return None
        return np.asarray(self.judge.score([Image.fromarray(image) for image in pixels], prompts)[0], np.float64)

    def _once(
        self, now: Tensor, told: dict[str, Tensor], untold: dict[str, Tensor] | None, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor, list[str], list[float], list[int]]:
        """One loop over latents [N, C, h, w]: the new ones, their masks [N, 1, h, w], and what is told of them."""
        settings = self.settings
        drawn = [masks.draw(settings, *now.shape[2:], seed) for seed in seeds]
        inside = masks.dilate(torch.from_numpy(np.stack([mask for mask, _ in drawn])[:, None]), settings.dilate)
        inside = inside.to(now.device)
        noise = sampling.noise(now.shape[1:], seeds, now.device)
        times = sampling.starts(self.pipe, settings.steps, now)
        first = [sampling.begin(times, level_of(settings, seed)) for seed in seeds]
        made, evaluations = now.clone(), [0] * len(seeds)

        def walked(rows: list[int], level: float) -> sampling.Step:
            some = None if inside[rows].all() else inside[rows]
            steps = sampling.walk(
                self.pipe, {key: value[rows] for key, value in told.items()},
                untold and {key: value[rows] for key, value in untold.items()}, noise[rows], settings.steps,
                self.guidance, now[rows], level, some, _random(seeds, rows),
            )  # fmt: skip
            return deque(steps, maxlen=1)[0]

        for place in sorted(set(first)):  # those of one level go together
            rows, level = [i for i, other in enumerate(first) if other == place], times[place] / 1000
            ends = self.halves(len(rows), lambda some, rows=rows, level=level: walked(rows[some], level))
            made[rows] = torch.cat([end.x for end in ends])
            for i in rows:
                evaluations[i] = ends[0].evaluations
        return made, inside, [text for _, text in drawn], [times[i] / 1000 for i in first], evaluations


def level_of(settings: Refine, seed: int) -> float:
    """The level of one sample and loop: the recipe's, or drawn evenly from its range."""
    low, high = settings.levels
    return low + (high - low) * float(np.random.default_rng([seed, 1]).random())


def _random(seeds: Sequence[int], rows: Sequence[int]) -> list[torch.Generator]:
    """For schedulers that draw noise in each step: not the numbers that the first noise has taken."""
    return [torch.Generator().manual_seed(seeds[i] ^ 1) for i in rows]
