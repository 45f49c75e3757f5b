"""A GPU's memory: what does not fit at once goes on in halves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from jobs.progress import say
from schemas.errors import WinnowError

T = TypeVar("T")


class Halves:
    """Work over rows, in as large batches as have proved to fit. ``what`` works, and ``cure`` for a single image that
    does not fit, are for people; ``fits``: how many rows there is room for, null as long as all did fit."""

    def __init__(self, what: str, cure: str) -> None:
        self.what, self.cure = what, cure
        self.fits: int | None = None

    def __call__(self, rows: int, work: Callable[[slice], T]) -> list[T]:
        """What ``work`` gives for slices of range(rows), in their order. WinnowError where one row does not fit."""
        import torch

        done: list[T] = []
        start = 0
        while start < rows:
            size = min(self.fits or rows, rows - start)
            try:
                done.append(work(slice(start, start + size)))
                start += size
                continue
            except torch.OutOfMemoryError as error:
                if size == 1:
                    raise self.too_large(error) from error
                self.fits = -(-size // 2)
            # Outside the handler, whose traceback holds on to the tensors.
            torch.cuda.empty_cache()
            say(f"{self.what}: {size} images at once do not fit into the memory; going on with {self.fits}")
        return done

    def too_large(self, error: Exception) -> WinnowError:
        """What to tell where even one image is too large."""
        first = str(error).splitlines()[0][:120]
        return WinnowError(f"{self.what}: one image does not fit into the memory ({first}); {self.cure}")
