"""The grid of regions that an image is cut into: what a region-wise model reads and writes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from schemas.errors import WinnowError


@dataclass(frozen=True)
class Grid:
    """``rows`` × ``columns`` square regions of ``patch`` pixels and ``channels`` colours; ``box``: regions a side of
    the squares that they are grouped in, 0 for none."""

    rows: int
    columns: int
    patch: int
    channels: int = 1
    box: int = 0

    @property
    def regions(self) -> int:
        return self.rows * self.columns

    @property
    def width(self) -> int:
        """Numbers in a region."""
        return self.channels * self.patch**2

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image: height, width, channels."""
        return self.rows * self.patch, self.columns * self.patch, self.channels

    def cut(self, images: np.ndarray) -> np.ndarray:
        """Images uint8 [N, H, W, C] → regions float32 [N, rows·columns, width] in [−1, 1], row by row."""
        if images.shape[1:] != self.shape or images.dtype != np.uint8:
            raise WinnowError(f"images {images.dtype} {images.shape[1:]}: allowed are uint8 {self.shape}; resize them")
        tiles = images.reshape(-1, self.rows, self.patch, self.columns, self.patch, self.channels)
        return tiles.transpose(0, 1, 3, 2, 4, 5).reshape(-1, self.regions, self.width).astype(np.float32) / 127.5 - 1

    def join(self, regions: np.ndarray) -> np.ndarray:
        """What ``cut`` undoes: regions [N, rows·columns, width], clipped to [−1, 1] → images uint8 [N, H, W, C]."""
        pixels = ((np.clip(regions, -1, 1) + 1) * 127.5).round().astype(np.uint8)
        tiles = pixels.reshape(-1, self.rows, self.columns, self.patch, self.patch, self.channels)
        return tiles.transpose(0, 1, 3, 2, 4, 5).reshape(-1, *self.shape)

    def places(self) -> np.ndarray:
        """Row, column and box of each region, int64 [rows·columns, 3]."""
        row, column = np.divmod(np.arange(self.regions), self.columns)
        if not self.box:
            return np.stack([row, column, np.zeros_like(row)], 1)
        return np.stack([row, column, row // self.box * (self.columns // self.box) + column // self.box], 1)
