"""``make base``: every model of the embedded world, from a seed and a file of handwritten digits.

Three disjoint slices of the handwriting train the generator, the scorers (again apart from each other) and the
judge; a fourth is shown to none and gives the figures. Every part draws from its own seed, so building one of
them again gives what building all of them does.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from curate.drift import diversity, frechet, moments
from jobs.images import encode
from jobs.progress import bar, say
from jobs.world import WEIGHTS
from jobs.world.clip import one_slot_wrong, save_clip, train_clip
from jobs.world.fit import Progress, pixels, store
from jobs.world.generator import train_autoencoder, train_generator
from jobs.world.judge import DigitReader, judge, restore, train_judge
from jobs.world.reader import SlotReader, log_likelihood, train_reader
from jobs.world.scenes import Handwriting, Scene, all_captions, draw_scenes, handwriting, parse, render
from schemas.errors import WinnowError
from schemas.tables import IMAGE

#: Shares of the shuffled handwriting: nobody's test digits come last.
SLICES = {
    "generator": (0.0, 0.25),
    "clip": (0.25, 0.42),
    "reader": (0.42, 0.5),
    "judge": (0.5, 0.917),
    "test": (0.917, 1.0),
}
STEPS = {"autoencoder": 1000, "generator": 1000, "clip": 1500, "reader": 800, "judge": 2000}
REAL = 50  # real scenes of each caption behind ``fd_real``
Slices = dict[str, Handwriting]
Steps = dict[str, int]
Figures = dict[str, Any]
EACH = 16  # real scenes of each caption behind ``reference.source: embedded``
#: Captions, and images of each, that the embedded recipes and their studies judge.
JUDGED = ((36, 56), (36, 20), (30, 4))
DRAWS = 12  # of captions and scenes, whose mean is the figure
PARTS = ("generator", "clip", "reader", "judge", "real", "scenes")


def digits(data: str | None) -> tuple[np.ndarray, np.ndarray, str]:
    """Images uint8 [N, H, W], labels [N] and where they come from: a .npz file with ``images`` and ``labels`` (or
    ``x_train`` and ``y_train``), or scikit-learn's bundled 8×8 digits where ``data`` is empty."""
    if not data:
        from sklearn.datasets import load_digits

        found = load_digits()
        return (found.images * 255 / 16).round().astype(np.uint8), found.target, "scikit-learn digits"
    path = Path(data).expanduser()
    try:
        with open(path, "rb") as file, np.load(file) as held:
            names = ("images", "labels") if "images" in held else ("x_train", "y_train")
            images, labels = held[names[0]], held[names[1]]
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise WinnowError(f"{data}: no handwriting there ({error}); give an .npz with 'images' and 'labels'") from error
    if images.ndim != 3 or len(images) != len(labels) or len(images) < 1000:
        raise WinnowError(f"{data}: images {images.shape}, labels {labels.shape}; give [N, H, W] and [N], N ≥ 1000")
    if images.dtype.kind not in "iu" or labels.dtype.kind not in "iu" or set(np.unique(labels)) != set(range(10)):
        raise WinnowError(f"{data}: holds {images.dtype} and {labels.dtype}; give uint8 images, and labels 0 to 9, all")
    return images.astype(np.uint8), labels, path.name


def slices(images: np.ndarray, labels: np.ndarray, seed: int) -> dict[str, Handwriting]:
    """The shuffled handwriting, cut as SLICES says."""
    shuffled = np.random.default_rng([seed, 0]).permutation(len(images))
    hand = handwriting(images[shuffled], labels[shuffled])
    n = len(images)
    return {name: hand.slice(round(low * n), round(high * n)) for name, (low, high) in SLICES.items()}


