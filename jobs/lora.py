"""LoRA models: a folder of low-rank weights, and which base model they belong to.

    pytorch_lora_weights.safetensors    what ``pipeline.load_lora_weights(folder)`` of diffusers reads
    base.json                           {"model": name, "revision": …, "rank": …}

Alpha is the rank, so the update is B·A itself (LoRA, arXiv 2106.09685, section 4.1).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from jobs import models
from jobs.families import family
from schemas.errors import WinnowError

BASE = models.LORA
WEIGHTS = "pytorch_lora_weights.safetensors"
ADAPTER = "winnow"


@dataclass(frozen=True)
class Base:
    """The model under a LoRA."""

    model: str
    revision: str
    rank: int


def base_of(folder: Path) -> Base:
    """What ``base.json`` of a LoRA folder says; WinnowError where it is damaged."""
    try:
        found = Base(**json.loads((folder / BASE).read_text(encoding="utf-8")))
        if [type(value) for value in vars(found).values()] != [str, str, int]:
            raise TypeError(f"it holds {found}")
        return found
    except (OSError, ValueError, TypeError) as error:
        raise WinnowError(f"{folder / BASE}: cannot be read ({error}); restore the folder or train again") from error


def attach(pipe: Any, rank: int, seed: int, folder: Path | None = None) -> None:
    """Put trainable layers of this rank, in float32, on the pipeline's denoiser and freeze all else: fresh ones
    that change nothing yet, or those of ``folder``."""
    from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    kind = family(pipe)
    model = kind.model(pipe)
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        model.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(kind.lora)), ADAPTER
        )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if folder is None:
        return
    held = base_of(folder)
    if held.rank != rank:
        raise WinnowError(f"train.rank is {rank}, but the round starts from a LoRA of rank {held.rank}; give that one")
    prefix = f"{kind.denoiser}."
    try:
        state = {key.removeprefix(prefix): value for key, value in load_file(folder / WEIGHTS).items()}
        wanted = get_peft_model_state_dict(model, adapter_name=ADAPTER).keys()
        if odd := sorted(wanted ^ state.keys()):
            raise WinnowError(
                f"{folder / WEIGHTS}: {len(odd)} weights fit no layer or are missing, such as {odd[0]}; it is damaged "
                "or belongs to another base model or train.method"
            )
        set_peft_model_state_dict(model, state, adapter_name=ADAPTER)
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise WinnowError(f"{folder / WEIGHTS}: cannot be taken up ({reason}); restore the folder") from error


def save(pipe: Any, folder: Path, base: Base) -> None:
    """Write the denoiser's LoRA and its base into ``folder``."""
    from peft.utils import get_peft_model_state_dict

    kind = family(pipe)
    state = get_peft_model_state_dict(kind.model(pipe), adapter_name=ADAPTER)
    layers = {f"{kind.denoiser}_lora_layers": state}
    pipe.save_lora_weights(folder, weight_name=WEIGHTS, **layers)
    (folder / BASE).write_text(json.dumps(asdict(base)) + "\n")


def load(pipe: Any, folder: Path) -> None:
    """Put the LoRA of ``folder`` on the pipeline, for sampling."""
    try:
        pipe.load_lora_weights(folder, weight_name=WEIGHTS, adapter_name=ADAPTER)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise WinnowError(f"{folder}: the LoRA cannot be loaded ({reason}); restore the folder") from error
