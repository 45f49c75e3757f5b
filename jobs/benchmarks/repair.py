"""What late-step models repair: damaged real scenes, and what the base itself draws wrong; and what they spoil."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

from curate.drift import proportion
from jobs import models, sampling
from jobs.benchmarks.damage import DAMAGES
from jobs.benchmarks.late import MODELS, SCENES, cached, trained
from jobs.benchmarks.measured import Figures
from jobs.generate import Generate
from jobs.progress import bar
from jobs.refine import Refine
from jobs.refiner import Refiner
from jobs.sampler import Sampler
from jobs.world.build import digits, slices
from jobs.world.judge import Judge
from jobs.world.scenes import SIZE, Handwriting, caption, draw_scenes, render

EVALUATIONS = 16  # of each repair
SHOWN = ("the base, level 0.5", "both at once, level 0.5")
TILES = 24
BATCH = 200
#: Takes images uint8 [N, 16, 16, 3] and their captions, and gives them repaired.
Repair = Callable[[np.ndarray, list[str]], np.ndarray]


@dataclass(frozen=True)
class Case:
    """N images to be repaired: ``pixels`` uint8 [N, 16, 16, 3] with their captions, ``masks`` bool [N, 16, 16] of where
    they are damaged, null where nobody knows; ``right``: whether the judge finds them right as they are."""

    name: str
    pixels: np.ndarray
    prompts: list[str]
    masks: np.ndarray | None
    right: bool = False


def verdicts(pixels: np.ndarray, prompts: list[str]) -> np.ndarray:
    """The judge's, bool [N]."""
    return Judge()([Image.fromarray(image) for image in pixels], prompts)[0]


def damaged(hand: Handwriting, n: int, seed: int) -> list[Case]:
    """Of each kind n scenes of handwriting that nobody has seen, right before the damage and wrong after it."""
    cases = []
    for place, (name, damage) in enumerate(DAMAGES.items()):
        rng = np.random.default_rng([seed, 12, place])
        scenes = draw_scenes(6 * n, rng)
        prompts = [caption(scene) for scene in scenes]
        images = render(scenes, hand, rng)
        pixels, masks = damage(images, scenes, hand, rng)
        some = np.flatnonzero(verdicts(images, prompts) & ~verdicts(pixels, prompts))[:n]
        cases.append(Case(name, pixels[some], [prompts[i] for i in some], masks[some]))
    return cases


def drawn(n: int, seed: int) -> list[Case]:
    """What the base draws: n that the judge finds wrong, and n that it finds right."""
    draw, rng = Sampler(models.load("embedded"), Generate(steps=8, guidance=1.0)), np.random.default_rng([seed, 13])
    prompts = [caption(scene) for scene in draw_scenes(4 * n, rng)]
    parts = [draw(prompts[i : i + BATCH], list(range(i, i + len(prompts[i : i + BATCH]))))
             for i in range(0, len(prompts), BATCH)]  # fmt: skip
    pixels = np.round(np.concatenate(parts) * 255).astype(np.uint8)
    right, cases = verdicts(pixels, prompts), []
    for name, asked in (("drawn wrong", ~right), ("drawn right", right)):
        some = np.flatnonzero(asked)[:n]
        cases.append(Case(name, pixels[some], [prompts[i] for i in some], None, name == "drawn right"))
    return cases


def by_filter(kind: ImageFilter.Filter) -> Repair:
    """A classical filter of Pillow's."""
    return lambda pixels, _: np.stack([np.asarray(Image.fromarray(image).filter(kind)) for image in pixels])


def by_model(network: Any, level: float) -> Repair:
    """Noised to a level and denoised by the base with this denoiser, null: its own."""
    pipe = models.load("embedded", torch.float32)
    if network is not None:
        pipe.unet = network
    refiner = Refiner(pipe, Refine(level=level, steps=steps_for(pipe, level)), 1.0)

    def repair(pixels: np.ndarray, prompts: list[str]) -> np.ndarray:
        done = []
        for start in range(0, len(pixels), BATCH):
            some = slice(start, start + BATCH)
            [made] = refiner(pixels[some], prompts[some], [list(range(start, start + len(prompts[some])))])
            assert set(made.evaluations) == {EVALUATIONS}
            done.append(made.pixels)
        return np.concatenate(done)

    return repair


def steps_for(pipe: Any, level: float) -> int:
    """Of how many steps EVALUATIONS lie at or below a level, at the base's size."""
    like = torch.empty(1, pipe.vae.config.latent_channels, SIZE // 2, SIZE // 2)
    for steps in range(EVALUATIONS, 100 * EVALUATIONS):
        times = sampling.starts(pipe, steps, like)
        if len(times) - sampling.begin(times, level) == EVALUATIONS:
            return steps
    raise AssertionError(f"no number of steps has {EVALUATIONS} below level {level}")


def repairs(found: dict[str, Any]) -> dict[str, tuple[Repair, int]]:
    """What is compared, with evaluations an image; ``found``: the late models."""
    ways: dict[str, tuple[Repair, int]] = {
        "unsharp mask": (by_filter(ImageFilter.UnsharpMask(2, 150, 0)), 0),
        "median filter": (by_filter(ImageFilter.MedianFilter(3)), 0),
        "the base, level 0.5": (by_model(None, 0.5), EVALUATIONS),
        "the base, level 0.25": (by_model(None, 0.25), EVALUATIONS),
    }
    for name, network in found.items():
        level = 0.25 if name == "details" else 0.5
        ways[f"{name}, level {level}"] = by_model(network, level), EVALUATIONS
    return ways


def row(case: Case, after: np.ndarray) -> Figures:
    """Of one case: the share that is right now, with its standard error and 95 % interval, and the mean change of a
    pixel's channel, of 255, where nothing was damaged."""
    right = verdicts(after, case.prompts)
    n, k = len(right), int(right.sum())
    value, low, high = proportion(k, n)
    moved = np.abs(after.astype(int) - case.pixels).mean(3)
    outside = None if case.masks is None or case.masks.all() else float(moved[~case.masks].mean())
    return {"n": n, "right": k, "share": value, "se": (value * (1 - value) / n) ** 0.5, "low": low, "high": high,
            "changed": float(moved.mean()), "changed_outside": outside}  # fmt: skip


def measure(
    home: Path, data: str | None, steps: int, n: int, seed: int = 0
) -> tuple[Figures, list[np.ndarray]]:
    """All figures, and for the picture a sheet of each case: before, and after each model, uint8 [ways, TILES, …]."""
    images, labels, source = digits(data)
    hand = slices(images, labels, 0)
    rows = cached(home, hand["generator"], SCENES, seed)
    found, told = {}, {}
    for late in MODELS:
        found[late.name], told[late.name] = trained(home, rows, late, steps, seed)
    cases = [*damaged(hand["test"], n, seed), *drawn(n, seed)]
    ways, table, sheets = repairs(found), [], [[case.pixels] for case in cases]
    with bar("benchmark late", len(ways) * len(cases)) as advance:
        for name, (repair, evaluations) in ways.items():
            for case, sheet in zip(cases, sheets, strict=True):
                after = repair(case.pixels, case.prompts)
                table.append({"way": name, "case": case.name, "evaluations": evaluations, **row(case, after)})
                if name in SHOWN:
                    sheet.append(after)
                advance()
    figures = {"handwriting": source, "models": told, "scenes": SCENES, "rows": table, "seed": seed}
    return figures, [np.stack([one[:TILES] for one in sheet]) for sheet in sheets]
