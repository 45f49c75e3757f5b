"""Verbs that play whole rounds, and what comes before and around them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.cli.app import RECIPE, STORE, Arm, RecipeName, Round, Rounds, Set, StorePath, app, open_run, setting


@app.command(name="round")
def round_(
    recipe: RecipeName = RECIPE, store: StorePath = STORE, arm: Arm = "curated", round: Round = None, set: Set = None
) -> None:
    """Play one whole round, and before the first one what all rounds share."""
    from jobs.round import play, prepare

    run = open_run(recipe, store, arm, round, set)
    prepare(run)
    play(run)


@app.command()
def loop(
    recipe: RecipeName = RECIPE, store: StorePath = STORE, arm: Arm = "curated", rounds: Rounds = None, set: Set = None
) -> None:
    """Play rounds until the guard ends them."""
    from jobs.round import loop as play_all

    sets = [*(set or []), *([f"rounds={rounds}"] if rounds else [])]
    outcome = play_all(open_run(recipe, store, arm, 1, sets))
    print(f"{outcome.verdict}: {outcome.reason}")
    print(f"the model to keep is that of round {outcome.best_round}: {outcome.model}")


@app.command()
def demo(
    store: StorePath = STORE,
    fast: Annotated[bool, typer.Option("--fast", help="Below two minutes, too small to show the effect.")] = False,
    rounds: Rounds = None,
    set: Set = None,
) -> None:
    """Run the curated and the naive arm of the embedded default and write a report."""
    from jobs.demo import demo as run_demo

    sets = [*(set or []), *([f"rounds={rounds}"] if rounds else [])]
    print(run_demo(store, "embedded-fast" if fast else "embedded", [setting(text) for text in sets]))


@app.command()
def study(
    store: StorePath = Path("runs/study"),
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="How many rounds.")] = 8,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("results"),
    set: Set = None,
) -> None:
    """Confirm the demo's effect over several seeds and more rounds, into results/."""
    from jobs.study import study as run_study

    print(run_study(store, seeds, rounds, out, [setting(text) for text in set or []]))


@app.command()
def base(
    data: Annotated[str, typer.Option(help="An .npz of handwritten digits; empty for scikit-learn's.")] = "",
    to: Annotated[Path | None, typer.Option(help="The folder to write; by default the shipped weights.")] = None,
    seed: int = 0,
    only: Annotated[list[str] | None, typer.Option(help="generator, clip, reader, judge or real.")] = None,
    scale: Annotated[float, typer.Option(min=0, help="Multiplies the training steps.")] = 1.0,
) -> None:
    """Build the models of the embedded default from a seed and real handwriting."""
    from jobs.world import WEIGHTS
    from jobs.world.build import PARTS, build

    build(data, seed, to or WEIGHTS, tuple(only or PARTS), scale)


@app.command()
def plan(
    recipe: RecipeName = RECIPE,
    arm: Arm = "curated",
    prompts: Annotated[int | None, typer.Option(min=2, help="Prompts, where the recipe keeps all that pass.")] = None,
    tflops: Annotated[float | None, typer.Option(min=0.001, help="The TFLOP/s that your GPU sustains.")] = None,
    set: Set = None,
) -> None:
    """Say what a run will take: images, disk and GPU-hours, by arithmetic from the recipe and the model's shape."""
    from jobs import recipe as recipes
    from jobs.plan import TFLOPS
    from jobs.plan import plan as count

    loaded = recipes.override(recipes.load(recipe), [setting(text) for text in set or []]).for_arm(arm)
    for line in count(loaded, prompts, tflops or TFLOPS).lines():
        print(line)
