"""A stage: fixed work units over rows, each one committed part; done when all are there, and then sealed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from jobs.executors import local
from jobs.progress import say
from jobs.run import Run, ids
from schemas.ids import digest
from schemas.tables import TABLES, fingerprint
from storage.commit import Part, commit, find
from storage.layout import part_path
from storage.snapshot import Spent, latest, refuse_second, seal

#: The rows that a stage adds, or what gives them and needs no model any more.
Made = pa.Table | Callable[[], pa.Table]
#: From rows to the rows that the stage adds.
Work = Callable[[pa.Table], Made]
#: The same for samples together with a second table that tells of them: (samples, notes).
Pair = tuple[pa.Table, pa.Table]
Both = Callable[[pa.Table], Pair | Callable[[], Pair]]


@dataclass(frozen=True)
class Unit:
    """Rows that are worked on together, and the part that they become. The membership is part of the content:
    another batch would move floats by 1e-6."""

    path: str
    rows: pa.Table


def units(table: str, folders: Mapping[str, Any], rows: pa.Table, size: int, spec: Any) -> list[Unit]:
    """Cut ``rows`` (with a ``sample_id`` column) into units of ``size`` and name each by all that decides it."""
    cut = []
    for start in range(0, rows.num_rows, size):
        some = rows.slice(start, size)
        full = digest([spec, fingerprint(TABLES[table].schema), ids(some).tolist()])
        cut.append(Unit(part_path(table, folders, f"{start // size:05d}", full), some))
    return cut


def complete(run: Run, stage: str, table: str, work_units: Sequence[Unit], start: Callable[[], Work]) -> bool:
    """Do this shard's missing units and seal the stage once every unit of every shard is committed.

    ``start`` loads the models and gives the work; it is not called where nothing is missing. Returns whether
    the stage is sealed.
    """
    began = time.perf_counter()
    newest = latest(run.store)
    refuse_second(run.store, newest, {unit.path for unit in work_units})
    sealed = newest.by_path()
    parts: dict[str, Part] = {}
    for unit in work_units:
        part = find(run.store, unit.path, sealed)
        if part is not None:
            parts[unit.path] = part
    mine = [u for i, u in enumerate(work_units) if i % run.n_shards == run.shard and u.path not in parts]

    def keep(unit: Unit, made: pa.Table) -> None:
        parts[unit.path] = commit(run.store, table, unit.path, made, sealed.get(unit.path))

    label = f"{stage} {run.arm} round {run.round}"
    local(label, mine, start, keep)
    missing = [unit.path for unit in work_units if unit.path not in parts]
    still = [path for path in missing if find(run.store, path) is None] if missing else []
    if still:
        say(f"{label}: {len(still)} of {len(work_units)} units are left to other shards; not sealed yet")
        return False
    for path in missing:
        part = find(run.store, path)
        assert part is not None, path
        parts[path] = part
    spent = Spent(stage, run.arm, run.round, round(time.perf_counter() - began, 3)) if mine else None
    # Looked at once more while it is sealed: another process may have begun with other settings at the same time.
    seal(run.store, stage, list(parts.values()), run.recipe.model_dump(mode="json"), spent, alone=True)
    return True


def complete_both(
    run: Run, stage: str, table: str, notes: Sequence[Unit], images: Sequence[Unit], start: Callable[[], Both]
) -> bool:
    """As ``complete``, for samples and a ``table`` that the same work makes: ``notes`` and ``images`` are units of the
    same rows. The notes are sealed first, so that no sample is ever seen without its own."""
    place = {int(ids(unit.rows)[0]): unit.path for unit in images}

    def noted() -> Work:
        work = start()

        def some_work(some: pa.Table) -> Made:
            made, path = work(some), place[int(ids(some)[0])]

            def finish() -> pa.Table:
                pictures, told = made() if callable(made) else made
                commit(run.store, "samples", path, pictures, latest(run.store).by_path().get(path))
                return told

            return finish if callable(made) else finish()

        return some_work

    def pictured() -> Work:
        work = start()

        def some_work(some: pa.Table) -> Made:
            made = work(some)
            return (lambda: made()[0]) if callable(made) else made[0]

        return some_work

    return complete(run, stage, table, notes, noted) and complete(run, stage, "samples", images, pictured)
