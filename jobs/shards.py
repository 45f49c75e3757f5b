"""Shards: training rows as Hugging Face Parquet or WebDataset tars, a fixed number of rows a file."""

from __future__ import annotations

import itertools
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from schemas.errors import WinnowError
from schemas.tables import IMAGE, with_features
from storage.commit import IMAGE_ROWS, parquet_options
from storage.sink import Sink

GROUP_BYTES = 64 * 2**20  # image bytes in a row group, at most about
PAGE_ROWS = 4  # rows between two looks whether a Parquet page is full: pages of a few images stay in the cache
LINES = 65_536  # keys turned into text at once
SCORE = "score:"  # before a scorer's name, the column of its scores

Write = Callable[[pa.Table], None]


@dataclass(frozen=True)
class File:
    """One finished file of an export."""

    name: str
    rows: int
    bytes: int
    sha256: str


def schema_of(scorers: Sequence[str]) -> pa.Schema:
    """Columns of the Parquet shards: what trainers read, a column a scorer (null: not scored), and the lineage.

    ``image`` and ``text`` come first: that is where diffusers' training scripts look for them.
    """
    fields = {"image": IMAGE, "text": pa.string(), "weight": pa.float64()}
    fields |= {SCORE + name: pa.float64() for name in scorers}
    fields |= {"key": pa.string(), "sample_id": pa.int64(), "prompt_id": pa.int64(), "parent_id": pa.int64(),
               "round": pa.int32(), "arm": pa.string(), "model": pa.string(), "seed": pa.int64()}  # fmt: skip
    return with_features(pa.schema(fields))


def groups(tables: Iterable[pa.Table], rows: int) -> Iterator[tuple[int, pa.Table]]:
    """The same rows as (shard, table): of at most IMAGE_ROWS rows and about GROUP_BYTES, none across two shards.

    Where a table ends hangs on the rows alone, not on how they came. Images are not copied.
    """
    shard = filled = count = size = 0
    held: list[pa.Table] = []
    for table in tables:
        start = 0
        for i, length in enumerate(pc.binary_length(pc.struct_field(table["image"], 0)).to_pylist()):
            if count and (count == IMAGE_ROWS or size + length > GROUP_BYTES or filled + count == rows):
                yield shard, pa.concat_tables([*held, table.slice(start, i - start)])
                filled += count
                if filled == rows:
                    shard, filled = shard + 1, 0
                held, start, count, size = [], i, 0, 0
            count, size = count + 1, size + length
        held.append(table.slice(start))
    if count:
        yield shard, pa.concat_tables(held)


def told_in_tars(schema: pa.Schema, first: pa.Table) -> pa.Schema:
    """Without the scorers that the ``first`` row has no score of: `datasets` reads the type of a tar's keys off its
    first rows, and null is none that later numbers fit."""
    for name in first.column_names:
        if name.startswith(SCORE) and not first[name][0].is_valid:
            schema = schema.remove(schema.get_field_index(name))
    return schema


@contextmanager
def parquet(sink: Sink, schema: pa.Schema) -> Iterator[Write]:
    """Write tables as row groups: images as they are, in plain pages; the rest compressed."""
    options = parquet_options(schema)
    with pq.ParquetWriter(sink, schema, write_batch_size=PAGE_ROWS, **options) as writer:
        # In one piece, because pages end where a piece does: the bytes must not tell how the rows came.
        yield lambda table: writer.write_table(table.combine_chunks(), row_group_size=IMAGE_ROWS)


@contextmanager
def webdataset(sink: Sink, schema: pa.Schema) -> Iterator[Write]:
    """Write rows as KEY.png (.jpg, .webp), KEY.txt and KEY.json of a tar (ustar, times and owners 0)."""
    yield partial(_members, sink)
    sink.write(bytes(2 * tarfile.BLOCKSIZE))


