"""What a run will take, before it starts: images, disk and hours, by arithmetic from the recipe and the model's shape.

Operations are counted, not guessed: the networks are built without memory (PyTorch's meta device) in their true
shape and PyTorch counts the floating-point operations of one pass. Hours follow from a sustained rate. Left out are
the time of scoring (early rejection's, too), embedding and text encoding (a few per cent), the vectors on disk
(32 kB an image in the latents of Stable Diffusion, about 2 kB in CLIP) and copies of images that are taken in.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import models
from schemas.errors import WinnowError

if TYPE_CHECKING:
    from jobs.recipe import Recipe
    from jobs.refine import Refine

#: Sustained TFLOP/s: 40 % of an H100's dense bfloat16 peak of 989, what well-tuned sampling loops reach.
TFLOPS = 400.0
#: Bytes a pixel of a photograph-like image, by format.
PIXEL_BYTES = {"png": 1.7, "webp": 1.3, "jpeg": 0.6}

_SDXL = {
    "_class_name": "UNet2DConditionModel", "sample_size": 128, "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "use_linear_projection": True,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
_SD3 = {
    "_class_name": "SD3Transformer2DModel", "sample_size": 128, "num_layers": 24, "num_attention_heads": 24,
    "attention_head_dim": 64, "caption_projection_dim": 1536, "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
}  # fmt: skip
#: Shapes of models on the Hub, so that a plan needs no network: the denoiser's configuration as published.
PUBLISHED: dict[str, dict[str, Any]] = {
    "CompVis/stable-diffusion-v1-4": {
        "_class_name": "UNet2DConditionModel", "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8
    },
    "stabilityai/stable-diffusion-xl-base-1.0": _SDXL,
    "stabilityai/stable-diffusion-3-medium-diffusers": _SD3,
    "black-forest-labs/FLUX.1-dev": {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True},
}  # fmt: skip
#: Weights of their text encoder and autoencoder: CLIP ViT-L/14's 123 M and 84 M.
REST = {"CompVis/stable-diffusion-v1-4": 206_714_000}
USUAL_VAE = {
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
#: How many text tokens each kind of network reads.
TOKENS = {"UNet2DConditionModel": 77, "SD3Transformer2DModel": 77 + 256, "FluxTransformer2DModel": 512}


@dataclass(frozen=True)
class Shape:
    """A model's size: weights of its denoiser, those of a LoRA of rank 1 on it, pixels a side, TFLOP of one pass and of
    decoding one image, and the numbers in an image's latents and in what the denoiser is told of a text."""

    parameters: int
    adapted: int
    side: int
    step: float
    decode: float
    latent: int
    told: int


@dataclass(frozen=True)
class Plan:
    """What a recipe takes in all: images by split, bytes on disk by kind, and GPU-hours by stage; ``spared``: the share
    of the candidates' network evaluations that early rejection saves."""

    images: dict[str, int]
    bytes: dict[str, float]
    hours: dict[str, float]
    tflops: float
    pixels: tuple[int, int]
    spared: float = 0.0

    def lines(self) -> list[str]:
        """For people: one line each."""
        width, height = self.pixels
        total, disk, hours = sum(self.images.values()), sum(self.bytes.values()), sum(self.hours.values())
        return [
            f"images   {total:,} of {width}×{height}: {_parts(self.images, lambda n: f'{n:,.0f}')}",
            f"disk     {_size(disk)}: {_parts(self.bytes, _size)}",
            f"hours    {hours:,.3g} GPU-hours at {self.tflops:g} sustained TFLOP/s: "
            f"{_parts(self.hours, lambda h: f'{h:.3g}')}",
        ] + [f"spared   {self.spared:.0%} of the candidates' network evaluations, by early rejection"] * (
            self.spared > 0
        )  # fmt: skip


def _parts(values: dict[str, Any], shown: Any) -> str:
    return ", ".join(f"{name} {shown(value)}" for name, value in values.items() if value)


def _size(count: float) -> str:
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6)):
        if count >= 10**power:
            return f"{count / 10**power:.3g} {unit}"
    return f"{count / 1000:.3g} kB"


