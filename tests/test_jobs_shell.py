"""SQL from a prompt, a file and standard input, and the views without Winnow."""

import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import World
from prompt_toolkit.application import create_app_session
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from jobs import shell

LEAVE = "\x04"  # Ctrl-D
Typed = Callable[[str], tuple[str, str]]


@pytest.fixture
def typed(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Typed]:
    """What typing this at the prompt prints, on standard output and standard error."""

    def call(text: str) -> tuple[str, str]:
        with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
            keys.send_text(text)
            shell.shell(world.store, "csv", history=tmp_path / "history")
        said = capsys.readouterr()
        return said.out, said.err

    yield call


def test_statements_are_answered_until_the_user_leaves(typed: Typed, tmp_path: Path) -> None:
    out, err = typed("SELECT 1 AS one;\r\rSELECT\rcount(*) AS rounds FROM rounds;\r" + LEAVE)
    assert out == '"one"\n1\n"rounds"\n6\n' and not err
    kept = (tmp_path / "history").read_text()
    assert "SELECT 1 AS one;" in kept and "count(*) AS rounds" in kept


def test_a_mistake_is_said_and_the_next_statement_can_be_typed(typed: Typed) -> None:
    out, err = typed("SELEC 1;\rDROP VIEW rounds;\r.nothing\rSELECT 2 AS two;\r.quit\r")
    assert out == '"two"\n2\n'
    syntax, refused, unknown = err.strip().split("\n", 2)[0], "only SELECT", ".nothing: unknown; .help says"
    assert syntax.startswith("sql: ") and refused in err and unknown in err


def test_lines_with_a_dot(typed: Typed) -> None:
    out, err = typed(".help\r.tables\r.format json\rSELECT 3 AS three;\r.format xml\r.quit\r")
    assert ".format FORMAT" in out and "rounds: round, arm, model" in out and '[{"three": 3}]' in out
    assert ".format xml: unknown" in err


def test_views_and_columns_are_completed(world: World) -> None:
    words = shell.WordCompleter(shell._words(world.store, None), ignore_case=True)

    def completed(text: str) -> set[str]:
        return {found.text for found in words.get_completions(Document(text), None)}  # type: ignore[arg-type]

    assert "evaluations" in completed("SELECT * FROM ev") and "prompt_id" in completed("SELECT prom")
    assert "SELECT" in completed("sel")


def test_sql_from_a_file_and_from_standard_input(
    world: World, winnow: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "q.sql").write_text("SELECT 1;\nSELECT 5 AS five;\n")
    said = winnow("sql", "--store", world.store, "--file", tmp_path / "q.sql", "--format", "csv")
    assert said.out == '"five"\n5\n'
    for words in ((), ("--file", "-")):
        monkeypatch.setattr(sys, "stdin", io.StringIO("SELECT 7 AS seven"))
        assert winnow("sql", "--store", world.store, "--format", "csv", *words).out == '"seven"\n7\n'
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert "sql: empty" in winnow("sql", "--store", world.store).line
    assert "--file" in winnow("sql", "--store", world.store, "--file", tmp_path / "none.sql").line
    (tmp_path / "q.sql").write_bytes(b"SELECT '\xff'")
    assert "UTF-8" in winnow("sql", "--store", world.store, "--file", tmp_path / "q.sql").line
    assert "not several" in winnow("sql", "SELECT 1", "--views", "--store", world.store).line


@pytest.mark.parametrize(("sql", "format", "said"), [
    ("SELECT 'infinity'::DATE AS a", "table", "beyond what can be shown"),
    ("SELECT 'infinity'::TIMESTAMP AS a", "json", "beyond what can be shown"),
    ("SELECT 'a\udcff'", "json", "no UTF-8"),
])  # fmt: skip
def test_what_cannot_be_shown_is_one_line(
    world: World, winnow: Callable[..., Any], sql: str, format: str, said: str
) -> None:
    assert said in winnow("sql", sql, "--store", world.store, "--format", format).line


def test_null_is_empty_in_csv_and_nan_is_null_in_json(world: World, winnow: Callable[..., Any]) -> None:
    sql = "SELECT NULL::INTEGER[] AS a, [1] AS b, NULL AS c"
    assert winnow("sql", sql, "--store", world.store, "--format", "csv").out.splitlines()[1] == ',"[1]",'
    said = winnow("sql", "SELECT MAP {'x': 'nan'::DOUBLE} AS a", "--store", world.store, "--format", "json")
    assert said.out.strip() == '[{"a": [["x", null]]}]'


def test_the_views_open_without_winnow(world: World, winnow: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "views.sql").write_text(winnow("sql", "--views", "--store", world.store).out)
    code = (
        "import duckdb, sys; c = duckdb.connect(); c.execute(open('views.sql').read()); "
        "print(c.sql('SELECT count(*) FROM curated').fetchall()[0][0], 'schemas' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    [expected] = world.rows("SELECT count(*) AS n FROM curated")
    assert said.stdout.split() == [str(expected["n"]), "False"] and expected["n"] > 0
