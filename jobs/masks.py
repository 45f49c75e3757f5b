"""Region masks: which part of an image is made anew, and how it is joined to the rest.

A mask is a bool array [h, w] over latents; true is made anew.
"""

from __future__ import annotations

from math import ceil, floor

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from jobs.refine import Refine
from schemas.errors import WinnowError

EDGE = 1e-9  # of a latent: 0.28 · 25 is above 7 by rounding alone


def draw(settings: Refine, height: int, width: int, seed: int) -> tuple[np.ndarray, str]:
    """The mask [h, w] of one sample and loop, before it is dilated, and its description, from which it can be made
    again: "whole", "box 0.25 0.25 0.75 0.75" or "cells 4×4: 3 7 9 12", counted from 0 along the rows."""
    mask = np.zeros((height, width), bool)
    if settings.mask == "whole":
        return ~mask, "whole"
    if settings.mask == "box":
        left, top, right, bottom = settings.box
        above, before = floor(top * height + EDGE), floor(left * width + EDGE)
        mask[above : ceil(bottom * height - EDGE), before : ceil(right * width - EDGE)] = True
        return mask, "box " + " ".join(f"{side:g}" for side in settings.box)
    grid = settings.grid
    most = min(height, width)
    if grid > most:  # some cells would be none
        raise WinnowError(f"refine.grid is {grid}, of latents that are {width}×{height}; give at most {most}")
    count = max(1, round(settings.share * grid * grid))
    cells = np.sort(np.random.default_rng(seed).permutation(grid * grid)[:count])
    lines, columns = (np.linspace(0, side, grid + 1).round().astype(int) for side in (height, width))
    for row, column in zip(*divmod(cells, grid), strict=True):
        mask[lines[row] : lines[row + 1], columns[column] : columns[column + 1]] = True
    return mask, f"cells {grid}×{grid}: {' '.join(map(str, cells))}"


def dilate(masks: Tensor, by: int) -> Tensor:
    """Masks [N, 1, h, w], grown by ``by`` latents on every side, corners too."""
    return max_pool2d(masks.float(), 2 * by + 1, 1, by) > 0


def share_of_new(masks: Tensor, height: int, width: int, feather: int) -> np.ndarray:
    """How much of each pixel, float32 [N, H, W, 1], is taken from the new image: none outside the mask [N, 1, h, w],
    and inside it more with every pixel from its edge, all from the pixel ``feather`` + 1 on. Where the mask meets the
    image's own edge nothing is joined."""
    inside = interpolate(masks.float(), (height, width), mode="nearest")
    share = torch.zeros_like(inside)
    for reach in range(feather + 1):
        share += 1 - max_pool2d(1 - inside, 2 * reach + 1, 1, reach)
    return (share / (feather + 1)).squeeze(1).unsqueeze(3).cpu().numpy()


def seam(image: np.ndarray, mask: np.ndarray) -> float:
    """How much sharper an image [H, W, C] changes across the edge of a pixel mask [H, W] than elsewhere.

    The mean absolute difference of two neighbours of which one is inside, divided by that of all other neighbours:
    about 1 where nothing shows, and NaN where the mask has no edge or the rest of the image is flat.
    """
    image = np.asarray(image, np.float64)
    across, elsewhere = [], []
    for axis in (0, 1):
        steps = np.abs(np.diff(image, axis=axis)).mean(axis=2)
        edge = np.diff(mask.astype(np.int8), axis=axis) != 0
        across.append(steps[edge])
        elsewhere.append(steps[~edge])
    over, rest = np.concatenate(across), np.concatenate(elsewhere)
    if not len(over) or not len(rest) or rest.mean() == 0:
        return float("nan")
    return float(over.mean() / rest.mean())
