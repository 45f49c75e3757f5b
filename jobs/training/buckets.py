"""Aspect-ratio buckets: a few image sizes of about one area, so that images of any shape are trained on nearly whole.

Every image goes to the bucket whose aspect ratio is nearest to its own on a log scale, is resized to cover it (see
``jobs.images.cover``) and loses what sticks out: between neighbouring buckets of ratios r₁ < r₂ at most the share
1 − √(r₁/r₂) of its area, and more only beyond the outermost.
"""

from __future__ import annotations

import math

from pydantic import Field

from schemas.errors import WinnowError
from schemas.settings import Settings

Size = tuple[int, int]  # width, height in pixels


class Buckets(Settings):
    """``step``: sides are multiples of so many pixels; ``ratio``: of the longer side to the shorter, at most."""

    step: int = Field(64, ge=8, multiple_of=8)
    ratio: float = Field(2.0, ge=1)


def grid(side: int, settings: Buckets, unit: int = 1) -> list[Size]:
    """The buckets of area at most side², by rising aspect ratio: the largest square, each width below its side with the
    largest height that goes with it, and the same turned round. Sides are multiples of the step and of ``unit``.

    Raises WinnowError where the step is larger than ``side``.
    """
    step = math.lcm(settings.step, unit)
    most = side * side // step**2  # in squares of the step
    if not most:
        raise WinnowError(
            f"train.size: {side} pixels, less than a bucket's step of {step}; "
            f"set it to {step} at least, or a smaller train.buckets.step (a multiple of {unit})"
        )
    square = math.isqrt(most)
    upright = [(square, square), *((width, most // width) for width in range(1, square))]
    within = {(w * step, h * step) for w, h in upright if h <= settings.ratio * w}
    return sorted(within | {(h, w) for w, h in within}, key=lambda size: size[0] / size[1])


def nearest(width: int, height: int, sizes: list[Size]) -> Size:
    """The one of ``sizes`` whose aspect ratio is nearest to width : height on a log scale; the first of two."""
    ratio = math.log(width / height)
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - ratio))
