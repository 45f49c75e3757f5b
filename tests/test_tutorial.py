"""The tutorial is played from its first line to its last: every command and snippet, in order, in one store."""

import re
import shlex
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import TINY, Said, rows, sets
from test_documentation import HOME
from test_jobs_label import post, start

from jobs.label.ballot import pairs, picks
from jobs.label.booth import Booth

TUTORIAL = (HOME / "docs" / "tutorial.md").read_text()
STORE = Path("hour")
KEPT = 6  # images that the voter keeps

#: Smaller than the page's numbers; every stage stays.
SMALL = TINY | {"generate.images_per_prompt": 4, "reference.images_per_prompt": 2, "select.keep": 1}


def write(body: str) -> None:
    """A file as the page shows it, its name in the first line; a recipe with the small numbers in it."""
    recipe = yaml.safe_load(body)
    for keys, value in sets(SMALL):
        inner = recipe
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
        inner[keys[-1]] = value
    Path(body.splitlines()[0].removeprefix("# ")).write_text(yaml.safe_dump(recipe))


def vote(words: list[str]) -> None:
    """``winnow label`` as a process: somebody votes on its page, and ends it."""
    process, token, port = start(STORE.absolute(), *words)
    if words[0] == "picks":
        some = [number for task in picks(STORE, "curated", 2).tasks for number in task.ids][:KEPT]
        cast = [{"question": "keep", "sample": str(number), "choice": "keep"} for number in some]
    else:
        asked = Booth(STORE, pairs(STORE, ["base", "curated:2"], 10)).view("ada")
        cast = [{"question": asked["question"], "sample": asked["left"], "other": asked["right"], "choice": "left"}]
    for body in cast:
        assert post(port, token, "/vote", {"voter": "ada"} | body)[0] == 200
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and f"{len(cast)} votes of 1 voters" in out, (out, err)


def play(line: str, names: dict[str, str], winnow: Callable[..., Said]) -> None:
    """One line of a shell: a command, or ``name=$(command | tail -n 1)``."""
    kept = re.fullmatch(r"(\w+)=\$\((winnow .+) \| tail -n 1\)", line)
    words = shlex.split(re.sub(r"\$(\w+)", lambda found: names[found[1]], kept[2] if kept else line))
    assert words[0] == "winnow", line
    if words[1] == "label" and "--results" not in words:
        assert words[3:5] == ["--store", str(STORE)]
        return vote([words[2], *words[5:]])
    said = winnow(*words[1:])
    assert said.status == 0, (line, said.err)
    if kept:
        names[kept[1]] = said.out.splitlines()[-1]
    return None


def test_the_tutorial_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], winnow: Callable[..., Said]
) -> None:
    import datasets.config

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    names: dict[str, str] = {}
    played = 0
    for language, body in re.findall(r"^```(\w+)\n(.*?)^```$", TUTORIAL, re.DOTALL | re.MULTILINE):
        if language == "yaml":
            write(body)
        elif language == "bash":
            for line in body.splitlines():
                play(line, names, winnow)
                played += 1
        else:
            assert language == "python"
            capsys.readouterr()
            exec(compile(body, "tutorial.md", "exec"), {})
            assert capsys.readouterr().out
    assert played > 30 and names["kept"] != names["gone"]
    assert [row["round"] for row in rows(STORE, "SELECT round FROM rounds ORDER BY round")] == [0, 1, 2]
    mine = rows(STORE, "SELECT sample_id FROM selections WHERE round = 2 AND kept ORDER BY sample_id")
    assert [row["sample_id"] for row in mine] == sorted(picks(STORE, "curated", 2).tasks[0].ids[:KEPT])
    assert Path("replay.png").exists() and Path("hour/report.html").exists()
