"""A pipeline's autoencoder as an encoder: scaled latents, the space of the paper's distances and of training."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image

from jobs import models
from jobs.images import array


class Latents:
    """``model``: a name, folder or Hub id of a latent diffusion pipeline."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.revision = models.revision(model)

    @cached_property
    def vae(self) -> Any:
        return models.load(self.model).vae.float()

    @torch.no_grad()
    def flat(self, images: list[Image.Image]) -> np.ndarray:
        """Means of the scaled latents, float32 [N, C·h·w]."""
        return encode(self.vae, array(images)).flatten(1).cpu().numpy()


@torch.no_grad()
def encode(vae: Any, images: np.ndarray, batch: int = 64) -> torch.Tensor:
    """uint8 [N, H, W, 3] → scaled latent means, float32 [N, C, h, w] on the CPU."""
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    parts = []
    for start in range(0, len(images), batch):
        pixels = torch.from_numpy(images[start : start + batch]).permute(0, 3, 1, 2)
        pixels = pixels.to(vae.device, vae.dtype) / 127.5 - 1
        mean = vae.encode(pixels).latent_dist.mean
        parts.append(((mean - shift) * vae.config.scaling_factor).float().cpu())
    return torch.cat(parts)
