"""Images between arrays, files in a row, and Pillow."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
from PIL import ExifTags, Image, ImageOps

from schemas.errors import WinnowError

T = TypeVar("T")
Format = Literal["png", "webp", "jpeg"]
SIDE = 2**14  # pixels of an image that is made, at most
MOST_PIXELS = 2**26  # 8192 × 8192; a 10 KB file can claim many more
READING = "upright, on white, of 8 bits"  # what ``decode`` makes of a file; what is made of its pixels hangs on it
FLAT = 2.0  # standard deviation (of 255) below which an image shows nothing


def encode(image: np.ndarray, format: Format) -> bytes:
    """uint8 [H, W, 3] as a file; PNG and WebP keep every pixel, JPEG is of quality 95."""
    out = io.BytesIO()
    options: dict[str, Any] = {"png": {}, "webp": {"lossless": True}, "jpeg": {"quality": 95, "subsampling": 0}}
    try:
        Image.fromarray(image).save(out, format, **options[format])
    except (ValueError, OSError) as error:  # more than 16,383 pixels a side in WebP, 65,500 in JPEG
        high, wide = image.shape[:2]
        raise WinnowError(f"an image of {wide}×{high} pixels is no {format} ({error}); take another format") from error
    return out.getvalue()


def decode(data: bytes, name: str = "image") -> Image.Image:
    """An RGB image from a file's bytes, upright, on white where it is transparent, and of 8 bits; WinnowError where
    they are none, too large to open, or numbers without a white."""
    return _opened(data, name, lambda image: _rgb(image, name))


def size_of(data: bytes, name: str = "image") -> tuple[int, int]:
    """Width and height in pixels of the upright image, from the head of a file alone; errors as of ``decode``."""
    return _opened(data, name, lambda image: image.size[:: -1 if _orientation(image) >= 5 else 1])


def _orientation(image: Image.Image) -> int:
    """How the camera was held, by EXIF: 1 is upright, from 5 on the sides change places."""
    return int(image.getexif().get(ExifTags.Base.Orientation, 1))


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise WinnowError(f"{name}: holds whole numbers of more than 16 bits; save it with 8 or 16")
        image = Image.fromarray(np.round(values / 257).astype(np.uint8))
    if image.mode == "F":
        raise WinnowError(f"{name}: holds floats, of which nothing says what is white; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _opened(data: bytes, name: str, use: Callable[[Image.Image], T]) -> T:
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > MOST_PIXELS:
            raise WinnowError(f"{name}: {image.width}×{image.height} pixels, allowed are {MOST_PIXELS}; shrink it")
        return use(image)
    except (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError) as error:  # by its format
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
