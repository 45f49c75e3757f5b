"""Advantages: against the formula group by group, and what never changes them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.advantage import advantages, weights
from schemas.errors import WinnowError

SCORES = st.lists(st.tuples(st.integers(-50, 50), st.integers(0, 4)), min_size=1, max_size=40)


@given(SCORES, st.floats(0.1, 100), st.floats(-1e3, 1e3))
def test_advantages_are_standard_scores_of_each_group(rows: list[tuple[int, int]], scale: float, shift: float) -> None:
    scores, groups = np.array([s for s, _ in rows], float), np.array([g for _, g in rows])
    got = advantages(scores, groups)
    for group in set(groups):
        some = scores[groups == group]
        expected = (some - some.mean()) / some.std() if some.std() > 0 else np.zeros(len(some))
        np.testing.assert_allclose(got[groups == group], expected, atol=1e-9)
    np.testing.assert_allclose(advantages(scores * scale + shift, groups), got, atol=1e-6)


def test_equal_scores_are_no_advantage_however_large() -> None:
    for value in (0.1, 1e8 + 0.3, -3e-12):
        assert advantages([value] * 7, [1] * 7).tolist() == [0] * 7
    assert advantages([5.0, 1.0, 3.0], [1, 2, 2]).tolist() == pytest.approx([0, -1, 1])


def test_weights_rise_with_the_advantage_up_to_the_cap() -> None:
    a = np.array([-2.0, 0.0, 1.0, 3.0, 800.0])
    np.testing.assert_allclose(weights(a, 0.5, 20), [np.exp(-4), 1, np.exp(2), 20, 20])
    np.testing.assert_allclose(weights(a, 1e9), 1, atol=1e-6)
    # At the cap exactly, so that they can be counted there; and above 0, in float32 too.
    assert weights(a, 1e-3).tolist()[2:] == [20] * 3 and weights(a, 1e-3)[0] == np.finfo(np.float32).tiny
    assert weights([1.0, 0.0], 1e-320).tolist() == [20, 1]


def test_weights_that_all_vanish_name_the_temperature() -> None:
    with pytest.raises(WinnowError, match=r"advantages run from -2 to -1, temperature is 0\.001; give a larger"):
        weights([-1.0, -2.0], 1e-3)


@pytest.mark.parametrize(
    ("how", "said"),
    [({"temperature": 0.0}, "is 0"), ({"temperature": float("nan")}, "above 0"), ({"most": 0.5}, "1 or more")],
)
def test_what_makes_no_weight_is_refused(how: dict[str, float], said: str) -> None:
    with pytest.raises(WinnowError, match=said):
        weights([1.0], **how)
    with pytest.raises(WinnowError, match="groups has 1 rows where 2"):
        advantages([1.0, 2.0], [1])
    with pytest.raises(WinnowError, match="scores"):
        advantages([1.0, float("nan")], [1, 1])
