"""PickScore (arXiv 2305.01569; Hub: yuvalkirstain/PickScore_v1): which image people would pick for a prompt.

A CLIP-H tuned on their choices: exp(logit_scale) · cosine of image and text.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize

from jobs import devices
from jobs.pretrained import Pretrained, pooled, too_long

MODEL, PROCESSOR = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class PickScore:
    """``local``: a CLIPModel's folder, with its processor in it or else the Hub's; "" for the published one."""

    def __init__(self, local: str = "") -> None:
        what = f"scorer {f'pickscore:{local}' if local else 'pickscore'!r}"
        self.weights = Pretrained(what, local or MODEL)
        own = self.weights.local and (self.weights.folder / "preprocessor_config.json").is_file()
        # transformers 5 writes the settings of all parts of a processor into one file, and reads both forms.
        own = own or (self.weights.local and (self.weights.folder / "processor_config.json").is_file())
        self.reading = self.weights if own else Pretrained(what, PROCESSOR, weights=False)
        self.revision = self.weights.revision if own else f"{self.weights.revision}-{self.reading.revision}"

    @cached_property
    def model(self) -> Any:
        from transformers import CLIPModel

        return self.weights.model(CLIPModel)

    @cached_property
    def processor(self) -> Any:
        from transformers import CLIPProcessor

        return self.reading.part(CLIPProcessor)

    @torch.no_grad()
    def score(self, images: list[Image.Image], prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """exp(logit_scale)·cosine float32 [N], about 15 to 25 for the published model (at most 100), and where the
        text was longer than 77 tokens [N]."""
        limit, device = self.model.config.text_config.max_position_embeddings, devices.device()
        pixels = self.processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        text = self.processor(text=prompts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        with devices.exact():
            seen = normalize(pooled(self.model.get_image_features(**pixels.to(device))), dim=-1)
            read = normalize(pooled(self.model.get_text_features(**text.to(device))), dim=-1)
            value = self.model.logit_scale.exp() * (seen * read).sum(1)
        return value.cpu().numpy(), np.array(too_long(self.processor.tokenizer, prompts, limit))
