"""Progress bars: rate and time left on a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class Advance(Protocol):
    """Call it with the number of things just done."""

    def __call__(self, n: int = 1) -> None: ...


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:6.1f}/s", style="progress.data.speed")


@contextmanager
def bar(label: str, total: int | None, quiet: bool = False) -> Iterator[Advance]:
    """A bar from 0 to ``total`` (null: one that only moves) on standard error; silent when that is not a terminal."""
    console = Console(file=sys.stderr)
    words = TextColumn("{task.description:<34}")
    columns = (words, BarColumn(), MofNCompleteColumn(), _Rate(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=quiet or not sys.stderr.isatty()) as progress:
        task = progress.add_task(label, total=total)

        def advance(n: int = 1) -> None:
            progress.advance(task, n)

        yield advance


def say(line: str) -> None:
    """One line of news for whoever watches, on standard error."""
    print(line, file=sys.stderr, flush=True)
