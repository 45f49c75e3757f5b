"""The tables open in `datasets`, duckdb, polars and pandas with no code of ours."""

import io
from pathlib import Path

import datasets
import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from PIL import Image

from schemas.tables import TABLES, embedding_schema
from storage.commit import commit
from storage.layout import create, part_path

N, DIM = 6, 5


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (i, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def samples() -> pa.Table:
    rows = [
        {
            "sample_id": i, "round": i % 2, "arm": "curated", "split": "train", "prompt_id": i,
            "prompt": f"p{i}", "seed": i, "model": "m", "width": 4, "height": 3, "attempt": 0,
            "image": {"bytes": png(i), "path": None}, "parent_id": None if i else 2**62,
        }
        for i in range(N)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=TABLES["samples"].schema)


def embeddings() -> pa.Table:
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(N * DIM).astype(np.float16)), DIM)
    ids = pa.array(range(N), pa.int64())
    return pa.table(
        [ids, pa.array([1] * N, pa.int32()), ["dino"] * N, ["r"] * N, vectors], schema=embedding_schema(DIM)
    )


@pytest.fixture(params=[1, 3], ids=["one part", "many parts"])
def tables(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    root = create(tmp_path / "store")
    size = N // request.param
    for name, data in (("samples", samples()), ("embeddings", embeddings())):
        for unit in range(request.param):
            path = part_path(name, {"round": unit, "arm": "curated"}, f"u{unit}", "abc")
            commit(root, name, path, data.slice(unit * size, size))
    return root / "tables"


def load(tables: Path, name: str, tmp_path: Path) -> datasets.Dataset:
    files = str(tables / name / "**/*.parquet")
    return datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache")
    )


def test_datasets(tables: Path, tmp_path: Path) -> None:
    data = load(tables, "samples", tmp_path)
    assert data.features == datasets.Features.from_arrow_schema(TABLES["samples"].schema)
    assert data.features["image"] == datasets.Image()
    assert sorted(image.getpixel((0, 0))[0] for image in data["image"]) == list(range(N))
    assert data[0]["image"].size == (4, 3)
    vectors = load(tables, "embeddings", tmp_path)
    assert vectors.features["vector"] == datasets.List(datasets.Value("float16"), length=DIM)
    assert np.shape(vectors["vector"][:]) == (N, DIM)


def test_duckdb(tables: Path) -> None:
    with duckdb.connect() as connection:
        rows = connection.sql(
            f"SELECT * FROM read_parquet('{tables}/samples/**/*.parquet') ORDER BY sample_id"
        )
        assert rows.columns == TABLES["samples"].schema.names
        assert [row[0] for row in rows.fetchall()] == list(range(N))
        vector = connection.sql(
            f"SELECT vector::FLOAT[{DIM}] FROM '{tables}/embeddings/**/*.parquet' LIMIT 1"
        )
        assert str(vector.types[0]) == f"FLOAT[{DIM}]"


def test_polars(tables: Path) -> None:
    data = pl.read_parquet(tables / "samples").sort("sample_id")
    assert data.columns == TABLES["samples"].schema.names
    assert data["image"].struct.field("bytes").to_list() == [png(i) for i in range(N)]
    vectors = pl.read_parquet(tables / "embeddings")
    assert vectors.shape == (N, 5)
    assert vectors["vector"].to_list()[0][:2] == [0.0, 1.0]


def test_pandas(tables: Path) -> None:
    data = pd.read_parquet(tables / "samples").sort_values("sample_id")
    assert list(data.columns) == TABLES["samples"].schema.names
    assert data["image"].iloc[3]["bytes"] == png(3)
    assert len(pd.read_parquet(tables / "embeddings")) == N
