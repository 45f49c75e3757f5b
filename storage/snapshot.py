"""Snapshots: numbered, sealed lists of every live part. Whoever reads a store reads one of them."""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import duckdb

from schemas.errors import WinnowError
from schemas.tables import TABLES
from storage.commit import Part
from storage.conform import describe
from storage.durable import publish, staged, storage_errors, sync_folders
from storage.layout import check
from storage.views import identifier, scan

ROUND = re.compile(r"round-\d+")  # the folder that the parts of a round stand in


@dataclass(frozen=True)
class Spent:
    """Wall seconds that the process which finished a stage of a round worked at it. What other shards did, and what a
    process did that was killed, is in none."""

    stage: str
    arm: str
    round: int
    seconds: float


@dataclass(frozen=True)
class Snapshot:
    """Everything that was sealed up to here, shared by all who read it and not to be changed. `parts` are all live
    parts, not only those of this stage; `spent` is what all stages took."""

    number: int = 0
    stage: str = ""
    parts: tuple[Part, ...] = ()
    recipe: dict[str, Any] = field(default_factory=dict)
    created: str = ""  # UTC, ISO 8601
    spent: tuple[Spent, ...] = ()

    def by_path(self) -> dict[str, Part]:
        return {part.path: part for part in self.parts}

    def of_round(self, round: int) -> "Snapshot":
        """Without the parts that stand in the folder of another round."""
        folder = f"round-{round}"
        kept = (part for part in self.parts if not ROUND.fullmatch(at := part.path.split("/")[2]) or at == folder)
        return replace(self, parts=tuple(kept))


def _file(number: int) -> str:
    return f"snapshots/{number:06d}.json"


def numbers(root: str | Path) -> list[int]:
    """The numbers of the snapshots that exist, in order."""
    names = [path.stem for path in (Path(root) / "snapshots").glob("*.json")]
    return sorted(int(name) for name in names if name.isdigit())


def latest(root: str | Path) -> Snapshot:
    """The newest snapshot; the empty one with number 0 where nothing is sealed yet."""
    found = numbers(root)
    return load(root, found[-1]) if found else Snapshot()


def load(root: str | Path, number: int) -> Snapshot:
    """Snapshot `number`; WinnowError where it does not exist or its file was changed."""
    path = Path(root) / _file(number)
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        found = numbers(root)
        known = f"there are {found[0]} to {found[-1]}" if found else "nothing is sealed yet"
        raise WinnowError(f"snapshot {number}: not in {root}; {known}") from None
    return _read(path, text)


@lru_cache(maxsize=1)  # a stage asks for the newest with every query
def _read(path: Path, text: bytes) -> Snapshot:
    try:
        body = json.loads(text)
        seal_of_body = body.pop("sha256")
        if seal_of_body != _sha256(body):
            raise ValueError("its SHA-256 differs")
        parts = tuple(Part(**part) for part in body.pop("parts"))
        spent = tuple(Spent(**one) for one in body.pop("spent", ()))
        return Snapshot(parts=parts, spent=spent, **body)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise WinnowError(f"{path}: damaged ({error}); restore it, or read an older snapshot") from error


def sealed_under(root: str | Path, folder: str) -> dict[str, Any] | None:
    """The recipe of the stage that first sealed parts in this folder below `tables/`; None where none did."""
    for number in numbers(root):
        snapshot = load(root, number)
        if any(part.path.startswith(f"tables/{folder}/") for part in snapshot.parts):
            return snapshot.recipe
    return None


