"""Training: steps from the cache against the usual loop, which decodes and encodes its rows anew every epoch.

Ours is the trainer as a round runs it, from a cache that an earlier round has filled: batches made by the loader's
thread, the moving average, the checks of the loss. The plain loop decodes the PNG files, runs the autoencoder and the
text encoder on each batch, and then does the same step of the same optimiser on the same loss, without an average.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench.ratio import Ratio, compare
from jobs import models
from jobs.generate import Generate, Sampler
from jobs.images import encode
from jobs.train import Train
from jobs.training.cache import Example, build
from jobs.training.loader import batches
from jobs.training.loop import fine_tune
from jobs.world.scenes import all_captions

ROWS, STEPS, BATCH = 512, 24, 64


def examples() -> list[Example]:
    """Rows as a round has them: images that the embedded model drew."""
    captions = [all_captions()[i % 180] for i in range(ROWS)]
    draw = Sampler(models.load("embedded"), Generate(steps=8, guidance=1.0), captions)
    made = []
    for start in range(0, ROWS, BATCH):
        texts = captions[start : start + BATCH]
        images = draw(texts, list(range(start, start + len(texts))))
        for i, (text, image) in enumerate(zip(texts, images, strict=True), start):
            made.append(Example(i, text, 1.0, encode(np.round(image * 255).astype(np.uint8), "png")))
    return made


def plain(rows: list[Example], settings: Train) -> None:
    """The usual loop of a training script for a flow-matching latent diffusion model."""
    pipe = models.load("embedded")
    unet, vae = pipe.unet.train(), pipe.vae
    optimiser = torch.optim.AdamW(unet.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    random = torch.Generator().manual_seed(0)
    drawn = batches(np.zeros(len(rows), int), settings.batch, 0)
    for _, some in zip(range(settings.steps), drawn, strict=False):
        batch = [rows[i] for i in some]
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(row.file)).convert("RGB")) for row in batch])
        with torch.no_grad():
            inputs = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
            x = vae.encode(inputs).latent_dist.mean * vae.config.scaling_factor
            ids = pipe.tokenizer(
                [row.text for row in batch], padding="max_length", max_length=pipe.tokenizer.model_max_length,
                truncation=True, return_tensors="pt",
            ).input_ids  # fmt: skip
            text = pipe.text_encoder(ids)[0]
        noise = torch.randn(x.shape, generator=random)
        sigma = torch.sigmoid(torch.randn(len(x), generator=random))
        noisy = torch.lerp(x, noise, sigma.view(-1, 1, 1, 1))
        loss = (unet(noisy, sigma * 1000, text).sample - (noise - x)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), settings.clip)
        optimiser.step()
        loss.item()


def run() -> list[Ratio]:
    """The embedded default, batches of 64."""
    rows, settings = examples(), Train(steps=STEPS, batch=BATCH, lr=1e-4, ema=0.98, checkpoint=0)
    waited = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(models.load("embedded"), rows, folder / "cache")

        def ours() -> None:
            pipe = models.load("embedded")
            waited.append(fine_tune(pipe, build(pipe, rows, folder / "cache"), settings, 0, folder / "state"))

        what = f"{STEPS} steps of {BATCH} rows; {{:.2%}} of ours was waiting for data"
        found = compare("training, from the cache / plain loop", what, ours, lambda: plain(rows, settings))
    share = float(np.median(waited)) / found.ours
    return [Ratio(**{**vars(found), "what": what.format(share)})]
