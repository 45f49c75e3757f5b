"""Where models run, and in which precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState


@lru_cache
def device() -> str:
    """The best device at hand: "cuda", "mps" or "cpu"."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def dtype() -> torch.dtype:
    """bfloat16 where the device computes in it, else float32."""
    import torch

    return torch.bfloat16 if device() == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def processes() -> PartialState:
    """This process among those that ``accelerate launch`` or ``torchrun`` started; alone without them."""
    from accelerate import PartialState

    # They wait while the first one encodes, draws sheets and writes.
    return PartialState(cpu=device() == "cpu", timeout=timedelta(days=1))


@contextmanager
def exact() -> Iterator[None]:
    """Full float32 on a GPU, too: its convolutions otherwise round to 10 bits of mantissa, a score's third digit."""
    import torch

    with torch.backends.cudnn.flags(allow_tf32=False):
        yield
