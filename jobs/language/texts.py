"""Text encoders: from prompts to unit vectors, for their diversity."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import AfterValidator

from jobs.named import known, pick
from jobs.progress import bar

if TYPE_CHECKING:
    from jobs.pretrained import Pretrained

BATCH = 64


@dataclass(frozen=True)
class TextEncoder:
    """``encode(texts) -> float [N, D]``, rows of length 1; ``revision`` changes whenever the vectors would."""

    name: str
    revision: str
    encode: Callable[[Sequence[str]], np.ndarray]


def _open_clip(model: str) -> TextEncoder:
    from jobs.clip import Clip

    clip = Clip(model)
    return TextEncoder(f"open_clip:{model}", clip.revision, lambda texts: _batched(texts, clip.texts))


def _sentence(model: str) -> TextEncoder:
    from jobs.pretrained import Pretrained

    found = Pretrained(f"text encoder {model!r}", model)
    return TextEncoder(f"sentence:{model}", found.revision, lambda texts: _batched(texts, _mean_pooling(found)))


def _mean_pooling(pretrained: Pretrained) -> Callable[[Sequence[str]], np.ndarray]:
    """A transformers encoder whose last hidden states are averaged over the tokens of each text, padding aside."""
    import torch
    from torch.nn.functional import normalize
    from transformers import AutoModel, AutoTokenizer

    tokenizer = pretrained.part(AutoTokenizer)
    model = pretrained.model(AutoModel)
    model = model.get_encoder() if model.config.is_encoder_decoder else model
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    room = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or sys.maxsize, 512)

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> np.ndarray:
        tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=room, return_tensors="pt")
        tokens = tokens.to(model.device)
        hidden = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        mask = tokens["attention_mask"][:, :, None].to(hidden.dtype)
        return normalize((hidden * mask).sum(1) / mask.sum(1).clamp(min=1), dim=-1).cpu().numpy()

    return encode


def _batched(texts: Sequence[str], encode: Callable[[Sequence[str]], np.ndarray]) -> np.ndarray:
    made = []
    with bar("embed prompts", len(texts)) as advance:
        for start in range(0, len(texts), BATCH):
            made.append(encode(texts[start : start + BATCH]))
            advance(len(made[-1]))
    return np.concatenate(made)


TEXT_ENCODERS: dict[str, Callable[[str], TextEncoder]] = {
    "open_clip": _open_clip,  # the text tower: open_clip:ViT-B-32/laion2b_s34b_b79k, open_clip:local-dir:/path
    "sentence": _sentence,  # sentence:FOLDER or sentence:org/name: any transformers text encoder, mean pooling
}

#: The name of a known text encoder, as settings hold it.
TextEncoderName = Annotated[str, AfterValidator(lambda name: known("text encoder", name, TEXT_ENCODERS))]


def text_encoder(name: str) -> TextEncoder:
    """The text encoder of that name; its weights are loaded when it is first used."""
    return pick("text encoder", name, TEXT_ENCODERS, TextEncoder)
