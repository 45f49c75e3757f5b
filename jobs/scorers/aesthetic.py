"""LAION's aesthetic predictors: how much people like an image, whatever it shows.

The value is an affine function of the L2-normalised image feature of OpenAI's CLIP ViT-L/14. V1 is one linear layer
(github.com/LAION-AI/aesthetic-predictor, sa_0_4_vit_l_14_linear.pth), V2 five of them
(github.com/christophschuhmann/improved-aesthetic-predictor, sac+logos+ava1-l14-linearMSE.pth).
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from jobs.checkpoint import fill
from jobs.clip import Clip
from jobs.hub import Weights
from jobs.scorers.head import Head
from schemas.errors import WinnowError

WIDTH = 768  # numbers in a feature of ViT-L/14
#: OpenAI's weights were trained with the quick approximation of GELU; the plain name would compute another one.
TOWER = "ViT-L-14-quickgelu/openai"


class Aesthetic:
    """``local``: the head's file; V2 alone is also on the Hub. A folder with an open_clip model beside the head
    (open_clip_config.json) takes the place of OpenAI's tower."""

    def __init__(self, version: Literal["v1", "v2"], local: str = "") -> None:
        name = f"aesthetic-{version}"
        if version == "v1" and not local:
            raise WinnowError(
                f"scorer {name!r}: its weights are not on the Hub; get sa_0_4_vit_l_14_linear.pth from "
                f"github.com/LAION-AI/aesthetic-predictor and write '{name}:/path/to/it'"
            )
        file = "sa_0_4_vit_l_14_linear.pth" if version == "v1" else "aesthetic-model.pth"
        what = f"scorer {f'{name}:{local}' if local else name!r}"
        self.version = version
        self.weights = Weights(what, local, "trl-lib/ddpo-aesthetic-predictor", file)
        beside = self.weights.path.parent if local else None
        own = beside is not None and (beside / "open_clip_config.json").is_file()
        self.clip = Clip(f"local-dir:{beside}" if own else TOWER)

    @cached_property
    def revision(self) -> str:
        return f"{self.weights.revision}-{self.clip.revision}"

    @cached_property
    def head(self) -> nn.Module:
        head = nn.Linear(WIDTH, 1) if self.version == "v1" else Head(WIDTH)
        fill(head, self.weights.tensors(), self.weights.what)
        return head.eval()

    @torch.no_grad()
    def of(self, features: Tensor) -> Tensor:
        """Unit features [N, 768] → values [N]; most images lie between 3 and 7, people were asked from 1 to 10."""
        return self.head(features).reshape(-1)

    def score(self, images: list[Image.Image], prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Values float32 [N]; no text is read, so none is cut."""
        features = torch.from_numpy(self.clip.images(images))
        if features.shape[1] != WIDTH:
            raise WinnowError(f"{self.weights.what}: the tower gives {features.shape[1]} numbers, not {WIDTH}")
        return self.of(features).numpy(), np.zeros(len(prompts), bool)
