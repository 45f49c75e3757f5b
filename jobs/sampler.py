"""A sampler: images from texts and seeds, in batches that fit into the memory."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import suppress
from threading import RLock
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs import models
from jobs.memory import Halves
from schemas.errors import WinnowError

if TYPE_CHECKING:
    from torch import Tensor

    from jobs.generate import Generate
    from jobs.sampling import Step


class Sampler:
    """Images from texts and seeds, in two halves for two threads: the denoiser works on one batch while the
    autoencoder works on the batch before. ``texts``: those that will be asked for, in their order."""

    def __init__(self, pipe: Any, settings: Generate, texts: Iterable[str] = ()) -> None:
        from jobs.families import Conditions
        from jobs.sampling import shifted

        self.pipe = pipe if settings.shift is None else shifted(pipe, settings.shift)
        self.settings = settings
        self.conditions = Conditions(pipe, texts, forget=True)
        self.turn = RLock()  # a pipeline's scheduler counts its steps: one batch at a time
        self.halves = Halves("generate", "lower generate.width and height, or take a smaller model or generate.dtype")

    def __call__(self, texts: list[str], seeds: list[int]) -> np.ndarray:
        """Float images [N, H, W, 3] in [0, 1]; image i depends on text and seed i alone, but for rounding."""
        return self.decode(self.denoise(texts, seeds))

    def denoise(self, texts: list[str], seeds: list[int]) -> Tensor:
        """Their latents [N, C, h, w], on the device."""
        import torch

        with self.turn:
            return torch.cat(self.halves(len(texts), lambda some: self._denoise(texts[some], seeds[some])))

    def _denoise(self, texts: list[str], seeds: list[int]) -> Tensor:
        import torch

        settings, pipe, kind = self.settings, self.pipe, self.conditions.family
        told = self.conditions(texts)
        if kind.guided and settings.guidance > 1:
            nothing = self.conditions([None] * len(texts))
            told |= {f"negative_{key}": value for key, value in nothing.items()}
        made = pipe(
            **{key: value.to(pipe._execution_device) for key, value in told.items()},
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            width=settings.width,
            height=settings.height,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            output_type="latent",
        ).images
        return kind.unpack(pipe, made, settings.height, settings.width)

    def walk(self, texts: list[str], seeds: list[int]) -> Generator[Step, Sequence[int] | None, None]:
        """The way to the same latents, but for rounding, step by step: see ``jobs.sampling``."""
        import torch

        from jobs import sampling

        settings, pipe = self.settings, self.pipe
        told, untold = (
            {key: value.to(pipe._execution_device) for key, value in self.conditions(asked).items()}
            for asked in (texts, [None] * len(texts))
        )
        # As the pipeline has it: what the schedulers draw in each step comes after the first noise.
        random = [torch.Generator().manual_seed(seed) for seed in seeds]
        first = [torch.randn(self._shape(), generator=one, dtype=told["prompt_embeds"].dtype) for one in random]
        noise = torch.stack(first).to(pipe._execution_device)
        return sampling.walk(pipe, told, untold, noise, settings.steps, settings.guidance, random=random)

    def _shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents."""
        pipe, settings = self.pipe, self.settings
        side = getattr(pipe, "default_sample_size", None) or pipe.unet.config.sample_size
        sides = (given // pipe.vae_scale_factor if given else side for given in (settings.height, settings.width))
        return (pipe.vae.config.latent_channels, *sides)

    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents [N, C, h, w] → float images [N, H, W, 3] in [0, 1]."""
        import torch

        from jobs.latents import decode

        with suppress(torch.OutOfMemoryError):
            return decode(self.pipe.vae, latents)
        with self.turn:  # beside a batch that is denoised they did not fit; alone they may
            torch.cuda.empty_cache()
            try:
                return decode(self.pipe.vae, latents)
            except torch.OutOfMemoryError as error:
                raise self.halves.too_large(error) from error


def sampler(model: str, settings: Generate, texts: Iterable[str] = ()) -> Sampler:
    """The sampler of a model, in the precision and layout that the settings ask for."""
    import torch

    from jobs.families import family

    pipe = models.load(model, getattr(torch, settings.dtype) if settings.dtype else None)
    kind = family(pipe)
    network = kind.model(pipe)
    fits = kind.patch * pipe.vae_scale_factor
    for key, side in (("width", settings.width), ("height", settings.height)):
        if side and side % fits:
            raise WinnowError(f"generate.{key} is {side}: this model takes multiples of {fits}; give one")
    if pipe.vae.dtype == torch.float16 and pipe.vae.config.get("force_upcast"):
        pipe.vae.float()  # SDXL's overflows in float16
    if pipe.device.type == "cuda":
        network.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    if settings.negative:
        from jobs.negative import lead_away

        lead_away(pipe, settings.negative)
    if settings.compile:
        kind.model(pipe).compile()
    return Sampler(pipe, settings, texts)
