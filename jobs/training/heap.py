"""The C library's heap while a model trains on a CPU: what is freed stays with the process."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt(3)
MAPPED = 2**25  # bytes; glibc itself raises its threshold no farther
ALL, USUAL = 2**31 - 1, 2 * MAPPED


@contextmanager
def kept() -> Iterator[None]:
    """Within, glibc keeps free memory for what is asked for next; at the end it gives back what nothing holds.

    By itself it gives large blocks and the end of its heap back to the system at once, and each pass over a model
    faults the same pages in anew, in all lanes at a time. Nothing happens where the C library is another.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "malloc_trim"):
        yield
        return
    library.mallopt(MMAP_THRESHOLD, MAPPED)
    library.mallopt(TRIM_THRESHOLD, ALL)
    try:
        yield
    finally:
        library.mallopt(TRIM_THRESHOLD, USUAL)
        library.malloc_trim(0)
