"""The documents are true: their commands exist, and their snippets run."""

import importlib
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from conftest import World

from jobs.cli import app
from schemas.tables import IMAGE, TABLES
from storage.layout import create
from storage.query import script, user_query

HOME = Path(__file__).parent.parent
README = (HOME / "README.md").read_text()
MAKEFILE = (HOME / "Makefile").read_text()
QUERIES = (HOME / "docs" / "queries.md").read_text()
STORE_PAGE = (HOME / "docs" / "store.md").read_text()
DOCUMENTS = sorted([*HOME.glob("*.md"), *(HOME / "docs").rglob("*.md")])
HOW_TOS = sorted((HOME / "docs" / "how-to").glob("*.md"))
VERBS = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}


def blocks(text: str, *languages: str) -> list[str]:
    """Fenced code blocks of these languages ("": of none)."""
    found = re.findall(r"^```([a-z]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [body for language, body in found if language in languages]


def commands(text: str) -> list[str]:
    lines = "\n".join(blocks(text, "", "bash", "sh", "console")).replace("\\\n", " ").splitlines()
    lines = [line.removeprefix("$ ").strip() for line in lines]
    return [line for line in lines if line.startswith(("make ", "winnow "))]


def targets() -> dict[str, str]:
    """Help by target; "" where it has none."""
    found = re.findall(r"^([a-z][a-z-]*):(?!=)[^#\n]*(?:## (.*))?$", MAKEFILE, re.MULTILINE)
    return {name: help_ for name, help_ in found}


def test_there_are_commands_to_check() -> None:
    assert sum(line.startswith("make ") for line in commands(README)) >= 3
    assert sum(line.startswith("winnow ") for line in commands(README)) >= 3
    assert len(targets()) >= 15


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_exists(document: Path) -> None:
    import typer.main

    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for line in commands(document.read_text()):
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"] and len(words) > 1:
            assert words[1] in targets(), line
        if words[:1] == ["winnow"]:
            assert words[1] in VERBS, line
            options = {option for p in known[words[1]].params for option in p.opts} | {"--help", "--debug"}
            assert {word for word in words[2:] if word.startswith("--")} <= options, line
    inline = re.findall(r"`(?:\.venv/bin/)?(make|winnow) ([a-z-]+)[^`]*`", document.read_text())
    for tool, name in inline:
        assert name in (targets() if tool == "make" else VERBS), f"{tool} {name}"


def test_every_target_has_help() -> None:
    assert [name for name, said in targets().items() if not said] == []
    assert {"help", "setup", "demo", "test", "lint", "clean", "verify", "sql", "report", "loop"} <= set(targets())


def test_the_makefile_calls_verbs_that_exist() -> None:
    called = re.findall(r"^\t@?\$\(WINNOW\) ([a-z-]+)", MAKEFILE, re.MULTILINE)
    assert len(called) > 10 and set(called) <= VERBS
    phony = set(re.sub(r"\\\n", " ", MAKEFILE).split(".PHONY:")[1].splitlines()[0].split())
    for name in phony - {"$(STAGES)", "$(STUDIES)"}:
        assert name in targets(), name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith(("http://", "https://", "#", "mailto:")):
            assert (document.parent / link.split("#")[0]).exists(), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_nothing_is_left_to_be_filled_in(document: Path) -> None:
    text = document.read_text()
    assert not re.findall(r"^[A-Z]{3,}$|TODO|FIXME|XXX", text, re.MULTILINE)
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users)/", text)


@pytest.mark.parametrize("query", blocks(README, "sql"))
def test_sql_snippets_run(world: World, query: str) -> None:
    assert world.table(query).num_rows > 0


@pytest.mark.parametrize("query", blocks(QUERIES, "sql"))
def test_the_twenty_queries_run(world: World, query: str) -> None:
    """On a small store some find nothing."""
    assert world.table(query).num_columns > 1


