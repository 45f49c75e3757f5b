"""The generators and checkers of the IPR benchmarks, against checks of their own kind written here."""

import colorsys
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage, stats

from jobs.ipr import polygons, sudoku
from jobs.ipr.digits import SLICES, Digits, Reader, slices
from jobs.ipr.pixels import EvenPixels, hues, rgb
from jobs.ipr.polygons import Polygons, components, corners, polygon
from jobs.ipr.sudoku import Sudoku, draw, pool, solutions, valid
from jobs.world.build import digits
from schemas.errors import WinnowError


@pytest.fixture(scope="module")
def hand() -> dict[str, Digits]:
    images, labels, _ = digits(None)
    return slices(images, labels, 8, 0)


def obeys(board: np.ndarray) -> bool:
    """The rule, by sets."""
    side, order = len(board), round(len(board) ** 0.5)
    units = [set(row) for row in board.tolist()] + [set(column) for column in board.T.tolist()]
    for r in range(0, side, order):
        units += [set(board[r : r + order, c : c + order].ravel().tolist()) for c in range(0, side, order)]
    return all(unit == set(range(1, side + 1)) for unit in units)


def test_there_are_288_boards_of_order_2() -> None:
    found = list(solutions(2, np.random.default_rng(0)))
    assert len(found) == len({board.tobytes() for board in found}) == 288
    assert all(obeys(board) for board in found)


def test_boards_of_order_2_are_drawn_uniformly() -> None:
    drawn = draw(288 * 100, 2, np.random.default_rng(1))
    kinds, counts = np.unique(drawn.reshape(len(drawn), -1), axis=0, return_counts=True)
    assert len(kinds) == 288 and stats.chisquare(counts).pvalue > 0.001


def test_shuffling_one_board_covers_its_whole_class_evenly() -> None:
    """The 288 boards fall into classes of 96 and 192 under the symmetries, so one board alone reaches one of them."""
    sizes = set()
    for seed in range(6):
        one = next(solutions(2, np.random.default_rng(seed)))[None]
        drawn = draw(19200, 2, np.random.default_rng(2), one)
        kinds, counts = np.unique(drawn.reshape(len(drawn), -1), axis=0, return_counts=True)
        assert stats.chisquare(counts).pvalue > 0.001
        sizes.add(len(kinds))
    assert sizes == {96, 192}


def test_boards_of_order_3_obey_the_rule_and_differ() -> None:
    boards = pool(3, 0, 20)
    assert len({board.tobytes() for board in boards}) == 20 and all(obeys(board) for board in boards)
    drawn = draw(500, 3, np.random.default_rng(0), boards)
    assert all(obeys(board) for board in drawn) and len({board.tobytes() for board in drawn}) == 500
    for cell in ((0, 0), (4, 7)):
        assert stats.chisquare(np.bincount(drawn[:, *cell], minlength=10)[1:]).pvalue > 0.001


def test_a_search_goes_on_to_other_boards() -> None:
    found = list(islice(solutions(3, np.random.default_rng(0)), 30))
    assert all(obeys(board) for board in found) and len({board.tobytes() for board in found}) == 30


@pytest.mark.parametrize("order", [2, 3])
def test_every_change_of_one_cell_is_found(order: int) -> None:
    board = draw(1, order, np.random.default_rng(3), pool(order, 0, 5))[0]
    side = order * order
    assert valid(board[None]).tolist() == [True]
    changed = []
    for r in range(side):
        for c in range(side):
            for digit in set(range(side + 2)) - {int(board[r, c])}:  # also digits that no board has
                changed.append(board.copy())
                changed[-1][r, c] = digit
    assert len(changed) == side * side * (side + 1) and not valid(np.stack(changed)).any()


def test_each_kind_of_unit_counts() -> None:
    shifted = np.array([[(r + c) % 4 + 1 for c in range(4)] for r in range(4)])  # rows and columns, but no boxes
    rows_only = np.tile([1, 2, 3, 4], (4, 1))
    boxes_only = np.tile([[1, 2], [3, 4]], (2, 2))
    assert not valid(np.stack([shifted, rows_only, rows_only.T, boxes_only])).any()
    assert valid(shifted[[0, 2, 1, 3]][None]).all()


@given(st.integers(0, 2**32))
def test_valid_agrees_with_the_sets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    boards = draw(8, 2, rng)
    for board in boards:
        if rng.random() < 0.7:  # swaps within a row keep the row right
            r, (a, b) = rng.integers(4), rng.permutation(4)[:2]
            board[r, [a, b]] = board[r, [b, a]]
            if rng.random() < 0.5:
                board[(r + 2) % 4, [a, b]] = board[(r + 2) % 4, [b, a]]
    assert valid(boards).tolist() == [obeys(board) for board in boards]


