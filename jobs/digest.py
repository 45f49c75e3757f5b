"""What a file, a folder, a network or a tokenizer is, by its content."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from storage.content import content_of


@lru_cache
def digest(path: Path) -> str:
    """``content_of`` what a process reads many times, and nothing changes meanwhile."""
    return content_of(path)


def network(module: Any) -> str:
    """64 hex digits of a network of diffusers or transformers as it computes: its class, configuration and weights.

    Where it was loaded from, and by which version, is no part of it.
    """
    import torch

    config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    passing = ("transformers_version", "architectures", "dtype", "torch_dtype")  # class and weights say theirs
    config = {key: value for key, value in config.items() if not key.startswith("_") and key not in passing}
    total = hashlib.sha256(_text([type(module).__name__, config]))
    for name, weights in sorted(module.state_dict().items()):
        total.update(f"{name} {weights.dtype} {tuple(weights.shape)}\n".encode())
        total.update(weights.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def tokenizer(words: Any) -> str:
    """64 hex digits of a tokenizer of transformers: its vocabulary, special tokens, greatest length and its rules, or
    the files that a slow one keeps them in."""
    if hasattr(words, "backend_tokenizer"):
        rules = json.loads(words.backend_tokenizer.to_str())
        for call in ("padding", "truncation"):  # what the last call asked for stays in there
            rules.pop(call, None)
    else:
        with TemporaryDirectory() as folder:
            words.save_vocabulary(folder)
            rules = digest(Path(folder))
    spec = [words.get_vocab(), words.special_tokens_map, words.model_max_length, words.padding_side, rules]
    return hashlib.sha256(_text(spec)).hexdigest()


def _text(spec: Any) -> bytes:
    return json.dumps(spec, sort_keys=True, default=str).encode()
