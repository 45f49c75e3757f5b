"""Buckets: their area, their sides, and that an image is cut as little as can be and never distorted."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jobs.images import cover, square
from jobs.training.buckets import Buckets, grid, nearest
from schemas.errors import WinnowError

STEPS = st.sampled_from([8, 16, 24, 64])
SIDES = st.integers(1, 5000)


@given(side=st.integers(1, 1100), step=STEPS, ratio=st.floats(1, 6), unit=st.sampled_from([1, 2, 8, 16]))
@settings(max_examples=200, deadline=None)
def test_buckets_are_what_they_promise(side: int, step: int, ratio: float, unit: int) -> None:
    both = math.lcm(step, unit)
    if side < both:
        with pytest.raises(WinnowError, match=r"less than a bucket's step of"):
            grid(side, Buckets(step=step, ratio=ratio), unit)
        return
    sizes = grid(side, Buckets(step=step, ratio=ratio), unit)
    for w, h in sizes:
        assert w % step == h % step == w % unit == h % unit == 0 and w * h <= side**2
        assert max(w, h) <= ratio * min(w, h)
        if w != h:  # the longer side cannot be longer
            assert min(w, h) * (max(w, h) + both) > side**2
    largest = side // both * both
    assert (largest, largest) in sizes
    assert Counter(sizes) == Counter((h, w) for w, h in sizes) and len(set(sizes)) == len(sizes)
    ratios = [w / h for w, h in sizes]
    assert ratios == sorted(set(ratios))
    # Each width up to the square has its bucket, unless that is too long.
    for w in range(both, largest, both):
        h = side**2 // w // both * both
        assert ((w, h) in sizes) == (h <= ratio * w)


def test_buckets_of_512() -> None:
    expected = [(384, 640), (448, 576), (512, 512), (576, 448), (640, 384)]
    assert grid(512, Buckets()) == expected
    assert grid(512, Buckets(ratio=1.0)) == [(512, 512)]


@given(w=SIDES, h=SIDES, side=st.integers(64, 1100), step=STEPS, ratio=st.floats(1, 6))
@settings(max_examples=200, deadline=None)
def test_the_nearest_ratio_is_the_nearest(w: int, h: int, side: int, step: int, ratio: float) -> None:
    sizes = grid(side, Buckets(step=step, ratio=ratio))
    bw, bh = nearest(w, h, sizes)
    # |log a/b| as a ratio of at least 1, in whole numbers: no rounding decides.
    times = [max(w * y, x * h) / min(w * y, x * h) for x, y in sizes]
    assert max(w * bh, bw * h) / min(w * bh, bw * h) == pytest.approx(min(times), rel=1e-12)
    # What is lost between two buckets.
    ratios = [x / y for x, y in sizes]
    if ratios[0] <= w / h <= ratios[-1]:
        widest = max((b / a for a, b in pairwise(ratios)), default=1.0)
        assert 1 - 1 / min(times) <= 1 - math.sqrt(1 / widest) + 1e-9


@pytest.mark.parametrize(("side", "ratio"), [(512, 2.0), (1024, 4.0), (64, 3.0)])
def test_buckets_part_at_the_geometric_mean(side: int, ratio: float) -> None:
    sizes = grid(side, Buckets(step=16, ratio=ratio))
    assert len(sizes) > 2
    for low, high in pairwise(sizes):
        middle = math.isqrt(low[0] * high[0] * 10**12 // (low[1] * high[1]))  # √(r₁·r₂) in millionths
        assert nearest(middle - 5, 10**6, sizes) == low and nearest(middle + 5, 10**6, sizes) == high


@given(w=st.integers(8, 300), h=st.integers(8, 300), size=st.sampled_from([(64, 64), (48, 80), (80, 48), (32, 128)]))
@settings(max_examples=60, deadline=None)
def test_no_image_is_distorted(w: int, h: int, size: tuple[int, int]) -> None:
    """An image of its own coordinates says after the cut what stood where."""
    across, down = np.meshgrid(np.arange(w, dtype=np.float32), np.arange(h, dtype=np.float32))
    x, y = (np.asarray(cover(Image.fromarray(c), *size)) for c in (across, down))
    assert x.shape == (size[1], size[0])
    if (w, h) == size:
        np.testing.assert_array_equal(x, across)
        return
    pixels = min(w / size[0], h / size[1])  # of the image, to one of the bucket
    # Away from the image's edge, where the filter has all its neighbours, a straight line stays one.
    edge = math.ceil(4 / pixels) + 4
    row, column = x[size[1] // 2, edge:-edge], y[edge:-edge, size[0] // 2]
    for line in (row, column):
        if len(line) > 1:
            assert abs(line[-1] - line[0] - pixels * (len(line) - 1)) < 0.1
    # The middle stays the middle, but for the rounding to a whole pixel.
    assert abs(x.mean() - (w - 1) / 2) <= 1 and abs(y.mean() - (h - 1) / 2) <= 1
    # As much as can be is kept: one direction whole.
    assert pixels * size[0] == pytest.approx(w) or pixels * size[1] == pytest.approx(h)


@given(w=st.integers(1, 90), h=st.integers(1, 90), side=st.integers(1, 64), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_square_is_the_middle_resized(w: int, h: int, side: int, seed: int) -> None:
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8))
    edge, left, top = min(w, h), (w - min(w, h)) // 2, (h - min(w, h)) // 2
    middle = image.resize((side, side), Image.Resampling.LANCZOS, (left, top, left + edge, top + edge))
    made = np.asarray(square(image, side))
    np.testing.assert_array_equal(made, np.asarray(middle))
    np.testing.assert_array_equal(made, np.asarray(cover(image, side, side)))
