"""Stable names for things: hashes of what decides their content."""

import hashlib
import json
from typing import Any

from pydantic import BaseModel


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    kind = type(value).__name__
    raise TypeError(f"digest: cannot name a {kind}; pass str, int, float, bool, None, list, tuple or dict")


def canonical(spec: Any) -> bytes:
    """The one JSON text of `spec`: keys sorted, floats by repr (1 and 1.0 differ), tuples as lists.

    Raises TypeError for other types and ValueError for NaN and infinity, which have no JSON text.
    """
    text = json.dumps(spec, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_plain)
    return text.encode()


def digest(spec: Any, length: int = 16) -> str:
    """The first `length` (at most 64) hex digits of the hash of `spec`, the same in every process."""
    return hashlib.blake2b(canonical(spec), digest_size=32).hexdigest()[:length]


def sample_id(spec: Any) -> int:
    """A positive 63-bit id from what makes a sample what it is (model, prompt, seed, settings).

    63 bits, so that Parquet, DuckDB and FAISS hold it in a signed int64; among 10^8 samples two collide with
    a chance of 5e-4, and then `seal` refuses the second.
    """
    return int.from_bytes(hashlib.blake2b(canonical(spec), digest_size=8).digest(), "big") >> 1 or 1