def test_the_twenty_queries_are_twenty_and_most_find_something(world: World) -> None:
    found = [world.table(query).num_rows for query in blocks(QUERIES, "sql")]
    assert len(found) == 20 and sum(rows > 0 for rows in found) >= 18, found


def sections(text: str) -> list[tuple[str, str]]:
    """Headings of the third level and what stands below them."""
    return re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", text, re.DOTALL | re.MULTILINE)


def cells(body: str) -> list[list[str]]:
    """The rows of the one table of a section."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines() if line.startswith("|")]
    return rows[2:]


def test_the_store_page_has_every_table_with_its_columns() -> None:
    words = {pa.int64(): "int64", pa.int32(): "int32", pa.float64(): "float64", pa.bool_(): "bool",
             pa.string(): "string", IMAGE: "image", pa.list_(pa.float16()): "vector"}  # fmt: skip
    tables, _, _ = STORE_PAGE.partition("\n## Views\n")
    said = {
        name: (tuple(re.findall(r"`(\w+)`", re.search(r"^Key: (.*?)\.", body, re.MULTILINE)[1])),  # type: ignore[index]
               [(row[0], row[1]) for row in cells(body)])
        for name, body in sections(tables)
    }  # fmt: skip
    assert said == {
        name: (table.key, [(field.name, words[field.type] + "?" * (field.name not in table.required))
                           for field in table.schema])
        for name, table in TABLES.items()
    }  # fmt: skip


def test_the_store_page_has_every_view_with_its_columns(tmp_path: Path) -> None:
    store = create(tmp_path / "store")
    said = {
        name: [column for row in cells(body) for column in row[0].split(", ")]
        for name, body in sections(STORE_PAGE.partition("\n## Views\n")[2])
    }
    made = {name: user_query(store, f"SELECT * FROM {name}").column_names for name in said}
    assert said == made
    views = set(re.findall(r'CREATE OR REPLACE VIEW "(\w+)"', script(store)))
    assert views == {*TABLES, *said}


@pytest.mark.parametrize("line", [line for line in commands(README) if re.match(r"winnow (sql|verify)", line)])
def test_questions_to_the_store_run(world: World, winnow: Callable[..., Any], line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    if "--store" not in words:
        words += ["--store", str(world.store)]
    words = [str(world.store) if word.startswith("runs/") else word for word in words]
    said = winnow(*words)
    assert said.status == 0 and len(said.out.splitlines()) >= 1 and not said.err, said.err


@pytest.mark.parametrize("code", [*blocks(README, "python"), *blocks(QUERIES, "python")])
def test_python_snippets_run(
    world: World, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets.config

    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(world.store)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize("page", HOW_TOS, ids=lambda path: path.name)
def test_how_to_snippets_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A snippet whose first line names a file becomes that file; the others run and print something."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        monkeypatch.delitem(sys.modules, name)
    for code in blocks(page.read_text(), "python"):
        first = code.splitlines()[0].removeprefix("# ")
        if first.endswith(".py"):
            (tmp_path / first).parent.mkdir(exist_ok=True)
            (tmp_path / first).write_text(code)
        else:
            exec(compile(code, page.name, "exec"), {})
            assert capsys.readouterr().out
    for module, name in re.findall(r"(mine\.\w+):(\w+)", page.read_text()):
        assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("name", ["methods.md", "limits.md"])
def test_figures_with_an_error_are_those_of_the_results(name: str) -> None:
    results = "\n".join(path.read_text() for path in (HOME / "results").glob("*.md"))
    figures = re.findall(r"-?[\d.]+ ± [\d.]+", (HOME / "docs" / name).read_text())
    assert len(figures) > 2 and [figure for figure in figures if figure not in results] == []


@pytest.mark.parametrize("text", [text for path in DOCUMENTS for text in blocks(path.read_text(), "yaml")])
def test_recipe_snippets_load(text: str) -> None:
    from jobs import recipe as recipes

    recipes.override(recipes.load("embedded"), [([key], value) for key, value in yaml.safe_load(text).items()])