def _sha256(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def refuse_second(root: str | Path, snapshot: Snapshot, paths: Collection[str]) -> None:
    """Raise WinnowError where the snapshot has other parts in the folders of `paths`: a stage of a round is made once,
    and a second set beside the first would be read with it."""
    folders = {path.rpartition("/")[0] for path in paths}
    others = {part.path for part in snapshot.parts if part.path.rpartition("/")[0] in folders}.difference(paths)
    if others:
        raise WinnowError(
            f"{root}: {min(others)} is sealed already, made with other settings, models or inputs; go on with the "
            "recipe that it was begun with, or take another STORE= or --arm"
        )


def seal(
    root: str | Path, stage: str, parts: Sequence[Part], recipe: Mapping[str, Any], spent: Spent | None = None,
    alone: bool = False,
) -> Snapshot:  # fmt: skip
    """Add `parts` to the newest snapshot and write the result as the next one.

    Parts that are sealed already are passed over; if all are, the newest snapshot is returned as it is, so a
    rerun makes none. A stage that makes no parts, such as training, is sealed for what it `spent`. Raises
    WinnowError where a part is sealed with other content, or two parts hold one key; and, for parts that are to be
    `alone` in their folders, where another process has sealed others there meanwhile.
    `recipe` must be plain JSON.
    """
    home = check(root)
    while True:
        base = latest(home)
        new = _new_parts(base, parts)
        if not new and (parts or spent is None):
            return base
        if alone:
            refuse_second(home, base, {part.path for part in parts})
        _refuse_double_keys(home, base, new)
        number = base.number + 1
        merged = tuple(sorted([*base.parts, *new], key=lambda part: part.path))
        created = datetime.now(UTC).isoformat(timespec="seconds")
        took = (*base.spent, *([spent] if spent else []))
        snapshot = Snapshot(number, stage, merged, dict(recipe), created, took)
        body = asdict(snapshot)
        body |= {"parts": list(body["parts"]), "spent": list(body["spent"])}
        text = json.dumps({"sha256": _sha256(body), **body}, indent=1)
        with storage_errors(home, _file(number)), staged(home, _file(number)) as draft:
            for part in new:  # found by a rerun, a part may still stand in a folder that was never flushed
                sync_folders(home, home / part.path)
            draft.write_text(text)
            if publish(home, draft, _file(number)):
                return snapshot
        # Another process took the number: look at what it sealed, and merge again.


def told(root: str | Path, number: int, change: Callable[[str], str]) -> bytes:
    """The file of a snapshot with its text changed but for its parts, as it reads elsewhere: its SHA-256 is of that."""
    load(root, number)  # which says so if it is damaged
    body = json.loads((check(root) / _file(number)).read_text())
    body.pop("sha256")
    parts = body.pop("parts")
    body = json.loads(change(json.dumps(body, ensure_ascii=False))) | {"parts": parts}
    return json.dumps({"sha256": _sha256(body), **body}, indent=1).encode()


def _new_parts(base: Snapshot, parts: Sequence[Part]) -> list[Part]:
    known = base.by_path()
    new: dict[str, Part] = {}
    for part in parts:
        other = known.get(part.path) or new.get(part.path)
        if other is None:
            new[part.path] = part
        elif other.sha256 != part.sha256:
            raise WinnowError(
                f"{part.path}: sealed with SHA-256 {other.sha256[:12]}, came with {part.sha256[:12]}; "
                "run verify, and restore the file or name the new part by its own spec"
            )
    return list(new.values())


def _refuse_double_keys(root: Path, base: Snapshot, new: Sequence[Part]) -> None:
    by_table = sorted(new, key=lambda part: part.table)
    for name, group in groupby(by_table, key=lambda part: part.table):
        fresh = [part.path for part in group]
        for path in fresh:
            if not (root / path).exists():
                raise WinnowError(f"{path}: not in the store; commit the part before it is sealed")
        old = [part.path for part in base.parts if part.table == name]
        keys = ", ".join(identifier(column) for column in TABLES[name].key)
        # Only sealed rows whose key also stands in a new part matter: the hash table holds new keys only.
        rows = f"SELECT {keys}, filename FROM {scan(root, fresh, filename=True)}"
        if old:
            stored = f"SELECT {keys}, filename FROM {scan(root, old, filename=True)}"
            rows = f"{rows} UNION ALL SELECT * FROM ({stored}) SEMI JOIN ({rows}) USING ({keys})"
        twice = f"GROUP BY {keys} HAVING count(*) > 1 LIMIT 1"
        sql = f"SELECT {keys}, min(filename), max(filename) FROM ({rows}) {twice}"
        try:
            with duckdb.connect() as connection:
                double = connection.execute(sql).fetchone()
        except duckdb.Error as error:
            reason = str(error).splitlines()[0]
            raise WinnowError(
                f"{name}: a part cannot be read ({reason}); nothing was sealed, 'winnow verify' names it and the cure"
            ) from error
        if double:
            *key, one, two = double
            where = " and ".join(Path(path).relative_to(root).as_posix() for path in (one, two))
            raise WinnowError(
                f"{name}: two rows for {describe(dict(zip(TABLES[name].key, key, strict=True)))}, "
                f"in {where}; nothing was sealed, leave one of the parts out"
            )
