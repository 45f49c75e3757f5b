"""Serve a ballot on this machine until it is stopped, and tell what came out."""

from __future__ import annotations

import secrets
import socket
from contextlib import suppress
from pathlib import Path

from jobs import votes
from jobs.label.ballot import Ballot
from jobs.label.booth import Booth
from schemas.errors import WinnowError
from storage.query import arrow


def listen(port: int) -> socket.socket:
    """A socket on 127.0.0.1; ``port`` 0 takes a free one. WinnowError where it is taken."""
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was just left is free
        found.bind(("127.0.0.1", port))
    except OSError as error:
        found.close()
        raise WinnowError(f"--port {port}: cannot be opened ({error.strerror}); give another, or 0 for any") from error
    return found


def serve(store: Path, ballot: Ballot, port: int = 0) -> None:
    """Print the address of the page and serve it until Ctrl-C; then seal the votes and compute the strengths."""
    import uvicorn

    from jobs.label.page import page

    with listen(port) as taken:
        port, token = taken.getsockname()[1], secrets.token_urlsafe(24)
        app = page(Booth(store, ballot), token, port)
        print(f"{ballot.title}: http://127.0.0.1:{port}/?token={token}", flush=True)
        print("every vote is saved at once; Ctrl-C ends", flush=True)
        # The log would show the token, which is part of the first address.
        config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[taken])
    for line in results(store):
        print(line)


def results(store: Path) -> list[str]:
    """The votes so far, win rates and Bradley–Terry strengths, as lines."""
    strong = votes.strengths(store).to_pylist()
    lines = [
        f"{row['question']}: {row['votes']} votes of {row['voters']} voters"
        for row in arrow(
            store,
            "SELECT question, count(*) AS votes, count(DISTINCT voter) AS voters FROM opinions GROUP BY question "
            "ORDER BY question",
        ).to_pylist()
    ]
    for row in arrow(store, "SELECT * FROM win_rates WHERE contestant < opponent ORDER BY ALL").to_pylist():
        lines.append(
            f"{row['question']}: {row['contestant']} is preferred over {row['opponent']} in {100 * row['rate']:.1f} % "
            f"[{100 * row['ci_low']:.1f}, {100 * row['ci_high']:.1f}] of {row['n']} votes"
        )
    for row in strong:
        lines.append(
            f"{row['question']}: strength of {row['contestant']} {row['strength']:+.2f} "
            f"[{row['ci_low']:+.2f}, {row['ci_high']:+.2f}]"
        )
    return lines or ["no votes yet"]
