"""The tables of a store: columns, keys, and the metadata that makes Hugging Face `datasets` read them."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from schemas.errors import WinnowError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # the Hub's Image feature on disk
_VALUES = {pa.float64(): "float64", pa.float16(): "float16"}  # Arrow says "double" and "halffloat"


@dataclass(frozen=True)
class Table:
    """What a table promises.

    Arrow fields are all nullable, because `datasets` drops the Image feature from a required column;
    `required` names the columns in which a commit accepts no null, `finite` those without NaN or infinity.
    """

    name: str
    schema: pa.Schema
    key: tuple[str, ...]  # together unique over the whole store
    finite: tuple[str, ...]
    required: tuple[str, ...]


def _feature(kind: pa.DataType) -> dict[str, Any]:
    if kind == IMAGE:
        return {"_type": "Image"}
    if pa.types.is_fixed_size_list(kind):
        return {"feature": _feature(kind.value_type), "length": kind.list_size, "_type": "List"}
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    return {"dtype": _VALUES.get(kind, str(kind)), "_type": "Value"}


def with_features(schema: pa.Schema) -> pa.Schema:
    """The same columns with the `huggingface` metadata that `datasets` itself would write."""
    features = {field.name: _feature(field.type) for field in schema}
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def fingerprint(schema: pa.Schema) -> str:
    """Hash of column names, types and nullability, then "-D" where a column is a vector of length D.

    What stands before the dash is equal for parts that differ in their vector length only.
    """
    lengths = [str(field.type.list_size) for field in schema if pa.types.is_fixed_size_list(field.type)]
    columns = []
    for field in schema:
        is_list = pa.types.is_fixed_size_list(field.type) or pa.types.is_list(field.type)
        # The name of a list's inner field ("item", "element") changes on the way through Parquet.
        kind = f"list<{field.type.value_type}>" if is_list else str(field.type)
        columns.append([field.name, kind, field.nullable])
    base = hashlib.blake2b(json.dumps(columns).encode(), digest_size=8).hexdigest()
    return "-".join([base, *lengths])


_TYPES = {
    "int64": pa.int64(), "int32": pa.int32(), "float64": pa.float64(), "bool": pa.bool_(),
    "string": pa.string(), "image": IMAGE, "vector": pa.list_(pa.float16()),
}  # fmt: skip


def _table(name: str, key: str, finite: str, columns: str) -> Table:
    """Table from one line of "column:type" words; a question mark lets a column be null."""
    pairs = [word.split(":") for word in columns.split()]
    schema = pa.schema([(column, _TYPES[kind.rstrip("?")]) for column, kind in pairs])
    required = tuple(column for column, kind in pairs if not kind.endswith("?"))
    return Table(name, with_features(schema), tuple(key.split()), tuple(finite.split()), required)


TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        _table(
            "prompts", key="prompt_id", finite="",
            columns="prompt_id:int64 text:string source:string split:string cluster:int32? kept:bool "
            "reason:string? category:string?",
        ),
        _table(
            "samples", key="sample_id", finite="",
            columns="sample_id:int64 round:int32 arm:string split:string prompt_id:int64 prompt:string "
            "seed:int64 model:string width:int32 height:int32 parent_id:int64? refiner:string? attempt:int32 "
            "image:image",
        ),
        _table(
            "drafts", key="sample_id", finite="",
            columns="sample_id:int64 round:int32 arm:string prompt_id:int64 prompt:string seed:int64 criterion:string "
            "value:float64? step:int32 evaluations:int32 kept:bool",
        ),
        _table(
            "refinements", key="sample_id", finite="level",
            columns="sample_id:int64 parent_id:int64 round:int32 mask:string level:float64 loop:int32 "
            "evaluations:int32 scorer:string? score_before:float64? score_after:float64? accepted:bool",
        ),
        _table(
            "embeddings", key="sample_id encoder", finite="vector",
            columns="sample_id:int64 round:int32 encoder:string revision:string vector:vector",
        ),
        _table(
            "scores", key="sample_id scorer", finite="value",
            columns="sample_id:int64 round:int32 scorer:string revision:string value:float64 truncated:bool",
        ),
        _table(
            "distances", key="sample_id space metric reference", finite="value",
            columns="sample_id:int64 round:int32 space:string metric:string reference:string value:float64",
        ),
        _table(
            "selections", key="selection round sample_id", finite="",
            columns="selection:string round:int32 sample_id:int64 kept:bool rank:int32? reason:string",
        ),
        _table(
            "weights", key="selection round sample_id", finite="weight",
            columns="selection:string round:int32 sample_id:int64 weight:float64",
        ),
        _table(
            "evaluations", key="round arm metric prompt_set", finite="value",
            columns="round:int32 arm:string metric:string prompt_set:string value:float64 ci_low:float64? "
            "ci_high:float64? n:int64",
        ),
        _table(
            "rounds", key="round arm", finite="seconds",
            columns="round:int32 arm:string model:string parent_model:string? verdict:string reason:string "
            "best_round:int32 seconds:float64 images:int64 recipe:string",
        ),
        _table(
            "shards", key="path", finite="",
            columns="selection:string round:int32 format:string path:string rows:int64 bytes:int64 sha256:string",
        ),
        _table(
            "models", key="model revision", finite="",
            columns="arm:string round:int32 model:string revision:string bytes:int64",
        ),
        _table(
            "answers", key="text_id revision", finite="",
            columns="text_id:int64 task:string text:string model:string revision:string clarity:int32? "
            "specificity:int32? reply:string? problem:string?",
        ),
        _table(
            "votes", key="vote_id", finite="",
            columns="vote_id:int64 voter:string question:string sample_id:int64 other_id:int64? choice:string "
            "retracts:int64? seconds:float64? voted_at:string",
        ),
        _table(
            "strengths", key="basis question contestant", finite="strength ci_low ci_high",
            columns="basis:int64 question:string contestant:string strength:float64 ci_low:float64 ci_high:float64 "
            "n:int64",
        ),
    )
}  # fmt: skip


def table(name: str) -> Table:
    """The table called `name`; WinnowError for another name."""
    if name not in TABLES:
        raise WinnowError(f"table {name!r}: no such table; use one of {', '.join(TABLES)}")
    return TABLES[name]


def embedding_schema(dim: int) -> pa.Schema:
    """Schema of an embeddings part whose vectors are float16[dim]; TABLES holds the form with any length."""
    schema = TABLES["embeddings"].schema
    field = pa.field("vector", pa.list_(pa.float16(), dim))
    return with_features(schema.set(schema.get_field_index("vector"), field))
