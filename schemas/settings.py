"""Settings of a stage: small, frozen, and strict about unknown keys."""

import difflib
import re
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError


class Settings(BaseModel):
    """Base of every settings table. Unknown keys are refused together with the keys that exist."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML reads yes as true, which Python takes for 1.
        if _holds_truth(value) and not _offers_truth(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("true and false, yes and no are none of its values")
        return value

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        # Pydantic's own `extra_forbidden` error does not say which keys exist; only the class knows.
        if isinstance(values, dict):
            for key in values:
                if key not in cls.model_fields:
                    context = {"key": str(key), "allowed": list(cls.model_fields)}
                    raise PydanticCustomError("unknown_key", "unknown key", context)
        return values


def _holds_truth(value: Any) -> bool:
    """Whether true or false stands in the value of a setting, also inside its lists and tables."""
    if isinstance(value, dict | list | tuple):
        return any(_holds_truth(part) for part in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, bool)


def _offers_truth(annotation: Any) -> bool:
    """Whether a field of this type can hold true. A table of settings looks at its own fields."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return True
    return annotation in (bool, Any) or any(_offers_truth(part) for part in get_args(annotation))


def _nearest(word: str, allowed: list[str]) -> str:
    near = difflib.get_close_matches(word, allowed, n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def explain(error: ValidationError, where: str) -> str:
    """One line for a refused settings table: the key, what came, what is allowed, the cure.

    `where` names the table to the user, such as "recipes/demo.yaml". Further errors are only counted.
    """
    first, *others = error.errors()
    context = first.get("ctx", {})
    path = [str(step) for step in first["loc"]]
    if first["type"] == "unknown_key":
        key, allowed = context["key"], context["allowed"]
        names = ", ".join(allowed) or "none"
        line = f"unknown key {'.'.join([*path, key])!r}; {_nearest(key, allowed)}allowed keys: {names}"
    elif first["type"] == "missing":
        line = f"key {'.'.join(path)!r} is missing; add it"
    else:
        rule = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
        came = _shown(first["input"])
        hint = ""
        if first["type"] == "literal_error" and isinstance(first["input"], str):
            hint = _nearest(first["input"], re.findall(r"'([^']*)'", context["expected"]))
        line = f"{'.'.join(path) or 'the table'} is {came}: {rule}; {hint}change it there"
    more = f" (and {len(others)} more)" if others else ""
    return " ".join(f"{where}: {line}{more}".split())
