"""The command line: ``winnow <verb>``. Each verb is one stage, or one of the ways to look at what they made."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from schemas.errors import WinnowError

app = typer.Typer(
    name="winnow",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Rounds of self-improvement for text-to-image models, in a store that can be asked about everything.",
)

RecipeName = Annotated[str, typer.Option("--recipe", help="A recipe's name, or a .yaml file.")]
StorePath = Annotated[Path, typer.Option("--store", help="The store's folder.")]
Arm = Annotated[str, typer.Option("--arm", help="The arm of the recipe.")]
Round = Annotated[int | None, typer.Option("--round", min=0, help="The round; by default the next without a verdict.")]
Shard = Annotated[int, typer.Option("--shard", min=0, help="Which share of the work this process does.")]
Shards = Annotated[int, typer.Option("--of", min=1, help="How many processes share the work.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Change a setting, such as generate.steps=20.")]
Rounds = Annotated[int | None, typer.Option("--rounds", min=1, help="How many rounds, instead of the recipe's.")]

STORE = Path("runs/demo")
RECIPE = "embedded"


def open_run(
    recipe: str, store: Path, arm: str, round: int | None, sets: list[str] | None, shard: int = 0, of: int = 1
) -> Any:
    """The Run that a verb works on."""
    from jobs import recipe as recipes
    from jobs.run import Run
    from storage.layout import create

    if shard >= of:
        raise WinnowError(f"--shard {shard} --of {of}: shards count from 0; give a shard below {of}")
    loaded = recipes.override(recipes.load(recipe), [_setting(text) for text in sets or []])
    if loaded.threads:
        import torch

        torch.set_num_threads(loaded.threads)
    run = Run(create(store), loaded.for_arm(arm), 1, arm, shard, of)
    if round is None:
        done = run.query("SELECT coalesce(max(round), 0) AS n FROM rounds WHERE arm = $arm", arm=arm)
        round = done["n"][0].as_py() + 1
    return run.at(round)


def _setting(text: str) -> tuple[list[str], Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise WinnowError(f"--set {text!r}: not 'key=value'; write for example generate.steps=20")
    try:
        return key.split("."), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise WinnowError(f"--set {text!r}: the value is not YAML ({error}); quote it") from error


@app.command()
def prompts(
    recipe: RecipeName = RECIPE,
    store: StorePath = STORE,
    source: Annotated[str | None, typer.Option(help="A file or folder, hub:org/name, or 'embedded'.")] = None,
    set: Set = None,
) -> None:
    """Curate prompts from a text, TSV, CSV, JSONL or Parquet file, or a dataset of the Hub."""
    from jobs.prompts import prompts as stage

    sets = [*(set or []), *([f"prompts.source={json.dumps(source)}"] if source else [])]
    run = open_run(recipe, store, _first_arm(recipe), 1, sets)
    stage(run)
    for row in run.query(
        "SELECT kept, split, count(*) AS n FROM prompts GROUP BY ALL ORDER BY kept DESC, split DESC"
    ).to_pylist():
        print(f"{row['n']:>7} prompts {'kept for ' + row['split'] if row['kept'] else 'dropped'}")


def _first_arm(recipe: str) -> str:
    from jobs import recipe as recipes

    return next(iter(recipes.load(recipe).arms))


@app.command()
def generate(
    recipe: RecipeName = RECIPE, store: StorePath = STORE, arm: Arm = "curated", round: Round = None,
    split: Annotated[str, typer.Option(help="train, reference (D_0) or eval.")] = "train",
    shard: Shard = 0, of: Shards = 1, set: Set = None,
) -> None:  # fmt: skip
    """Sample images for the round's prompts, or for D_0."""
    from jobs.generate import generate as stage
    from jobs.train import trained_model

    if split not in ("train", "reference", "eval"):
        raise WinnowError(f"--split {split!r}: unknown; allowed are train, reference and eval")
    run = open_run(recipe, store, arm, round, set, shard, of)
    if split == "eval":
        stage(run.base() if run.round == 0 else run, "eval", trained_model(run))
    else:
        stage(run, split)  # type: ignore[arg-type]


@app.command()
def embed(
    recipe: RecipeName = RECIPE, store: StorePath = STORE, arm: Arm = "curated", round: Round = None,
    shard: Shard = 0, of: Shards = 1, set: Set = None,
) -> None:  # fmt: skip
    """Embed the round's samples, and D_0's, with the recipe's encoders."""
    from jobs.embed import embed as stage

    run = open_run(recipe, store, arm, round, set, shard, of)
    stage(run.base(), "reference")
    stage(run)


