"""One verb a stage of the round."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from jobs.cli.app import RECIPE, STORE, Arm, RecipeName, Round, Set, Shard, Shards, StorePath, app, first_arm, open_run
from schemas.errors import WinnowError


@app.command()
def prompts(
    recipe: RecipeName = RECIPE,
    store: StorePath = STORE,
    source: Annotated[str | None, typer.Option(help="A file or folder, hub:org/name, or 'embedded'.")] = None,
    set: Set = None,
) -> None:
    """Curate prompts from a text, TSV, CSV, JSONL or Parquet file, or a dataset of the Hub."""
    from jobs.prompts import prompts as stage

    sets = [*(set or []), *([f"prompts.source={json.dumps(source, ensure_ascii=False)}"] if source else [])]
    run = open_run(recipe, store, first_arm(recipe), 1, sets)
    stage(run)
    for row in run.query(
        "SELECT kept, split, count(*) AS n FROM prompts GROUP BY ALL ORDER BY kept DESC, split DESC"
    ).to_pylist():
        print(f"{row['n']:>7} prompts {'kept for ' + row['split'] if row['kept'] else 'dropped'}")


@app.command()
def generate(
    recipe: RecipeName = RECIPE, store: StorePath = STORE, arm: Arm = "curated", round: Round = None,
    split: Annotated[str, typer.Option(help="train, reference (D_0) or eval.")] = "train",
    shard: Shard = 0, of: Shards = 1, set: Set = None,
) -> None:  # fmt: skip
    """Sample images for the round's prompts, or for D_0."""
    from jobs.generate import generate as stage
    from jobs.rejection import SPENT, saved
    from jobs.train import trained_model

    if split not in ("train", "reference", "eval"):
        raise WinnowError(f"--split {split!r}: unknown; allowed are train, reference and eval")
    run = open_run(recipe, store, arm, round, set, shard, of)
    if split == "eval":
        stage(run.base() if run.round == 0 else run, "eval", trained_model(run))
    else:
        stage(run, split)  # type: ignore[arg-type]
    for row in run.query(SPENT).to_pylist():
        if split == "train" and (row["arm"], row["round"]) == (run.arm, run.round):
            print(saved(row))


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
def refine(
    recipe: RecipeName = RECIPE, store: StorePath = STORE, arm: Arm = "curated", round: Round = None,
    where: Annotated[str | None, typer.Option(help="Which candidates: an SQL condition (refine.where).")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="How many samples at most.")] = None,
    shard: Shard = 0, of: Shards = 1, set: Set = None,
) -> None:  # fmt: skip
    """Noise chosen samples again and denoise them, whole or in part; each attempt is a new sample with its parent."""
    from jobs.refine import refine as stage

    given = {key: value for key, value in (("where", where), ("limit", limit)) if value is not None}
    sets = [*(set or []), *(f"refine.{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items())]
    run = open_run(recipe, store, arm, round, sets, shard, of)
    stage(run)
    for row in run.query(
        "SELECT accepted, count(*) AS n, sum(evaluations) AS passes FROM refinements JOIN samples USING (sample_id) "
        "WHERE samples.round = $round AND arm = $arm GROUP BY accepted ORDER BY accepted DESC",
        round=run.round, arm=run.arm,
    ).to_pylist():  # fmt: skip
        what = "accepted" if row["accepted"] else "not accepted"
        print(f"{row['n']:>7} refined images {what}, {row['passes']} network evaluations")


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
def tournament(
    recipe: RecipeName = RECIPE, store: StorePath = STORE, arm: Arm = "curated", round: Round = None,
    policy: Annotated[list[str] | None, typer.Option(help="One of tournament.policies; by default all.")] = None,
    format: Annotated[str, typer.Option(help="table, json, csv or parquet.")] = "table", set: Set = None,
) -> None:  # fmt: skip
    """Compare policies over the round's candidates: overlap, diversity, effective sample size, drift, scores."""
    from jobs.show import show
    from jobs.tournament import tournament as compare

    found = compare(open_run(recipe, store, arm, round, set), tuple(policy or ()))
    if format != "table":
        show(found, format)
        return
    show(found.drop(["overlap"]))
    show(found.select(["policy", "overlap"]).flatten())


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

    for path in stage(open_run(recipe, store, arm, round, set)):
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
