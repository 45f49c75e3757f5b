"""Ids are positive, stable over processes, and tell specs apart."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.ids import digest, sample_id
from schemas.settings import Settings

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(plain)
def test_ids_fit_a_signed_int64(spec: object) -> None:
    assert 0 < sample_id(spec) < 2**63
    assert digest(spec, 64).startswith(digest(spec))


def test_known_values() -> None:
    # Stored ids depend on these: a change here orphans every store.
    assert sample_id({"a": 1}) == 1136596171473484647
    assert digest((1, 2.0)) == "ef151897fb1f05e1"


def test_same_in_another_process() -> None:
    code = "from schemas.ids import digest; print(digest({'b': [1, 2.5, None], 'a': 'ä'}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == digest({"a": "ä", "b": (1, 2.5, None)})


def test_what_differs_is_told_apart() -> None:
    specs = [1, 1.0, "1", True, None, [1], {"a": 1}, 0.1, 0.1 + 2**-56, "", []]
    assert len({digest(spec) for spec in specs}) == len(specs)


def test_settings_have_a_digest() -> None:
    class Steps(Settings):
        steps: int = 3

    assert digest(Steps()) == digest({"steps": 3})


def test_what_has_no_name() -> None:
    with pytest.raises(ValueError, match="JSON"):
        digest(float("nan"))
    with pytest.raises(TypeError, match="cannot name a set"):
        digest({1, 2})
