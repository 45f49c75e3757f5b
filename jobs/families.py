"""Families of text-to-image pipelines: what Stable Diffusion, SDXL, SD3 and FLUX do each in its own way.

Everything else (generation and training) is written once, over these three things:

    encode         texts -> what the model is told of them, a Condition
    unconditional  the Condition of no text, for guidance and for prompt dropout
    predict        (noisy latents [N, C, h, w], timesteps [N] in 0…1000, Condition) -> prediction [N, C, h, w]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from schemas.errors import WinnowError

#: Tensors [N, …] by the name under which the pipeline's call takes them: "prompt_embeds", "pooled_prompt_embeds".
Condition = dict[str, Tensor]

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
JOINT = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


@dataclass(frozen=True)
class Family:
    """``denoiser``: the pipeline's attribute that is trained; ``lora``: its layers that LoRA adapts; ``patch``: a side
    of latents must be a multiple of it; ``guided``: whether guidance takes a second, unconditional pass (FLUX is told
    its guidance instead); ``unpack``: what the pipeline's call gives as latents → [N, C, h, w], given its
    ``height`` and ``width``, pixels or null; ``timing``: what its scheduler's ``set_timesteps`` is told for a number of
    steps over latents [N, C, h, w]."""

    denoiser: str
    encode: Callable[[Any, list[str]], Condition]
    unconditional: Callable[[Any], Condition]
    predict: Callable[[Any, Tensor, Tensor, Condition], Tensor]
    lora: tuple[str, ...]
    patch: int = 1
    guided: bool = True
    unpack: Callable[[Any, Tensor, int | None, int | None], Tensor] = lambda pipe, made, height, width: made
    timing: Callable[[Any, int, Tensor], dict[str, Any]] = lambda pipe, steps, x: {"num_inference_steps": steps}

    def model(self, pipe: Any) -> Any:
        """The network that predicts."""
        return getattr(pipe, self.denoiser)


def _encode_sd(pipe: Any, texts: list[str]) -> Condition:
    return {"prompt_embeds": pipe.encode_prompt(texts, pipe._execution_device, 1, False)[0]}


def _nothing_sd(pipe: Any) -> Condition:
    return {"prompt_embeds": pipe.encode_prompt([""], pipe._execution_device, 1, True)[1]}


def _predict_sd(pipe: Any, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
    return pipe.unet(noisy, t, condition["prompt_embeds"]).sample


def _encode_pooled(pipe: Any, texts: list[str], **more: Any) -> Condition:
    made = pipe.encode_prompt(texts, device=pipe._execution_device, do_classifier_free_guidance=False, **more)
    return {"prompt_embeds": made[0], "pooled_prompt_embeds": made[2]}


def _nothing_pooled(pipe: Any, **more: Any) -> Condition:
    made = pipe.encode_prompt([""], device=pipe._execution_device, do_classifier_free_guidance=True, **more)
    return {"prompt_embeds": made[1], "pooled_prompt_embeds": made[3]}


def _predict_sdxl(pipe: Any, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
    # Original size, crop from the top left, target size, in pixels (SDXL, arXiv 2307.01952, section 2.2).
    height, width = (side * pipe.vae_scale_factor for side in noisy.shape[2:])
    pooled = condition["pooled_prompt_embeds"]
    sizes = torch.tensor([height, width, 0, 0, height, width], dtype=pooled.dtype, device=noisy.device)
    added = {"text_embeds": pooled, "time_ids": sizes.expand(len(noisy), 6)}
    return pipe.unet(noisy, t, condition["prompt_embeds"], added_cond_kwargs=added).sample


def _predict_sd3(pipe: Any, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
    return pipe.transformer(noisy, condition["prompt_embeds"], condition["pooled_prompt_embeds"], t).sample


def _encode_flux(pipe: Any, texts: list[str]) -> Condition:
    embeds, pooled, _ = pipe.encode_prompt(texts, None, device=pipe._execution_device)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def _grid(tokens: Tensor, height: int, width: int) -> Tensor:
    """FLUX's tokens [N, h·w / 4, 4 C] as latents [N, C, h, w]."""
    n, _, numbers = tokens.shape
    grid = tokens.view(n, height // 2, width // 2, numbers // 4, 2, 2)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(n, numbers // 4, height, width)


def _shift(pipe: Any, x: Tensor) -> float:
    """μ of schedules that shift with the image's size: linear in the number of 2×2 tokens."""
    config = pipe.scheduler.config
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    tokens = (x.shape[2] // 2) * (x.shape[3] // 2)
    return low + (high - low) * (tokens - few) / (many - few)


def _timing_sd3(pipe: Any, steps: int, x: Tensor) -> dict[str, Any]:
    shifts = pipe.scheduler.config.get("use_dynamic_shifting")
    return {"num_inference_steps": steps} | ({"mu": _shift(pipe, x)} if shifts else {})


def _timing_flux(pipe: Any, steps: int, x: Tensor) -> dict[str, Any]:
    if pipe.scheduler.config.get("use_flow_sigmas"):
        return {"num_inference_steps": steps, "mu": _shift(pipe, x)}
    return {"sigmas": torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist(), "mu": _shift(pipe, x)}


def _predict_flux(pipe: Any, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
    n, channels, height, width = noisy.shape
    embeds, device = condition["prompt_embeds"], noisy.device
    # FLUX sees 2×2 latents as one token of 4 C numbers.
    tokens = noisy.reshape(n, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], dim=2).view(-1, 3)
    guidance = condition.get("guidance", torch.ones(n, device=device))  # training has none to tell
    made = pipe.transformer(
        tokens.reshape(n, -1, 4 * channels), embeds, condition["pooled_prompt_embeds"], t / 1000,
        img_ids=places.to(device, embeds.dtype), txt_ids=embeds.new_zeros(embeds.shape[1], 3),
        guidance=guidance if pipe.transformer.config.guidance_embeds else None,
    ).sample  # fmt: skip
    return _grid(made, height, width)


def _unpack_flux(pipe: Any, made: Tensor, height: int | None, width: int | None) -> Tensor:
    sides = (side // pipe.vae_scale_factor if side else pipe.default_sample_size for side in (height, width))
    return _grid(made, *sides)


def _encode_sd3(pipe: Any, texts: list[str]) -> Condition:
    return _encode_pooled(pipe, texts, prompt_2=None, prompt_3=None)


def _nothing_sd3(pipe: Any) -> Condition:
    return _nothing_pooled(pipe, prompt_2=None, prompt_3=None)


def _nothing_flux(pipe: Any) -> Condition:
    return _encode_flux(pipe, [""])


#: By the name of the pipeline's class.
FAMILIES = {
    "StableDiffusionPipeline": Family("unet", _encode_sd, _nothing_sd, _predict_sd, ATTENTION),
    "StableDiffusionXLPipeline": Family("unet", _encode_pooled, _nothing_pooled, _predict_sdxl, ATTENTION),
    "StableDiffusion3Pipeline": Family(
        "transformer", _encode_sd3, _nothing_sd3, _predict_sd3, JOINT, 2, timing=_timing_sd3
    ),
    "FluxPipeline": Family(
        "transformer", _encode_flux, _nothing_flux, _predict_flux, JOINT, 2, False, _unpack_flux, _timing_flux
    ),
}


def family(pipe: Any) -> Family:
    """The family of a pipeline; WinnowError for a class that is none of FAMILIES."""
    for kind in type(pipe).__mro__:
        if kind.__name__ in FAMILIES:
            return FAMILIES[kind.__name__]
    raise WinnowError(
        f"model: a {type(pipe).__name__} is not of a family that Winnow knows; it knows {', '.join(FAMILIES)}"
    )


#: Texts in one call of the encoders.
TOGETHER = 16


class Conditions:
    """Conditions by text, on the CPU, each text encoded once.

    ``texts``, in their order, are encoded in batches of TOGETHER, a whole batch as soon as one of it is asked for: a
    text's numbers then do not depend on where a stage was broken off. Any other text is encoded alone. ``forget``:
    keep only the batches that the last call asked for, where every call goes on where the last one ended.
    """

    def __init__(self, pipe: Any, texts: Iterable[str] = (), forget: bool = False) -> None:
        self.pipe, self.forget = pipe, forget
        self.family = family(pipe)
        distinct = list(dict.fromkeys(texts))
        batches = [distinct[start : start + TOGETHER] for start in range(0, len(distinct), TOGETHER)]
        self.batch_of = {text: batch for batch in batches for text in batch}
        self.known: dict[str | None, Condition] = {}

    @torch.no_grad()
    def __call__(self, texts: Sequence[str | None]) -> Condition:
        """The conditions of ``texts`` (null: of no text), stacked: tensors [N, …]."""
        asked = list(dict.fromkeys(texts))
        for text in asked:
            if text not in self.known:
                self._encode(text)
        stacked = {key: torch.stack([self.known[text][key] for text in texts]) for key in self.known[texts[0]]}
        if self.forget:
            wanted = {mate for text in asked if text is not None for mate in self.batch_of.get(text, ())}
            self.known = {text: made for text, made in self.known.items() if text is None or text in wanted}
        return stacked

    def _encode(self, text: str | None) -> None:
        batch: list[Any] = [None] if text is None else self.batch_of.get(text, [text])
        made = self.family.unconditional(self.pipe) if text is None else self.family.encode(self.pipe, batch)
        for place, one in enumerate(batch):
            self.known[one] = {key: value[place].cpu() for key, value in made.items()}
