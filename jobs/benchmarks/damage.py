"""Damaged scenes: real ones that something was done to, with the mask of where."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from jobs.world.scenes import BOX, INKS, PALETTE, SIZE, Handwriting, Scene, render

PATCH = 6  # pixels a side of what is swapped
BLUR = 1.5  # pixels, standard deviation
#: (images uint8 [N, 16, 16, 3], their scenes, handwriting, random numbers) -> damaged images, bool masks [N, 16, 16].
Damage = Callable[[np.ndarray, list[Scene], Handwriting, np.random.Generator], tuple[np.ndarray, np.ndarray]]


def blurred(
    images: np.ndarray, scenes: list[Scene], hand: Handwriting, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The whole image, by a Gaussian."""
    soft = [np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(BLUR))) for image in images]
    return np.stack(soft), np.ones(images.shape[:3], bool)


def swapped(
    images: np.ndarray, scenes: list[Scene], hand: Handwriting, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Two patches in each other's place: of the digit's upper and of its lower half."""
    made, masks = images.copy(), np.zeros(images.shape[:3], bool)
    for image, whole, mask in zip(made, images, masks, strict=True):
        tops = rng.integers(1, SIZE // 2 - PATCH + 1), rng.integers(SIZE // 2, SIZE - PATCH)
        places = [(slice(top, top + PATCH), slice(left, left + PATCH))
                  for top, left in zip(tops, rng.integers(1, SIZE - PATCH, 2), strict=True)]  # fmt: skip
        for here, there in (places, places[::-1]):
            image[here], mask[here] = whole[there], True
    return made, masks


def composed(
    images: np.ndarray, scenes: list[Scene], hand: Handwriting, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One half, left, right, upper or lower, is of another digit in the same colours."""
    others = [Scene(int((scene.digit + rng.integers(1, 10)) % 10), scene.ink, scene.background) for scene in scenes]
    made, masks = images.copy(), np.zeros(images.shape[:3], bool)
    for image, other, mask in zip(made, render(others, hand, rng), masks, strict=True):
        half = slice(0, SIZE // 2) if rng.random() < 0.5 else slice(SIZE // 2, None)
        here = (half, slice(None))[:: rng.choice([-1, 1])]
        image[here], mask[here] = other[here], True
    return made, masks


def miscoloured(
    images: np.ndarray, scenes: list[Scene], hand: Handwriting, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The ink of the upper or lower two thirds has another colour."""
    made, masks = images.astype(np.float32), np.zeros(images.shape[:3], bool)
    for image, scene, mask in zip(made, scenes, masks, strict=True):
        background = np.median(np.concatenate([image[0], image[-1]]), axis=0)
        old, new = (np.array(PALETTE[name], np.float32) for name in (
            scene.ink, rng.choice([ink for ink in INKS if ink != scene.ink])))  # fmt: skip
        direction = old - background
        share = np.clip((image - background) @ direction / (direction @ direction), 0, 1)[..., None]
        here = slice(0, 2 * BOX // 3) if rng.random() < 0.5 else slice(SIZE - 2 * BOX // 3, None)
        image[here] += (share * (new - old))[here]
        mask[here] = True
    return np.clip(made, 0, 255).round().astype(np.uint8), masks


DAMAGES: dict[str, Damage] = {
    "blurred": blurred, "patches swapped": swapped, "half of another digit": composed, "wrong colour": miscoloured,
}  # fmt: skip
