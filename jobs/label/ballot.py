"""What voters are asked: sheets of candidates to keep or drop, or pairs of images of one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from jobs.run import BASE
from jobs.summary import main_arm, opened, summarise
from jobs.votes import KEEP, QUESTIONS
from schemas.errors import WinnowError
from schemas.ids import sample_id

SHEET = 24  # images on a sheet, at most about: a prompt is never cut in two


@dataclass(frozen=True)
class Task:
    """Images that are shown together: ``groups`` of sample ids, each with its prompt. Of a pair, that is one group of
    two, in no order."""

    groups: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def ids(self) -> list[int]:
        return [number for _, numbers in self.groups for number in numbers]


@dataclass(frozen=True)
class Ballot:
    """All that is asked: ``kind`` "picks" or "pairs", the tasks, and the ``questions`` of each."""

    kind: str
    title: str
    tasks: tuple[Task, ...]
    questions: tuple[str, ...]

    def order(self, voter: str) -> list[Task]:
        """The tasks as a voter meets them. Pairs come in an order of the voter's own, so that tiredness does not fall
        on the same ones for everybody."""
        if self.kind == "picks":
            return list(self.tasks)
        return sorted(self.tasks, key=lambda task: sample_id(["order", voter, *sorted(task.ids)]))


def sides(pair: Sequence[int], voter: str) -> tuple[int, int]:
    """Which image of a pair stands left and which right for a voter: at random, and the same each time."""
    one, two = sorted(pair)
    return (one, two) if sample_id(["side", voter, one, two]) % 2 else (two, one)


def picks(store: Path, arm: str | None, round: int | None) -> Ballot:
    """The candidates of a round (by default the newest of the arm that the guard judges), some prompts a sheet."""
    with opened(store) as source:
        arm = arm or main_arm(summarise(source)) or "curated"
        found = source.rows(
            "SELECT sample_id, prompt_id, prompt FROM samples WHERE split = 'train' AND arm = $arm AND round = "
            "coalesce($round, (SELECT max(round) FROM samples WHERE split = 'train' AND arm = $arm)) "
            "ORDER BY prompt_id, sample_id",
            arm=arm, round=round,
        )  # fmt: skip
    if not found:
        where = f"arm {arm!r}" if round is None else f"round {round} of arm {arm!r}"
        raise WinnowError(f"samples: {where} has no candidates; run 'winnow generate' first")
    groups: dict[int, tuple[str, list[int]]] = {}
    for row in found:
        groups.setdefault(row["prompt_id"], (row["prompt"], []))[1].append(row["sample_id"])
    sheets: list[list[tuple[str, tuple[int, ...]]]] = []
    for prompt, numbers in groups.values():
        if not sheets or sum(len(some) for _, some in sheets[-1]) + len(numbers) > SHEET:
            sheets.append([])
        sheets[-1].append((prompt, tuple(numbers)))
    return Ballot("picks", f"candidates of {arm}", tuple(Task(tuple(sheet)) for sheet in sheets), (KEEP,))


def pairs(store: Path, contestants: Sequence[str], limit: int) -> Ballot:
    """At most ``limit`` pairs of held-out images of one prompt and seed, by two contestants each: models as "base" or
    "arm:round", by default the base, the round that the guard keeps and the last of each other arm."""
    with opened(store) as source:
        models = list(dict.fromkeys(_model(name) for name in contestants)) or _usual(summarise(source))
        found: list[dict[str, Any]] = []
        for one, two in combinations(models, 2):
            found += source.rows(
                "SELECT one.prompt, one.sample_id AS one, two.sample_id AS two FROM samples AS one "
                "JOIN samples AS two USING (split, prompt_id, seed) WHERE split = 'eval' AND one.arm = $a AND "
                "one.round = $r AND two.arm = $b AND two.round = $s",
                a=one[0], r=one[1], b=two[0], s=two[1],
            )  # fmt: skip
    if not found:
        names = ", ".join(arm if arm == BASE else f"{arm}:{number}" for arm, number in models) or "none"
        raise WinnowError(
            f"label: no two of the contestants ({names}) have held-out images of one prompt and seed; run 'winnow "
            "evaluate' first, or give --contestants such as base,curated:1"
        )
    # By a hash, so that every voter is asked of the same pairs, and no contestant or prompt comes first.
    found.sort(key=lambda row: sample_id(["pair", row["one"], row["two"]]))
    tasks = tuple(Task(((row["prompt"], (row["one"], row["two"])),)) for row in found[:limit])
    return Ballot("pairs", "pairs of held-out images", tasks, QUESTIONS)


def _model(name: str) -> tuple[str, int]:
    arm, _, number = name.strip().partition(":")
    if arm == BASE and number in ("", "0"):
        return BASE, 0
    if not arm or not number.isdecimal():
        raise WinnowError(f"--contestants {name!r}: unknown; write base, or arm:round such as curated:1")
    return arm, int(number)


def _usual(summary: dict[str, Any]) -> list[tuple[str, int]]:
    arms = summary["arms"].items()
    last = [(name, (arm["kept_round"] if arm["judged"] else None) or arm["last_round"]) for name, arm in arms]
    return [(BASE, 0), *((name, number) for name, number in last if number)]
