"""Memory that training frees stays with the process, until training ends."""

import ctypes
import multiprocessing
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


def measured() -> tuple[int, int]:
    """The faults of twenty times within, and of once more after it."""
    with heap.kept():
        faults(1)
        within = faults(20)
    return within, faults(1)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_freed_memory_is_kept_within_and_given_back_at_the_end() -> None:
    pages = BLOCKS * BLOCK // resource.getpagesize()
    # In a process of its own: what other tests have freed may stand in huge pages, of which each is one fault.
    with multiprocessing.get_context("spawn").Pool(1) as alone:
        within, after = alone.apply(measured)
    assert within < pages
    assert after > pages / 2


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    with heap.kept():
        pass
