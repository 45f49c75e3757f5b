"""Any open_clip model: image features, text features, and the cosine of image and text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize

from jobs.models import digest
from schemas.errors import WinnowError


class Clip:
    """``model``: "ViT-B-32/laion2b_s34b_b79k", "hf-hub:org/name" or "local-dir:/path"; float32, on the GPU if any."""

    def __init__(self, model: str) -> None:
        folder = Path(model.removeprefix("local-dir:"))
        if model.startswith("local-dir:") and not (folder / "open_clip_config.json").is_file():
            raise WinnowError(f"open_clip model {model!r}: no open_clip_config.json there; give the model's folder")
        self.name = model
        self.revision = digest(folder) if model.startswith("local-dir:") else model

    @cached_property
    def loaded(self) -> tuple[Any, Any, Any, str]:
        """Model, image transform, tokenizer and device, when they are first needed."""
        import open_clip

        name, _, weights = (self.name, "", "") if ":" in self.name else self.name.partition("/")
        try:
            model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=weights or None)
            tokenize = open_clip.get_tokenizer(name)
        except (OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise WinnowError(f"open_clip model {self.name!r}: cannot be loaded ({reason})") from error
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return model.float().to(device).eval(), preprocess, tokenize, device

    @torch.no_grad()
    def images(self, images: list[Image.Image]) -> np.ndarray:
        """Unit image features, float32 [N, D]."""
        model, preprocess, _, device = self.loaded
        pixels = torch.stack([preprocess(image) for image in images]).to(device)
        return normalize(model.encode_image(pixels), dim=-1).cpu().numpy()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit text features, float32 [N, D], of what the context holds of each text."""
        model, _, tokenize, device = self.loaded
        return normalize(model.encode_text(tokenize(list(texts)).to(device)), dim=-1).cpu().numpy()

    @torch.no_grad()
    def score(self, images: list[Image.Image], prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Cosine of image and text [N], in [-1, 1], and where the text was cut [N]."""
        model, _, tokenize, device = self.loaded
        tokens = tokenize(prompts)
        text = normalize(model.encode_text(tokens.to(device)), dim=-1).cpu().numpy()
        # A text that fills the context to its last place has lost its tail, or just fits: ask the longer context.
        full = np.flatnonzero((tokens[:, -1] != 0).numpy())
        cut = np.zeros(len(prompts), bool)
        if len(full):
            longer = tokenize([prompts[i] for i in full], context_length=8 * tokens.shape[1])
            cut[full] = (longer != 0).sum(1).numpy() > tokens.shape[1]
        return (self.images(images) * text).sum(1), cut
