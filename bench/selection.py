"""A store with one selected and weighed round of made-up images, for exports of any size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jobs import recipe as recipes
from jobs.run import BASE, Run
from schemas.tables import TABLES
from storage.commit import Part, commit
from storage.layout import create, part_path
from storage.snapshot import seal

PNG = b"\x89PNG\r\n\x1a\n"


def random_file(size: int) -> Callable[[int], bytes]:
    """By number, ``size`` bytes that start like a PNG file and cannot be compressed."""
    return lambda number: PNG + np.random.default_rng(number).bytes(size - len(PNG))


def selection(
    folder: Path,
    rows: int,
    image: Callable[[int], bytes],
    *,
    export: dict[str, Any] | None = None,
    weight: Callable[[np.ndarray], np.ndarray] = lambda n: 1 / (1 + n % 4),
    keep: Callable[[np.ndarray], np.ndarray] = lambda n: n >= 0,
    scorers: tuple[str, ...] = ("one", "two"),
    arms: tuple[str, ...] = ("curated",),
    d0: int = 0,
    unit: int = 1000,
) -> Run:
    """Round 1 of arm "curated" over samples numbered from 1 (in the order they are stored), and ``d0`` samples of D_0
    numbered on; ``keep`` and ``weight`` take their numbers. Every fifth sample lacks the last scorer. Each of the
    ``arms`` selects the same."""
    store = create(folder / "store")
    numbers = np.arange(1, rows + 1)
    parts = [_samples(store, 1, "curated", "train", some, image) for some in _cut(numbers, unit)]
    parts += [_samples(store, 0, BASE, "reference", some, image) for some in _cut(rows + 1 + np.arange(d0), unit)]
    for name in scorers:
        for some in _cut(numbers if name != scorers[-1] else numbers[numbers % 5 > 0], 100 * unit):
            columns = {"sample_id": some, "scorer": name, "revision": "1", "value": some / 3 + len(name),
                       "truncated": False, "round": 1}  # fmt: skip
            parts.append(part(store, "scores", {"scorer": name}, columns))
    for arm in arms:
        for some in _cut(numbers, 100 * unit):
            same, kept = {"selection": arm, "round": 1}, keep(some)
            columns = {**same, "sample_id": some, "kept": kept, "rank": 1, "reason": "made up"}
            parts.append(part(store, "selections", {"selection": arm}, columns))
            columns = {**same, "sample_id": some[kept], "weight": weight(some[kept]).astype(float)}
            parts.append(part(store, "weights", {"selection": arm}, columns))
    recipe = recipes.override(recipes.load("refine-only"), [(["export", k], v) for k, v in (export or {}).items()])
    seal(store, "made up", parts, recipe.model_dump(mode="json"))
    return Run(store, recipe.for_arm("curated"))


def _cut(numbers: np.ndarray, unit: int) -> Iterator[np.ndarray]:
    return (numbers[start : start + unit] for start in range(0, len(numbers), unit))


def _samples(store: Path, round: int, arm: str, split: str, numbers: np.ndarray, image: Callable[[int], bytes]) -> Part:
    files = [{"bytes": image(i), "path": f"{i}.png"} for i in numbers.tolist()]
    columns = {
        "sample_id": numbers, "round": round, "arm": arm, "split": split, "prompt_id": numbers // 4,
        "prompt": [f"a scene, number {i} — « ünïcode »" for i in numbers.tolist()], "seed": numbers * 7,
        "model": "made-up", "width": 8, "height": 8, "attempt": 0, "refiner": None, "image": files,
        "parent_id": [i - 1 if i % 3 == 0 else None for i in numbers.tolist()],
    }  # fmt: skip
    return part(store, "samples", {"round": round, "arm": arm, "split": split}, columns)


def part(
    store: Path, table: str, folders: dict[str, str | int], columns: dict[str, Any], schema: pa.Schema | None = None
) -> Part:
    """A part of these columns; a single value stands for every row."""
    numbers, schema = columns["sample_id"], schema or TABLES[table].schema
    full = {name: value if isinstance(value, np.ndarray | list | pa.Array) else [value] * len(numbers)
            for name, value in columns.items()}  # fmt: skip
    data = pa.table({field.name: pa.array(full[field.name], field.type) for field in schema}, schema=schema)
    return commit(store, table, part_path(table, folders, f"{numbers[0]:09d}", "made"), data)
