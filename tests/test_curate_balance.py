"""A number shared over classes: against every other way of sharing it, and against every other choice of rows."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.balance import OTHER, balanced, by_rules, shares
from curate.prompts import curate
from schemas.errors import WinnowError


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(0, 26))
def test_shares_are_the_fairest_of_all_ways(counts: list[int], total: int) -> None:
    """Fairest: the least served class has most, then the second least, and so on."""
    ways = [way for way in itertools.product(*(range(n + 1) for n in counts)) if sum(way) == min(total, sum(counts))]
    fairest = max(sorted(way) for way in ways)
    given_ = shares(counts, total)
    assert tuple(given_) in ways and sorted(given_) == fairest
    # Of equally fair ways, what is over goes to the classes with most left.
    best = [way for way in ways if sorted(way) == fairest]
    level = max(given_, default=0)
    assert sum(n for n, g in zip(counts, given_, strict=True) if g == level) == max(
        sum(n for n, g in zip(counts, way, strict=True) if g == level) for way in best
    )


def test_shares_of_many() -> None:
    assert shares([1000, 10, 300, 0], 100) == [45, 10, 45, 0]
    assert shares([1000, 10, 300], 101) == [46, 10, 45]
    assert shares([3, 3, 3], 2) == [1, 1, 0] and shares([], 5) == [] and shares([10**12, 1], 10**9) == [10**9 - 1, 1]
    with pytest.raises(WinnowError, match="numbers of 0 or more"):
        shares([1, -1], 2)


def test_rules_take_the_first_that_matches() -> None:
    rules = {"people": r"\b(wo)?man\b", "animals": r"\bcats?\b|\bdog"}
    texts = ["A man with a cat", "Two CATS", "a woman", "the manual of a catapult", "dogs"]
    assert by_rules(texts, rules) == ["people", "animals", "people", OTHER, "animals"]
    with pytest.raises(WinnowError, match=r"rule 'bad': '\(' is no regular expression"):
        by_rules(texts, {"bad": "("})


def cost(points: np.ndarray, partition: tuple[int, ...], k: int) -> float:
    groups = [points[[p == c for p in partition]] for c in range(k)]
    if any(not len(group) for group in groups):
        return np.inf
    return sum(((group - group.mean(0)) ** 2).sum() for group in groups)


@pytest.mark.parametrize("seed", range(5))
def test_the_nearest_to_each_centre_of_the_best_clustering_is_chosen(seed: int) -> None:
    """Against all ways to cut nine points of each class into as many clusters as it has places."""
    rng = np.random.default_rng(seed)
    middles = {"a": [(0, 0), (9, 0), (0, 9)], "b": [(40, 40), (50, 41)]}
    sizes = {"a": 9, "b": 2}
    points = np.concatenate([[rng.normal(middles[kind][i % len(middles[kind])], 0.6, 2) for i in range(sizes[kind])]
                             for kind in "ab"])  # fmt: skip
    kinds = ["a"] * 9 + ["b"] * 2
    order = rng.permutation(11)
    cluster, chosen, share = balanced(points[order], [kinds[i] for i in order], 5)
    assert share == {"a": 3, "b": 2}
    mine = points[:9]
    best = min(itertools.product(range(3), repeat=9), key=lambda way: cost(mine, way, 3))
    heads = set()
    for c in range(3):
        group = np.flatnonzero(np.array(best) == c)
        heads.add(int(group[((mine[group] - mine[group].mean(0)) ** 2).sum(1).argmin()]))
    assert {int(order[i]) for i in chosen} == heads | {9, 10}
    for i, at in enumerate(order):  # and who is in a cluster is with its head
        head = int(order[chosen[cluster[i]]])
        assert at == head if at >= 9 else best[at] == best[head]


def test_a_class_of_equal_rows_leaves_its_places_to_others() -> None:
    rng = np.random.default_rng(0)
    points = np.concatenate([np.ones((10, 3)), rng.normal(size=(20, 3)), rng.normal(size=(4, 3))])
    kinds = ["same"] * 10 + ["many"] * 20 + ["few"] * 4
    cluster, chosen, share = balanced(points, kinds, 12)
    assert share == {"same": 1, "many": 7, "few": 4} and len(set(chosen)) == 12
    assert [kinds[i] for i in chosen].count("many") == 7
    assert (cluster >= 0).all() and all(kinds[chosen[c]] == kind for c, kind in zip(cluster, kinds, strict=True))


def test_more_classes_than_places() -> None:
    cluster, chosen, share = balanced(np.arange(8.0)[:, None], list("aabbbcdd"), 2)
    assert share == {"a": 1, "b": 1, "c": 0, "d": 0}
    assert cluster.tolist()[5:] == [-1, -1, -1] and len(chosen) == 2


def test_curated_prompts_are_shared_over_their_categories() -> None:
    animals = [f"a {colour} {animal} in the garden" for colour in ("red", "white", "black", "brown")
               for animal in ("cat", "dog", "horse", "goat", "hen")]  # fmt: skip
    texts = [*animals, "a city at night", "a village by the sea", "an old bridge", "animal"]
    kinds = ["animals"] * 20 + ["places"] * 3 + [OTHER]
    made = curate(texts, keep=10, categories=kinds)
    kept = [kind for prompt, kind in zip(made, kinds, strict=True) if prompt.kept]
    assert {kind: kept.count(kind) for kind in kinds} == {"animals": 6, "places": 3, OTHER: 1}
    for prompt in made:
        if not prompt.kept:
            assert prompt.reason.startswith("'animals' keeps 6 of 20: cluster ")
    made = curate(texts, keep=2, categories=kinds)
    assert made[-1].reason == "'other' keeps 0 of 1: no place is left for it" and made[-1].cluster == -1
    with pytest.raises(WinnowError, match="2 categories for 24 prompts"):
        curate(texts, keep=2, categories=["a", "b"])
