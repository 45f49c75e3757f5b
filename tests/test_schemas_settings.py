"""A refused setting is explained in one line: key, what came, what is allowed, cure."""

from typing import Any, Literal

import pytest
from pydantic import Field, ValidationError, field_validator

from schemas.errors import WinnowError
from schemas.settings import Settings, explain


class Inner(Settings):
    steps: int = Field(default=20, gt=0)
    metric: Literal["l2", "mse", "cosine"] = "l2"


class Outer(Settings):
    model: str
    sampler: Inner = Inner()
    levels: list[float] = []
    floors: dict[str, float] = {}

    @field_validator("levels")
    @classmethod
    def _rising(cls, levels: list[float]) -> list[float]:
        if levels != sorted(levels):
            raise ValueError("must rise")
        return levels


def refused(values: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(values)
    line = explain(caught.value, "demo.yaml")
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"model": "m", "sampler": {"step": 3}},
            "demo.yaml: unknown key 'sampler.step'; did you mean 'steps'? allowed keys: steps, metric",
        ),
        ({}, "demo.yaml: key 'model' is missing; add it"),
        (
            {"model": "m", "sampler": {"steps": True}},
            "demo.yaml: sampler.steps is True: true and false, yes and no are none of its values; change it there",
        ),
        (
            {"model": "m", "floors": {"clip": True}},
            "demo.yaml: floors is {'clip': True}: true and false, yes and no are none of its values; change it there",
        ),
        (
            {"model": "m", "sampler": {"steps": 0}},
            "demo.yaml: sampler.steps is 0: should be greater than 0; change it there",
        ),
        (
            {"model": "m", "sampler": {"metric": "cosin"}},
            "demo.yaml: sampler.metric is 'cosin': should be 'l2', 'mse' or 'cosine'; "
            "did you mean 'cosine'? change it there",
        ),
        ({"model": "m", "levels": [2, 1]}, "demo.yaml: levels is [2, 1]: must rise; change it there"),
        (
            {"model": 3, "levels": "x"},
            "demo.yaml: model is 3: should be a valid string; change it there (and 1 more)",
        ),
        (
            ["m"],
            "demo.yaml: the table is ['m']: should be a valid dictionary or instance of Outer; "
            "change it there",
        ),
    ],
)
def test_explain(values: Any, line: str) -> None:
    assert refused(values) == line


def test_a_list_index_is_in_the_path() -> None:
    assert "levels.1 is 'many'" in refused({"model": "m", "levels": [1, "many"]})


def test_frozen() -> None:
    with pytest.raises(ValidationError):
        Inner().steps = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_an_error_is_one_line() -> None:
    assert str(WinnowError("a:\n  b;\n  c")) == "a: b; c"