def build(
    data: str | None, seed: int = 0, to: Path = WEIGHTS, only: tuple[str, ...] = PARTS, scale: float = 1.0
) -> None:
    """Train the parts and write them with their figures into ``to``. ``scale`` multiplies the training steps."""
    unknown = [part for part in only if part not in PARTS]
    if unknown:
        raise WinnowError(f"base: unknown part {unknown[0]!r}; allowed are {', '.join(PARTS)}")
    images, labels, source = digits(data)
    hand = slices(images, labels, seed)
    to.mkdir(parents=True, exist_ok=True)
    card_file = to / "card.json"
    card = json.loads(card_file.read_text()) if card_file.exists() else {"parts": {}}
    card |= {"handwriting": source, "digits": len(images), "seed": seed, "slices": SLICES}
    makers: dict[str, Callable[..., dict[str, Any]]] = {
        "generator": _generator, "clip": _clip, "reader": _reader, "judge": _judge,
        "real": partial(_real, judge_file=to / "judge.safetensors"), "scenes": partial(_scenes, weights=to),
    }  # fmt: skip
    for part in only:
        wall, cpu = time.perf_counter(), time.process_time()
        torch.manual_seed(seed)
        rng = np.random.default_rng([seed, 1 + PARTS.index(part)])
        with tempfile.TemporaryDirectory(dir=to, prefix=".draft-") as draft:
            figures = makers[part](hand, {k: max(2, round(v * scale)) for k, v in STEPS.items()}, rng, Path(draft))
            for made in Path(draft).iterdir():  # a part that was stopped half-way leaves the old one as it was
                if (to / made.name).is_dir():
                    shutil.rmtree(to / made.name)
                made.replace(to / made.name)
        card["parts"][part] = figures | {
            "seconds": round(time.perf_counter() - wall), "cpu_seconds": round(time.process_time() - cpu),
            "cores": os.cpu_count(),
        }  # fmt: skip
        card_file.write_text(json.dumps(card, indent=2) + "\n")
        say(f"base {part}: {card['parts'][part]}")


def _watch(stack: ExitStack) -> Progress:
    """A progress bar for each model that reports."""
    bars: dict[str, Any] = {}

    def progress(name: str, step: int, steps: int, _: float) -> None:
        if name not in bars:
            bars[name] = stack.enter_context(bar(f"base {name}", steps))
        bars[name]()

    return progress


def _generator(hand: Slices, steps: Steps, rng: np.random.Generator, to: Path) -> Figures:
    with ExitStack() as stack:
        progress = _watch(stack)
        vae = train_autoencoder(hand["generator"], steps["autoencoder"], rng, progress)
        x = pixels(render(draw_scenes(256, rng), hand["test"], rng))
        with torch.no_grad():
            error = float((vae.decode(vae.encode(x).latent_dist.mean).sample - x).square().mean().sqrt())
        pipe = train_generator(hand["generator"], vae, steps["generator"], 128, rng, progress)
    # Half the bytes; the text encoder stays in float32, since transformers would load it as it is stored.
    pipe.unet.half()
    pipe.vae.half()
    pipe.save_pretrained(to / "pipeline")
    return {"autoencoder_rmse": round(error, 4), "steps": [steps["autoencoder"], steps["generator"]]}


def _clip(hand: Slices, steps: Steps, rng: np.random.Generator, to: Path) -> Figures:
    with ExitStack() as stack:
        model = train_clip(hand["clip"], steps["clip"], rng, _watch(stack))
    save_clip(model, to / "clip")
    from jobs.clip import Clip
    from jobs.world.scenes import caption

    clip = Clip(f"local-dir:{to / 'clip'}")
    scenes, images = _test(hand, rng)
    from PIL import Image

    pictures = [Image.fromarray(image) for image in images]
    right = clip.score(pictures, [caption(s) for s in scenes])[0]
    wrong = clip.score(pictures, [caption(one_slot_wrong(s, rng)) for s in scenes])[0]
    return {"ranks_right_caption_first": round(float((right > wrong).mean()), 4), "steps": steps["clip"]}