def test_slices_of_the_handwriting_are_disjoint_and_whole() -> None:
    images = (np.arange(1200)[:, None, None] // np.array([1, 256])[:, None] % 256).astype(np.uint8)
    images = np.repeat(np.repeat(images, 4, 1), 8, 2)[:, :8, :8]
    cut = slices(images, np.arange(1200), 8, 0)
    assert set(cut) == set(SLICES)
    assert sorted(np.concatenate([part.labels for part in cut.values()])) == list(range(1200))
    assert all((part.ink == images[part.labels]).all() for part in cut.values())


def test_mnist_loses_its_frame_and_is_resized() -> None:
    images = np.zeros((1000, 28, 28), np.uint8)
    images[:, 4:24, 4:24] = 200
    cut = slices(images, np.arange(1000) % 10, 8, 0)
    assert all((part.ink == 200).all() and part.ink.shape[1:] == (8, 8) for part in cut.values())


def test_digits_are_drawn_as_asked(hand: dict[str, Digits]) -> None:
    asked = np.random.default_rng(0).integers(0, 10, (50, 4))
    drawn = hand["model"].draw(asked, np.random.default_rng(1))
    known = {ink.tobytes(): label for ink, label in zip(hand["model"].ink, hand["model"].labels, strict=True)}
    assert [[known[ink.tobytes()] for ink in row] for row in drawn] == asked.tolist()
    few = Digits(hand["model"].ink[:3], np.array([1, 1, 2]))
    with pytest.raises(WinnowError, match="none shows a 7"):
        few.draw(np.array([1, 7]), np.random.default_rng(0))


def test_the_reader_reads_a_foreign_hand(hand: dict[str, Digits]) -> None:
    test = hand["test"]
    reader = Reader(hand["classifier"], tuple(range(10)))
    assert (reader(test.ink) == test.labels).mean() > 0.97
    assert reader(test.ink[:6].reshape(2, 3, 8, 8)).shape == (2, 3) and len(reader(test.ink[:0])) == 0


def test_real_boards_are_judged_by_their_digits(hand: dict[str, Digits]) -> None:
    task = Sudoku(2, hand)
    images, classes = task.draw(300, np.random.default_rng(5), "test")
    assert images.dtype == np.uint8 and images.shape == (300, 32, 32, 1)
    boards = task.read(images)
    assert (boards.reshape(300, 16) == classes + 1).mean() > 0.99
    assert task.valid(images).tolist() == [obeys(board) for board in boards] and task.valid(images).mean() > 0.9
    # Another digit in one cell: the cell of a neighbour, which no valid board repeats.
    spoilt = images.copy()
    spoilt[:, :8, :8] = spoilt[:, :8, 8:16]
    assert not task.valid(spoilt).any()
    assert not task.valid(np.zeros_like(images[:4])).any() and len(task.valid(images[:0])) == 0
    assert task.figures()["digit_accuracy"] > 0.98 and task.figures()["digits"] > 100


def test_details_count_boards_and_cells_that_are_no_digits(hand: dict[str, Digits]) -> None:
    task = Sudoku(2, hand)
    images, classes = task.draw(200, np.random.default_rng(6), "test")
    right = task.valid(images)
    found = task.details(images, right)
    assert found["distinct"] == len({row.tobytes() for row in classes[right]}) < 200
    assert 0 < found["unlike"] < 0.03  # 1 % of the digits that it is drawn from
    noise = np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)
    assert task.details(noise, task.valid(noise)) == {"distinct": 0, "unlike": 1.0}
    blend = (images // 2 + images[::-1] // 2).astype(np.uint8)  # two digits through each other
    assert task.details(blend, task.valid(blend))["unlike"] > 0.05


def test_the_distance_is_that_of_the_nearest(hand: dict[str, Digits]) -> None:
    reader, some = Reader(hand["classifier"], (1, 2)), hand["test"].ink[:20]
    known = hand["classifier"].ink[np.isin(hand["classifier"].labels, (1, 2))]
    expected = [min(np.linalg.norm((a / 255.0 - b / 255.0).ravel()) for b in known) for a in some]
    np.testing.assert_allclose(reader.distance(some), expected, atol=1e-6)
    np.testing.assert_allclose(reader.distance(known[:5]), 0, atol=1e-6)


# Even pixels.


def test_half_of_the_pixels_are_of_each_of_two_complementary_colours() -> None:
    images, classes = EvenPixels().draw(40, np.random.default_rng(0))
    assert images.shape == (40, 16, 16, 3) and images.dtype == np.uint8 and classes is None
    for image in images:
        colours, counts = np.unique(image.reshape(-1, 3), axis=0, return_counts=True)
        assert counts.tolist() == [128, 128]
        one, other = (360 * colorsys.rgb_to_hsv(*(colour / 255))[0] for colour in colours)
        assert abs((one - other) % 360 - 180) < 1
    assert EvenPixels().valid(images).all()
    first = images[:, 0, 0].astype(int)
    assert len(np.unique(first, axis=0)) > 35  # of any hue


@given(st.integers(0, 2**32), st.integers(1, 20))
def test_pixels_that_change_sides_are_found(seed: int, changed: int) -> None:
    rng = np.random.default_rng(seed)
    image = EvenPixels().draw(1, rng)[0]
    flat = image.reshape(-1, 3)
    side = (flat == flat[0]).all(1)
    flat[rng.choice(np.flatnonzero(side), changed, replace=False)] = flat[~side][0]
    assert not EvenPixels().valid(image).any()


def test_noise_that_keeps_the_sides_is_forgiven() -> None:
    rng = np.random.default_rng(0)
    images = EvenPixels().draw(30, rng)[0]
    noisy = np.clip(images + rng.normal(0, 25, images.shape), 0, 255).astype(np.uint8)
    assert (noisy != images).mean() > 0.4 and EvenPixels().valid(noisy).all()


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (128, 128, 128), (255, 0, 0), (0, 255, 255)])
def test_a_picture_of_one_colour_is_not_even(colour: tuple[int, int, int]) -> None:
    assert not EvenPixels().valid(np.full((1, 16, 16, 3), colour, np.uint8)).any()


