"""The training set of a round: which rows, how often, and each with its image, text, scores and lineage."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curate import resample
from jobs import images, samples
from jobs.progress import say
from jobs.run import Run, ids
from jobs.shards import SCORE
from schemas.errors import WinnowError, about
from schemas.tables import IMAGE
from storage.places import places, rows_at

STORED = ["sample_id", "prompt_id", "parent_id", "round", "arm", "model", "seed", "prompt", "image"]


def rows_of(run: Run, paths: Sequence[str]) -> list[pa.Table]:
    """Every row by where it stands in the parts ``paths``: the selected ones, then those of D_0, each in stored order.

    Columns: part, row, sample_id, weight, and one a scorer. Only numbers, and no join in the database: its hash tables
    would take ten times as much.
    """
    settings = run.recipe.export
    asked = {"arm": run.arm, "first": 1 if settings.accumulate else run.round, "last": run.round}
    kept = "FROM selections WHERE kept AND selection = $arm AND round BETWEEN $first AND $last"
    rounds = run.query(f"SELECT round, bool_and(weight IS NOT NULL) AS weighed {kept} GROUP BY round", **asked)
    weighed = {run.round: False} | dict(zip(rounds["round"].to_pylist(), rounds["weighed"].to_pylist(), strict=True))
    for number in sorted(weighed):
        if not weighed[number]:
            raise WinnowError(f"round {number} of {run.arm!r} is not selected and weighed; run 'winnow weigh' first")
    scorers = run.query("SELECT DISTINCT scorer FROM scores ORDER BY scorer")["scorer"].to_pylist()
    found = run.query(f"SELECT sample_id, weight {kept}", **asked)
    chosen = _placed(run, paths, ids(found), found["weight"].to_numpy(), scorers)
    _check(run, chosen)
    unused = [name for name in chosen.column_names if chosen[name].null_count == chosen.num_rows]
    extra = round(settings.reference_share * chosen.num_rows)
    if not extra:
        return [chosen.drop_columns(unused)]
    base = run.base()
    d0 = ids(
        run.query(
            "SELECT sample_id FROM samples WHERE round = $round AND arm = $arm AND split = 'reference' "
            "ORDER BY prompt_id, sample_id",
            round=base.round, arm=base.arm,
        )
    )  # fmt: skip
    if not len(d0):
        raise WinnowError("samples: D_0 is empty; run 'winnow generate --split reference' first")
    if extra > len(d0):
        say(f"export: reference_share asks for {extra} samples of D_0, which has {len(d0)}; all of them are taken")
    some = d0[np.random.default_rng(run.seed("reference", run.round)).permutation(len(d0))[:extra]]
    rest = _placed(run, paths, some, np.ones(len(some)), scorers)
    return [chosen.drop_columns(unused), rest.drop_columns(unused)]


def at_random(run: Run, paths: Sequence[str], count: int) -> pa.Table:
    """``count`` of the round's candidates (all, if there are fewer), whatever they are worth, where they stand in the
    parts ``paths``; each of weight 1."""
    rows = samples.of(run, "train")
    numbers = ids(rows.filter(rows["parent_id"].is_null()))  # none that a refinement was chosen for
    some = np.random.default_rng(run.seed("unselected", run.round)).permutation(numbers)[:count]
    return _placed(run, paths, some, np.ones(len(some)), [])


def _placed(run: Run, paths: Sequence[str], numbers: np.ndarray, weights: np.ndarray, scorers: list[str]) -> pa.Table:
    """The rows of ``rows_of`` for these samples."""
    order = np.argsort(numbers)
    numbers = numbers[order]

    def fill(sql: str, columns: dict[str, np.ndarray], **asked: Any) -> None:
        for batch in run.stream(sql, **asked):
            came = batch["sample_id"].to_numpy()
            at = np.minimum(np.searchsorted(numbers, came), len(numbers) - 1)
            ours = numbers[at] == came
            for name, column in columns.items():
                column[at[ours]] = batch[name].to_numpy()[ours]

    place = {name: np.full(len(numbers), -1, np.int32) for name in ("part", "row")}
    fill(places(run.store, paths), place)
    if (place["part"] < 0).any():
        lost = numbers[np.argmin(place["part"])]
        raise WinnowError(f"sample {lost}: selected, but not in samples; run 'winnow verify', which names the cure")
    columns = {**place, "sample_id": numbers, "weight": weights[order]}
    for name in scorers:
        values = np.full(len(numbers), np.nan)
        fill("SELECT sample_id, value FROM scores WHERE scorer = $name", {"value": values}, name=name)
        columns[SCORE + name] = pa.array(values, mask=np.isnan(values))
    return pa.table(columns).take(np.lexsort((place["row"], place["part"])))


def _check(run: Run, chosen: pa.Table) -> None:
    weights = chosen["weight"].to_numpy()
    wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(wrong):
        raise WinnowError(
            f"sample {chosen['sample_id'][wrong[0]]}: its weight is {weights[wrong[0]]}, allowed are numbers of 0 or "
            "more; find the part with 'winnow verify' and restore it, or weigh in another STORE="
        )
    if not weights.any():
        raise WinnowError(f"round {run.round} of {run.arm!r}: every weight is 0; raise weigh.beta or weigh.sigma2")


def digest_of(rows: Sequence[pa.Table]) -> str:
    """Hash of the rows' order, ids and weights, over their buffers; a score that is added later is no part of it."""
    found = hashlib.blake2b(digest_size=16)
    for table in rows:
        found.update(table.num_rows.to_bytes(8))
        for column in table.select(["sample_id", "weight"]).columns:
            found.update(np.ascontiguousarray(column.to_numpy()))
    return found.hexdigest()


