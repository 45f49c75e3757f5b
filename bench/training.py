"""Training: steps from the cache against the usual loop, which decodes and encodes its rows anew every epoch.

Ours is the trainer as a round runs it, from a cache that an earlier round has filled: batches made by the loader's
thread, the moving average, the checks of the loss. The plain loop is put together as diffusers' text-to-image script
is: a dataset of images that decodes, transforms and tokenizes row by row, a data loader in the same process, the
autoencoder and the text encoder on each batch, and the same step of the same optimiser. It is measured with the moving
average that ours keeps, by diffusers' EMAModel as that script has it, and without one, which is less than ours does.
"""

from __future__ import annotations

import itertools
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.ratio import Ratio, compare
from jobs import models
from jobs.generate import Generate, Sampler
from jobs.images import encode
from jobs.train import Train
from jobs.training.cache import Example, build
from jobs.training.loop import fine_tune
from jobs.world.scenes import all_captions

ROWS, STEPS, BATCH, TURNS = 512, 96, 64, 7


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
    """The usual loop of a training script, for a flow-matching latent diffusion model."""
    from datasets import Dataset, Features, Image, Value
    from diffusers.training_utils import EMAModel
    from torchvision import transforms

    pipe = models.load("embedded")
    unet, vae = pipe.unet.train(), pipe.vae
    side = unet.config.sample_size * pipe.vae_scale_factor
    change = transforms.Compose(
        [transforms.Resize(side, interpolation=transforms.InterpolationMode.BILINEAR), transforms.CenterCrop(side),
         transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]
    )  # fmt: skip

    def prepare(some: dict[str, list[Any]]) -> dict[str, Any]:
        ids = pipe.tokenizer(
            some["text"], padding="max_length", max_length=pipe.tokenizer.model_max_length, truncation=True,
            return_tensors="pt",
        ).input_ids  # fmt: skip
        return {"pixels": [change(image.convert("RGB")) for image in some["image"]], "ids": ids}

    held = {"image": [{"bytes": row.file, "path": None} for row in rows], "text": [row.text for row in rows]}
    data = Dataset.from_dict(held, features=Features({"image": Image(), "text": Value("string")}))
    loader = torch.utils.data.DataLoader(
        data.with_transform(prepare), settings.batch, shuffle=True, drop_last=True,
        collate_fn=lambda some: {key: torch.stack([row[key] for row in some]) for key in ("pixels", "ids")},
    )  # fmt: skip
    optimiser = torch.optim.AdamW(unet.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    average = EMAModel(unet.parameters(), settings.ema) if settings.ema else None
    epochs = itertools.chain.from_iterable(itertools.repeat(loader))
    for _, batch in zip(range(settings.steps), epochs, strict=False):
        with torch.no_grad():
            x = vae.encode(batch["pixels"]).latent_dist.sample() * vae.config.scaling_factor
            text = pipe.text_encoder(batch["ids"])[0]
        noise, sigma = torch.randn_like(x), torch.sigmoid(torch.randn(len(x)))
        noisy = torch.lerp(x, noise, sigma.view(-1, 1, 1, 1))
        loss = (unet(noisy, sigma * 1000, text).sample - (noise - x)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), settings.clip)
        optimiser.step()
        if average:
            average.step(unet.parameters())
        optimiser.zero_grad()
        loss.item()


def ours(rows: list[Example], settings: Train, folder: Path) -> float:
    """The trainer; the share of the time that it waited for data."""
    pipe = models.load("embedded")
    return fine_tune(pipe, build(pipe, rows, folder / "cache"), settings, 0, folder / "state")


def run() -> list[Ratio]:
    """The embedded default, batches of 64. Each way has a process of its own, as its user would have: what one sets of
    threads and memory is not the other's."""
    rows, settings = examples(), Train(steps=STEPS, batch=BATCH, lr=1e-4, ema=0.98, checkpoint=0)
    ways = {"plain loop": settings.model_copy(update={"ema": 0.0}), "plain loop with the average": settings}
    found, alone = [], multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name, alone.Pool(1) as mine, alone.Pool(1) as other:
        folder = Path(name)
        build(models.load("embedded"), rows, folder / "cache")
        what = f"{STEPS} steps of {BATCH} rows; {{:.2%}} of ours was waiting for data"
        for theirs, how in ways.items():
            waited: list[float] = []
            ratio = compare(
                f"training, from the cache / {theirs}", what,
                lambda waited=waited: waited.append(mine.apply(ours, (rows, settings, folder))),
                lambda how=how: other.apply(plain, (rows, how)), TURNS,
            )  # fmt: skip
            found.append(Ratio(**{**vars(ratio), "what": what.format(float(np.median(waited)))}))
    return found
