"""Verify: is everything that was sealed still there, bit by bit?"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemas.errors import WinnowError
from storage.commit import Part, find
from storage.content import content_of, sha256_of
from storage.layout import check
from storage.query import arrow
from storage.snapshot import load, numbers
from storage.views import of_another_layout


@dataclass(frozen=True)
class Report:
    """What verify found. Problems need a cure; notes (unsealed parts, leftovers) are harmless."""

    problems: tuple[str, ...]
    notes: tuple[str, ...]
    parts: int
    bytes: int

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(root: str | Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Report:
    """Read every part of every snapshot, and the shards and models that the newest lists, and compare them with what
    was sealed.

    `progress(done, total)` is called after each part. Reads the whole store: about the disk's speed.
    """
    home = check(root)
    problems: list[str] = []
    sealed: dict[tuple[str, str], tuple[Part, int]] = {}  # (path, sha256) → part, first snapshot with it
    found = numbers(home)
    for number in sorted(set(range(1, found[-1] + 1)) - set(found) if found else ()):
        problems.append(f"snapshots/{number:06d}.json: missing; restore it from a copy")
    for number in found:
        try:
            snapshot = load(home, number)
        except WinnowError as error:
            problems.append(str(error))
            continue
        for part in snapshot.parts:
            sealed.setdefault((part.path, part.sha256), (part, number))
    for done, (part, number) in enumerate(sealed.values(), start=1):
        wrong = _wrong(home, part)
        if wrong:
            problems.append(
                f"{part.path}: {wrong} (sealed in snapshot {number}); restore it from a copy, or move it "
                "away and run its stage again"
            )
        progress(done, len(sealed))
    changed, gone = _models(home)
    problems += [*_shards(home), *changed]
    notes = [*gone, *_notes(home, {path for path, _ in sealed})]
    return Report(tuple(problems), tuple(notes), len(sealed), sum(part.bytes for part, _ in sealed.values()))


def _wrong(root: Path, sealed: Part) -> str:
    """What is wrong with a part, or nothing."""
    if of_another_layout(sealed):
        return "has other columns than this Winnow's table"
    try:
        part = find(root, sealed.path)
    except WinnowError as error:
        return str(error).removeprefix(f"{sealed.path}: ").split(";")[0]
    if part is None:
        return "missing"
    for what in ("rows", "fingerprint", "sha256"):
        came, should = getattr(part, what), getattr(sealed, what)
        if came != should:
            return f"{what} is {came}, should be {should}"
    return ""


def _sealed(root: Path, sql: str) -> list[dict[str, Any]]:
    try:
        return arrow(root, sql).to_pylist()
    except WinnowError:  # a part that cannot be read was named already
        return []


def _shards(root: Path) -> list[str]:
    """Training shards that are not as their sealed manifest lists them."""
    problems = []
    for row in _sealed(root, "SELECT path, sha256 FROM shards ORDER BY path"):
        file, cure = root / row["path"], "remove its folder and run 'winnow export' again"
        if not file.is_file():
            problems.append(f"{row['path']}: missing; {cure}")
        elif (came := sha256_of(file)) != row["sha256"]:
            problems.append(f"{row['path']}: sha256 is {came}, should be {row['sha256']}; {cure}")
    return problems


def _models(root: Path) -> tuple[list[str], list[str]]:
    """Trained models that were changed, and those that are gone as a whole, which a store can do without."""
    revisions: dict[str, list[str]] = {}
    for row in _sealed(root, "SELECT model, revision FROM models ORDER BY ALL"):
        revisions.setdefault(row["model"], []).append(row["revision"])
    changed, gone = [], []
    for model, should in revisions.items():
        if not (root / model).exists():
            gone.append(f"{model}: not here; what was made with it is, and 'winnow train' makes it again")
        elif (came := content_of(root / model)) not in should:
            changed.append(
                f"{model}: revision is {came}, should be {' or '.join(should)}; restore it from a copy, or remove it "
                "and run 'winnow train' again"
            )
    return changed, gone


def _folders(root: Path) -> list[Path]:
    """Folders of shards and models that are listed nowhere; none, where what lists them cannot be read."""
    try:
        listed = {str(Path(row["path"]).parent) for row in arrow(root, "SELECT path FROM shards").to_pylist()}
        listed |= {row["model"] for row in arrow(root, "SELECT model FROM models").to_pylist()}
    except WinnowError:  # which is named already
        return []
    found = [path for kind in ("shards", "models") for path in sorted((root / kind).glob("*")) if path.is_dir()]
    return [path for path in found if path.relative_to(root).as_posix() not in listed]


def _notes(root: Path, sealed: set[str]) -> list[str]:
    notes = []
    files = [path for path in sorted((root / "tables").rglob("*")) if path.is_file()]
    for path in [*files, *_folders(root)]:
        relative = path.relative_to(root).as_posix()
        if relative not in sealed:
            notes.append(
                f"{relative}: not sealed; a stage is still running, or was interrupted and goes on with the same "
                "settings alone; safe to remove when nothing is running"
            )
    for path in sorted((root / "staging").glob("*")):
        notes.append(f"staging/{path.name}: left over; safe to remove when nothing is running")
    return notes
