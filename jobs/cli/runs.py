"""Verbs that play whole rounds, and what comes before and around them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from jobs.cli.app import RECIPE, STORE, Arm, RecipeName, Round, Rounds, Set, StorePath, app, open_run, setting
from jobs.studies import NAMES
from schemas.errors import WinnowError


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
    recipe: RecipeName = RECIPE,
    store: StorePath = STORE,
    arm: Arm = "curated",
    rounds: Rounds = None,
    report: Annotated[bool, typer.Option(help="Renew report.html after every round.")] = True,
    set: Set = None,
) -> None:
    """Play rounds until the guard ends them."""
    from jobs.report import renew
    from jobs.round import loop as play_all

    sets = [*(set or []), *([f"rounds={rounds}"] if rounds else [])]
    outcome = play_all(open_run(recipe, store, arm, 1, sets), renew if report else lambda run: None)
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
    names: Annotated[list[str] | None, typer.Argument(help=f"Some of {', '.join(NAMES)}.")] = None,
    store: StorePath = Path("runs/study"),
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="How many rounds, of the effect.")] = 8,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("results"),
    workers: Annotated[int | None, typer.Option(min=1, help="Arms at a time; by default one a core.")] = None,
    set: Set = None,
) -> None:
    """Confirm the demo's effect over several seeds and more rounds, or compare what each part does, into results/."""
    from jobs.studies import named
    from jobs.study import compare
    from jobs.study import study as run_study

    asked, sets = names or ["effect"], [setting(text) for text in set or []]
    others = [name for name in asked if name != "effect"]
    for name in others:
        named(name)
    if "effect" in asked:
        print(run_study(store / "effect", seeds, rounds, out, sets))
    if others:
        for page in compare(others, store, seeds, out, sets, workers or os.cpu_count() or 1):
            print(page)


@app.command()
def base(
    data: Annotated[str, typer.Option(help="An .npz of handwritten digits; empty for scikit-learn's.")] = "",
    to: Annotated[Path | None, typer.Option(help="The folder to write; by default the shipped weights.")] = None,
    seed: int = 0,
    only: Annotated[list[str] | None, typer.Option(help="generator, clip, reader, judge, real or scenes.")] = None,
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


@app.command()
def publish(
    to: Annotated[str, typer.Option(help="The repository of the Hub, user/name.")],
    store: StorePath = STORE,
    what: Annotated[str, typer.Option(help="selection (one round's training set), store or model.")] = "selection",
    recipe: Annotated[str | None, typer.Option(help="Whose table 'publish' answers; by default the store's.")] = None,
    arm: Annotated[str | None, typer.Option(help="The arm; by default the first that the guard judges.")] = None,
    round: Annotated[int | None, typer.Option(min=1, help="The round; by default that which the guard keeps.")] = None,
    dry_run: Annotated[Path | None, typer.Option(help="Write the files into this folder, and upload nothing.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Open to all; by default it is private.")] = False,
    tag: Annotated[str | None, typer.Option(help="The tag that marks it; by default one by the content.")] = None,
    unanswered: Annotated[bool, typer.Option("--unanswered", help="Although answers are missing.")] = False,
    set: Set = None,
) -> None:
    """Publish a curated selection, the whole store or a trained model to the Hugging Face Hub, with its card."""
    from jobs import recipe as recipes
    from jobs.publish import publish as send
    from storage.layout import check

    given = recipes.load(recipe) if recipe else None
    sets = [setting(text) for text in set or []]
    print(send(check(store), to, what, given, sets, arm, round, dry_run, public, tag, unanswered))


@app.command()
def label(
    store: StorePath = STORE,
    kind: Annotated[str, typer.Argument(help="picks (keep or drop candidates) or pairs (which is better).")] = "picks",
    arm: Annotated[str | None, typer.Option(help="Picks: whose candidates; by default the judged arm's.")] = None,
    round: Annotated[int | None, typer.Option(min=1, help="Picks: of which round; by default the newest.")] = None,
    contestants: Annotated[str, typer.Option(help="Pairs: models such as base,curated:1,naive:4.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="Pairs: how many each voter is asked of.")] = 100,
    port: Annotated[int, typer.Option(min=0, max=65535, help="The page's port; 0 takes a free one.")] = 0,
    results: Annotated[bool, typer.Option("--results", help="Only tell what the votes so far say.")] = False,
) -> None:
    """Vote on a page of this machine: pick candidates by hand, or compare models; every vote is a row at once."""
    from jobs.label.ballot import pairs, picks
    from jobs.label.serve import results as lines
    from jobs.label.serve import serve
    from storage.layout import check

    home = check(store)
    if results:
        print("\n".join(lines(home)))
    elif kind == "picks":
        serve(home, picks(home, arm, round), port)
    elif kind == "pairs":
        serve(home, pairs(home, [name for name in contestants.split(",") if name], limit), port)
    else:
        raise WinnowError(f"label {kind!r}: unknown; allowed are picks and pairs")


@app.command()
def doctor(
    recipe: RecipeName = RECIPE,
    store: StorePath = STORE,
    arm: Arm = "curated",
    prompts: Annotated[int | None, typer.Option(min=2, help="Prompts, where the recipe keeps all that pass.")] = None,
    set: Set = None,
) -> None:
    """Look what of a recipe cannot run on this machine, and say the cure; ends with status 2 where something cannot."""
    from jobs import recipe as recipes
    from jobs.doctor import doctor as look

    loaded = recipes.override(recipes.load(recipe), [setting(text) for text in set or []]).for_arm(arm)
    wrong = 0
    for finding in look(loaded, store, prompts):
        print(finding.line(), flush=True)
        wrong += finding.ok is False
    if wrong:
        raise typer.Exit(2)
