"""Where samples stand in their parts, and those rows again in that order, one row group in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import WinnowError
from storage.snapshot import Snapshot
from storage.views import literal, no_glob

AGAIN = 100  # rows in a table that repeats some


def parts_of(snapshot: Snapshot) -> list[str]:
    """Paths of the parts of `samples`, in order; a place counts them from 0."""
    return sorted(part.path for part in snapshot.parts if part.table == "samples")


def places(root: Path, paths: Sequence[str]) -> str:
    """SQL of a relation of every stored sample: sample_id, part (in `paths`) and row (in that file), from 0."""
    files = ", ".join(literal(no_glob(root / path)) for path in paths)
    return (
        f"SELECT sample_id, file_index::INTEGER AS part, file_row_number::INTEGER AS row "
        f"FROM read_parquet([{files}], hive_partitioning = false)"
    )


def rows_at(root: Path, paths: Sequence[str], placed: pa.Table, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The rows of `placed` (part, row, sample_id; ascending by part and row, a row may come again), in its order.

    Each table holds wanted rows of one row group; images stay where they were read. Raises WinnowError where a part is
    missing, cannot be read, or has another sample in that place.
    """
    part, row, ids = (placed[name].to_numpy() for name in ("part", "row", "sample_id"))
    if (np.diff(part) < 0).any() or ((np.diff(row) < 0) & (np.diff(part) == 0)).any():
        raise ValueError("rows_at: rows must come in stored order")
    columns = ["sample_id", *(name for name in columns if name != "sample_id")]
    for first, last in _runs(part):
        path = paths[part[first]]
        yield from _rows_of(root, path, row[first:last], ids[first:last], columns)


def _runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and one past the last place of each run of equal values."""
    starts = np.flatnonzero(np.diff(values, prepend=values[:1] - 1))
    return zip(starts.tolist(), [*starts[1:].tolist(), len(values)], strict=True)


def _rows_of(root: Path, path: str, row: np.ndarray, ids: np.ndarray, columns: list[str]) -> Iterator[pa.Table]:
    try:
        # Mapped: the images are copied once, from the page cache into the table.
        with pq.ParquetFile(root / path, memory_map=True) as file:
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            ends = np.cumsum(sizes)
            group = np.searchsorted(ends, row, side="right")
            for first, last in _runs(group):
                number = int(group[first])
                wanted, again = np.unique(row[first:last] - (ends[number] - sizes[number]), return_inverse=True)
                data = file.read_row_group(number, columns=columns, use_threads=False)
                if len(wanted) < data.num_rows:  # a copy of few, not a slice that keeps all of them in memory
                    data = data.take(wanted)
                if not np.array_equal(data["sample_id"].to_numpy()[again], ids[first:last]):
                    raise pa.ArrowInvalid("it holds other samples than its snapshot says")
                if len(again) == len(wanted):
                    yield data
                    continue
                for start in range(0, len(again), AGAIN):
                    yield pa.concat_tables([data.slice(i, 1) for i in again[start : start + AGAIN].tolist()])
    except FileNotFoundError as error:
        raise WinnowError(f"{path}: sealed, but missing; restore it from a copy, or run its stage again") from error
    except (pa.ArrowException, OSError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise WinnowError(f"{path}: not readable ({reason}); 'winnow verify' names the cure") from error
