"""Training at the true shape of Stable Diffusion 1.x, on a GPU: steps from the cache against the usual loop.

Weights are random, since speed does not ask for learned ones. Ours is the trainer as a round runs it; the plain loop is
put together as diffusers' text-to-image script is, in bfloat16, with processes of its own that decode ahead.
"""

from __future__ import annotations

import copy
import io
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.ratio import Ratio, compare
from jobs import lora, models
from jobs.images import encode
from jobs.train import Train
from jobs.training.cache import Example, build
from jobs.training.loop import fine_tune
from jobs.world.scenes import all_captions

SIDE, ROWS, BATCH, STEPS, TURNS = 512, 64, 16, 16, 3
WORKERS = 4  # of the plain loop's data loader
PEAK = {"H100": 989e12, "H200": 989e12}  # dense bf16 operations a second, by NVIDIA's data sheets


def pipeline() -> Any:
    """A Stable Diffusion 1.x with random weights on the GPU, float32; the tokenizer is the embedded model's."""
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = models.load("embedded").tokenizer
    tokenizer.model_max_length = 77
    with torch.device("cuda"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=SIDE,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        unet = UNet2DConditionModel(sample_size=SIDE // 8, cross_attention_dim=768)
    text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                                        num_attention_heads=12, vocab_size=49408)).cuda()  # fmt: skip
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    pipe = StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)
    pipe.vae.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    return pipe


def examples() -> list[Example]:
    """Smooth random JPEG images with captions."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(ROWS):
        rough = torch.from_numpy(rng.random((1, 3, 32, 32), np.float32))
        fine = torch.nn.functional.interpolate(rough, size=(SIDE, SIDE), mode="bicubic")[0].clamp(0, 1)
        pixels = (fine.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        rows.append(Example(i, all_captions()[i], 1.0, encode(pixels, "jpeg")))
    return rows


class Images(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows decoded, transformed and tokenized one by one, as the usual script does it."""

    def __init__(self, pipe: Any, rows: list[Example]) -> None:
        from torchvision import transforms

        self.tokenizer, self.rows = pipe.tokenizer, rows
        resize = transforms.Resize(SIDE, interpolation=transforms.InterpolationMode.BILINEAR)
        steps = [resize, transforms.CenterCrop(SIDE), transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]
        self.change = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        row = self.rows[i]
        told = self.tokenizer(row.text, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        pixels = self.change(Image.open(io.BytesIO(row.file)).convert("RGB"))
        return {"pixels": pixels, "ids": told.input_ids[0]}


def batches(pipe: Any, rows: list[Example]) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches of them, decoded ahead."""
    loader = torch.utils.data.DataLoader(
        Images(pipe, rows), BATCH, shuffle=True, drop_last=True, num_workers=WORKERS, persistent_workers=True,
        pin_memory=True,
    )  # fmt: skip
    return itertools.chain.from_iterable(itertools.repeat(loader))


def plain(pipe: Any, encoders: tuple[Any, Any], rows: Iterator[dict[str, torch.Tensor]], settings: Train) -> None:
    """The usual loop: the autoencoder and the text encoder, ``encoders`` in bfloat16, on every batch."""
    unet, (vae, text_encoder) = pipe.unet.train(), encoders
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    for batch in itertools.islice(rows, settings.steps):
        with torch.no_grad():
            pixels = batch["pixels"].to("cuda", torch.bfloat16, non_blocking=True)
            x = vae.encode(pixels).latent_dist.sample().float() * vae.config.scaling_factor
            text = text_encoder(batch["ids"].to("cuda", non_blocking=True))[0]
        noise, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),), device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            predicted = unet(pipe.scheduler.add_noise(x, noise, t), t, text).sample
        (predicted.float() - noise).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.clip)
        optimiser.step()
        optimiser.zero_grad()


def operations(unet: Any) -> float:
    """Floating-point operations of the passes of one row, forth and back."""
    from torch.utils.flop_counter import FlopCounterMode

    x, t = torch.randn(1, 4, SIDE // 8, SIDE // 8, device="cuda"), torch.zeros(1, device="cuda")
    text = torch.randn(1, 77, 768, device="cuda", dtype=torch.bfloat16)
    with FlopCounterMode(display=False) as counter, torch.autocast("cuda", torch.bfloat16):
        unet(x, t, text).sample.float().square().mean().backward()
    return float(counter.get_total_flops())


def run() -> list[Ratio]:
    """LoRA of rank 16 and full fine-tune, where there is a GPU."""
    if not torch.cuda.is_available():
        print("large: there is no GPU; nothing is measured")
        return []
    rows, pipe = examples(), pipeline()
    encoders = tuple(copy.deepcopy(part).to(torch.bfloat16) for part in (pipe.vae, pipe.text_encoder))
    decoded, found = batches(pipe, rows), []  # its processes start in the turn that does not count
    with tempfile.TemporaryDirectory() as name:
        build(pipe, rows, Path(name) / "cache")
        # The full one first: a LoRA freezes what it is attached to.
        for method in ("full", "lora"):
            more = {"lr": 1e-5, "ema": 0.99, "checkpoint": 0, "precision": "bfloat16"}
            settings = Train(method=method, steps=STEPS, batch=BATCH, **more)
            if method == "lora":
                pipe.unet.to(torch.bfloat16)
                lora.attach(pipe, settings.rank, 0)
            each = operations(pipe.unet)
            pipe.unet.zero_grad(set_to_none=True)

            def timed(call: Callable[[], object]) -> Callable[[], object]:
                def whole() -> None:
                    call()
                    torch.cuda.synchronize()

                return whole

            def ours(settings: Train = settings) -> None:
                fine_tune(pipe, build(pipe, rows, Path(name) / "cache"), settings, 0, Path(name) / "state")

            def theirs(settings: Train = settings) -> None:
                plain(pipe, encoders, decoded, settings)

            title = f"Stable Diffusion 1.x, {method}, from the cache / plain loop"
            found.append(_told(compare(title, "", timed(ours), timed(theirs), TURNS), each))
            torch.cuda.empty_cache()
    return found


def _told(ratio: Ratio, operations: float) -> Ratio:
    """The ratio with both speeds in its words."""
    device = torch.cuda.get_device_name()
    peak = next((value for name, value in PEAK.items() if name in device), None)
    said = []
    for who, seconds in (("ours", ratio.ours), ("theirs", ratio.theirs)):
        speed = STEPS * BATCH / seconds
        share = f", {speed * operations / peak:.0%} of the peak" if peak else ""
        said.append(f"{who} {speed:.1f} samples/s{share}")
    cores = os.cpu_count()
    what = f"{STEPS} steps of {BATCH}, {SIDE} × {SIDE}, bf16, one {device}, {cores} cores; {'; '.join(said)}"
    return Ratio(**{**vars(ratio), "what": what})
