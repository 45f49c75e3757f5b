"""Memory that training frees stays with the process, until training ends."""

import ctypes
import resource

import numpy as np
import pytest

from jobs.training import heap

BLOCKS, BLOCK = 16, 2**20


def faults(times: int) -> int:
    """Pages faulted in by taking, filling and freeing all blocks so many times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        [np.ones(BLOCK, np.uint8) for _ in range(BLOCKS)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_freed_memory_is_kept_within_and_given_back_at_the_end() -> None:
    pages = BLOCKS * BLOCK // resource.getpagesize()
    with heap.kept():
        faults(1)
        assert faults(20) < pages
    assert faults(1) > pages / 2


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    with heap.kept():
        pass
