"""Batches and the loader: which rows come when, and a thread that neither reorders nor stays behind."""

import threading
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.training import loader as loaders
from jobs.training.loader import Loader, batches
from schemas.errors import WinnowError


@given(n=st.integers(1, 30), batch=st.integers(1, 12), seed=st.integers(0, 2**64), first=st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_one_bucket_is_epochs_one_behind_the_other(n: int, batch: int, seed: int, first: int) -> None:
    epochs = (first + 20) * batch // n + 1
    line = np.concatenate([np.random.default_rng([seed % 2**63, e]).permutation(n) for e in range(epochs)])
    drawn = list(islice(batches(np.zeros(n, int), batch, seed, first), 20))
    for step, rows in enumerate(drawn, start=first):
        np.testing.assert_array_equal(rows, line[step * batch : (step + 1) * batch])
        assert rows.dtype == np.int64


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 12), st.integers(0, 9), st.data())
@settings(max_examples=100, deadline=None)
def test_every_row_comes_equally_often(bucket: list[int], batch: int, seed: int, data: Any) -> None:
    held, sizes, epochs = np.array(bucket), Counter(bucket), 12
    ends = [sum(e * n // batch for n in sizes.values()) for e in range(epochs + 1)]  # steps after e epochs
    drawn = list(islice(batches(held, batch, seed), ends[-1]))
    assert all(len(rows) == batch and len(set(held[rows])) == 1 for rows in drawn)
    first, last = sorted(data.draw(st.lists(st.integers(0, epochs), min_size=2, max_size=2)))
    count = Counter(int(row) for rows in drawn[ends[first] : ends[last]] for row in rows)
    for b, n in sizes.items():
        mine = [count[row] for row in np.flatnonzero(held == b)]
        assert abs(sum(mine) - (last - first) * n) < batch
        spare = -(-(batch - 1) // n)
        assert all(abs(times - (last - first)) <= spare for times in mine)
        if first == 0:  # epochs run on: no row is more than one ahead of another
            assert max(mine) - min(mine) <= 1
    # From any step on it goes as it went.
    start = data.draw(st.integers(0, ends[-1]))
    again = list(islice(batches(held, batch, seed, start), len(drawn) - start))
    np.testing.assert_array_equal(np.array(again).reshape(-1), np.array(drawn[start:]).reshape(-1))


def test_buckets_take_turns_at_random_and_by_the_seed() -> None:
    bucket = np.repeat([0, 1], [80, 40])

    def turns(seed: int) -> list[int]:
        return [int(bucket[rows[0]]) for rows in islice(batches(bucket, 4, seed), 300)]

    assert turns(1) == turns(1) != turns(2)
    assert turns(1)[:30] != turns(1)[30:60] and all(sum(turns(1)[e * 30 : e * 30 + 30]) == 10 for e in range(10))


def test_no_rows_are_refused() -> None:
    with pytest.raises(WinnowError, match="there are no rows"):
        next(batches(np.empty(0, np.int32), 4, 1))


def test_order_and_what_is_made_ahead() -> None:
    made: list[int] = []

    def source() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            yield number

    with Loader(source(), depth=3) as loader:
        for number in range(20):
            assert next(loader) == number
            assert len(made) <= number + 1 + 3
        assert list(loader) == [] and list(loader) == []
    assert not loader._thread.is_alive()


def test_it_makes_ahead_without_being_asked() -> None:
    third = threading.Event()

    def source() -> Iterator[int]:
        yield from (0, 1)
        third.set()
        yield 2

    with Loader(source(), depth=3) as loader:
        assert third.wait(60) and next(loader) == 0


def test_an_error_comes_in_its_place() -> None:
    def source() -> Iterator[int]:
        yield from (1, 2)
        raise WinnowError("the third: damaged; remove it")

    with Loader(source()) as loader:
        assert [next(loader), next(loader)] == [1, 2]
        for _ in range(2):
            with pytest.raises(WinnowError, match="the third: damaged"):
                next(loader)
    assert not loader._thread.is_alive()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, GeneratorExit])
def test_the_thread_ends_with_the_block(error: type[BaseException]) -> None:
    closed = threading.Event()

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    before = threading.active_count()
    with pytest.raises(error), Loader(endless()) as loader:
        next(loader)
        raise error
    assert closed.wait(60) and threading.active_count() == before
    assert 1 in [*loader, 1]  # what was ready, then the end: it does not hang


def test_it_counts_what_the_caller_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that goes on by 1 whenever it is asked, every item costs 1."""
    clock = iter(range(10**6))
    monkeypatch.setattr(loaders.time, "perf_counter", lambda: float(next(clock)))
    with Loader(iter("abcde")) as loader:
        assert loader.waited == 0 and list(islice(loader, 4)) == ["a", "b", "c", "d"] and loader.waited == 4


class Held:
    """A cache of numbers: latents are the row, a condition is the row or, dropped, -1."""

    def latents(self, rows: np.ndarray) -> Any:
        import torch

        return torch.tensor(rows)

    def conditions(self, rows: np.ndarray, dropped: np.ndarray) -> Any:
        import torch

        return {"prompt_embeds": torch.tensor(np.where(dropped, -1, rows))}
