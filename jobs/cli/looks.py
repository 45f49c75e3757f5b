"""Verbs that look at a store, or at single files, and change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.cli.app import STORE, StorePath, app
from schemas.errors import WinnowError


@app.command()
def report(store: StorePath = STORE) -> None:
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
    """Ask the store: prompts, samples, refinements, scores, embeddings, distances, selections, evaluations, rounds,
    curated."""
    from jobs.show import show
    from storage.query import user_query

    show(user_query(store, query, snapshot), format)


@app.command()
def explain(sample: Annotated[int, typer.Argument(help="A sample_id.")], store: StorePath = STORE) -> None:
    """Tell why a sample was kept or dropped."""
    from jobs.explain import explain as tell
    from storage.layout import check

    print(tell(check(store), sample))


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
        to.parent.mkdir(parents=True, exist_ok=True)
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
    from jobs.progress import bar
    from storage.verify import verify as check

    with bar("verify", 1) as advance:
        done = 0.0

        def progress(parts: int, total: int) -> None:
            nonlocal done
            advance(parts / total - done)
            done = parts / total

        found = check(store, progress)
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
def diff(
    before: Annotated[str, typer.Argument(help="A round, such as 1, or arm:round.")],
    after: Annotated[str, typer.Argument(help="Another one.")],
    store: StorePath = STORE,
) -> None:
    """Tell what changed from one round to another: recipe, kept samples, scores, drift, verdict."""
    from jobs.diff import diff as tell
    from storage.layout import check

    print("\n".join(tell(check(store), before, after)))
