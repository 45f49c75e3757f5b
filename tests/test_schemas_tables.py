"""The tables carry exactly the metadata that `datasets` writes."""

import datasets
import pyarrow as pa
import pytest

from schemas.errors import WinnowError
from schemas.tables import TABLES, embedding_schema, fingerprint, table


@pytest.mark.parametrize("name", TABLES)
def test_metadata_is_what_datasets_writes(name: str) -> None:
    schema = TABLES[name].schema
    features = datasets.Features.from_arrow_schema(schema)
    assert features.arrow_schema.equals(schema, check_metadata=True)


def test_special_features() -> None:
    samples = datasets.Features.from_arrow_schema(TABLES["samples"].schema)
    assert samples["image"] == datasets.Image()
    embeddings = datasets.Features.from_arrow_schema(embedding_schema(8))
    assert embeddings["vector"] == datasets.List(datasets.Value("float16"), length=8)
    assert embeddings.arrow_schema.equals(embedding_schema(8), check_metadata=True)


def test_datasets_still_drops_the_image_feature_of_a_required_column() -> None:
    # Why all Arrow fields are nullable and `required` is kept beside them.
    schema = TABLES["samples"].schema
    required = schema.set(schema.get_field_index("image"), schema.field("image").with_nullable(False))
    assert datasets.Features.from_arrow_schema(required)["image"] != datasets.Image()


@pytest.mark.parametrize("name", TABLES)
def test_keys_and_finite_columns_exist_and_are_required(name: str) -> None:
    rules = TABLES[name]
    assert rules.name == name
    assert set(rules.required) <= set(rules.schema.names)
    assert {*rules.key, *rules.finite} <= set(rules.required)


def test_fingerprint_tells_names_types_nullability_and_length_apart() -> None:
    one = pa.schema([("a", pa.int64()), ("b", pa.string())])
    others = [
        pa.schema([("b", pa.string()), ("a", pa.int64())]),
        pa.schema([("a", pa.int32()), ("b", pa.string())]),
        pa.schema([pa.field("a", pa.int64(), nullable=False), ("b", pa.string())]),
        pa.schema([("a", pa.int64())]),
    ]
    assert len({fingerprint(schema) for schema in [one, *others]}) == 5
    assert fingerprint(one) == fingerprint(one.with_metadata({"x": "y"}))
    four, eight = fingerprint(embedding_schema(4)), fingerprint(embedding_schema(8))
    assert four != eight
    assert four.split("-")[0] == eight.split("-")[0] == fingerprint(TABLES["embeddings"].schema)


def test_unknown_table() -> None:
    with pytest.raises(WinnowError, match="table 'score': no such table; use one of prompts, samples"):
        table("score")