@given(st.floats(0, 359.9))
def test_hues_are_those_of_colorsys(hue: float) -> None:
    colour = rgb(np.array(hue))
    expected = np.array(colorsys.hsv_to_rgb(hue / 360, 1, 1)) * 255
    assert np.abs(colour - expected).max() <= 0.5 + 1e-6
    # The angle in the plane of colours is not the hexagon's, but never more than 1.2° away.
    assert abs((hues(colour) - hue + 180) % 360 - 180) < 1.5


# Polygons.


def test_polygons_are_as_many_as_told(hand: dict[str, Digits]) -> None:
    images, numbers, sides = Polygons(hand).told(60, np.random.default_rng(0))
    assert images.shape == (60, 40, 40, 1) and images.dtype == np.uint8
    for image, number in zip(images[..., 0], numbers, strict=True):
        assert ndimage.label(image[8:] > 127)[1] == number
        assert not image[:8, 8:-8].any()
    assert set(numbers) == {1, 2, 3} and set(sides) == {3, 4, 5}


@given(st.integers(0, 2**32), st.floats(0.2, 0.6))
def test_components_are_those_of_scipy(seed: int, share: float) -> None:
    image = np.random.default_rng(seed).random((20, 20)) < share
    labels, n = ndimage.label(image)
    expected = {(labels == i).tobytes() for i in range(1, n + 1) if (labels == i).sum() >= polygons.SPECK}
    assert {mask.tobytes() for mask in components(image)} == expected


@given(st.sampled_from([3, 4, 5]), st.floats(5, 6.5), st.floats(0, 7), st.floats(8, 32), st.floats(16, 32))
def test_corners_are_counted_wherever_it_lies(n: int, radius: float, turn: float, x: float, y: float) -> None:
    assert corners(polygon(n, radius, turn, x, y)) == n


def test_other_shapes_have_no_corners() -> None:
    y, x = np.indices((40, 40))
    disc = (255 * (np.hypot(x - 24, y - 24) < 8)).astype(np.uint8)
    assert corners(disc) == 0 and polygons.read(np.zeros((40, 40), np.uint8)) == (0, set())


def scene(hand: Digits, number: int, side: int, drawn: list[int]) -> np.ndarray:
    """Two numerals and polygons of these corners, side by side."""
    image = np.zeros((40, 40), np.uint8)
    for i, n in enumerate(drawn):
        image |= polygon(n, 5.5, 0.3, 7 + 13 * i, 17) if i < 3 else polygon(n, 5.5, 0.3, 7, 32)
    image[:8, :8], image[:8, -8:] = hand.draw(np.array([number, side]), np.random.default_rng(number))
    return image[..., None]


def test_only_what_both_numerals_tell_is_valid(hand: dict[str, Digits]) -> None:
    task, ink = Polygons(hand), hand["classifier"]
    right = [scene(ink, n, s, [s] * n) for n in (1, 2, 3) for s in (3, 4, 5)]
    assert task.valid(np.stack(right)).all()
    wrong = [
        scene(ink, 1, 4, [4, 4]), scene(ink, 2, 4, [4]), scene(ink, 2, 4, [4, 4, 4]), scene(ink, 3, 5, [5] * 4),
        scene(ink, 2, 4, [4, 3]), scene(ink, 2, 3, [4, 4]), scene(ink, 1, 5, [3]), scene(ink, 1, 3, []),
    ]  # fmt: skip
    assert not task.valid(np.stack(wrong)).any()


def test_real_polygons_pass(hand: dict[str, Digits]) -> None:
    task = Polygons(hand)
    assert task.valid(task.draw(60, np.random.default_rng(1), "test")[0]).mean() > 0.95
    assert all(value > 0.97 for value in task.figures().values())


def test_polygons_lie_apart() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        placed = polygons.scatter(3, rng)
        assert len(placed) == 3 and all(r <= x <= 40 - r and 10 + r <= y <= 40 - r for r, x, y in placed)
        pairs = [(a, b) for i, a in enumerate(placed) for b in placed[:i]]
        assert all(np.hypot(a[1] - b[1], a[2] - b[2]) > a[0] + b[0] + 2 for a, b in pairs)
    assert all(low != high for low, high in pairwise(sorted(r for r, _, _ in placed)))
    assert sudoku.CELL == polygons.CELL == 8  # the handwriting is cut to one size for all benchmarks
