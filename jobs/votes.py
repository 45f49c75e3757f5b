"""Votes: what people chose, each a committed row at once, and what follows from all of them.

A vote is a part of its own, on disk before it is acknowledged. Votes are sealed some at a time, since each seal lists
the whole store again; what a killed session had not sealed yet, the next reader of votes seals.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from curate.bradley_terry import bradley_terry
from jobs.run import Run, ids
from schemas.errors import WinnowError
from schemas.ids import digest, sample_id
from schemas.tables import TABLES
from storage.commit import Part, commit, find
from storage.layout import part_path
from storage.query import arrow
from storage.snapshot import latest, seal

KEEP, QUESTIONS = "keep", ("appeal", "faithfulness")  # asked of one image; of two
CHOICES = {KEEP: ("keep", "drop")} | dict.fromkeys(QUESTIONS, ("left", "right", "skip"))
RETRACT = "retract"


def cast(
    store: Path, voter: str, question: str, sample: int, other: int | None, choice: str, seconds: float | None = None,
    retracts: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Commit one vote; when this returns, it is on disk. ``sample`` stood left and ``other`` right, where two were
    asked of; ``retracts``: the vote_id that this row takes back. Returns the row of the table ``votes``."""
    now = datetime.now(UTC)
    row = {
        "voter": voter, "question": question, "sample_id": sample, "other_id": other, "choice": choice,
        "retracts": retracts, "seconds": seconds, "voted_at": now.isoformat(timespec="microseconds"),
    }  # fmt: skip
    row = {"vote_id": sample_id(["vote", row])} | row
    path = part_path("votes", {"voter": voter}, now.strftime("%Y%m%dT%H%M%S.%f"), digest(row))
    commit(store, "votes", path, pa.Table.from_pylist([row], schema=TABLES["votes"].schema))
    return row


def gather(store: Path) -> int:
    """Seal every vote that is committed and not sealed; returns how many there were."""
    snapshot = latest(store)
    sealed = snapshot.by_path()
    there = (path.relative_to(store).as_posix() for path in (store / "tables" / "votes").rglob("*.parquet"))
    parts = [part for path in sorted(there) if path not in sealed and (part := find(store, path)) is not None]
    if parts:
        seal(store, "label", parts, snapshot.recipe)
    return len(parts)


def standing(store: Path) -> list[dict[str, Any]]:
    """The sealed votes that nobody took back, in the order in which they were cast. Of those that one voter gave over
    the same images the last one counts; taking it back brings the one before into force again."""
    return arrow(
        store,
        "SELECT votes.* FROM votes ANTI JOIN (SELECT retracts FROM votes) AS gone ON votes.vote_id = gone.retracts "
        f"WHERE choice <> '{RETRACT}' ORDER BY voted_at, vote_id",
    ).to_pylist()


def picked(run: Run) -> np.ndarray:
    """The candidates of the round that more voters kept than dropped, int64; WinnowError where there are none."""
    gather(run.store)
    found = run.query(
        "SELECT sample_id FROM opinions JOIN samples USING (sample_id) WHERE question = $keep AND round = $round "
        "AND arm = $arm AND split = 'train' GROUP BY sample_id HAVING count_if(choice = 'keep') > "
        "count_if(choice = 'drop') ORDER BY sample_id",
        keep=KEEP, round=run.round, arm=run.arm,
    )  # fmt: skip
    if not found.num_rows:
        raise WinnowError(
            f"select.picks: nobody has kept a candidate of round {run.round} of {run.arm!r}; run 'winnow label --arm "
            f"{run.arm} --round {run.round}' first"
        )
    return ids(found)


def strengths(store: Path) -> pa.Table:
    """Bradley–Terry strengths of all contestants by all votes so far, committed and sealed as the newest rows of the
    table ``strengths``; those rows."""
    gather(store)
    [basis] = arrow(store, "SELECT count(*) AS n FROM votes")["n"].to_pylist()
    won = arrow(store, "SELECT * FROM win_rates ORDER BY ALL").to_pylist()
    rows = [row | {"basis": basis} for question in QUESTIONS for row in _rated(question, won)]
    if rows:
        table = pa.Table.from_pylist(rows, schema=TABLES["strengths"].schema)
        path = part_path("strengths", {}, f"{basis:06d}", digest(["strengths", rows]))
        seal(store, "label", [_kept(store, path, table)], latest(store).recipe)
    return arrow(store, "SELECT * FROM strengths ORDER BY question, strength DESC")


def _kept(store: Path, path: str, table: pa.Table) -> Part:
    return find(store, path) or commit(store, "strengths", path, table)


def _rated(question: str, won: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    mine = [row for row in won if row["question"] == question]
    names = sorted({row["contestant"] for row in mine})
    if not names:
        return []
    wins = np.zeros((len(names), len(names)))
    for row in mine:
        wins[names.index(row["contestant"]), names.index(row["opponent"])] = row["wins"]
    found = bradley_terry(wins)
    return [
        {"question": question, "contestant": name, "strength": value, "ci_low": value - 1.96 * error,
         "ci_high": value + 1.96 * error, "n": int(count)}
        for name, value, error, count in zip(names, found.value.tolist(), found.error.tolist(),
                                             (wins + wins.T).sum(axis=1), strict=True)
    ]  # fmt: skip
