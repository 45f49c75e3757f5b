"""The demo: both arms of the embedded default from one base, and a report."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

from jobs import devices
from jobs import recipe as recipes
from jobs.progress import say
from jobs.report import renew, report
from jobs.round import Outcome, loop, prepare
from jobs.run import Run
from storage.layout import create


def play_arms(store: Path, name: str, settings: list[tuple[list[str], Any]]) -> list[Outcome]:
    """Loop every arm of the recipe ``name`` with settings changed, in one store; the report is renewed after each round
    that this process plays.

    On a CPU with a core for each arm, all but the first are played by processes of their own: small models make more of
    one core each than of all together.
    """
    import torch

    recipe = recipes.override(recipes.load(name), settings)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    home, (first, *others) = create(store), recipe.arms

    def play(arm: str, each: Callable[[Run], None] = renew) -> Outcome:
        return loop(Run(home, recipe.for_arm(arm), 1, arm), each)

    cores = torch.get_num_threads()
    share = cores // len(recipe.arms)
    if not (devices.device() == "cpu" and share and others):
        return [play(arm) for arm in recipe.arms]
    prepare(Run(home, recipe.for_arm(first), 1, first))  # once, what all arms share
    torch.set_num_threads(share)
    try:
        with _processes(home, name, [*settings, (["threads"], share)], others):
            outcome = play(first)
        # What is there is passed over, so that an arm whose process broke off is played to its end here.
        return [outcome, *(play(arm, lambda run: None) for arm in others)]
    finally:
        torch.set_num_threads(cores)


@contextmanager
def _processes(store: Path, name: str, settings: list[tuple[list[str], Any]], arms: list[str]) -> Iterator[None]:
    """Loop ``arms``, a process each, and leave when all have ended; an error here ends them."""
    texts = [f"{'.'.join(keys)}={json.dumps(value, ensure_ascii=False)}" for keys, value in settings]
    sets = [word for text in texts for word in ("--set", text)]
    verb = [sys.executable, "-m", "jobs.cli", "loop", "--recipe", name, "--store", str(store), *sets]
    with ExitStack() as stack:
        for arm in arms:
            # Through a pipe, not to the terminal, where bars of two processes would write over each other. A process
            # whose pipe is broken ends, so that none outlives this one by much.
            out, err = subprocess.DEVNULL, subprocess.PIPE
            played = subprocess.Popen([*verb, "--no-report", "--arm", arm], stdout=out, stderr=err, text=True)
            stack.enter_context(played)
            stack.callback(_relay(played).join)
            stack.push(lambda kind, *_, played=played: played.terminate() if kind else None)
        yield


def _relay(played: subprocess.Popen[str]) -> Thread:
    """Say here what a process says."""
    assert played.stderr
    lines = played.stderr
    thread = Thread(target=lambda: [say(line.rstrip()) for line in lines], daemon=True)
    thread.start()
    return thread


def demo(store: Path, name: str, settings: list[tuple[list[str], Any]]) -> Path:
    """Run the recipe ``name`` with settings changed; returns the path of the report."""
    play_arms(store, name, settings)
    return report(store)