def _members(sink: Sink, table: pa.Table) -> None:
    rest = table.drop_columns(["image", "text", "key"])
    keys, texts = table["key"].to_pylist(), table["text"].to_pylist()
    for key, data, text, row in zip(keys, _files(table), texts, rest.to_pylist(), strict=True):
        scores = {name.removeprefix(SCORE): row.pop(name) for name in rest.column_names if name.startswith(SCORE)}
        # Each key in each row and of one type, as `datasets` wants it: no parent is 0, which is no sample's id. Scores
        # may be null where those of the first row are not, see `told_in_tars`.
        row |= {"parent_id": row["parent_id"] or 0, "scores": scores}
        told = ("txt", text.encode()), ("json", json.dumps(row, ensure_ascii=False).encode())
        sink.write(_header(f"{key}.{_kind(data, key)}", len(data)))
        sink.write(data)
        small = ((_header(f"{key}.{name}", len(content)), content, _padding(content)) for name, content in told)
        sink.write(b"".join([_padding(data), *itertools.chain.from_iterable(small)]))


def kinds(table: pa.Table) -> set[str]:
    """The suffixes of a table's images."""
    return {_kind(data, key) for data, key in zip(_files(table), table["key"].to_pylist(), strict=True)}


def _files(table: pa.Table) -> Iterator[memoryview]:
    """The image files of a table, where they lie: a scalar of Arrow's would be a copy."""
    for chunk in pc.struct_field(table["image"], 0).chunks:
        _, offsets, data = chunk.buffers()
        ends = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1].tolist()
        yield from (memoryview(data)[start:end] for start, end in itertools.pairwise(ends))


_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
_SUM = int(_HEADER[148:154], 8) - sum(_HEADER[124:135])  # of all but name and size


def _header(name: str, size: int) -> bytes:
    """A tar member's header, as `tarfile` makes it in ten times the time."""
    said, digits = name.encode(), b"%011o" % size
    check = b"%06o" % (_SUM + sum(said) + sum(digits))
    return said.ljust(100, b"\0") + _HEADER[100:124] + digits + _HEADER[135:148] + check + _HEADER[154:]


def _padding(content: bytes | memoryview) -> bytes:
    return bytes(-len(content) % tarfile.BLOCKSIZE)


def _kind(image: memoryview, key: str) -> str:
    """The suffix that WebDataset readers know a file's format by."""
    head = bytes(image[:12])
    for suffix, known in (("png", head[:8] == b"\x89PNG\r\n\x1a\n"), ("jpg", head[:3] == b"\xff\xd8\xff"),
                          ("webp", head[:4] == b"RIFF" and head[8:] == b"WEBP")):  # fmt: skip
        if known:
            return suffix
    raise WinnowError(
        f"sample {key}: its image file starts with {head!r}; webdataset takes PNG, JPEG and WebP; set export.encode to "
        "one of them, or leave webdataset out of export.formats"
    )


#: By format: what writes it into a file, and that file's suffix.
FORMATS: dict[str, tuple[Callable[[Sink, pa.Schema], AbstractContextManager[Write]], str]] = {
    "parquet": (parquet, "parquet"),
    "webdataset": (webdataset, "tar"),
}


def write(folder: Path, format: str, schema: pa.Schema, tables: Iterable[pa.Table], rows: int) -> list[File]:
    """Files of ``rows`` rows each in ``folder``, flushed to disk: while one is, the next is made."""
    kind, suffix = FORMATS[format]
    sinks: list[tuple[Sink, int]] = []
    for number, some in itertools.groupby(groups(tables, rows), key=itemgetter(0)):
        count = 0
        with Sink(folder / f"train-{number:05d}.{suffix}") as sink:
            with kind(sink, schema) as put:
                for _, table in some:
                    put(table)
                    count += table.num_rows
            sink.finish()
        sinks.append((sink, count))
        if number:
            sinks[-2][0].result()
    return [File(sink.path.name, count, sink.bytes, sink.result()) for sink, count in sinks]


def write_keys(folder: Path, keys: np.ndarray) -> list[File]:
    """``keys`` (int64) in a text file, one a line."""
    with Sink(folder / "keys-00000.txt") as sink:
        for start in range(0, len(keys), LINES):
            sink.write("".join(f"{key}\n" for key in keys[start : start + LINES].tolist()).encode())
        sink.finish()
    return [File(sink.path.name, len(keys), sink.bytes, sink.result())]
