"""Executors run the units of a stage. They know nothing of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import pyarrow as pa

from jobs.progress import bar

if TYPE_CHECKING:
    from jobs.stage import Made, Unit, Work


def local(
    label: str, units: Sequence[Unit], start: Callable[[], Work], keep: Callable[[Unit, pa.Table], None]
) -> None:
    """One unit after the other in this process; what is kept stays, whatever happens to the next.

    While a unit is worked on, the one before is finished and kept on a second thread: models do not wait for image
    files and for the disk. Two units are in memory at most.
    """
    if not units:
        return
    work = start()

    def finish(unit: Unit, made: Made) -> None:
        keep(unit, made() if callable(made) else made)

    # Of a single unit there is nothing to count until it is done.
    total = sum(unit.rows.num_rows for unit in units) if len(units) > 1 else None
    with bar(label, total) as advance, ThreadPoolExecutor(1) as second:
        before: tuple[Unit, Future[None]] | None = None
        for unit in units:
            made = work(unit.rows)
            if before:
                before[1].result()
                advance(before[0].rows.num_rows)
            before = unit, second.submit(finish, unit, made)
        assert before
        before[1].result()
        advance(before[0].rows.num_rows)
