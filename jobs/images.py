"""Images between arrays, files in a row, and Pillow."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
from PIL import Image

from schemas.errors import WinnowError

T = TypeVar("T")
Format = Literal["png", "webp", "jpeg"]
MOST_PIXELS = 2**26  # 8192 × 8192; a 10 KB file can claim many more
FLAT = 2.0  # standard deviation (of 255) below which an image shows nothing


def encode(image: np.ndarray, format: Format) -> bytes:
    """uint8 [H, W, 3] as a file; PNG and WebP keep every pixel, JPEG is of quality 95."""
    out = io.BytesIO()
    options: dict[str, Any] = {"png": {}, "webp": {"lossless": True}, "jpeg": {"quality": 95, "subsampling": 0}}
    Image.fromarray(image).save(out, format, **options[format])
    return out.getvalue()


def decode(data: bytes, name: str = "image") -> Image.Image:
    """An RGB image from a file's bytes; WinnowError where they are none, or too large to open."""
    return _opened(data, name, lambda image: image.convert("RGB"))


def size_of(data: bytes, name: str = "image") -> tuple[int, int]:
    """Width and height in pixels, from the head of a file alone; errors as of ``decode``."""
    return _opened(data, name, lambda image: image.size)


def _opened(data: bytes, name: str, use: Callable[[Image.Image], T]) -> T:
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > MOST_PIXELS:
            raise WinnowError(f"{name}: {image.width}×{image.height} pixels, allowed are {MOST_PIXELS}; shrink it")
        return use(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise WinnowError(f"{name}: not a readable image ({error}); remove or replace it") from error


def images_of(rows: pa.Table) -> list[Image.Image]:
    """The decoded ``image`` column of sample rows."""
    names = rows["sample_id"].to_pylist()
    files = rows["image"].to_pylist()
    return [decode(file["bytes"], f"sample {name}") for name, file in zip(names, files, strict=True)]


def look(image: Image.Image) -> tuple[float, float]:
    """Mean brightness (luma, ITU-R BT.601) and saturation (HSV) of an image, in [0, 1]."""
    luma, saturation = image.convert("L"), image.convert("HSV").getchannel("S")
    return float(np.asarray(luma).mean()) / 255, float(np.asarray(saturation).mean()) / 255


def array(images: list[Image.Image]) -> np.ndarray:
    """Images of one size as uint8 [N, H, W, 3]; WinnowError where their sizes differ."""
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        (w, h), (v, g) = sizes[0], sizes[-1]
        raise WinnowError(
            f"images: their sizes differ, from {w}×{h} to {v}×{g}; set train.size, and take an encoder for distances "
            "that resizes (open_clip), not vae"
        )
    return np.stack([np.asarray(image) for image in images])


def square(image: Image.Image, side: int) -> Image.Image:
    """The middle of the image as a square of ``side`` pixels, resized (Lanczos) where it is not that size."""
    return cover(image, side, side)


def cover(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of the image at width × height pixels: as much of it as has that aspect ratio, resized once (Lanczos)
    and alike in both directions, or the image itself where it has that size."""
    if image.size == (width, height):
        return image
    wide = min(image.width, image.height * width / height)
    high = min(image.height, image.width * height / width)
    left, top = (image.width - wide) // 2, (image.height - high) // 2
    return image.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, left + wide, top + high))


def fault(image: np.ndarray) -> str | None:
    """Why a generated float image [H, W, 3] in [0, 1] shows nothing, or None where it is sound."""
    if not np.isfinite(image).all():
        return "NaN pixels"
    if image.std(axis=(0, 1)).max() * 255 < FLAT:
        return "black" if image.max() * 255 < 2 * FLAT else "one flat colour"
    return None
