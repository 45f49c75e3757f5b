"""SQL at a prompt: statements end with a semicolon, Tab completes, and what was asked before comes again with ↑."""

from __future__ import annotations

import sys
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory

from jobs.progress import say
from jobs.show import FORMATS, show
from schemas.errors import WinnowError
from storage.query import user_query

HELP = f"""Statements end with ';'. Only what reads the store is allowed.
.tables            the views and their columns
.format FORMAT     how results are shown: {", ".join(FORMATS)}
.quit              leave (or Ctrl-D)"""

COLUMNS = "SELECT table_name AS view, list(column_name ORDER BY column_index) AS columns FROM duckdb_columns() " \
          "WHERE NOT internal GROUP BY ALL ORDER BY ALL"  # fmt: skip

_WORDS = (
    "SELECT FROM WHERE GROUP BY ORDER BY HAVING LIMIT JOIN LEFT JOIN USING ON AS AND OR NOT IN IS NULL LIKE BETWEEN "
    "CASE WHEN THEN ELSE END DISTINCT WITH UNION ALL DESC ASC OVER PARTITION BY QUALIFY FILTER count avg min max sum "
    "quantile_cont corr stddev list DESCRIBE SUMMARIZE EXPLAIN"
)


def shell(store: Path, format: str = "table", snapshot: int | None = None, history: Path | None = None) -> None:
    """Ask until the user leaves. What is wrong with a statement is said, and the next one can be typed. ``history``:
    the file of what was typed, .winnow_history of the home folder by default."""
    session: PromptSession[str] = PromptSession(
        history=FileHistory(str(history or Path.home() / ".winnow_history")),
        completer=WordCompleter(_words(store, snapshot), ignore_case=True),
        multiline=Condition(lambda: not _whole(get_app().current_buffer.text)),
        prompt_continuation="   ...> ",
    )
    if sys.stdin.isatty():
        say(f"{store}; .help says what there is")
    while True:
        try:
            text = session.prompt("winnow> ").strip()
        except KeyboardInterrupt:  # Ctrl-C gives up the line, as in other shells
            continue
        except EOFError:
            return
        if text in (".quit", ".exit"):
            return
        try:
            if text.startswith("."):
                format = _command(text, store, snapshot, format)
            elif text.strip(";"):
                show(user_query(store, text, snapshot), format)
        except WinnowError as error:
            say(str(error))


def _whole(text: str) -> bool:
    """Whether Enter sends the text, or begins another line of it."""
    text = text.strip()
    return not text or text.startswith(".") or text.endswith(";")


def _command(text: str, store: Path, snapshot: int | None, format: str) -> str:
    """Do what a line that starts with a dot says; the format to go on with."""
    match text.split():
        case [".help"]:
            print(HELP)
        case [".tables"]:
            for row in user_query(store, COLUMNS, snapshot).to_pylist():
                print(f"{row['view']}: {', '.join(row['columns'])}")
        case [".format", name] if name in FORMATS:
            return name
        case _:
            raise WinnowError(f"{text}: unknown; .help says what there is")
    return format


def _words(store: Path, snapshot: int | None) -> list[str]:
    rows = user_query(store, COLUMNS, snapshot).to_pylist()
    named = {name for row in rows for name in (row["view"], *row["columns"])}
    return sorted(named) + list(dict.fromkeys(_WORDS.split()))
