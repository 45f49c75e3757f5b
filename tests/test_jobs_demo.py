"""The demo's arms beside each other, a process each: the same rows, whatever becomes of a process."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, World, rows, sets

import jobs.demo
from jobs.demo import play_arms

SETTINGS = sets(TINY | {"threads": None, "rounds": 1})
#: What does not depend on D_0, which two threads make here and one there.
NAIVE = (
    "SELECT metric, value FROM evaluations WHERE arm = 'naive' AND round = 1 AND NOT ends_with(metric, '_d0') "
    "ORDER BY metric"
)
KEPT = "SELECT selection, sample_id FROM selections WHERE round = 1 AND kept ORDER BY ALL"


@pytest.fixture
def two_cores() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[str]]:
    """The processes that the demo starts."""
    found: list[subprocess.Popen[str]] = []
    start = subprocess.Popen

    def spy(*words: Any, **more: Any) -> subprocess.Popen[str]:
        found.append(start(*words, **more))
        return found[-1]

    monkeypatch.setattr(jobs.demo.subprocess, "Popen", spy)
    return found


def test_arms_beside_each_other_make_what_they_make_in_turn(
    world: World, tmp_path: Path, two_cores: None, started: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = play_arms(tmp_path / "store", "embedded-fast", SETTINGS)
    assert [outcome.arm for outcome in outcomes] == list(world.recipe.arms)
    assert [process.returncode for process in started] == [0]
    assert "round 1 of naive" in capsys.readouterr().err, "what the process says is said here"
    assert rows(tmp_path / "store", KEPT) == world.rows(KEPT)
    assert rows(tmp_path / "store", NAIVE) == world.rows(NAIVE)
    assert torch.get_num_threads() == 2


def test_an_arm_whose_process_died_is_played_all_the_same(
    world: World, tmp_path: Path, two_cores: None, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    relay: Callable[[Any], Any] = jobs.demo._relay

    def kill(process: Any) -> Any:
        process.kill()
        return relay(process)

    monkeypatch.setattr(jobs.demo, "_relay", kill)
    play_arms(tmp_path / "store", "embedded-fast", SETTINGS)
    assert [process.returncode for process in started] == [-9]
    assert rows(tmp_path / "store", NAIVE) == world.rows(NAIVE)


def test_an_interrupt_ends_the_processes(tmp_path: Path, started: list[Any]) -> None:
    processes = jobs.demo._processes(tmp_path / "store", "embedded", [], ["naive"])
    with pytest.raises(KeyboardInterrupt), processes:
        raise KeyboardInterrupt
    assert [process.returncode for process in started] == [-15]
