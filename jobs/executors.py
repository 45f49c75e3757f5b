"""Executors run the units of a stage. They know nothing of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa

from jobs.progress import bar

if TYPE_CHECKING:
    from jobs.stage import Unit, Work


def local(
    label: str, units: Sequence[Unit], start: Callable[[], Work], keep: Callable[[Unit, pa.Table], None]
) -> None:
    """One unit after the other in this process; what is kept stays, whatever happens to the next."""
    if not units:
        return
    work = start()
    # Of a single unit there is nothing to count until it is done.
    with bar(label, sum(unit.rows.num_rows for unit in units) if len(units) > 1 else None) as advance:
        for unit in units:
            keep(unit, work(unit.rows))
            advance(unit.rows.num_rows)
