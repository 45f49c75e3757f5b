"""The booth: the votes of all voters on one ballot, and what each of them is asked next."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs import votes
from jobs.label.ballot import Ballot, Task, sides
from jobs.votes import CHOICES, KEEP
from schemas.errors import WinnowError
from storage.places import parts_of, places, rows_at
from storage.query import arrow
from storage.snapshot import latest

Row = dict[str, Any]
Key = tuple[str, frozenset[int]]  # a question, and the images that it is asked of

HELD = 512  # image files that are kept in memory


class Booth:
    """What stands is read once from the store; from then on each vote goes into the store first and in here second."""

    def __init__(self, store: Path, ballot: Ballot) -> None:
        self.store, self.ballot = store, ballot
        self.lock = threading.Lock()
        self._paths = parts_of(latest(store))
        self._task = {number: task for task in ballot.tasks for number in task.ids}
        ours = "SELECT unnest($ids) AS sample_id"
        self._places = arrow(
            store, f"SELECT * FROM ({places(store, self._paths)}) SEMI JOIN ({ours}) USING (sample_id)",
            {"ids": sorted(self._task)},
        )  # fmt: skip
        self._images: OrderedDict[int, bytes] = OrderedDict()
        self._pairs = {frozenset(task.ids) for task in ballot.tasks}
        self._cast: dict[str, list[Row]] = {}  # by voter, in order; what was taken back is gone
        self._unsealed = 0
        votes.gather(store)
        for row in votes.standing(store):
            if self._asked(row["question"], row["sample_id"], row["other_id"]):
                self._cast.setdefault(row["voter"], []).append(row)

    def _asked(self, question: str, sample: int, other: int | None) -> bool:
        if question == KEEP:
            return self.ballot.kind == "picks" and other is None and sample in self._task
        return question in self.ballot.questions and other is not None and frozenset((sample, other)) in self._pairs

    def _standing(self, voter: str) -> dict[Key, Row]:
        """By question and images, the voter's last vote."""
        with self.lock:
            return {_key(row): row for row in self._cast.get(voter, ())}

    def image(self, number: int) -> bytes:
        """An image's file; WinnowError where the ballot does not show it."""
        if number not in self._task:
            raise WinnowError(f"sample {number}: is not on this ballot")
        with self.lock:
            if number not in self._images:
                self._read(self._task[number])
            self._images.move_to_end(number)
            return self._images[number]

    def _read(self, task: Task) -> None:
        """The images of a whole task at once: they mostly stand in one row group."""
        mine = self._places.filter(pc.is_in(self._places["sample_id"], pa.array(task.ids, pa.int64())))
        for rows in rows_at(self.store, self._paths, mine.sort_by([("part", "ascending"), ("row", "ascending")]),
                            ["image"]):  # fmt: skip
            files = zip(rows["sample_id"].to_pylist(), rows["image"].to_pylist(), strict=True)
            self._images |= {number: file["bytes"] or b"" for number, file in files}
        while len(self._images) > max(HELD, len(task.ids)):
            self._images.popitem(last=False)

    def cast(self, voter: str, question: str, sample: int, other: int | None, choice: str, seconds: float) -> None:
        """Commit a vote; WinnowError where the ballot does not ask this, or not on these sides."""
        if choice not in CHOICES.get(question, ()) or not self._asked(question, sample, other):
            raise WinnowError(f"vote: {choice!r} on {question!r} of {sample} and {other} is not on this ballot")
        if other is not None and sides((sample, other), voter) != (sample, other):
            raise WinnowError(f"vote: {sample} does not stand left of {other} for {voter}; reload the page")
        with self.lock:
            row = votes.cast(self.store, voter, question, sample, other, choice, seconds)
            self._cast.setdefault(voter, []).append(row)
            self._unsealed += 1

    def undo(self, voter: str) -> bool:
        """Take back the voter's last vote on this ballot, if there is one."""
        with self.lock:
            if not (mine := self._cast.get(voter)):
                return False
            row = mine[-1]
            asked = voter, row["question"], row["sample_id"], row["other_id"]
            votes.cast(self.store, *asked, votes.RETRACT, retracts=row["vote_id"])
            mine.pop()
            self._unsealed += 1
            return True

    def seal(self) -> bool:
        """Seal what was cast since the last time; returns whether there was anything."""
        if not (waiting := self._unsealed):
            return False
        votes.gather(self.store)
        with self.lock:
            self._unsealed -= waiting
        return True

    def view(self, voter: str, at: int | None = None) -> dict[str, Any]:
        """What the page shows a voter: sheet ``at``, or the first task that is not finished."""
        mine = self._standing(voter)
        tasks = self.ballot.order(voter)
        if self.ballot.kind == "picks":
            return self._sheet(tasks, mine, at)
        done = len(mine)
        shown: dict[str, Any] = {"kind": "pairs", "title": self.ballot.title, "done": done,
                                 "total": len(tasks) * len(self.ballot.questions)}  # fmt: skip
        open_ = ((t, q) for t in tasks for q in self.ballot.questions if (q, frozenset(t.ids)) not in mine)
        for task, question in open_:
            left, right = sides(task.ids, voter)
            return shown | {"prompt": task.groups[0][0], "question": question, "left": str(left), "right": str(right)}
        return shown

    def _sheet(self, tasks: list[Task], mine: dict[Key, Row], at: int | None) -> dict[str, Any]:
        chosen = {row["sample_id"]: row["choice"] for row in mine.values()}
        if at is None:
            undecided = (i for i, task in enumerate(tasks) if not set(task.ids) <= chosen.keys())
            at = next(undecided, len(tasks) - 1)
        at = min(max(at, 0), len(tasks) - 1)
        # As text: JavaScript's numbers hold no 63 bits.
        groups = [
            {"prompt": prompt, "images": [{"id": str(n), "choice": chosen.get(n)} for n in numbers]}
            for prompt, numbers in tasks[at].groups
        ]
        kept = sum(choice == "keep" for choice in chosen.values())
        return {"kind": "picks", "title": self.ballot.title, "done": len(chosen), "total": len(self._task),
                "kept": kept, "at": at, "sheets": len(tasks), "groups": groups}  # fmt: skip


def _key(row: Row) -> Key:
    return row["question"], frozenset(n for n in (row["sample_id"], row["other_id"]) if n is not None)
