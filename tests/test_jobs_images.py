"""Images as files: what of them is seen, whatever their format."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from jobs.images import decode, encode, size_of
from schemas.errors import WinnowError


def file(image: Image.Image, form: str, **how: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **how)
    return out.getvalue()


@pytest.mark.parametrize("form", ["png", "tiff"])
def test_16_bits_become_8(form: str) -> None:
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(1, 64)
    seen = np.asarray(decode(file(Image.fromarray(values), form)))
    assert (np.abs(seen - values[..., None] / 257) <= 0.5).all()


def test_numbers_without_a_white_are_refused() -> None:
    for values in (np.linspace(0, 1, 16, dtype=np.float32), np.arange(16, dtype=np.int32) * 100_000):
        with pytest.raises(WinnowError, match=r"sample 7: holds .*save it with 8"):
            decode(file(Image.fromarray(values.reshape(4, 4)), "tiff"), "sample 7")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode: str) -> None:
    image = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 2, 2))
    seen = np.asarray(decode(file(image.convert(mode), "png")))
    assert (seen[:, :2] == 0).all() and (seen[:, 2:] == 255).all()


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_camera_held_otherwise_gives_an_upright_image(turn: int) -> None:
    """As ``datasets`` and browsers show it."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turn
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 3)).astype(np.uint8)
    data = file(Image.fromarray(pixels), "png", exif=exif)
    seen = decode(data)
    assert size_of(data) == seen.size == ((16, 8) if turn < 5 else (8, 16))
    np.testing.assert_array_equal(np.asarray(seen), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))


def test_whatever_a_format_raises_is_one_line() -> None:
    notes = PngImagePlugin.PngInfo()
    notes.add_text("workflow", "x" * (2 << 20), zip=True)
    with pytest.raises(WinnowError, match="sample 7: not a readable image .*too large.*remove or replace it"):
        decode(file(Image.new("RGB", (8, 8)), "png", pnginfo=notes), "sample 7")
    with pytest.raises(WinnowError, match="an image of 16384×1 pixels is no webp"):
        encode(np.zeros((1, 16384, 3), np.uint8), "webp")
