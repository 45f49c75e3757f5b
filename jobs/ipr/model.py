"""A transformer over regions, each with its own noise level: what is there, and how sure is it?

Rectified flow: z = (1 − t) x + t ε for each region, x in [−1, 1], ε standard normal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from jobs.ipr.grid import Grid

FREQUENCIES = 32  # of the embedded noise level, from 1 to MOST periods
MOST = 64.0


@dataclass(frozen=True)
class Shape:
    """``width`` of a token, ``layers`` of ``heads`` each; what the first head ``predicts``: the clean region x, or the
    velocity u = ε − x; ``classes``: of an auxiliary head that names each region's digit, 0 for none."""

    width: int = 96
    layers: int = 4
    heads: int = 4
    predicts: Literal["x", "u"] = "x"
    classes: int = 0


class Prediction(NamedTuple):
    """Of each region: its clean content [N, R, D], the log of the mean square error that is expected of that [N, R],
    and the logits of its class [N, R, classes], None without such a head."""

    x: Tensor
    log_var: Tensor
    logits: Tensor | None


class Block(nn.Module):
    """Attention between all regions, then each on its own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h: Tensor) -> Tensor:
        n, regions, width = h.shape
        qkv = self.qkv(self.norm1(h)).view(n, regions, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*qkv.unbind(0))
        h = h + self.out(mixed.transpose(1, 2).reshape(n, regions, width))
        return h + self.mlp(self.norm2(h))


class RegionTransformer(nn.Module):
    """Noisy regions z [N, R, D] and their levels t [N, R] in [0, 1] → Prediction."""

    frequencies: Tensor
    places: Tensor

    def __init__(self, grid: Grid, shape: Shape) -> None:
        super().__init__()
        self.grid, self.shape = grid, shape
        d = shape.width
        places = torch.from_numpy(grid.places())
        self.register_buffer("places", places, persistent=False)
        frequencies = torch.exp(torch.linspace(0, math.log(MOST), FREQUENCIES)) * math.pi
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.enter = nn.Linear(grid.width, d)
        self.level = nn.Sequential(nn.Linear(2 * FREQUENCIES, d), nn.SiLU(), nn.Linear(d, d))
        self.position = nn.ModuleList(nn.Embedding(int(axis.max()) + 1, d) for axis in places.unbind(1))
        self.blocks = nn.Sequential(*(Block(d, shape.heads) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(d)
        self.content, self.certainty = nn.Linear(d, grid.width), nn.Linear(d, 1)
        self.kind = nn.Linear(d, shape.classes) if shape.classes else None

    def forward(self, z: Tensor, t: Tensor) -> Prediction:
        angles = t[..., None] * self.frequencies
        h = self.enter(z) + self.level(torch.cat([angles.sin(), angles.cos()], -1))
        for embedding, place in zip(self.position, self.places.unbind(1), strict=True):
            h = h + embedding(place)
        h = self.norm(self.blocks(h))
        found = self.content(h)
        x = found if self.shape.predicts == "x" else z - t[..., None] * found
        return Prediction(x, self.certainty(h)[..., 0], None if self.kind is None else self.kind(h))
