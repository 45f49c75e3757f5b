"""Checkpoints: tensors by name out of a file, without running anything in it, and into a module without a gap."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from schemas.errors import WinnowError


def tensors(path: Path, what: str) -> dict[str, Tensor]:
    """Name → tensor on the CPU, from .safetensors or a pickled checkpoint, where ``state_dict`` is unwrapped.

    Raises WinnowError where the file cannot be read, holds code, or is no dict of tensors.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found = load_file(path)
        else:
            with warnings.catch_warnings(action="ignore"):  # about old pickles, which are read or refused
                found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # of torch, pickle, zipfile, safetensors or the system
        raise WinnowError(f"{what}: {path} {_why(error)}") from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not found:
        kind = "nothing" if isinstance(found, Mapping) else f"a {type(found).__name__}"
        raise WinnowError(f"{what}: {path} holds {kind}, not tensors by name; give a checkpoint's state dict")
    for name, value in found.items():
        plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized
        if not isinstance(name, str) or not plain:
            kind = "sparse or quantised tensor" if isinstance(value, Tensor) and not plain else type(value).__name__
            raise WinnowError(f"{what}: {path} holds a {kind} under {name!r}; give a file of tensors by name alone")
    return {name: value.detach() for name, value in found.items()}


def _why(error: Exception) -> str:
    """What torch met, without its advice on how to run it all the same."""
    text = " ".join(str(error).split())
    if found := re.search(r"GLOBAL ([\w.]+)", text):
        return f"holds more than tensors ({found[1]}), which may run code; take a file of tensors alone, or safetensors"
    _, _, met = text.partition("WeightsUnpickler error: ")
    met = met.partition(" Check the documentation")[0] or text
    if isinstance(error, KeyError):  # torch looks for what a byte of a text would stand for
        met = "no checkpoint"
    return f"cannot be read ({met[:120] or type(error).__name__}); get it again"


def fill(
    module: nn.Module,
    found: Mapping[str, Tensor],
    what: str,
    unused: Collection[str] = (),
    published: Callable[[str], str] = str,
) -> None:
    """Put the tensors into the module, in its precision; WinnowError unless they are all of its own, and no others.

    ``unused``: names that the checkpoint may hold besides. ``published``: the checkpoint's name for one of the
    module's, where they differ.
    """
    check(module, found, what, unused, published)
    module.load_state_dict({name: found[published(name)].to(own.dtype) for name, own in module.state_dict().items()})


def check(
    module: nn.Module,
    found: Mapping[str, Tensor],
    what: str,
    unused: Collection[str] = (),
    published: Callable[[str], str] = str,
) -> None:
    """WinnowError unless the tensors are all that the module has, in its shapes, and nothing else."""
    wanted = {published(name): own.shape for name, own in module.state_dict().items()}
    refuse_gap(what, [name for name in wanted if name not in found], len(wanted))
    if unknown := [name for name in found if name not in wanted and name not in unused]:
        raise WinnowError(
            f"{what}: the checkpoint has {len(unknown)} tensors that the model does not know ({_first(unknown)}); "
            "give the checkpoint of this model"
        )
    for name, shape in wanted.items():
        if shape != found[name].shape:
            raise WinnowError(
                f"{what}: the checkpoint's {name} is {list(found[name].shape)}, the model's {list(shape)}; "
                "give the checkpoint of this model"
            )


def refuse_gap(what: str, missing: Iterable[str], total: int) -> None:
    """WinnowError with the first missing names and how many there are, unless there are none."""
    missing = sorted(missing)
    if missing:
        raise WinnowError(
            f"{what}: the checkpoint lacks {len(missing)} of {total} tensors ({_first(missing)}); "
            "give the checkpoint of this model, and all of it"
        )


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
