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

from jobs import devices, hub
from jobs.digest import digest
from schemas.errors import WinnowError


class Clip:
    """``model``: "ViT-B-32/laion2b_s34b_b79k", "hf-hub:org/name" or "local-dir:/path"; float32, on the GPU if any."""

    def __init__(self, model: str) -> None:
        folder = Path(model.removeprefix("local-dir:"))
        if model.startswith("local-dir:") and not (folder / "open_clip_config.json").is_file():
            raise WinnowError(f"open_clip model {model!r}: no open_clip_config.json there; give the model's folder")
        self.name = model

    @cached_property
    def revision(self) -> str:
        """Changes whenever the weights do: digest of a folder, commit of a repository, else the name itself."""
        kind, _, place = self.name.partition(":")
        if kind == "local-dir":
            return digest(Path(place))
        # A tag's weights lie in "org/name/", or in "org/name/file".
        repo = place if kind == "hf-hub" else "/".join(self.tag.get("hf_hub", "").split("/")[:2])
        return hub.revision(repo, f"open_clip model {self.name!r}:") if repo else self.name

    @cached_property
    def tag(self) -> dict[str, Any]:
        """What open_clip knows of the weights of "model/tag"; nothing of a folder's or repository's."""
        import open_clip

        if ":" in self.name:
            return {}
        name, _, weights = self.name.partition("/")
        if not (found := open_clip.get_pretrained_cfg(name, weights)):
            tags = open_clip.list_pretrained_tags_by_model(name)
            there = f"there are {', '.join(tags)}" if tags else f"there is no model {name!r}"
            raise WinnowError(
                f"open_clip model {self.name!r}: unknown; {there}; write 'model/tag', 'hf-hub:org/name' or "
                "'local-dir:/path'"
            )
        return found

    @cached_property
    def loaded(self) -> tuple[Any, Any, Any, str]:
        """Model, image transform, tokenizer and device, when they are first needed."""
        import open_clip

        name, _, weights = (self.name, "", "") if ":" in self.name else self.name.partition("/")
        # Weights trained with the quick approximation of GELU (OpenAI's, among others) are off with the other.
        quick = bool(self.tag.get("quick_gelu"))
        try:
            with hub.quiet():
                model, _, preprocess = open_clip.create_model_and_transforms(
                    name, pretrained=weights or None, force_quick_gelu=quick
                )
                tokenize = open_clip.get_tokenizer(name)
        except (OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise WinnowError(f"open_clip model {self.name!r}: cannot be loaded ({reason})") from error
        return model.float().to(devices.device()).eval(), preprocess, tokenize, devices.device()

    @torch.no_grad()
    def images(self, images: list[Image.Image]) -> np.ndarray:
        """Unit image features, float32 [N, D]."""
        model, preprocess, _, device = self.loaded
        pixels = torch.stack([preprocess(image.convert("RGB")) for image in images]).to(device)
        with devices.exact():
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
        ids, cut = tokens(tokenize, prompts)
        text = normalize(model.encode_text(ids.to(device)), dim=-1).cpu().numpy()
        return (self.images(images) * text).sum(1), cut


def tokens(tokenize: Any, texts: list[str]) -> tuple[torch.Tensor, np.ndarray]:
    """Token ids [N, context] of an open_clip tokenizer, and where it cut the text, bool [N].

    Read into a longer context, a whole text has the same tokens and then nothing but padding.
    """
    ids = tokenize(texts)
    context = ids.shape[1]
    longer = tokenize(texts, context_length=8 * context)
    cut = (ids != longer[:, :context]).any(1) | (longer[:, context:] != longer[:, -1:]).any(1)
    return ids, cut.numpy()
