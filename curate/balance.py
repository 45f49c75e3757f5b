"""A number shared over classes as evenly as they reach, and the rows of each class that stand for it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from curate.arrays import Ints, matrix
from curate.clusters import representatives
from schemas.errors import WinnowError

OTHER = "other"  # the class of what has none


def shares(counts: Sequence[int], total: int) -> list[int]:
    """How many of ``total`` each class of ``counts`` gets: water poured into vessels of these heights.

    No class gets more than it has, and the sum is min(total, sum(counts)). Among the classes that could give more no
    two differ by more than 1; those with most left get the 1, the first of equals before the others.
    """
    if total < 0 or any(count < 0 for count in counts):
        raise WinnowError(f"{total} shared over {list(counts)}: give numbers of 0 or more")
    left, level, open_ = min(total, sum(counts)), 0, sorted(count for count in counts if count)
    while open_ and left >= len(open_):
        rise = min(left // len(open_), open_[0] - level)
        level, left = level + rise, left - rise * len(open_)
        open_ = [count for count in open_ if count > level]
    given = [min(count, level) for count in counts]
    order = sorted((i for i, count in enumerate(counts) if count > level), key=lambda i: (-counts[i], i))
    for i in order[:left]:
        given[i] += 1
    return given


def by_rules(texts: Sequence[str], rules: Mapping[str, str]) -> list[str]:
    """The class of each text: the first rule (a regular expression, whatever the case) that it holds, else OTHER."""
    patterns = {}
    for name, rule in rules.items():
        try:
            patterns[name] = re.compile(rule, re.IGNORECASE)
        except (re.error, OverflowError, RecursionError) as error:
            raise WinnowError(f"rule {name!r}: {rule!r} is no regular expression ({error}); mend it") from None
    return [next((name for name, rule in patterns.items() if rule.search(text)), OTHER) for text in texts]


def balanced(
    features: ArrayLike, classes: Sequence[str], total: int, seed: int = 0
) -> tuple[Ints, Ints, dict[str, int]]:
    """Of each class of features [N, D] its share of ``total``, the nearest to as many centres of its own.

    Returns cluster [N], counted through all classes, -1 in a class without a share; the chosen row of each cluster;
    and the share of each class. A class with fewer distinct rows than its share leaves the rest to others.
    """
    x = matrix("features", features, rows=len(classes))
    names = sorted(set(classes))
    members = {name: np.flatnonzero([one == name for one in classes]) for name in names}
    reach = [len(members[name]) for name in names]
    while True:
        given = shares(reach, total)
        made = {name: representatives(x[members[name]], n, seed) for name, n in zip(names, given, strict=True) if n}
        found = [len(made[name][1]) if name in made else 0 for name in names]
        if found == given:
            break
        reach = [n if n < want else most for n, want, most in zip(found, given, reach, strict=True)]
    cluster, chosen = np.full(len(x), -1, dtype=np.int64), np.empty(0, dtype=np.int64)
    for name, (member, heads) in made.items():
        cluster[members[name]] = member + len(chosen)
        chosen = np.concatenate([chosen, members[name][heads]])
    return cluster, chosen, dict(zip(names, given, strict=True))
