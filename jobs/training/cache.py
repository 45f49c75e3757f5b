"""The trainer's cache: latents and conditions of its rows, on disk by content, so that nothing is encoded twice.

    FOLDER/latents-<autoencoder>/<width>x<height>-float32/    by SHA-256 of the image file
    FOLDER/conditions-<text encoders>/                        by SHA-256 of the text, and of no text

The folders' names are hashes of what encodes, not of the whole model: a model that training changed keeps its
autoencoder and text encoders, so a round finds what the rounds before it encoded, and other encoders find nothing.
Latents are the means of the posterior, scaled, in float32; conditions keep the dtype of their encoders.

Bytes on disk, a row: 4·C·h·w of latents (Stable Diffusion 1.x at 512²: 4×64×64, 64 KiB; SDXL at 1024²: 256 KiB; SD3
and FLUX at 1024²: 1 MiB) and, for each distinct text, its condition (in bfloat16 Stable Diffusion 1.x: 77×768, 116 KiB;
SDXL: 311 KiB; SD3: 333×4096 and 2048, 2.7 MB; FLUX: 512×4096 and 768, 4.2 MB).
"""

from __future__ import annotations

import hashlib
from array import array as numbers
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from operator import length_hint
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from jobs import devices, digest
from jobs.families import Condition, family
from jobs.images import READING, array, cover, decode, size_of
from jobs.latents import encode
from jobs.progress import bar, say
from jobs.training.buckets import Buckets, Size, grid, nearest
from jobs.training.packs import KEY, PACK_BYTES, Packs
from schemas import ids
from schemas.errors import WinnowError

NOTHING = bytes(KEY)  # the key of no text
WAITING = 256  # image files in memory, at most about
TIDY = 64  # rows between two looks at what all buckets hold


@dataclass(frozen=True)
class Example:
    """One training row: an image file with its text and weight."""

    sample_id: int
    text: str
    weight: float
    file: bytes


@dataclass(frozen=True, eq=False)
class Cache:
    """N training rows: ``sample_ids`` int64 [N], ``weights`` float32 [N], ``bucket`` int32 [N], a row's place in
    ``shapes``, the (C, h, w) of its latents. The tensors stay on disk until they are asked for."""

    sample_ids: np.ndarray
    weights: np.ndarray
    bucket: np.ndarray
    shapes: list[tuple[int, ...]]
    images: list[Packs]  # by bucket
    image_places: np.ndarray  # int32 [N, 2]
    texts: Packs
    text_places: np.ndarray  # int32 [N, 2]
    nothing: np.ndarray  # int32 [1, 2]

    def __len__(self) -> int:
        return len(self.sample_ids)

    def latents(self, rows: np.ndarray) -> Tensor:
        """Scaled latents of rows [n] of one bucket, float32 [n, C, h, w] on the CPU."""
        (bucket,) = np.unique(self.bucket[rows])
        return self.images[bucket].take(self.image_places[rows])["latents"]

    def conditions(self, rows: np.ndarray, dropped: np.ndarray) -> Condition:
        """What the model is told of rows [n], on the CPU; of those ``dropped`` (bool [n]) the condition of no text."""
        gone = np.asarray(dropped, bool)[:, None]
        return self.texts.take(np.where(gone, self.nothing, self.text_places[rows]))


