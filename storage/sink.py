"""A new file that is written and hashed on threads of its own, while its maker goes on."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType

Data = bytes | memoryview

BLOCK = 1 * 2**20  # bytes handed on at once
AHEAD = 8  # blocks that may wait


class Sink:
    """As a context: a file that must not exist yet, hashed while it is written and flushed to disk once.

    Whoever calls `write` must not change the data afterwards: it is written later. `finish` after the last byte, and
    `result` at any time after that; meanwhile the disk works. Left without `finish`, what waits is thrown away.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self.closed = False
        self._file = open(path, "xb")  # noqa: SIM115  Buffered, because a raw write may stop half-way without an error.
        self._sha256 = hashlib.sha256()
        self._writer, self._hasher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._block: list[Data] = []
        self._held = 0
        self._ahead: deque[tuple[Future[None], Future[None]]] = deque()
        self._end: Future[None] | None = None

    def write(self, data: Data) -> int:
        """Take bytes, in order; an error of the disk comes with a later call, or with `result`."""
        self._block.append(data)
        self._held += len(data)
        self.bytes += len(data)
        if self._held >= BLOCK:
            self._hand_on(AHEAD)
        return len(data)

    def flush(self) -> None:
        """Nothing: pyarrow asks for it between row groups."""

    def _hand_on(self, ahead: int) -> None:
        block, self._block, self._held = self._block, [], 0
        self._ahead.append((self._writer.submit(self._put, block), self._hasher.submit(self._hash, block)))
        while len(self._ahead) > ahead:
            for done in self._ahead.popleft():
                done.result()

    def _put(self, block: list[Data]) -> None:
        start = self._file.tell()
        for data in block:
            self._file.write(data)
        if hasattr(os, "posix_fadvise"):
            # Linux begins to write these pages to disk, and goes on; else all of them would wait for the flush.
            os.posix_fadvise(self._file.fileno(), start, self._file.tell() - start, os.POSIX_FADV_DONTNEED)

    def _hash(self, block: list[Data]) -> None:
        for data in block:
            self._sha256.update(data)

    def finish(self) -> None:
        """No more comes: write out, flush to disk and close, without waiting for it."""
        self._hand_on(AHEAD)
        self._end = self._writer.submit(self._sync)
        self.closed = True

    def _sync(self) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def result(self) -> str:
        """Wait until the file is on disk; its SHA-256."""
        assert self._end is not None, "finish first"
        for block in self._ahead:
            for done in block:
                done.result()
        self._end.result()
        return self._sha256.hexdigest()

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for threads in (self._writer, self._hasher):
            threads.shutdown(wait=self._end is None, cancel_futures=self._end is None)
        self.closed = True
        if self._end is None:
            with suppress(OSError):  # what it was left for is told already
                self._file.close()

