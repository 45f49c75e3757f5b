"""Verbs that look at a store, or at single files, and change nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from jobs.cli.app import STORE, StorePath, app
from schemas.errors import WinnowError

SampleId = Annotated[int, typer.Argument(min=0, max=2**63 - 1, help="A sample_id.")]


@app.command()
def report(store: StorePath = STORE) -> None:
    """Write report.html and summary.json into the store."""
    from jobs.report import report as write
    from storage.layout import check

    print(write(check(store)))


@app.command()
def sql(
    query: Annotated[str | None, typer.Argument(help='Such as "SELECT * FROM rounds"; without: at a prompt.')] = None,
    store: StorePath = STORE,
    file: Annotated[Path | None, typer.Option(help="A file of SQL instead; - for standard input.")] = None,
    format: Annotated[str, typer.Option(help="table, json, csv or parquet.")] = "table",
    snapshot: Annotated[int | None, typer.Option(help="Read the store as it was at this snapshot.")] = None,
    views: Annotated[bool, typer.Option("--views", help="Print the views as SQL, for DuckDB without Winnow.")] = False,
) -> None:
    """Ask the store: prompts, samples, refinements, scores, embeddings, distances, selections, evaluations, rounds,
    curated."""
    from jobs.show import show
    from storage.query import script, user_query

    if sum([query is not None, file is not None, views]) > 1:
        raise WinnowError("sql: give a query, --file or --views, not several of them")
    if views:
        print(script(store, snapshot), end="")
    elif file or query is not None or not sys.stdin.isatty():
        show(user_query(store, query if query is not None else _text(file), snapshot), format)
    else:
        from jobs.shell import shell

        shell(store, format, snapshot)


def _text(file: Path | None) -> str:
    """SQL from a file, or from standard input."""
    if file is None or str(file) == "-":
        return sys.stdin.read()
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WinnowError(f"--file {file}: cannot be read ({error}); give a text file in UTF-8") from error


@app.command()
def explain(
    sample: SampleId,
    store: StorePath = STORE,
    format: Annotated[str, typer.Option(help="text or json.")] = "text",
) -> None:
    """Tell why a sample was kept or dropped."""
    from jobs.explain import explain as tell
    from jobs.explain import words
    from storage.layout import check

    if format not in ("text", "json"):
        raise WinnowError(f"--format {format!r}: unknown; allowed are text and json")
    story = tell(check(store), sample)
    print(words(story) if format == "text" else json.dumps(story, ensure_ascii=False, indent=1))


Space = Annotated[str | None, typer.Option("--space", help="The encoder to compare in; by default the only one.")]
Count = Annotated[int, typer.Option("-k", min=1, help="How many.")]
Format = Annotated[str, typer.Option(help="table, json, csv or parquet.")]


@app.command()
def similar(
    sample: SampleId,
    store: StorePath = STORE, space: Space = None, k: Count = 10, format: Format = "table",
) -> None:  # fmt: skip
    """Find the samples that are most like one."""
    from jobs.show import show
    from jobs.similar import similar as find

    show(find(store, sample, space, k), format)


@app.command()
def search(
    text: Annotated[str, typer.Argument(help='Such as "a red seven".')],
    store: StorePath = STORE, space: Space = None, k: Count = 10, format: Format = "table",
) -> None:  # fmt: skip
    """Find the samples that are most like a text, in a space of images and texts."""
    from jobs.show import show
    from jobs.similar import search as find

    show(find(store, text, space, k), format)


@app.command()
def replay(
    sample: SampleId,
    store: StorePath = STORE,
    tolerance: Annotated[float, typer.Option(min=0, help="The mean difference (of 255) that counts as equal.")] = 1.0,
    to: Annotated[Path | None, typer.Option(help="Where to write both images, side by side, as PNG.")] = None,
) -> None:
    """Make a sample's image again from its row, and compare."""
    from jobs.replay import replay as again

    if to and to.is_dir():
        raise WinnowError(f"--to {to}: is a folder; give a file in it, such as both.png")
    found = again(store, sample)
    if to:
        try:
            to.parent.mkdir(parents=True, exist_ok=True)
            found.side_by_side().save(to, "PNG")
        except OSError as error:
            raise WinnowError(f"--to {to}: cannot be written ({error}); give another file") from error
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
