"""The command line: ``winnow <verb>``. A verb is a stage, or a way to play rounds or to look at what they made."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

# Each registers its verbs, in the order in which help lists them.
from jobs.cli import runs, stages, looks  # isort: skip
from jobs.cli.app import app
from schemas.errors import WinnowError

__all__ = ["app", "looks", "main", "runs", "stages"]


def _check_rooms() -> None:
    """The rooms have common names: stop where one of them comes from somewhere else."""
    import curate
    import schemas
    import storage

    home = Path(__file__).resolve().parents[2]
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
        # torch's need not be loaded to look
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            reason = (str(error) or "no more to be had").splitlines()[0][:120]
            cure = "lower generate.batch, embed.batch, score.batch or train.micro_batch, or set train.checkpointing"
            print(f"winnow: out of memory ({reason}); {cure}; everything committed is safe", file=sys.stderr)
            sys.exit(2)
        what = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"winnow: unexpected {what}; everything committed is safe, --debug shows where", file=sys.stderr)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == 130:  # what typer makes of Ctrl-C
            print("winnow: stopped; run the same command again to go on from here", file=sys.stderr)
        raise
