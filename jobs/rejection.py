"""Early rejection: part of the way through sampling, a prompt's most promising images go on, and the others end there.

What promises is how far the prompt has moved the prediction so far, in sum over the steps (the accumulated score
differences of CFG-Rejection, arXiv 2505.23343, which cost nothing where guidance needs both predictions anyway), or a
scorer's opinion of what the model takes the finished image to be.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import AfterValidator, Field

from curate.select import best_of_n
from jobs.named import known
from jobs.scorers import SCORERS, Scorer
from schemas.errors import WinnowError
from schemas.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from jobs.sampler import Sampler

#: The gap as a criterion, by the sign with which more of it is better.
GAPS: dict[str, Any] = {"largest-gap": 1.0, "smallest-gap": -1.0}
#: By arm and round: images begun and finished, and network evaluations, spent and had all been finished.
SPENT = (
    "SELECT arm, round, count(*) AS begun, count_if(kept) AS finished, sum(evaluations)::BIGINT AS spent, "
    "(count(*) * max(evaluations))::BIGINT AS whole FROM drafts GROUP BY arm, round ORDER BY arm, round"
)


def saved(row: dict[str, Any]) -> str:
    """A row of SPENT in words."""
    return (
        f"{row['finished']:,} of {row['begun']:,} candidates were finished; {row['spent']:,} network evaluations, "
        f"{1 - row['spent'] / row['whole']:.0%} fewer than for all of them"
    )


class Reject(Settings):
    """``at``: after which share of the steps; ``keep``: images of each prompt that go on; ``by``: "largest-gap" of the
    two predictions that guidance needs, as published, "smallest-gap", or a scorer of the estimated clean image."""

    at: float = Field(0.5, gt=0, lt=1)
    keep: int = Field(1, ge=1)
    by: Annotated[str, AfterValidator(lambda name: known("criterion", name, GAPS | SCORERS))]

    @property
    def scorer(self) -> str | None:
        """The scorer that decides; None where a gap does."""
        return None if self.by in GAPS else self.by

    def step(self, steps: int) -> int:
        """After how many of a walk's ``steps`` it is decided: at least one, and before the last."""
        return min(max(1, round(self.at * steps)), steps - 1)


@dataclass(frozen=True)
class Drafts:
    """What became of N images that were begun: ``values`` float64 [N], by which they were compared, more is better;
    ``kept`` bool [N]; ``evaluations`` int [N] of the network; ``latents`` [K, C, h, w] of the kept ones, finished."""

    values: np.ndarray
    kept: np.ndarray
    evaluations: np.ndarray
    latents: Tensor


def draft(
    draw: Sampler, reject: Reject, judge: Scorer | None, texts: list[str], seeds: list[int], groups: np.ndarray
) -> Drafts:
    """Begin every image, and finish the best of each group [N], in which all images of a prompt must be. ``judge``: the
    scorer of that name, null for a gap. What is finished is what the sampler makes of its text and seed, but for
    rounding. WinnowError where the model has no gap."""
    import torch

    step = reject.step(draw.settings.steps)

    def begun(some: slice) -> tuple[Any, np.ndarray, int]:
        walk = draw.walk(texts[some], seeds[some])
        first = list(islice(walk, step))
        if judge:
            # What the estimate shows may be anything: a scorer still has to see an image.
            pixels = np.round(np.nan_to_num(draw.decode(first[-1].clean)) * 255).astype(np.uint8)
            values = judge.score(_images(pixels), texts[some])[0]
        else:
            gaps = [each.gap for each in first if each.gap is not None]
            if not gaps:
                raise WinnowError(
                    f"generate.reject.by {reject.by!r}: this model is told its guidance and makes one prediction; "
                    "reject by a scorer"
                )
            values = GAPS[reject.by] * torch.stack(gaps).sum(0).cpu().numpy()
        return walk, np.asarray(values, np.float64), first[-1].evaluations

    with draw.turn:
        parts = draw.halves(len(texts), begun)
        values = np.concatenate([part[1] for part in parts])
        sound = np.isfinite(values)
        ranked = np.where(sound, values, values[sound].min(initial=0.0) - 1)
        kept = best_of_n(ranked, groups, np.asarray(seeds, np.int64), k=reject.keep).kept
        evaluations = np.empty(len(texts), np.int64)
        latents, start = [], 0
        for walk, some, spent in parts:
            mine = kept[start : start + len(some)]
            evaluations[start : start + len(some)] = spent
            if mine.any():
                [last] = deque(chain([walk.send(np.flatnonzero(mine).tolist())], walk), maxlen=1)
                latents.append(last.x)
                evaluations[start : start + len(some)][mine] = last.evaluations
            start += len(some)
    return Drafts(values, kept, evaluations, torch.cat(latents))


def _images(pixels: np.ndarray) -> list[Any]:
    from PIL import Image

    return [Image.fromarray(image) for image in pixels]
