"""Selection, against a plain implementation and against a window query."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.clusters import kmeans, representatives
from curate.decision import Decision, dedup, floors, listed, narrow
from curate.select import POLICIES, best_of_n, diverse, pareto, quantile_band, random_choice, stratified
from curate.select import top_k as top
from schemas.errors import WinnowError


class World(NamedTuple):
    scores: np.ndarray
    groups: np.ndarray
    ids: np.ndarray
    features: np.ndarray


@st.composite
def worlds(draw: st.DrawFn) -> World:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = draw(st.integers(1, 60))
    return World(
        rng.integers(0, 5, rows) / 4,  # many ties
        rng.integers(0, draw(st.integers(1, 12)), rows),
        rng.choice(2**62, rows, replace=False) - 2**61,
        rng.normal(size=(rows, 4)),
    )


def plain_best(world: World, k: int, budget: int | None) -> set[int]:
    prompts = defaultdict(list)
    for score, group, identity in zip(world.scores, world.groups, world.ids, strict=True):
        prompts[group].append((-score, identity))
    picked = [(place, *row) for rows in prompts.values() for place, row in enumerate(sorted(rows)[:k])]
    return {identity for _, _, identity in sorted(picked)[:budget]}


def query_best(world: World, k: int, budget: int) -> set[int]:
    rows = pa.table({"score": world.scores, "prompt": world.groups, "id": world.ids})
    with duckdb.connect() as db:
        db.register("rows", rows)
        found = db.execute(
            "select id from (select *, row_number() over"
            " (partition by prompt order by score desc, id) as place from rows)"
            " where place <= ? order by place, score desc, id limit ?",
            [k, budget],
        )
        return {identity for (identity,) in found.fetchall()}


@settings(deadline=None)
@given(worlds(), st.integers(1, 5), st.none() | st.integers(1, 40))
def test_best_of_n_is_the_plain_one(world: World, k: int, budget: int | None) -> None:
    decision = best_of_n(*world, budget, k=k)
    assert set(world.ids[decision.kept]) == plain_best(world, k, budget)


def test_best_of_n_is_the_window_query() -> None:
    rng = np.random.default_rng(0)
    world = World(
        rng.integers(0, 50, 3000) / 7, rng.integers(0, 700, 3000), rng.permutation(3000), np.zeros((3000, 1))
    )
    for k, budget in ((1, 10_000), (2, 900), (4, 100)):
        kept = world.ids[best_of_n(*world, budget, k=k).kept]
        assert set(kept) == query_best(world, k, budget)


@settings(deadline=None)
@given(worlds(), st.integers(1, 40))
def test_top_k_is_the_plain_one(world: World, budget: int) -> None:
    order = sorted(zip(-world.scores, world.ids, strict=True))
    assert set(world.ids[top(*world, budget).kept]) == {identity for _, identity in order[:budget]}


@settings(deadline=None)
@given(worlds(), st.integers(1, 40), st.sampled_from(list(POLICIES)), st.integers(0, 9))
def test_every_policy_keeps_the_rules(world: World, budget: int, name: str, seed: int) -> None:
    policy = POLICIES[name]
    settings = {
        "strata": {"strata": world.groups % 3},
        "pareto": {"columns": np.stack([world.scores, world.ids % 5], axis=1)},
    }.get(name, {})
    decision = policy(*world, budget, seed, **settings)
    assert decision.kept.sum() <= budget
    assert [bool(reason) for reason in decision.reason] == [not kept for kept in decision.kept]
    assert (decision.rank >= 1).all()
    if name != "quantile_band":
        assert decision.kept.any()
    # The order of the rows does not matter, nor whether the ids come as text.
    order = np.random.default_rng(seed).permutation(len(world.ids))
    settings = {key: column[order] for key, column in settings.items()}
    turned = policy(*(column[order] for column in world), budget, seed, **settings)
    np.testing.assert_array_equal(turned.kept, decision.kept[order])
    np.testing.assert_array_equal(turned.rank, decision.rank[order])
    np.testing.assert_array_equal(turned.reason, decision.reason[order])


def test_a_budget_takes_one_of_every_prompt_first() -> None:
    groups = np.repeat(np.arange(10), 4)
    scores = np.arange(40.0)  # the last prompts score highest throughout
    decision = best_of_n(scores, groups, np.arange(40), budget=12, k=2)
    assert (np.bincount(groups[decision.kept], minlength=10) >= 1).all()
    assert decision.reason[0] == "rank 4 of 4 for its prompt"
    assert decision.reason[2] == "outside budget: rank 20 of 12"


def test_random_choice_is_fair_and_blind() -> None:
    groups, ids = np.repeat(np.arange(3000), 4), np.arange(12_000)
    decision = random_choice(np.full(12_000, np.nan), groups, ids, rng=1)
    assert (np.bincount(groups[decision.kept]) == 1).all()
    np.testing.assert_allclose(np.bincount(ids[decision.kept] % 4) / 3000, 0.25, atol=0.04)
    assert (random_choice(ids, groups, ids, rng=2).kept != decision.kept).any()
    with pytest.raises(WinnowError, match="no rng"):
        random_choice(ids, groups, ids)


def test_quantile_band_draws_only_from_the_band() -> None:
    groups, ids = np.repeat(np.arange(2000), 4), np.arange(8000)
    scores = np.tile([4.0, 3.0, 2.0, 1.0], 2000)
    decision = quantile_band(scores, groups, ids, rng=0)
    assert (np.bincount(groups[decision.kept]) == 1).all()
    share = np.bincount(ids[decision.kept] % 4, minlength=4) / 2000
    np.testing.assert_allclose(share, [0.5, 0.5, 0, 0], atol=0.04)
    assert decision.reason[3] == "rank 4 of 4 for its prompt lies outside the band [0, 0.5)"
    with pytest.raises(WinnowError, match="quantile band"):
        quantile_band(scores, groups, ids, rng=0, low=0.5, high=0.5)


def test_diverse_keeps_the_shares_of_the_modes() -> None:
    rng = np.random.default_rng(0)
    mode = np.repeat([0, 1, 2], [600, 300, 100])
    features = rng.normal(size=(1000, 5)) * 0.1 + 10 * np.eye(5)[mode]
    scores = rng.random(1000) + (mode == 0)  # the best by score alone are all of one mode
    groups, ids = np.arange(1000) // 4, np.arange(1000)
    decision = diverse(scores, groups, ids, features, 100, 0, clusters=3)
    np.testing.assert_array_equal(np.bincount(mode[decision.kept]), [60, 30, 10])
    assert set(mode[top(scores, groups, ids, budget=100).kept]) == {0}
    assert "which keeps" in decision.reason[~decision.kept][0]
    with pytest.raises(WinnowError, match="needs features and a budget"):
        diverse(scores, groups, ids)


@settings(deadline=None)
@given(worlds(), st.integers(1, 3), st.integers(1, 4))
def test_pareto_keeps_whom_nobody_outdoes(world: World, scorers: int, k: int) -> None:
    columns = np.stack([world.scores, *(world.ids // 7**j % 4 for j in range(1, scorers))], axis=1)
    decision = pareto(*world, columns=columns, k=k)
    for i in range(len(world.ids)):
        mates = np.flatnonzero(world.groups == world.groups[i])
        better = [j for j in mates if (columns[j] >= columns[i]).all() and (columns[j] > columns[i]).any()]
        if better:
            named = int(decision.reason[i].split()[2].rstrip(":"))
            assert named in {world.ids[j] for j in better} and not decision.kept[i]
        else:
            assert decision.kept[i] == (decision.rank[i] <= k)


def test_strata_share_the_budget_evenly() -> None:
    groups = np.arange(400) // 4
    strata = np.repeat(["people", "animals", "places"], [320, 60, 20])
    scores = np.arange(400.0)[::-1]  # people score highest throughout
    decision = stratified(scores, groups, np.arange(400), budget=30, strata=strata, k=2)
    assert {name: int((strata[decision.kept] == name).sum()) for name in set(strata)} == {
        "people": 10, "animals": 10, "places": 10,
    }  # fmt: skip
    # Ten of people: the best of each of the first ten prompts.
    assert np.flatnonzero(decision.kept[:320]).tolist() == list(range(0, 40, 4))
    assert decision.reason[3] == "rank 4 of 4 for its prompt"
    assert decision.reason[1] == "outside quota: rank 81 in people, which keeps 10"
    few = stratified(scores, groups, np.arange(400), budget=90, strata=strata, k=2)
    assert int((strata[few.kept] == "places").sum()) == 10 and few.kept.sum() == 90
    with pytest.raises(WinnowError, match="strata have no budget"):
        stratified(scores, groups, np.arange(400), strata=strata)


def test_listed_keeps_what_a_query_gave() -> None:
    decision = listed([5, 3, 9], [9, 5, 77], [1, 2, 3])
    assert decision.kept.tolist() == [True, False, True] and decision.rank.tolist() == [2, 0, 1]
    assert decision.reason.tolist() == ["", "not among what the query gives", ""]
    assert not listed([5, 3], np.array([], np.int64)).kept.any()


def test_floors_name_every_scorer_that_fell_short() -> None:
    decision = floors({"clip": [0.18, 0.3, 0.1], "hps": [1, 1, 0]}, {"clip": 0.2, "hps": 0.5})
    assert decision.kept.tolist() == [False, True, False]
    assert decision.reason.tolist() == [
        "below floor clip 0.18 < 0.2", "", "below floor clip 0.1 < 0.2; below floor hps 0 < 0.5",
    ]  # fmt: skip
    with pytest.raises(WinnowError, match="floor for 'clip' is NaN"):
        floors({"clip": [0.1, 0.5]}, {"clip": np.nan})
    with pytest.raises(WinnowError, match="no scores: choose among clip"):
        floors({"clip": [0.1]}, {"pick": 1})
    with pytest.raises(WinnowError, match="1 rows where 2"):
        floors({"clip": [0.1, 0.2], "hps": [0.1]}, {"hps": 1})


@settings(deadline=None)
@given(worlds(), st.floats(0.3, 0.99))
def test_dedup_is_greedy_from_the_best(world: World, threshold: float) -> None:
    unit = world.features / np.linalg.norm(world.features, axis=1, keepdims=True)
    like = unit @ unit.T
    kept: list[int] = []
    for i in np.lexsort((world.ids, -world.scores)):
        if not any(like[i, j] >= threshold for j in kept):
            kept.append(i)
    decision = dedup(world.features, threshold, world.scores, world.ids)
    assert set(np.flatnonzero(decision.kept)) == set(kept)
    names = {f"near duplicate of {world.ids[i]}" for i in kept}
    assert {reason.split(":")[0] for reason in decision.reason if reason} <= names


def test_dedup_across_blocks_keeps_the_best_of_equal_rows() -> None:
    rng = np.random.default_rng(0)
    features = np.concatenate([rng.normal(size=(1500, 16))] * 2).astype(np.float16)
    scores, ids = np.repeat([0.0, 1.0], 1500), np.arange(3000)
    decision = dedup(features, 1.0, scores, ids)
    assert decision.kept.tolist() == [False] * 1500 + [True] * 1500
    assert decision.reason[7] == "near duplicate of 1507: similarity 1.0000"


def test_dedup_names_the_sample_without_a_direction() -> None:
    with pytest.raises(WinnowError, match="features of 23 are all zeros"):
        dedup([[1, 0], [0, 0]], 0.9, [1, 2], [7, 23])


def test_narrow_joins_two_decisions() -> None:
    first = floors({"clip": [0.1, 0.5, 0.7, 0.9]}, {"clip": 0.3})
    second = best_of_n([0.5, 0.7, 0.9], [0, 0, 1], [1, 2, 3])
    decision = narrow(first, second)
    assert decision.kept.tolist() == [False, False, True, True]
    assert decision.rank.tolist() == [0, 2, 1, 1]
    assert decision.reason[0].startswith("below floor") and decision.reason[1] == "rank 2 of 2 for its prompt"
    with pytest.raises(WinnowError, match="exactly the rows"):
        narrow(first, Decision(first.kept, first.rank, first.reason))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ids": [1, 1, 2]}, "ids 1 comes 2 times"),
        ({"ids": [1.5, 2, 3]}, "integers or strings"),
        ({"scores": [1, np.nan, 2]}, "scores row 1 holds NaN"),
        ({"groups": [0, 0]}, "groups has 2 rows where 3"),
        ({"scores": [], "groups": [], "ids": []}, "at least one key"),
        ({"budget": 0}, "budget is 0"),
        ({"k": 0}, "k is 0"),
    ],
)
def test_bad_input_is_refused(change: dict, said: str) -> None:
    with pytest.raises(WinnowError, match=said):
        best_of_n(**{"scores": [1, 2, 3], "groups": [0, 0, 1], "ids": [1, 2, 3]} | change)


@pytest.mark.parametrize("scale", [1e19, 1e30])
def test_features_that_faiss_cannot_hold_are_one_line(scale: float) -> None:
    """It would end the process."""
    features = np.random.default_rng(0).normal(size=(50, 8)) * scale
    for call in (kmeans, representatives):
        with pytest.raises(WinnowError, match="too large"):
            call(features, 3)
    assert len(set(kmeans(features / scale, 3).tolist())) == 3
