"""Batches: which rows make the next step, and a thread that has them ready when the step before is done."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from functools import lru_cache
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np

from schemas.errors import WinnowError

T = TypeVar("T")


def batches(bucket: np.ndarray, batch: int, seed: int, first: int = 0) -> Iterator[np.ndarray]:
    """Rows of every step's batch, int64 [batch], from step ``first`` on, without an end. ``bucket`` int [N]: a batch
    is of one bucket.

    Each bucket's rows are drawn in a fresh order every epoch; epochs run on into each other, so every batch is full.
    After e epochs a bucket of n rows has had ⌊e·n / batch⌋ batches; within an epoch the buckets take turns at random.
    """
    rows = [np.flatnonzero(bucket == number) for number in range(bucket.max(initial=-1) + 1)]
    sizes = np.array([len(some) for some in rows])
    if not len(bucket):
        raise WinnowError("train: there are no rows; select and export some")
    shuffled = lru_cache(maxsize=2 * len(rows))(order)

    def done(epochs: int) -> np.ndarray:
        return epochs * sizes // batch

    epoch = first * batch // len(bucket)  # by then at most `first` batches are done
    while done(epoch + 1).sum() <= first:
        epoch += 1
    skip = first - done(epoch).sum()
    while True:
        place = done(epoch)
        turns = np.repeat(np.arange(len(rows)), done(epoch + 1) - place)
        turns = np.random.default_rng([seed % 2**63, epoch, 1]).permutation(turns)
        for number in turns[:skip]:
            place[number] += 1
        for number in turns[skip:]:
            drawn, n = np.arange(place[number] * batch, (place[number] + 1) * batch), sizes[number]
            place[number] += 1
            yield rows[number][[shuffled(seed, int(at // n), int(n))[at % n] for at in drawn]]
        epoch, skip = epoch + 1, 0


def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of n rows in one epoch."""
    return np.random.default_rng([seed % 2**63, epoch]).permutation(n)


class Loader(Generic[T]):
    """What ``source`` yields, made in a thread at most ``depth`` items ahead of the caller, in order.

        with Loader(source) as loader:
            for item in loader: …

    An error in the thread is raised where its item would have come. ``waited``: the seconds that the caller has waited
    for items. At the end of the with block, by whatever way, the thread ends with the item that it is at.
    """

    def __init__(self, source: Iterable[T], depth: int = 2) -> None:
        self.waited = 0.0
        self._ready: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self._room, self._closed = threading.Semaphore(depth), threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(iter(source),), name="loader", daemon=True)
        self._thread.start()

    def _fill(self, source: Iterator[T]) -> None:
        try:
            while self._room.acquire() and not self._closed.is_set():
                self._ready.put(("item", next(source)))
        except StopIteration:
            self._ready.put(("end", None))
        except BaseException as error:  # also those that would end the thread without a word
            self._ready.put(("error", error))

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        begun = time.perf_counter()
        kind, item = self._ready.get()
        self.waited += time.perf_counter() - begun
        if kind == "item":
            self._room.release()
            return item
        self._ready.put((kind, item))  # for whoever asks again
        raise StopIteration if kind == "end" else item

    def __enter__(self) -> Loader[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._room.release()
        self._thread.join()
        self._ready.put(("end", None))