def _reader(hand: Slices, steps: Steps, rng: np.random.Generator, to: Path) -> Figures:
    with ExitStack() as stack:
        store(train_reader(hand["reader"], steps["reader"], rng, _watch(stack)), to / "reader.safetensors")
    model = restore(SlotReader(), to / "reader.safetensors")
    scenes, images = _test(hand, rng)
    with torch.no_grad():
        right = log_likelihood(model, pixels(images), scenes)
        wrong = log_likelihood(model, pixels(images), [one_slot_wrong(s, rng) for s in scenes])
    return {"ranks_right_caption_first": round(float((right > wrong).float().mean()), 4), "steps": steps["reader"]}


def _judge(hand: Slices, steps: Steps, rng: np.random.Generator, to: Path) -> Figures:
    with ExitStack() as stack:
        store(train_judge(hand["judge"], steps["judge"], rng, _watch(stack)), to / "judge.safetensors")
    model = restore(DigitReader(), to / "judge.safetensors")
    scenes, images = _test(hand, rng, 4000)
    right, _ = judge(model, images, scenes)
    fooled, _ = judge(model, images, [one_slot_wrong(s, rng) for s in scenes])
    return {
        "accuracy": round(float(right.mean()), 4),
        "accepts_one_slot_wrong": round(float(fooled.mean()), 4),
        "steps": steps["judge"],
    }


def _real(hand: Slices, _: Steps, rng: np.random.Generator, to: Path, judge_file: Path) -> Figures:
    """What real scenes of the demo's captions measure: the ceiling of every figure, and the target of ``fd_real``."""
    model = restore(DigitReader(), judge_file)
    prompts = [text for text in all_captions() for _ in range(REAL)]
    scenes = [parse(text) for text in prompts]
    right, features = judge(model, render(scenes, hand["test"], rng), scenes)
    table = pa.table({"prompt": prompts, "vector": list(features.astype(np.float16))})
    pq.write_table(table, to / "real.parquet", compression="zstd")
    groups = np.unique(prompts, return_inverse=True)[1]
    halves = [moments(features[i::2])[:2] for i in range(2)]
    return {
        "scenes": len(scenes),
        "judge_accuracy": round(float(right.mean()), 4),
        "fd_of_its_halves": round(frechet(*halves[0], *halves[1]), 2),
        "diversity": round(diversity(features, groups), 2),
    }


def _scenes(hand: Slices, _: Steps, rng: np.random.Generator, to: Path, weights: Path) -> Figures:
    """Real scenes of every caption, of the handwriting that the generator has learned from; and ``fd_real`` of others,
    which no model of it can come below: of few images the distance is above 0 (Chong and Forsyth, arXiv 1911.07023).
    """
    texts = [text for text in all_captions() for _ in range(EACH)]
    images = render([parse(text) for text in texts], hand["generator"], rng)
    files = [{"bytes": encode(image, "png"), "path": None} for image in images]
    table = pa.table({"image": pa.array(files, IMAGE), "text": texts})
    pq.write_table(table, to / "scenes.parquet", compression="zstd")
    model, real = restore(DigitReader(), weights / "judge.safetensors"), pq.read_table(weights / "real.parquet")
    features, prompts = np.stack(real["vector"].to_numpy()), np.array(real["prompt"].to_pylist())

    def distance(captions: int, each: int) -> float:
        some = rng.choice(all_captions(), captions, replace=False)
        scenes = [parse(text) for text in some for _ in range(each)]
        mine = judge(model, render(scenes, hand["generator"], rng), scenes)[1]
        return frechet(*moments(mine)[:2], *moments(features[np.isin(prompts, some)])[:2])

    least = [
        {"prompts": captions, "images_per_prompt": each,
         "fd_real": round(float(np.mean([distance(captions, each) for _ in range(DRAWS)])), 2)}
        for captions, each in JUDGED
    ]  # fmt: skip
    return {"scenes": len(texts), "least": least}


def _test(hand: Slices, rng: np.random.Generator, n: int = 2000) -> tuple[list[Scene], np.ndarray]:
    scenes = draw_scenes(n, rng)
    return scenes, render(scenes, hand["test"], rng)
