"""The guidance gap: how far a diffusion model's prediction moves when it is told the prompt.

After the accumulated score differences of CFG-Rejection (arXiv 2505.23343), but for a given image, not along a
sampling path: the image's latents x are noised to each of LEVELS, with noise that is the same for every image, and

    gap = mean over the levels of  RMS(ε(x_t, t, prompt) − ε(x_t, t, nothing)),

the root of the mean square over all numbers of a latent; "nothing" is what the pipeline itself guides away from, for
FLUX, which is told its guidance, an empty text.
Models that predict v or a flow are translated: Δε = √ᾱ · Δv, and Δε = (1 − σ) · Δu.

The score is −gap. An image that already shows what the prompt says needs no push towards it, one that shows
something else gets a large one: on the embedded world the right caption has the smaller gap in 97 % of the pairs
with another. Among images of one prompt it tells little there: the best of 4 by it is no more often right than any.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from jobs import devices, models
from jobs.families import Conditions
from jobs.images import array
from jobs.latents import encode
from jobs.objective import objective
from jobs.pretrained import too_long
from schemas.errors import WinnowError

#: Shares of the training steps, or σ of a flow.
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
SEED = 2505_23343


class GuidanceGap:
    """``model``: a pipeline by name, folder or Hub id; usually a small one. float32."""

    def __init__(self, model: str) -> None:
        if not model:
            raise WinnowError("scorer 'guidance-gap': of which model? write 'guidance-gap:embedded' or a pipeline")
        self.model = model
        self.revision = models.revision(model)

    @cached_property
    def pipe(self) -> Any:
        return models.load(self.model, torch.float32)

    @torch.no_grad()
    def score(self, images: list[Image.Image], prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """−gap float32 [N], at most 0 and in units of the noise's standard deviation, and where a tokenizer cut the
        text [N]."""
        values = np.zeros(len(images), np.float32)
        sizes = [image.size for image in images]
        for size in dict.fromkeys(sizes):  # latents of one size go together
            some = [i for i, other in enumerate(sizes) if other == size]
            pixels = array([images[i].convert("RGB") for i in some])
            values[some] = -self.gaps(encode(self.pipe.vae, pixels), [prompts[i] for i in some])
        cut = np.zeros(len(prompts), bool)
        for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
            if (tokenizer := getattr(self.pipe, name, None)) is not None:
                cut |= np.array(too_long(tokenizer, prompts, tokenizer.model_max_length))
        return values, cut

    def gaps(self, latents: Tensor, prompts: list[str]) -> np.ndarray:
        """Gap of each of the scaled latents [N, C, h, w] for its prompt [N]."""
        pipe, x, conditions = self.pipe, latents.to(devices.device()), Conditions(self.pipe)
        predict, goal = conditions.family.predict, objective(pipe.scheduler)
        told, untold = (
            {key: value.to(x.device) for key, value in conditions(texts).items()}
            for texts in (prompts, [None] * len(prompts))
        )
        random = torch.Generator().manual_seed(SEED)
        total = torch.zeros(len(x), device=x.device)
        for level in LEVELS:
            noise = torch.randn(x.shape[1:], generator=random).to(x.device).expand_as(x)
            t = torch.full((len(x),), level * goal.steps, device=x.device)
            t = t if goal.kind == "flow" else t.long()
            noisy = goal.noisy(x, noise, t)
            with devices.exact():
                moved = predict(pipe, noisy, t, told) - predict(pipe, noisy, t, untold)
            total += goal.in_noise(t) * moved.square().flatten(1).mean(1).sqrt()
        return (total / len(LEVELS)).cpu().numpy()