def plan(recipe: Recipe, prompts: int | None = None, tflops: float = TFLOPS) -> Plan:
    """The whole run of one arm. ``prompts``: how many are kept, where the recipe keeps all that pass.

    How many images refine.where is true of shows in the run alone: refined are, by this count, those that it names by
    ``"rank:…" <= K``, else all candidates, but no more than ``refine.limit``."""
    made, trained, measured, again = recipe.generate, recipe.train, recipe.evaluate, recipe.refine
    kept = recipe.prompts.keep or prompts
    if kept is None:
        raise WinnowError("plan: the recipe keeps all prompts that pass; say how many with --prompts")
    held_out = max(1, round(recipe.prompts.held_out * kept))
    learned = kept - held_out
    shape = shape_of(recipe.model, made.width, made.height)
    width, height = made.width or shape.side, made.height or shape.side
    judged = trained.method != "none"
    rounds = recipe.rounds
    asked = min(made.prompts or learned, learned)
    finished = made.reject.keep if made.reject else made.images_per_prompt
    base = recipe.reference
    images = {
        "D_0": 0 if base.source else min(base.prompts or learned, learned) * base.images_per_prompt,
        "candidates": 0 if made.source else asked * finished * rounds,
        "refined": 0 if again.where is None else _chosen(again, asked, finished) * again.loops * rounds,
        "evaluation": min(measured.prompts or held_out, held_out) * measured.images_per_prompt * (rounds + 1) * judged,
    }
    # Shards that accumulate hold the rounds before them again.
    sets = [number if recipe.export.accumulate else 1 for number in range(1, rounds + 1)]
    all_kept = recipe.select.budget or asked * recipe.select.keep
    if not made.source:  # no more than there are candidates in a round
        all_kept = min(all_kept, asked * finished + images["refined"] // rounds)
    # Of D_0 no more than there is; what a source gives of it is known once it is read.
    have = math.inf if base.source else images["D_0"]
    rows = sum(each * all_kept + min(recipe.export.reference_share * each * all_kept, have) for each in sets)
    folders = len(recipe.export.formats) * (2 if recipe.export.unweighted == "repeats" else 1)
    sizes = PIXEL_BYTES[made.format] * width * height
    weights = 4 * judged * (shape.parameters if trained.method == "full" else trained.rank * shape.adapted)
    rest = _rest(recipe.model)
    disk = {
        "images": sizes * sum(images.values()),
        "shards": sizes * rows * folders,
        # In float32 and bfloat16, each once in all rounds: see jobs.training.cache.
        "cache": judged * (4 * shape.latent * all_kept + 2 * shape.told * min(learned, all_kept)) * rounds,
        "models": (weights + 4 * rest * (trained.method == "full")) * rounds,
        "training state": (4 if trained.ema else 3) * weights,
    }

    def image(name: str) -> float:
        """TFLOP of an image."""
        guided = 2 if guidance[name] > 1 and not _told(recipe.model) else 1
        return steps[name] * guided * networks[name] * shape.step + shape.decode

    begun = made.steps * made.images_per_prompt
    if made.reject:
        step = made.reject.step(made.steps)
        begun = step * made.images_per_prompt + (made.steps - step) * finished
    spared = 1 - begun / (made.steps * made.images_per_prompt)
    steps = dict.fromkeys(images, made.steps) | {
        "candidates": begun / finished, "refined": max(1, round(sum(again.levels) / 2 * again.steps)),
    }  # fmt: skip
    guidance = dict.fromkeys(images, made.guidance)
    if again.guidance is not None:
        guidance["refined"] = again.guidance
    networks = dict.fromkeys(images, 2 if made.negative else 1) | {"D_0": 1} | ({"refined": 1} if again.model else {})
    # Backward costs twice the forward pass; checkpointing repeats the forward pass.
    sample = (4 if trained.checkpointing else 3) * shape.step
    per_hour = tflops * 3600
    hours = {name: count * image(name) / per_hour for name, count in images.items()}
    trainings = rounds * (2 if trained.neon and trained.neon_on == "candidates" else 1)
    hours["training"] = judged * trainings * trained.steps * trained.batch * sample / per_hour
    return Plan(images, disk, hours, tflops, (width, height), spared)


def _chosen(settings: Refine, prompts: int, per_prompt: int) -> int:
    """How many images of a round are refined, at most."""
    best = re.fullmatch(r'\s*"rank:[^"]+"\s*(<?=)\s*(\d+)\s*', settings.where or "")
    each = per_prompt if best is None else min(int(best[2]), per_prompt) if best[1] == "<=" else 1
    return min(prompts * each, settings.limit or prompts * each)


def _rest(model: str) -> int:
    """Weights of a pipeline beside its denoiser, which a fully trained model is saved with."""
    if model in REST:
        return REST[model]
    place = models.locate(model)
    count = 0
    if isinstance(place, Path):
        for file in place.rglob("*.safetensors"):
            if file.parent.name not in ("unet", "transformer"):
                with open(file, "rb") as stream:
                    header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
                count += sum(math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__")
    return count


def _told(model: str) -> bool:
    """Whether the model is told its guidance, so that one pass does."""
    return _config(model).get("_class_name") == "FluxTransformer2DModel"


def _config(model: str) -> dict[str, Any]:
    """The configuration of a model's denoiser: of a folder, or as published."""
    base, _ = models.layers(model) if Path(model).expanduser().exists() else (model, None)
    place = models.locate(base)
    if isinstance(place, Path):
        for part in ("unet", "transformer"):
            if (place / part / "config.json").is_file():
                return _read(place / part / "config.json")
    if base in PUBLISHED:
        return PUBLISHED[base]
    raise WinnowError(
        f"plan: the shape of {model!r} is not known here; give a local folder, or one of {', '.join(PUBLISHED)}"
    )


def _read(file: Path) -> dict[str, Any]:
    """A configuration's JSON."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WinnowError(f"{file}: not readable as JSON ({error}); restore the model's folder") from error
    if not isinstance(values, dict):
        raise WinnowError(f"{file}: is a {type(values).__name__}, not a table; restore the model's folder")
    return values


def shape_of(model: str, width: int | None, height: int | None) -> Shape:
    """Count a model's weights and operations at an image size (null: its own)."""
    place = models.locate(model)
    scale, decoder = 8, None
    if isinstance(place, Path) and (place / "vae" / "config.json").is_file():
        decoder = _read(place / "vae" / "config.json")
        scale = 2 ** (len(decoder.get("block_out_channels", USUAL_VAE["block_out_channels"])) - 1)
    config = _config(model)
    # A FLUX transformer has no size of its own: its pipeline draws 1024 × 1024.
    side = config.get("sample_size", 128)
    if not isinstance(side, int):
        raise WinnowError(f"plan: {model!r} has the sample_size {side!r}, an integer is needed; restore its folder")
    side *= scale
    key = json.dumps([config, decoder, (height or side) // scale, (width or side) // scale], sort_keys=True)
    try:
        parameters, adapted, *rest = _count(key)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise WinnowError(
            f"plan: a network of the shape that {model!r} gives cannot be built ({type(error).__name__}: {reason}); "
            "restore the config.json of its folder"
        ) from error
    return Shape(parameters, adapted, side, *rest)


@lru_cache
def _count(key: str) -> tuple[int, int, float, float, int, int]:
    """Weights, weights of a LoRA of rank 1, TFLOP of a pass and of a decoding, numbers in latents and in conditions."""
    import diffusers
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from jobs.families import JOINT

    config, decoder, height, width = json.loads(key)
    kind = config.get("_class_name", "network without _class_name")
    if kind not in TOKENS:
        raise WinnowError(f"plan: a {kind} is not counted here; it counts {', '.join(TOKENS)}")
    with torch.device("meta"):
        network = getattr(diffusers, kind).from_config({k: v for k, v in config.items() if not k.startswith("_")})
        channels = network.config.in_channels
        x, t = torch.empty(1, channels, height, width), torch.empty(1)
        words, pooled = TOKENS[kind], 0
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            if kind == "UNet2DConditionModel":
                wide, more = network.config.cross_attention_dim, {}
                if network.config.addition_embed_type == "text_time":
                    ids = 6 * network.config.addition_time_embed_dim
                    pooled = network.config.projection_class_embeddings_input_dim - ids
                    more = {"added_cond_kwargs": {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}}
                network(x, t, torch.empty(1, words, wide), **more)
            elif kind == "SD3Transformer2DModel":
                wide, pooled = network.config.joint_attention_dim, network.config.pooled_projection_dim
                network(x, torch.empty(1, words, wide), torch.empty(1, pooled), t)
            else:
                wide, pooled = network.config.joint_attention_dim, network.config.pooled_projection_dim
                tokens = height * width // 4
                network(
                    torch.empty(1, tokens, channels), torch.empty(1, words, wide), torch.empty(1, pooled), t,
                    torch.empty(tokens, 3),
                    torch.empty(words, 3), torch.empty(1) if network.config.guidance_embeds else None,
                )  # fmt: skip
                channels //= 4
        step = counter.get_total_flops() / 1e12
        vae = diffusers.AutoencoderKL.from_config(decoder or USUAL_VAE | {"latent_channels": channels})
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            vae.decode(torch.empty(1, vae.config.latent_channels, height, width))
        decode = counter.get_total_flops() / 1e12
    adapted = [
        layer.in_features + layer.out_features
        for name, layer in network.named_modules()
        if isinstance(layer, torch.nn.Linear) and name.endswith(JOINT)
    ]
    numbers = channels * height * width, words * wide + pooled
    return sum(p.numel() for p in network.parameters()), sum(adapted), step, decode, *numbers