def repeated(run: Run, rows: Sequence[pa.Table]) -> list[pa.Table]:
    """Each row as often as its weight says, with weight 1."""
    weights = np.concatenate([table["weight"].to_numpy() for table in rows])
    counts = resample.repeats(weights, run.recipe.export.total or len(weights), run.seed("repeats", run.arm, run.round))
    made, first = [], 0
    for table in rows:
        often = counts[first : first + table.num_rows]
        first += table.num_rows
        again = table.take(np.repeat(np.arange(len(often)), often))
        made.append(again.set_column(again.column_names.index("weight"), "weight", pa.array(np.ones(len(again)))))
    return made


def drawn(run: Run, rows: Sequence[pa.Table]) -> np.ndarray:
    """Sample ids drawn by weight."""
    weights = np.concatenate([table["weight"].to_numpy() for table in rows])
    n = run.recipe.export.total or len(weights)
    return np.concatenate([ids(table) for table in rows])[
        resample.draws(weights, n, run.seed("sampling", run.arm, run.round))
    ]


def tables(run: Run, paths: Sequence[str], rows: Sequence[pa.Table], schema: pa.Schema) -> Iterator[pa.Table]:
    """The rows with all that ``schema`` names, some at a time, in their order. A row's key is its sample_id, and
    sample_id-1, -2, … where it comes again."""
    with ThreadPoolExecutor(run.recipe.threads or os.cpu_count()) as pool:
        for placed in rows:
            nth, first = _ordinals(ids(placed)), 0
            for stored in rows_at(run.store, paths, placed, STORED):
                last = first + stored.num_rows
                numbers = stored["sample_id"].to_pylist()
                keys = [f"{n}-{k}" if k else f"{n}" for n, k in zip(numbers, nth[first:last].tolist(), strict=True)]
                stored = stored.rename_columns({"prompt": "text"}).append_column("key", pa.array(keys))
                for name in placed.column_names[3:]:
                    stored = stored.append_column(name, placed[name].slice(first, last - first))
                yield _encoded(run, pool, stored).select(schema.names).cast(schema)
                first = last


def _ordinals(numbers: np.ndarray) -> np.ndarray:
    """How many equal ones stand right before each, of ids [N] whose equals stand together."""
    starts = np.flatnonzero(np.diff(numbers, prepend=~numbers[:1]))
    return np.arange(len(numbers)) - np.repeat(starts, np.diff(starts, append=len(numbers)))


def _encoded(run: Run, pool: ThreadPoolExecutor, rows: pa.Table) -> pa.Table:
    """The rows with their images checked to be there, and in the format that export.encode asks for."""
    files = pc.struct_field(rows["image"], 0)
    empty = pc.equal(pc.fill_null(pc.binary_length(files), 0), 0)
    if pc.any(empty).as_py():
        number = rows.filter(empty)["sample_id"][0]
        raise WinnowError(f"sample {number}: its row holds no image file; run 'winnow verify', which names the cure")
    format = run.recipe.export.encode
    if format is None:
        return rows

    def encode(number: int, file: bytes) -> dict[str, Any]:
        pixels = np.asarray(images.decode(file, f"sample {number}"))
        with about(f"sample {number}"):
            return {"bytes": images.encode(pixels, format), "path": f"{number}.{format}"}

    made = list(pool.map(encode, rows["sample_id"].to_pylist(), files.to_pylist()))
    return rows.set_column(rows.column_names.index("image"), "image", pa.array(made, IMAGE))
