"""The demo: both arms of the embedded default from one base, and a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs import recipe as recipes
from jobs.report import report
from jobs.round import Outcome, loop
from jobs.run import Run
from storage.layout import create


def play_arms(store: Path, recipe: recipes.Recipe) -> list[Outcome]:
    """Loop every arm of the recipe in one store; the report is renewed after each round."""
    if recipe.threads:
        import torch

        torch.set_num_threads(recipe.threads)
    home = create(store)
    return [
        loop(Run(home, recipe.for_arm(arm), 1, arm), each=lambda run: report(run.store) and None) for arm in recipe.arms
    ]


def demo(store: Path, name: str, settings: list[tuple[list[str], Any]]) -> Path:
    """Run the recipe ``name`` with settings changed; returns the path of the report."""
    play_arms(store, recipes.override(recipes.load(name), settings))
    return report(store)