def build(
    pipe: Any, rows: Iterable[Example], folder: Path, size: int | None = None, buckets: Buckets | None = None
) -> Cache:
    """The cache of ``rows`` as ``pipe`` encodes them, whose autoencoder is put into float32. Only what the packs in
    ``folder`` lack is encoded. ``rows`` are read once, a few hundred image files in memory at most.

    ``size`` alone: the middle square of that many pixels. With ``buckets`` too: see ``jobs.training.buckets``.
    ``buckets`` alone: images of one size are a bucket. Neither: images must have one size.

    Raises WinnowError where an image cannot be read or has a size that does not fit, and where the disk is full; what
    was encoded up to a minute before is kept.
    """
    vae = pipe.vae.float()
    home = f"latents-{ids.digest([digest.network(vae), READING])}"
    images: dict[Size, Packs] = {}
    number: dict[Size, int] = {}
    target = _target(pipe, size, buckets)
    texts = Packs(folder, f"conditions-{_texts(pipe)}", partial(_told, pipe))
    texts.want(NOTHING, None)
    texts.settle()
    sample_ids, weights, bucket = numbers("q"), numbers("f"), numbers("i")
    image_keys, text_keys, enlarged = bytearray(), bytearray(), 0
    with bar("cache", length_hint(rows) or None) as advance:
        for count, row in enumerate(rows, start=1):
            own = size_of(row.file, f"sample {row.sample_id}")
            cut = target(*own)
            if cut not in images:
                if images and not (size or buckets):
                    raise WinnowError("train: the images have several sizes; set train.size")
                _check(pipe, cut)
                number[cut] = len(images)
                images[cut] = Packs(folder, f"{home}/{cut[0]}x{cut[1]}-float32", partial(_latents, vae, cut))
            enlarged += own[0] < cut[0] or own[1] < cut[1]
            image_key, text_key = (hashlib.sha256(data).digest() for data in (row.file, row.text.encode()))
            images[cut].want(image_key, (row.file, row.sample_id))
            texts.want(text_key, row.text)
            image_keys += image_key
            text_keys += text_key
            sample_ids.append(row.sample_id)
            weights.append(row.weight)
            bucket.append(number[cut])
            if count % TIDY == 0:
                _tidy([texts, *images.values()])
            advance()
        for packs in (texts, *images.values()):
            packs.settle()
            packs.write()
    if enlarged:
        say(f"train: {enlarged} of {len(sample_ids)} images are smaller than train.size asks for, and were enlarged")
    where = np.array(bucket, np.int32)
    places = np.empty((len(where), 2), np.int32)
    keys = np.frombuffer(image_keys, f"V{KEY}")
    for cut, packs in images.items():
        mine = where == number[cut]
        places[mine] = packs.find(keys[mine].tobytes())
    shapes = [packs.shape("latents") for packs in images.values()]
    return Cache(
        np.array(sample_ids, np.int64), np.array(weights, np.float32), where, shapes,
        [*images.values()], places, texts, texts.find(bytes(text_keys)), texts.find(NOTHING),
    )  # fmt: skip


def _target(pipe: Any, size: int | None, buckets: Buckets | None) -> Callable[[int, int], Size]:
    """Width and height of an image → those that it is cut to."""
    if size is None:
        return lambda width, height: (width, height)
    if buckets is None:
        return lambda width, height: (size, size)
    sizes = grid(size, buckets, family(pipe).patch * pipe.vae_scale_factor)
    return lambda width, height: nearest(width, height, sizes)


def _check(pipe: Any, cut: Size) -> None:
    patch, scale = family(pipe).patch, pipe.vae_scale_factor
    if any(side < scale or side // scale % patch for side in cut):
        raise WinnowError(
            f"train: images of {cut[0]}×{cut[1]} pixels do not fit this model; it takes multiples of {patch * scale}, "
            "set train.size to one"
        )


def _latents(vae: Any, cut: Size, items: list[tuple[bytes, int]]) -> Condition:
    pictures = [cover(decode(file, f"sample {sample_id}"), *cut) for file, sample_id in items]
    with devices.exact():
        return {"latents": encode(vae, array(pictures))}


def _told(pipe: Any, texts: list[str | None]) -> Condition:
    made_by = family(pipe)
    return made_by.unconditional(pipe) if texts == [None] else made_by.encode(pipe, texts)


def _texts(pipe: Any) -> str:
    """What turns a text into a condition: the text encoders, the tokenizers, and how the pipeline goes about it."""
    parts = [type(pipe).__name__]
    for name, part in sorted(pipe.components.items()):
        if part is not None and name.startswith(("text_encoder", "tokenizer")):
            parts.append(f"{name} {(digest.network if name.startswith('text') else digest.tokenizer)(part)}")
    # SDXL may tell zeros of no text; SD3 without T5 tells as many as its transformer is wide.
    width = family(pipe).model(pipe).config.get("joint_attention_dim")
    spec = [*parts, str(pipe.config.get("force_zeros_for_empty_prompt")), str(width)]
    return hashlib.sha256("\n".join(spec).encode()).hexdigest()[:16]


def _tidy(every: list[Packs]) -> None:
    """Write what is old, and keep memory bounded however many buckets there are: above WAITING / TOGETHER of them
    batches may be smaller, and numbers differ by rounding from those of another run."""
    for packs in every:
        packs.keep()
    while sum(len(packs.waiting) for packs in every) > WAITING:
        max(every, key=lambda packs: len(packs.waiting)).settle()
    while sum(packs.bytes for packs in every) > 4 * PACK_BYTES:
        max(every, key=lambda packs: packs.bytes).write()
