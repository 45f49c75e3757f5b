"""Encoders: from images to vectors. A name is one of ENCODERS, or ``package.module:object`` for your own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

import numpy as np
from PIL import Image
from pydantic import AfterValidator

from jobs import world
from jobs.named import guarded, known, pick
from schemas.errors import WinnowError

if TYPE_CHECKING:
    from jobs.encoders.vision import Kind


@dataclass(frozen=True)
class Encoder:
    """``encode(images, prompts) -> float [N, D]``; ``revision`` changes whenever the vectors would. ``texts(texts) ->
    float [N, D]`` where the space is one of images and texts."""

    name: str
    revision: str
    encode: Callable[[list[Image.Image], list[str]], np.ndarray]
    texts: Callable[[list[str]], np.ndarray] | None = None


def _open_clip(model: str) -> Encoder:
    from jobs.clip import Clip

    clip = Clip(model)
    return Encoder(f"open_clip:{model}", clip.revision, lambda images, _: clip.images(images), clip.texts)


def _vae(model: str) -> Encoder:
    return _latents("vae", model, scaled=True)


def _vae_raw(model: str) -> Encoder:
    return _latents("vae-raw", model, scaled=False)


def _latents(kind: str, model: str, scaled: bool) -> Encoder:
    from jobs.latents import Latents

    latents = Latents(model, scaled)
    return Encoder(f"{kind}:{model}", latents.revision, lambda images, _: latents.flat(images))


def _vision(kind: Kind, model: str) -> Encoder:
    from jobs.encoders.vision import Vision

    vision = Vision(kind, model)
    return Encoder(f"{kind}:{model}", vision.revision, vision.encode, None if kind == "dinov2" else vision.texts)


def _scene_clip(_: str) -> Encoder:
    found = _open_clip(f"local-dir:{world.WEIGHTS / 'clip'}")
    return Encoder("scene-clip", found.revision, found.encode, found.texts)


def _scene_judge(_: str) -> Encoder:
    from jobs.world.judge import Judge

    judge = Judge()
    return Encoder("scene-judge", judge.revision, lambda images, prompts: judge(images, prompts)[1])


ENCODERS: dict[str, Callable[[str], Encoder]] = {
    "open_clip": _open_clip,  # open_clip:ViT-B-32/laion2b_s34b_b79k, open_clip:local-dir:/path
    "vae": _vae,  # vae:embedded, vae:org/name: scaled latents of a pipeline's autoencoder, or of a bare one
    "vae-raw": _vae_raw,  # the same latents as the autoencoder gives them
    "clip": partial(_vision, "clip"),  # clip:openai/clip-vit-large-patch14, clip:/path: unit image features
    "siglip": partial(_vision, "siglip"),  # siglip:google/siglip-so400m-patch14-384: unit image features
    "dinov2": partial(_vision, "dinov2"),  # dinov2:facebook/dinov2-base: the [CLS] place
    "scene-clip": _scene_clip,
    "scene-judge": _scene_judge,
}


#: Those whose space is one of images and texts.
READERS = ("open_clip", "clip", "siglip", "scene-clip")

#: The name of a known encoder, as settings hold it.
EncoderName = Annotated[str, AfterValidator(lambda name: known("encoder", name, ENCODERS))]


def encoder(name: str) -> Encoder:
    """The encoder of that name; its weights are loaded when it is first used."""
    found: Encoder = pick("encoder", name, ENCODERS, Encoder)
    return found if name.partition(":")[0] in ENCODERS else replace(found, encode=guarded("encoder", name, _own(found)))


def _own(found: Encoder) -> Callable[[list[Image.Image], list[str]], np.ndarray]:
    def encode(images: list[Image.Image], prompts: list[str]) -> np.ndarray:
        vectors = np.asarray(found.encode(images, prompts))
        if vectors.ndim != 2 or len(vectors) != len(images) or not vectors.size:
            raise WinnowError(f"encoder {found.name}: gave {vectors.shape} for {len(images)} images; give [N, D]")
        return vectors if vectors.dtype.kind == "f" else vectors.astype(np.float64)

    return encode
