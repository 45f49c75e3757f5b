"""Pickled checkpoints to safetensors: the tensors alone, read without running code, written whole or not at all."""

from __future__ import annotations

import filecmp
import os
import tempfile
from pathlib import Path

from torch import Tensor

from jobs.checkpoint import tensors
from schemas.errors import WinnowError
from storage.durable import storage_errors, sync

RESERVED = "__metadata__"


def convert(source: Path, target: Path) -> int:
    """Write the tensors of ``source`` as ``target``; how many there are.

    Raises WinnowError where ``source`` is no dict of tensors, or ``target`` is there and holds anything else.
    """
    from safetensors.torch import save_file

    if target.suffix != ".safetensors":
        raise WinnowError(f"convert: {target} does not end in .safetensors; name the target so")
    if not source.is_file():
        raise WinnowError(f"convert: {source}: no such file; give a checkpoint")
    found = apart(tensors(source, "convert"))
    if RESERVED in found:
        raise WinnowError(f"convert: {source}: a tensor is named {RESERVED}, which safetensors cannot hold; rename it")
    with storage_errors(target.parent, target), tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as staging:
        draft = Path(staging) / target.name
        try:
            save_file(found, draft, {"format": "pt"})
        except (ValueError, RuntimeError, KeyError) as error:  # such as a sparse tensor, or complex numbers
            raise WinnowError(f"convert: {source}: {' '.join(str(error).split())[:200]}; convert it by hand") from error
        sync(draft)
        try:
            os.link(draft, target)
        except FileExistsError as error:
            if not filecmp.cmp(draft, target, shallow=False):
                raise WinnowError(f"convert: {target} holds something else already; choose another name") from error
        sync(target.parent)
    return len(found)


def apart(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, each with memory of its own: safetensors keeps no sharing, and writes whole storages."""
    seen: set[int] = set()
    own = {}
    for name, tensor in named.items():
        tensor = tensor.resolve_conj().resolve_neg()  # which is done at the next reading, and a file knows nothing of
        place = tensor.untyped_storage().data_ptr()
        alone = place not in seen and tensor.untyped_storage().nbytes() == tensor.nbytes
        own[name] = tensor if alone and tensor.is_contiguous() else tensor.contiguous().clone()
        seen.add(place)
    return own
