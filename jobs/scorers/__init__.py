"""Scorers: how good an image is for its prompt. A name is one of SCORERS, or ``package.module:object`` for your own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from pydantic import AfterValidator

from jobs import world
from jobs.named import guarded, known, pick
from schemas.errors import WinnowError


@dataclass(frozen=True)
class Scorer:
    """``score(images, prompts) -> (values float [N], truncated bool [N])``, higher is better.

    ``truncated`` tells where the text was longer than the scorer reads. ``revision`` changes whenever the values
    would.
    """

    name: str
    revision: str
    score: Callable[[list[Image.Image], list[str]], tuple[np.ndarray, np.ndarray]]


def _open_clip(model: str) -> Scorer:
    from jobs.clip import Clip

    clip = Clip(model)
    return Scorer(f"open_clip:{model}", clip.revision, clip.score)


def _aesthetic(version: Literal["v1", "v2"], head: str) -> Scorer:
    from jobs.scorers.aesthetic import Aesthetic

    return _named(f"aesthetic-{version}", head, Aesthetic(version, head))


def _hps(checkpoint: str) -> Scorer:
    from jobs.scorers.hps import Hps

    return _named("hps-v2.1", checkpoint, Hps(checkpoint))


def _pickscore(folder: str) -> Scorer:
    from jobs.scorers.pickscore import PickScore

    return _named("pickscore", folder, PickScore(folder))


def _image_reward(checkpoint: str) -> Scorer:
    from jobs.scorers.image_reward import ImageReward

    return _named("image-reward", checkpoint, ImageReward(checkpoint))


def _guidance_gap(model: str) -> Scorer:
    from jobs.scorers.guidance_gap import GuidanceGap

    return _named("guidance-gap", model, GuidanceGap(model))


def _named(name: str, local: str, found: Any) -> Scorer:
    return Scorer(f"{name}:{local}" if local else name, found.revision, found.score)


def _scene_clip(_: str) -> Scorer:
    found = _open_clip(f"local-dir:{world.WEIGHTS / 'clip'}")
    return Scorer("scene-clip", found.revision, found.score)


def _scene_reader(_: str) -> Scorer:
    from jobs.world.reader import Reader

    reader = Reader()
    return Scorer("scene-reader", reader.revision, lambda images, prompts: (reader(images, prompts), _none(prompts)))


def _scene_judge(_: str) -> Scorer:
    from jobs.world.judge import Judge

    judge = Judge()
    return Scorer("scene-judge", judge.revision, lambda images, prompts: (judge(images, prompts)[0], _none(prompts)))


def _none(prompts: list[str]) -> np.ndarray:
    return np.zeros(len(prompts), bool)


SCORERS: dict[str, Callable[[str], Scorer]] = {
    "open_clip": _open_clip,  # cosine in [-1, 1]; open_clip:ViT-B-32/laion2b_s34b_b79k, open_clip:local-dir:/path
    "aesthetic-v1": partial(_aesthetic, "v1"),  # about 1 to 10, whatever the prompt; aesthetic-v1:/path/to/head
    "aesthetic-v2": partial(_aesthetic, "v2"),  # about 1 to 10, whatever the prompt; aesthetic-v2:/path/to/head
    "hps-v2.1": _hps,  # cosine in [-1, 1], compares images of one prompt; hps-v2.1:/path/to/checkpoint
    "pickscore": _pickscore,  # about 15 to 25; pickscore:/path/to/folder
    "image-reward": _image_reward,  # about -2 to 2; image-reward:/path/to/checkpoint
    "guidance-gap": _guidance_gap,  # at most 0; guidance-gap:embedded, guidance-gap:org/name, a pipeline
    "scene-clip": _scene_clip,  # cosine in [-1, 1]; the embedded world's selecting scorer
    "scene-reader": _scene_reader,  # log-likelihood, at most 0; never used to select
    "scene-judge": _scene_judge,  # 1 where everything is as the caption says, else 0; never used to select
}


#: The name of a known scorer, as settings hold it.
ScorerName = Annotated[str, AfterValidator(lambda name: known("scorer", name, SCORERS))]


def scorer(name: str) -> Scorer:
    """The scorer of that name; its weights are loaded when it is first used."""
    found: Scorer = pick("scorer", name, SCORERS, Scorer)
    return found if name.partition(":")[0] in SCORERS else replace(found, score=guarded("scorer", name, _own(found)))


def _own(found: Scorer) -> Callable[[list[Image.Image], list[str]], tuple[np.ndarray, np.ndarray]]:
    def score(images: list[Image.Image], prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        given = found.score(images, prompts)
        if not isinstance(given, tuple) or len(given) != 2:
            raise TypeError(f"it gave a {type(given).__name__} where a pair is needed, values [N] and truncated [N]")
        values, truncated = np.asarray(given[0], np.float64), np.asarray(given[1], bool)
        for what, column in (("", values), (" as truncated", truncated)):
            if column.shape != (len(prompts),):
                raise WinnowError(f"scorer {found.name}: gave {column.shape}{what} for {len(prompts)} images; give [N]")
        return values, truncated

    return score
