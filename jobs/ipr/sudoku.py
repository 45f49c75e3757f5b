"""Sudoku of handwritten digits: boards, their pictures, and whether a picture is a valid board.

A board of order k has k² rows, columns and boxes of k × k cells, and each shows every digit 1…k² once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, lru_cache

import numpy as np

from jobs.ipr.digits import Digits, Reader
from jobs.ipr.grid import Grid

POOL = 1000  # boards of order 3 that are solved for; each drawn one is one of them, in a random other dress
CELL = 8  # pixels a side
STRANGE = 0.99  # quantile of real digits' distance to the classifier's; what lies further is unlike a digit


def solutions(order: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Every board of that order once, int64 [k², k²], in an order that ``rng`` decides.

    A search that fills the cell with the fewest digits left first, and tries these in random order.
    """
    n = order * order
    everything = (1 << n) - 1
    board = [[0] * n for _ in range(n)]
    rows, columns, boxes = [everything] * n, [everything] * n, [everything] * n

    def fill(empty: set[tuple[int, int]]) -> Iterator[np.ndarray]:
        if not empty:
            yield np.array(board)
            return
        left = {(r, c): rows[r] & columns[c] & boxes[r // order * order + c // order] for r, c in empty}
        r, c = min(left, key=lambda cell: (left[cell].bit_count(), cell))
        b = r // order * order + c // order
        for digit in rng.permutation([d for d in range(n) if left[r, c] >> d & 1]).tolist():
            bit = 1 << digit
            board[r][c] = digit + 1
            rows[r], columns[c], boxes[b] = rows[r] ^ bit, columns[c] ^ bit, boxes[b] ^ bit
            yield from fill(empty - {(r, c)})
            rows[r], columns[c], boxes[b] = rows[r] | bit, columns[c] | bit, boxes[b] | bit

    return fill({(r, c) for r in range(n) for c in range(n)})


@lru_cache
def pool(order: int, seed: int = 0, most: int = POOL) -> np.ndarray:
    """Boards [P, k², k²] to draw from: all 288 of order 2; of others, each the first that a search of its own finds."""
    if order == 2:
        return np.stack(list(solutions(2, np.random.default_rng(seed))))
    return np.stack([next(solutions(order, np.random.default_rng([seed, i]))) for i in range(most)])


def draw(n: int, order: int, rng: np.random.Generator, boards: np.ndarray | None = None) -> np.ndarray:
    """``n`` boards int64 [n, k², k²]: one of the pool each, its digits renamed, its rows and columns shuffled within
    their bands, the bands shuffled, and perhaps transposed.

    Order 2: uniform over all 288. Order 3: each dress of a pool's board (up to 1.2 · 10¹² of them) is equally
    likely; which essentially different boards are in the pool is not, since a search does not find all equally often.
    """
    boards = pool(order) if boards is None else boards
    side = order * order
    found = boards[rng.integers(0, len(boards), n)]
    renamed = rng.permuted(np.tile(np.arange(1, side + 1), (n, 1)), axis=1)
    found = renamed[np.arange(n)[:, None, None], found - 1]
    found = np.take_along_axis(found, _lines(n, order, rng)[:, :, None], 1)
    found = np.take_along_axis(found, _lines(n, order, rng)[:, None, :], 2)
    return np.where(rng.random(n)[:, None, None] < 0.5, found, found.swapaxes(1, 2))


def _lines(n: int, order: int, rng: np.random.Generator) -> np.ndarray:
    """``n`` orders of the rows of a board in which each band stays together, [n, k²]."""
    bands = rng.permuted(np.tile(np.arange(order), (n, 1)), axis=1)
    within = rng.permuted(np.tile(np.arange(order), (n, order, 1)), axis=2)
    return (bands[:, :, None] * order + within).reshape(n, -1)


def valid(boards: np.ndarray) -> np.ndarray:
    """Which of the boards of digits [N, k², k²] show every digit once in each row, column and box: bool [N]."""
    n, side = boards.shape[:2]
    order = round(side**0.5)
    boxes = boards.reshape(n, order, order, order, order).swapaxes(2, 3).reshape(n, side, side)
    units = np.concatenate([boards, boards.swapaxes(1, 2), boxes], 1)
    return (np.sort(units, 2) == np.arange(1, side + 1)).all((1, 2))


class Sudoku:
    """The benchmark: images of boards, and their check by a classifier that has seen none of the model's digits."""

    def __init__(self, order: int, hand: dict[str, Digits]) -> None:
        side = order * order
        self.name, self.order, self.hand = f"sudoku{side}", order, hand
        self.grid = Grid(side, side, CELL, box=order)
        self.classes = side

    @cached_property
    def reader(self) -> Reader:
        return Reader(self.hand["classifier"], tuple(range(1, self.classes + 1)))

    def draw(self, n: int, rng: np.random.Generator, hand: str = "model") -> tuple[np.ndarray, np.ndarray]:
        """``n`` real boards: images uint8 [n, H, W, 1], and the class 0…k²−1 of each cell, int64 [n, k⁴]."""
        boards = draw(n, self.order, rng)
        cells = self.hand[hand].draw(boards, rng)
        return cells.swapaxes(2, 3).reshape(n, *self.grid.shape), boards.reshape(n, -1) - 1

    def cells(self, images: np.ndarray) -> np.ndarray:
        """Images uint8 [N, H, W, 1] → uint8 [N, k², k², CELL, CELL]."""
        return images.reshape(len(images), self.classes, CELL, self.classes, CELL).swapaxes(2, 3)

    def read(self, images: np.ndarray) -> np.ndarray:
        """The boards that the classifier sees in images uint8 [N, H, W, 1]: int64 [N, k², k²]."""
        return self.reader(self.cells(images))

    @cached_property
    def limit(self) -> float:
        """The distance beyond which a cell is unlike a digit."""
        return float(np.quantile(self.reader.distance(self.known().ink), STRANGE))

    def known(self) -> Digits:
        """The digits of a board among those that nobody has seen."""
        test = self.hand["test"]
        rows = np.flatnonzero((test.labels >= 1) & (test.labels <= self.classes))
        return Digits(test.ink[rows], test.labels[rows])

    def valid(self, images: np.ndarray) -> np.ndarray:
        """bool [N]."""
        return valid(self.read(images))

    def details(self, images: np.ndarray, valid: np.ndarray) -> dict[str, float]:
        """How many different boards are among the valid ones, and the share of all cells that are unlike a digit, which
        is 1 - STRANGE of real ones."""
        boards = self.read(images[valid])
        unlike = self.reader.distance(self.cells(images)) > self.limit
        return {"distinct": len(np.unique(boards, axis=0)), "unlike": float(unlike.mean())}

    def figures(self) -> dict[str, float]:
        """How well the classifier reads single digits that neither it nor the model has seen."""
        known = self.known()
        return {"digit_accuracy": float((self.reader(known.ink) == known.labels).mean()), "digits": len(known.labels)}
