"""HPS v2.1, the Human Preference Score (arXiv 2306.09341; Hub: xswu/HPSv2, HPS_v2.1_compressed.pt).

An open_clip ViT-H-14 tuned on human choices: the cosine of image and text, without the logit scale. Values of
different prompts do not compare. Benchmarks print them times 100.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from jobs import devices
from jobs.checkpoint import fill
from jobs.clip import tokens
from jobs.hub import Weights

REPO, FILE = "xswu/HPSv2", "HPS_v2.1_compressed.pt"
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, red, green, blue
STD = (0.26862954, 0.26130258, 0.27577711)


def fit(image: Image.Image, size: int) -> Tensor:
    """RGB float32 [3, size, size]: the longer side resized to ``size`` (bicubic), the rest black, normalised."""
    image = image.convert("RGB")
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (size, size))
    square.paste(image, ((size - width) // 2, (size - height) // 2))
    pixels = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


class Hps:
    """``local``: the checkpoint's file or its folder; "" for the Hub's. ``architecture``: open_clip's settings of the
    model, by default those of ViT-H-14. float32."""

    def __init__(self, local: str = "", architecture: dict[str, Any] | None = None) -> None:
        name = f"hps-v2.1:{local}" if local else "hps-v2.1"
        self.weights = Weights(f"scorer {name!r}", local, REPO, FILE)
        self.architecture = architecture
        self.revision = self.weights.revision

    @cached_property
    def model(self) -> Any:
        import open_clip

        model = open_clip.CLIP(**(self.architecture or open_clip.get_model_config("ViT-H-14")))
        fill(model, self.weights.tensors(), self.weights.what)
        return model.float().to(devices.device()).eval()

    @cached_property
    def tokenizer(self) -> Any:
        import open_clip

        return open_clip.SimpleTokenizer(context_length=self.model.context_length)

    @torch.no_grad()
    def score(self, images: list[Image.Image], prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Cosine of image and text float32 [N], in [−1, 1], and where the text was longer than 77 tokens [N]."""
        size, device = self.model.visual.image_size[0], devices.device()
        ids, cut = tokens(self.tokenizer, prompts)
        pixels = torch.stack([fit(image, size) for image in images])
        with devices.exact():
            seen = normalize(self.model.encode_image(pixels.to(device)), dim=-1)
            read = normalize(self.model.encode_text(ids.to(device)), dim=-1)
        return (seen * read).sum(1).cpu().numpy(), cut
