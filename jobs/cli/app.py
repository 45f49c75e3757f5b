"""What all verbs share: the application, the options that mean the same everywhere, and the Run that they work on."""

from __future__ import annotations

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
    loaded = recipes.override(recipes.load(recipe), [setting(text) for text in sets or []])
    if loaded.threads:
        import torch

        torch.set_num_threads(loaded.threads)
    settings = loaded.for_arm(arm)  # before a store is made: a name that is wrong leaves none behind
    run = Run(create(store), settings, 1, arm, shard, of)
    if round is None:
        done = run.query("SELECT coalesce(max(round), 0) AS n FROM rounds WHERE arm = $arm", arm=arm)
        round = done["n"][0].as_py() + 1
    return run.at(round)


def setting(text: str) -> tuple[list[str], Any]:
    """"generate.steps=20" as the path of keys and the value."""
    from jobs.recipe import parsed

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise WinnowError(f"--set {text!r}: not 'key=value'; write for example generate.steps=20")
    try:
        return key.split("."), parsed(value)
    except yaml.YAMLError as error:
        raise WinnowError(f"--set {text!r}: the value is not YAML ({error}); quote it") from error


def first_arm(recipe: str) -> str:
    """The arm that a recipe lists first."""
    from jobs import recipe as recipes

    return next(iter(recipes.load(recipe).arms))
