"""Names at the edge: from a recipe's word to the thing it means."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from schemas.errors import WinnowError

T = TypeVar("T")


def known(kind: str, name: str, known: Mapping[str, Any]) -> str:
    """``name`` if it can be one (``key``, ``key:argument`` or ``package.module:object``), else WinnowError."""
    head, _, tail = name.partition(":")
    if head in known or ("." in head and tail and all(part.isidentifier() for part in head.split("."))):
        return name
    near = difflib.get_close_matches(head, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise WinnowError(
        f"{kind} {name!r}: unknown; {hint}there are {', '.join(known)}, and 'package.module:object' for your own"
    )


def yours(kind: str, name: str) -> Any:
    """What a user's ``package.module:object`` names."""
    head, _, tail = name.partition(":")
    try:
        return getattr(guarded(kind, name, importlib.import_module)(head), tail)
    except (ImportError, AttributeError) as error:
        raise WinnowError(f"{kind} {name!r}: {error}; it must be importable, as 'package.module:object'") from error


def guarded(kind: str, name: str, call: Callable[..., T]) -> Callable[..., T]:
    """A user's own function, whose errors come as one line that names it. Those of importing and of memory pass."""

    def called(*given: Any) -> T:
        try:
            return call(*given)
        except (WinnowError, ImportError):
            raise
        except Exception as error:
            if type(error).__name__ == "OutOfMemoryError":  # torch's, which has a cure of its own
                raise
            what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise WinnowError(f"{kind} {name!r}: fails with {what}; mend it, --debug shows where") from error

    return called


def pick(kind: str, name: str, table: Mapping[str, Callable[[str], Any]], wanted: type) -> Any:
    """Load ``key[:argument]`` from the table, or call the user's ``package.module:object`` without arguments."""
    known(kind, name, table)
    head, _, tail = name.partition(":")
    if head in table:
        return table[head](tail)
    made = guarded(kind, name, yours(kind, name))()
    if not isinstance(made, wanted):
        raise WinnowError(f"{kind} {name!r}: gave a {type(made).__name__}; it must return a {wanted.__name__}")
    return made
