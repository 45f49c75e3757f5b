"""The selecting scorer: an ordinary open_clip model of scenes and captions; its score is the cosine.

Plain contrastive training hardly sees a wrong digit in an otherwise right caption, so every image also meets
captions with one slot changed, which it must rank below its own.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jobs.world.fit import Progress, fit, fresh_scenes, store
from jobs.world.reader import SLOTS, UNSAID, slots
from jobs.world.scenes import BACKGROUNDS, INKS, SIZE, Handwriting, Scene, caption

SIDE = 2 * SIZE  # as a real CLIP does, it sees every picture at its own size
CONFIG = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": SIDE, "layers": [1, 1, 1, 1], "width": 12, "head_width": 64},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
PREPROCESS = {
    "size": SIDE,
    "mode": "RGB",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
HARD = 6  # one-slot-wrong captions an image


def one_slot_wrong(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same scene but for its digit (as often as not), its ink or its named background."""
    slot = rng.choice(["digit", "digit", "ink", "background"])
    if slot == "ink":
        return replace(scene, ink=str(rng.choice([c for c in INKS if c != scene.ink])))
    if slot == "background" and scene.background:
        return replace(scene, background=str(rng.choice([c for c in BACKGROUNDS if c != scene.background])))
    return replace(scene, digit=int((scene.digit + rng.integers(1, 10)) % 10))


def train_clip(hand: Handwriting, steps: int, rng: np.random.Generator, progress: Progress) -> Any:
    """An open_clip.CLIP from scratch. A slot head on the image feature speeds it up and is then thrown away."""
    import open_clip

    model = open_clip.CLIP(CONFIG["embed_dim"], CONFIG["vision_cfg"], CONFIG["text_cfg"])
    tokenize = open_clip.SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])
    head = nn.Linear(CONFIG["embed_dim"], sum(SLOTS))
    mean, std = PREPROCESS["mean"][0], PREPROCESS["std"][0]
    batches = fresh_scenes(hand, 128, rng)

    def loss() -> Tensor:
        scenes, images = next(batches)
        x = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std
        x = nn.functional.interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True)
        x = x + 0.2 * torch.rand(1) * torch.randn_like(x)
        texts = [caption(s) for s in scenes]
        for scene in scenes:
            texts += [caption(one_slot_wrong(scene, rng)) for _ in range(HARD)]
        image = model.encode_image(x)
        text = nn.functional.normalize(model.encode_text(tokenize(texts)), dim=-1)
        n = len(scenes)
        logits = model.logit_scale.exp().clamp(max=100) * nn.functional.normalize(image, dim=-1) @ text.T
        names = np.array(texts)
        same = torch.from_numpy(names[:n, None] == names[None, :])
        same[torch.arange(n), torch.arange(n)] = False
        logits = logits.masked_fill(same, -torch.inf)
        target = torch.arange(n)
        by_image = nn.functional.cross_entropy(logits, target)
        by_text = nn.functional.cross_entropy(logits[:, :n].T, target)
        said = torch.tensor([slots(s) for s in scenes])
        read = sum(
            nn.functional.cross_entropy(part, slot, ignore_index=UNSAID)
            for part, slot in zip(head(nn.functional.relu(image)).split(SLOTS, 1), said.T, strict=True)
        )
        return by_image + 0.3 * by_text + 0.5 * read

    fit("clip", [*model.parameters(), *head.parameters()], loss, steps, lr=2e-3, progress=progress)
    return model.eval()


def save_clip(model: Any, folder: Path) -> None:
    """As open_clip's ``local-dir:`` reads it: config and float16 safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": CONFIG, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    store(model, folder / "open_clip_model.safetensors")
