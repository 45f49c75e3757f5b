"""Image embeddings of transformers models: CLIP, SigLIP and DINOv2, each with its own image processor."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize

from jobs import devices
from jobs.pretrained import Pretrained, pooled
from schemas.errors import WinnowError

Kind = Literal["clip", "siglip", "dinov2"]
#: What ``model_type`` in config.json may be.
TYPES: dict[Kind, tuple[str, ...]] = {
    "clip": ("clip",),
    "siglip": ("siglip", "siglip2"),
    "dinov2": ("dinov2", "dinov2_with_registers"),
}


class Vision:
    """``name``: a folder or Hub id. CLIP (arXiv 2103.00020) and SigLIP (2303.15343) give the feature that is compared
    with text, of length 1; DINOv2 (2304.07193) its normalised [CLS] place, of any length. float32."""

    def __init__(self, kind: Kind, name: str) -> None:
        self.kind = kind
        self.weights = Pretrained(f"encoder {f'{kind}:{name}'!r}", name)
        self.revision = self.weights.revision

    @cached_property
    def model(self) -> Any:
        from transformers import AutoConfig, AutoModel

        found = self.weights.part(AutoConfig).model_type
        if found not in TYPES[self.kind]:
            wanted = " or ".join(TYPES[self.kind])
            raise WinnowError(f"{self.weights.what}: the model is of type {found!r}, not {wanted}; give such a one")
        return self.weights.model(AutoModel)

    @cached_property
    def processor(self) -> Any:
        from transformers import AutoImageProcessor

        return self.weights.part(AutoImageProcessor)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return self.weights.part(AutoTokenizer)

    @torch.no_grad()
    def texts(self, texts: list[str]) -> np.ndarray:
        """Unit text features of CLIP and SigLIP, float32 [N, D], padded as the images' texts were in training."""
        padding = "max_length" if self.kind == "siglip" else True
        inputs = self.tokenizer(texts, padding=padding, truncation=True, return_tensors="pt").to(devices.device())
        with devices.exact():
            vectors = normalize(pooled(self.model.get_text_features(**inputs)), dim=-1)
        return vectors.float().cpu().numpy()

    @torch.no_grad()
    def encode(self, images: list[Image.Image], _: list[str]) -> np.ndarray:
        """Vectors float32 [N, D]."""
        inputs = self.processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        inputs = inputs.to(devices.device())
        with devices.exact():
            if self.kind == "dinov2":
                vectors = self.model(**inputs).pooler_output
            else:
                vectors = normalize(pooled(self.model.get_image_features(**inputs)), dim=-1)
        return vectors.float().cpu().numpy()