@app.command()
def score(
    recipe: RecipeName = RECIPE, store: StorePath = STORE, arm: Arm = "curated", round: Round = None,
    shard: Shard = 0, of: Shards = 1, set: Set = None,
) -> None:  # fmt: skip
    """Score the round's samples with the recipe's scorers."""
    from jobs.score import score as stage

    stage(open_run(recipe, store, arm, round, set, shard, of))


@app.command()
def distance(
    recipe: RecipeName = RECIPE, store: StorePath = STORE, arm: Arm = "curated", round: Round = None, set: Set = None
) -> None:
    """Measure how far the round's samples lie from D_0."""
    from jobs.distance import distance as stage

    run = open_run(recipe, store, arm, round, set)
    stage(run.base(), "reference")
    stage(run)


@app.command()
def select(
    recipe: RecipeName = RECIPE, store: StorePath = STORE, arm: Arm = "curated", round: Round = None, set: Set = None
) -> None:
    """Keep the preferred samples; every reject gets its reason."""
    from jobs.select import select as stage

    stage(open_run(recipe, store, arm, round, set))


@app.command()
def weigh(
    recipe: RecipeName = RECIPE, store: StorePath = STORE, arm: Arm = "curated", round: Round = None, set: Set = None
) -> None:
    """Weigh the kept samples by their distance to D_0."""
    from jobs.weigh import weigh as stage

    stage(open_run(recipe, store, arm, round, set))


@app.command()
def export(
    recipe: RecipeName = RECIPE, store: StorePath = STORE, arm: Arm = "curated", round: Round = None, set: Set = None
) -> None:
    """Write the selection as weighted training shards."""
    from jobs.export import export as stage
    from jobs.export import shards_of

    run = open_run(recipe, store, arm, round, set)
    stage(run)
    for path, _ in shards_of(run):
        print(path)


@app.command()
def train(
    recipe: RecipeName = RECIPE, store: StorePath = STORE, arm: Arm = "curated", round: Round = None, set: Set = None
) -> None:
    """Fine-tune the round's start model on its shards."""
    from jobs.train import train as stage
    from jobs.train import trained_model

    run = open_run(recipe, store, arm, round, set)
    stage(run)
    print(trained_model(run))


@app.command()
def evaluate(
    recipe: RecipeName = RECIPE, store: StorePath = STORE, arm: Arm = "curated", round: Round = None,
    shard: Shard = 0, of: Shards = 1, set: Set = None,
) -> None:  # fmt: skip
    """Measure the round's model on held-out prompts."""
    from jobs.evaluate import evaluate as stage

    run = open_run(recipe, store, arm, round, set, shard, of)
    if not (stage(run.at(0)) and stage(run)):
        return
    for row in run.query(
        "SELECT metric, value, ci_low, ci_high FROM evaluations WHERE arm = $arm AND round = $round ORDER BY metric",
        arm=arm, round=run.round,
    ).to_pylist():  # fmt: skip
        print(f"{row['metric']:<28} {row['value']:>10.4f}  [{row['ci_low']:.4f}, {row['ci_high']:.4f}]")


@app.command()
def guard(
    recipe: RecipeName = RECIPE, store: StorePath = STORE, arm: Arm = "curated", round: Round = None, set: Set = None
) -> None:
    """Give the verdict over the round's model: promote, stop or rollback."""
    from jobs.guard import guard as stage

    run = open_run(recipe, store, arm, round, set)
    stage(run.at(0))
    verdict = stage(run)
    print(f"{verdict.verdict}: {verdict.reason}")


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
def plan(
    recipe: RecipeName = RECIPE,
    arm: Arm = "curated",
    prompts: Annotated[int | None, typer.Option(min=2, help="Prompts, where the recipe keeps all that pass.")] = None,
    tflops: Annotated[float | None, typer.Option(min=0, help="The TFLOP/s that your GPU sustains.")] = None,
    set: Set = None,
) -> None:
    """Say what a run will take: images, disk and GPU-hours, by arithmetic from the recipe and the model's shape."""
    from jobs import recipe as recipes
    from jobs.plan import TFLOPS
    from jobs.plan import plan as count

    loaded = recipes.override(recipes.load(recipe), [_setting(text) for text in set or []]).for_arm(arm)
    for line in count(loaded, prompts, tflops or TFLOPS).lines():
        print(line)


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
    print(run_demo(store, "embedded-fast" if fast else "embedded", [_setting(text) for text in sets]))


