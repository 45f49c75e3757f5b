"""Commit: a part, a folder or a file comes into the store entirely or not at all; the first writer wins."""

import errno
import hashlib
import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import WinnowError
from schemas.tables import IMAGE, fingerprint
from storage.conform import conform
from storage.content import sha256_of
from storage.durable import publish, staged, storage_errors, sync, sync_folders, sync_tree

GROUP_BYTES = 64 * 2**20  # uncompressed bytes in a row group, at most about
GROUP_ROWS = 122_880  # DuckDB's own row group
IMAGE_ROWS = 100  # rows in a row group with images: what a reader must hold to show one


@dataclass(frozen=True)
class Part:
    """One committed Parquet file. `path` is relative to the store, with slashes; `bytes` is its size."""

    table: str
    path: str
    rows: int
    bytes: int
    sha256: str
    fingerprint: str


def find(root: str | Path, path: str, sealed: Mapping[str, Part] | None = None) -> Part | None:
    """The part at `path` if it is committed, else None. Reads the whole file for its SHA-256.

    With `sealed` (Snapshot.by_path()) a part that is listed there is taken at its word if its size is right.
    Raises WinnowError where the file is not readable Parquet.
    """
    final = Path(root).resolve() / path
    if not final.exists():
        return None
    known = (sealed or {}).get(path)
    if known and final.stat().st_size == known.bytes:
        return known
    try:
        sha256 = sha256_of(final)
        with pq.ParquetFile(final) as parquet:
            rows, schema = parquet.metadata.num_rows, parquet.schema_arrow
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        cure = "move the file out of the store and run again"
        raise WinnowError(f"{path}: not readable ({reason}); {cure}") from error
    size = final.stat().st_size
    return Part(path.split("/")[1], path, rows, size, sha256, fingerprint(schema))


def commit(root: str | Path, table: str, path: str, data: pa.Table, sealed: Part | None = None) -> Part:
    """Write `data` as the part at `path` (see `part_path`); if the part is there already, return that one.

    `sealed`: what was sealed under this path and is lost; data that gives other bytes is refused then.

    Equal data gives equal bytes. Raises WinnowError where the data breaks a promise of its table (see
    `storage.conform`) or the disk is full; then nothing is left behind.
    """
    home = Path(root).resolve()
    if not (path.startswith(f"tables/{table}/") and path.endswith(".parquet")) or ".." in path.split("/"):
        raise WinnowError(f"{path}: not a place for a part of {table}; make the path with part_path()")
    data = conform(table, data)
    with storage_errors(home, path), staged(home, path) as draft:
        with _HashingWriter(io.FileIO(draft, "xb")) as file:
            _write(data, file)
            size = file.tell()
        sha256 = file.sha256.hexdigest()
        if sealed and sealed.sha256 != sha256:
            raise WinnowError(
                f"{path}: was sealed and is lost, and comes out otherwise now (another device, library or clock); "
                "restore it from a copy, or take another STORE="
            )
        if publish(home, draft, path):
            return Part(table, path, data.num_rows, size, sha256, fingerprint(data.schema))
    first = find(home, path)
    assert first is not None, path
    return first


class _HashingWriter(io.BufferedWriter):
    """A file that hashes what passes. Buffered, because a raw write may stop half-way without an error."""

    def __init__(self, raw: io.FileIO) -> None:
        super().__init__(raw)
        self.sha256 = hashlib.sha256()

    def write(self, data: Any, /) -> int:
        self.sha256.update(data)
        return super().write(data)


def _leaves(schema: pa.Schema) -> dict[str, pa.DataType]:
    """Parquet's name of every stored column: image.bytes, image.path, vector.list.element, …"""
    leaves = {}
    for field in schema:
        if pa.types.is_struct(field.type):
            leaves.update({f"{field.name}.{child.name}": child.type for child in field.type})
        elif pa.types.is_fixed_size_list(field.type):
            leaves[f"{field.name}.list.element"] = field.type
        else:
            leaves[field.name] = field.type
    return leaves


def parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """How the columns of a schema are stored, as ParquetWriter takes it."""
    leaves = _leaves(schema)
    # Images are compressed already, and uncompressed pages let the Hub store only what changed.
    plain = {name for name, kind in leaves.items() if kind == pa.binary()}
    return {
        "compression": {name: "none" if name in plain else "zstd" for name in leaves},
        "use_dictionary": [name for name, kind in leaves.items() if kind == pa.string()],
        "write_statistics": [name for name in leaves if name not in plain],
    }


def _write(data: pa.Table, file: Any) -> None:
    has_images = IMAGE in data.schema.types
    row_bytes = max(1, data.nbytes // max(1, data.num_rows))
    group = max(1, min(IMAGE_ROWS if has_images else GROUP_ROWS, GROUP_BYTES // row_bytes))
    with pq.ParquetWriter(file, data.schema, **parquet_options(data.schema)) as writer:
        for start in range(0, data.num_rows, group):
            # Combining chunks makes the bytes independent of how the caller built the table; a group at a
            # time, because Arrow's 32-bit offsets end at 2 GB of image bytes in one chunk.
            writer.write_table(data.slice(start, group).combine_chunks(), row_group_size=group)


def commit_folder(
    root: str | Path, relative: str, write: Callable[[Path], object], synced: bool = False
) -> Path:
    """Let `write(folder)` fill a fresh folder and give it its final name; if that is taken, keep the first.

    For what is more than one file: a trained model, a folder of shards. Returns the final path. `synced`: `write`
    flushes its files itself, and makes no folders.
    """
    home = Path(root).resolve()
    final = home / relative
    if final.exists():
        return final
    with staged(home, relative) as draft:
        with storage_errors(home, relative):
            draft.mkdir()
        with storage_errors(home, relative, full_only=True):
            write(draft)
        if not any(draft.iterdir()):
            raise WinnowError(f"{relative}: nothing was written into the folder; it was not committed")
        with storage_errors(home, relative):
            if synced:
                sync(draft)
            else:
                sync_tree(draft)
            final.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.rename(draft, final)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            sync_folders(home, final)
    return final


def write_file(root: str | Path, relative: str, data: bytes) -> Path:
    """Replace the file at `relative` at once: for reports and summaries, which can be made anew."""
    home = Path(root).resolve()
    final = home / relative
    with storage_errors(home, relative), staged(home, relative) as draft:
        draft.write_bytes(data)
        sync(draft)
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(draft, final)
        sync_folders(home, final)
    return final
