"""Questions to a language model, asked once: each answer is a row in the store, and what is there is not asked again.

A part is a unit of questions, committed as soon as its last answer is there, so that a killed run goes on where it
was. Answers differ between two times of asking, so unlike other parts these are known by what was asked, and not by
what comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.language.endpoint import Down, Reply
from jobs.progress import bar, say
from jobs.run import Run
from schemas.errors import WinnowError
from schemas.ids import digest, sample_id
from schemas.tables import TABLES
from storage.commit import Part, commit, find
from storage.layout import part_path
from storage.snapshot import latest, seal

UNIT = 64
SPARED = 0.1  # share of the questions that may stay without an answer: more are the server's fault, not theirs


class Model(Protocol):
    """``name`` for people, ``revision`` for all that decides the answers; a call gives (place, Reply) as they come."""

    name: str
    revision: str

    def __call__(self, questions: Sequence[str]) -> Iterator[tuple[int, Reply]]: ...


@dataclass(frozen=True)
class Task:
    """``question`` makes one of a text. ``read`` takes the reply apart into columns of the table ``answers``; a
    ValueError of it is what is wrong with the reply."""

    name: str
    question: Callable[[str], str]
    read: Callable[[str], dict[str, Any]]


def answers(run: Run, task: Task, model: Model, texts: Sequence[str]) -> list[dict[str, Any]]:
    """A row of the table ``answers`` for each text, in order; only what the store does not have is asked.

    WinnowError where the model is not to be reached, or too many get no answer; the answers up to there are kept and
    sealed. What may be answered another time is no row of the store, and asked again.
    """
    # The question that a fixed text becomes stands for the wording of all of them.
    revision = digest([model.revision, task.name, task.question("a cat")])
    schema = TABLES["answers"].schema
    folders = {"task": task.name, "by": revision}
    numbers = {sample_id([task.name, text]): text for text in texts}
    parts = _parts(run, folders)
    known = {row["text_id"] for part in parts for row in _rows(run, part)}
    todo = [number for number in numbers if number not in known]
    before = len(numbers) - len(todo)
    unanswered: dict[int, dict[str, Any]] = {}

    def keep(unit: list[int], replies: dict[int, Reply]) -> None:
        made = []
        for i, reply in sorted(replies.items()):
            row = {"text_id": unit[i], "task": task.name, "text": numbers[unit[i]], "model": model.name}
            row |= {"revision": revision} | _read(task, reply)
            if reply.passing:
                unanswered[unit[i]] = dict.fromkeys(schema.names) | row
            else:
                made.append(row)
        if not made:
            return
        path = part_path("answers", folders, f"{len(parts):05d}", digest([row["text_id"] for row in made]))
        parts.append(commit(run.store, "answers", path, pa.Table.from_pylist(made, schema=schema)))

    try:
        with bar(f"{task.name}: {model.name}", len(todo)) as advance:
            for start in range(0, len(todo), UNIT):
                unit, replies = todo[start : start + UNIT], {}
                try:
                    for i, reply in model([task.question(numbers[number]) for number in unit]):
                        replies[i] = reply
                        advance()
                finally:
                    if replies:
                        keep(unit, replies)
                        before += sum(not reply.passing for reply in replies.values())
    except Down as error:
        raise WinnowError(f"{error}; the {before} answers so far are kept, run again to go on from them") from None
    finally:
        if parts:
            seal(run.store, task.name, parts, run.recipe.model_dump(mode="json"))
    if unanswered:
        few, first = len(unanswered) <= SPARED * len(numbers), next(iter(unanswered.values()))
        line = (
            f"{task.name}: {len(unanswered)} of {len(numbers)} got no answer, such as {first['text'][:60]!r} "
            f"({first['problem']})"
        )
        if not few:
            raise WinnowError(
                f"{line}; raise prompts.judge.timeout or tries and run again: the {before} answers so far are kept"
            )
        say(line)
    rows = {row["text_id"]: row for part in parts for row in _rows(run, part)} | unanswered
    return [rows[sample_id([task.name, text])] for text in texts]


def _read(task: Task, reply: Reply) -> dict[str, Any]:
    """The columns of a reply: with a problem where it is no good."""
    if reply.text is None or reply.problem:
        return {"reply": reply.text, "problem": reply.problem}
    try:
        return {"reply": reply.text, "problem": None} | task.read(reply.text)
    except ValueError as error:
        return {"reply": reply.text, "problem": " ".join(str(error).split())}


def _parts(run: Run, folders: dict[str, str]) -> list[Part]:
    """The committed parts of a folder, sealed or not: what a killed run had paid for counts, under whatever name."""
    sealed = latest(run.store).by_path()
    folder = part_path("answers", folders, "x", "x").rpartition("/")[0]
    mine = [path for path in sealed if path.startswith(f"{folder}/")]
    lost = [path for path in mine if not (run.store / path).exists()]
    if lost:
        raise WinnowError(f"{lost[0]}: sealed, but missing; restore it from a copy")
    there = [path.relative_to(run.store).as_posix() for path in (run.store / folder).glob("*.parquet")]
    parts: list[Part] = []
    seen: set[int] = set()
    for path in [*sorted(mine), *sorted(set(there) - set(mine))]:
        part = find(run.store, path, sealed)
        assert part is not None, path
        asked = {row["text_id"] for row in _rows(run, part)}
        if seen.isdisjoint(asked):  # two runs at once may have asked the same; one answer stays
            parts.append(part)
            seen |= asked
    return parts


def _rows(run: Run, part: Part) -> list[dict[str, Any]]:
    return pq.read_table(run.store / part.path, partitioning=None).to_pylist()