@app.command()
def report(recipe: RecipeName = RECIPE, store: StorePath = STORE) -> None:
    """Write report.html and summary.json into the store."""
    from jobs.report import report as write
    from storage.layout import check

    print(write(check(store)))


@app.command()
def sql(
    query: Annotated[str, typer.Argument(help='Such as "SELECT * FROM rounds".')],
    store: StorePath = STORE,
    format: Annotated[str, typer.Option(help="table, json, csv or parquet.")] = "table",
    snapshot: Annotated[int | None, typer.Option(help="Read the store as it was at this snapshot.")] = None,
) -> None:
    """Ask the store: prompts, samples, scores, embeddings, distances, selections, evaluations, rounds, curated."""
    from jobs.show import show
    from storage.query import user_query

    show(user_query(store, query, snapshot), format)


@app.command()
def explain(
    sample: Annotated[int, typer.Argument(help="A sample_id.")], recipe: RecipeName = RECIPE, store: StorePath = STORE
) -> None:
    """Tell why a sample was kept or dropped."""
    from jobs.explain import explain as tell
    from storage.layout import check

    print(tell(open_run(recipe, check(store), _first_arm(recipe), 1, None), sample))


@app.command()
def replay(
    sample: Annotated[int, typer.Argument(help="A sample_id.")],
    store: StorePath = STORE,
    tolerance: Annotated[float, typer.Option(min=0, help="The mean difference (of 255) that counts as equal.")] = 1.0,
    to: Annotated[Path | None, typer.Option(help="Where to write both images, side by side, as PNG.")] = None,
) -> None:
    """Make a sample's image again from its row, and compare."""
    from jobs.replay import replay as again

    found = again(store, sample)
    if to:
        found.side_by_side().save(to, "PNG")
    print(f"largest difference {found.largest} of 255, mean {found.mean:.4f}")
    if found.mean > tolerance:
        raise WinnowError(
            f"sample {sample}: comes out otherwise, by {found.mean:.3g} of 255 in the mean; the device, the precision "
            "or a library may differ from when it was made"
        )


@app.command()
def verify(store: StorePath = STORE) -> None:
    """Check every sealed part against its SHA-256 and schema."""
    from storage.verify import verify as check

    found = check(store)
    for note in found.notes:
        print(f"note: {note}")
    for problem in found.problems:
        print(f"wrong: {problem}")
    print(f"{found.parts} parts, {found.bytes} bytes: {'sound' if found.ok else f'{len(found.problems)} wrong'}")
    if not found.ok:
        raise typer.Exit(2)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A pickled checkpoint, such as ImageReward.pt.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The .safetensors file to write.")],
) -> None:
    """Turn a scorer's pickled checkpoint into safetensors, without running what is in it."""
    from jobs.convert import convert as write

    print(f"{target}: {write(source, target)} tensors")


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
def study(
    store: StorePath = Path("runs/study"),
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="How many rounds.")] = 8,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("results"),
    set: Set = None,
) -> None:
    """Confirm the demo's effect over several seeds and more rounds, into results/."""
    from jobs.study import study as run_study

    print(run_study(store, seeds, rounds, out, [_setting(text) for text in set or []]))


def _check_rooms() -> None:
    """The rooms have common names: stop where one of them comes from somewhere else."""
    import curate
    import schemas
    import storage

    home = Path(__file__).resolve().parent.parent
    for room in (curate, schemas, storage):
        place = Path(room.__file__ or "?").resolve().parent
        if place.parent != home:
            raise WinnowError(
                f"import {room.__name__}: found {place}, not Winnow's own in {home}; run winnow in its own "
                "environment ('make setup'), without other packages of that name on PYTHONPATH"
            )


def main() -> None:
    """Entry point: one clear line and exit status 2 for what the user can mend, a traceback with --debug."""
    debug = "--debug" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--debug"]
    try:
        _check_rooms()
        app()
    except WinnowError as error:
        if debug:
            traceback.print_exc()
        print(f"winnow: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if debug:
            traceback.print_exc()
        what = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"winnow: unexpected {what}; everything committed is safe, --debug shows where", file=sys.stderr)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == 130:  # what typer makes of Ctrl-C
            print("winnow: stopped; run the same command again to go on from here", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
