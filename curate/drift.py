"""How far a set of samples has moved from another, how varied it is, and how sure such figures are."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from curate import groups as grouped
from curate import rows
from curate.arrays import TOO_LARGE, Float64s, Floats, Ints, matrix, tiles, vector
from schemas.errors import WinnowError

Z = 1.959963984540054  # standard errors on either side of a 95 % interval


class Interval(NamedTuple):
    """An estimate with its interval."""

    value: float
    low: float
    high: float


def moments(x: ArrayLike) -> tuple[Float64s, Float64s, int]:
    """Mean [D], covariance [D, D] (divided by N - 1) and N of rows x [N, D], N at least 2."""
    x = matrix("features", x)
    if len(x) < 2:
        raise WinnowError("features have 1 row: a covariance needs 2 or more samples")
    mean = np.zeros(x.shape[1])
    for tile in tiles(len(x), 16 * x.shape[1]):
        mean += x[tile].sum(axis=0, dtype=np.float64) / len(x)
    cov = np.zeros((x.shape[1], x.shape[1]))
    for tile in tiles(len(x), 16 * x.shape[1]):
        y = x[tile] - mean
        cov += y.T @ y
    return mean, cov / (len(x) - 1), len(x)


def frechet(mean1: ArrayLike, cov1: ArrayLike, mean2: ArrayLike, cov2: ArrayLike) -> float:
    """||m1 - m2||^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), at least 0 (FID; Heusel et al., arXiv 1706.08500).

    Means [D], covariances [D, D] symmetric and positive semi-definite; singular ones are fine.
    tr (C1 C2)^(1/2) is the sum of the singular values of C1^(1/2) C2^(1/2): no root of a product that
    rounding has made asymmetric.
    """
    m1, m2 = vector("mean", mean1), vector("mean", mean2)
    c1, c2 = matrix("covariance", cov1, columns=len(m1)), matrix("covariance", cov2, columns=len(m1))
    if not len(m1) == len(m2) == len(c1) == len(c2):
        raise WinnowError(
            f"means have {len(m1)} and {len(m2)} entries, "
            f"covariances {len(c1)} and {len(c2)} rows: compare features of one encoder"
        )
    cross = np.linalg.svd(_root(c1) @ _root(c2), compute_uv=False).sum()
    return max(0.0, float(np.sum((m1 - m2) ** 2) + np.trace(c1) + np.trace(c2) - 2 * cross))


def frechet_distance(a: ArrayLike, b: ArrayLike) -> float:
    """Fréchet distance of features a [N, D] and b [M, D]. Biased upwards by order 1/N: compare equal N.

    With fewer rows than dimensions on a side no covariance is written out: for centred rows X and Y, divided by
    sqrt(N - 1) and sqrt(M - 1), tr (C1 C2)^(1/2) is the sum of the singular values of X Y^T [N, M].
    """
    x = matrix("features a", a)
    y = matrix("features b", b, columns=x.shape[1])
    if min(len(x), len(y)) >= x.shape[1] or min(len(x), len(y)) < 2:
        mean1, cov1, _ = moments(x)
        mean2, cov2, _ = moments(y)
        return frechet(mean1, cov1, mean2, cov2)
    means = rows.mean(x), rows.mean(y)
    with np.errstate(over="ignore"):
        traces = [rows.squared_to(side, mean).sum() / (len(side) - 1) for side, mean in zip((x, y), means, strict=True)]
        apart = np.sum((means[0] - means[1]) ** 2)
    if not np.isfinite([*traces, apart]).all():
        raise WinnowError(TOO_LARGE)
    products = np.empty((len(x), len(y)))
    for i in tiles(len(x), 16 * x.shape[1]):
        mine = rows.exact(x[i]) - means[0]
        for j in tiles(len(y), 16 * x.shape[1]):
            products[i, j] = mine @ (rows.exact(y[j]) - means[1]).T
    cross = np.linalg.svd(products, compute_uv=False).sum() / math.sqrt((len(x) - 1) * (len(y) - 1))
    return max(0.0, float(apart + sum(traces) - 2 * cross))


def diversity(features: ArrayLike, groups: ArrayLike) -> float:
    """Mean over the groups of the variance within (summed over D, divided by n - 1): features [N, D].

    Groups of one row say nothing and are left out; WinnowError where no group has two.
    """
    x = matrix("features", features)
    code = grouped.codes(groups, rows=len(x))
    order = np.argsort(code, kind="stable")
    starts = np.flatnonzero(np.diff(code[order], prepend=-1))
    variances = []
    with np.errstate(over="ignore", invalid="ignore"):
        for mates in np.split(order, starts[1:]):
            if len(mates) > 1:
                variances.append(float(np.var(x[mates], axis=0, ddof=1, dtype=np.float64).sum()))
    if not variances:
        raise WinnowError(
            "no group has two samples: generate 2 or more images per prompt to measure diversity"
        )
    if not all(map(math.isfinite, variances)):
        raise WinnowError(TOO_LARGE)
    return math.fsum(variances) / len(variances)


def around(value: float, interval: tuple[float, float]) -> Interval:
    """The width of a bootstrap's interval around the value itself: a resample repeats rows, which shifts such
    statistics, so the percentiles alone may leave the value out."""
    half = (interval[1] - interval[0]) / 2
    return Interval(value, value - half, value + half)


def bootstrap(
    statistic: Callable[..., float], *arrays: ArrayLike, n: int = 1000, rng: np.random.Generator | int,
    paired: bool = False, strata: ArrayLike | None = None, level: float = 0.95,
) -> tuple[float, float]:  # fmt: skip
    """Percentile interval (low, high) of statistic(*arrays) over n resamplings of rows with replacement.

    paired: the same rows of every array (features and their groups, two scores of one sample); otherwise each
    array on its own (two sets of samples). strata: paired, and each row is replaced by one of its own stratum,
    so that every prompt keeps its share: for what is measured of a fixed set of prompts. The interval is then widened
    by √(n / (n − 1)) for n rows a stratum, which few rows ask for.

    A resample holds fewer distinct rows, so what is biased in small samples shifts: the interval of a Fréchet
    distance lies too high and may leave out the estimate. It is not corrected; use its width, or compare
    intervals of equal N.
    """
    rng = np.random.default_rng(rng)
    columns: list[NDArray[Any]] = [np.asarray(array) for array in arrays]
    if not columns or any(column.ndim == 0 or not len(column) for column in columns):
        raise WinnowError("bootstrap got an empty array: give one row or more in each")
    code = None if strata is None else grouped.codes(strata, rows=len(columns[0]))
    paired = paired or code is not None
    if paired and len({len(column) for column in columns}) > 1:
        raise WinnowError(f"paired arrays have {[len(c) for c in columns]} rows: give as many in each")
    if n < 2 or not 0 < level < 1:
        raise WinnowError(
            f"bootstrap of {n} resamplings at level {level}: give 2 or more, and a level in (0, 1)"
        )
    values = np.empty(n)
    total = len(columns[0])
    draw = partial(rng.integers, 0, total, total) if code is None else partial(_within, code, rng)
    for i in range(n):
        if paired:
            drawn = draw()
            values[i] = statistic(*(column[drawn] for column in columns))
        else:
            values[i] = statistic(*(column[rng.integers(0, len(column), len(column))] for column in columns))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    if code is not None:
        more = _lost(code) * (high - low) / 2
        low, high = low - more, high + more
    return float(low), float(high)


def _lost(code: Ints) -> float:
    """By how much too narrow intervals are that draw rows within their groups: n rows spread around their own mean as
    n - 1 do around the true one. A row alone in its group has no spread to tell."""
    sizes = np.bincount(code)
    many = sizes[sizes > 1]
    return math.sqrt(many.sum() / (many - 1).sum()) - 1 if len(many) else 0.0


def _within(code: Ints, rng: np.random.Generator) -> Ints:
    """For each row one row of its own group, drawn at random: [N] -> [N]."""
    order = np.argsort(code, kind="stable")
    sizes = np.bincount(code)
    starts = np.cumsum(sizes) - sizes
    return order[starts[code] + (rng.random(len(code)) * sizes[code]).astype(np.int64)]


def mean_over(values: ArrayLike, groups: ArrayLike, n: int = 1000, rng: np.random.Generator | int = 0) -> Interval:
    """Mean of values [N] with a 95 % bootstrap interval that resamples whole groups [N].

    What one prompt's images have in common is no new evidence, so prompts are drawn, not images. A single group
    has no spread between groups: its rows are drawn instead.
    """
    values = vector("values", values)
    code = grouped.codes(groups, rows=len(values))
    if code.max() == 0:
        code = np.arange(len(values))
    sums, sizes = np.bincount(code, values), np.bincount(code)
    low, high = bootstrap(lambda s, c: float(s.sum() / c.sum()), sums, sizes, n=n, rng=rng, paired=True)
    value = float(values.mean())
    return Interval(value, min(low, value), max(high, value))


def mean_within(values: ArrayLike, strata: ArrayLike) -> Interval:
    """Mean of values [N] with the 95 % interval of rows drawn anew within their own stratum [N], in closed form.

    For what is measured of a fixed set of prompts, as `bootstrap` with strata. A row alone in its stratum adds nothing
    to the width.
    """
    values = vector("values", values)
    code = grouped.codes(strata, rows=len(values))
    off, sizes = values - grouped.means(code, values)[code], grouped.sizes(code)
    half = Z * math.sqrt(float(np.sum(off**2 * (sizes / np.maximum(sizes - 1, 1))))) / len(values)
    value = float(values.mean())
    return Interval(value, value - half, value + half)


def wins(a: ArrayLike, b: ArrayLike) -> Float64s:
    """1 where a beats b, 1/2 for a tie, else 0: scores [N], [N] -> [N]. The mean is the win rate."""
    a = vector("scores a", a)
    b = vector("scores b", b, rows=len(a))
    return (a > b) + (a == b) / 2


def proportion(k: float, n: int) -> Interval:
    """k of n with its 95 % Wilson score interval (Wilson 1927), within [0, 1] also at k = 0 and k = n."""
    if not (n >= 1 and 0 <= k <= n):
        raise WinnowError(f"{k} of {n} is no proportion: give n of 1 or more and k in 0..n")
    z, p = Z, k / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Interval(p, min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half)))


def _root(cov: Floats) -> Float64s:
    values, vectors = np.linalg.eigh((cov + cov.T) / 2)
    if values[0] < -1e-6 * max(values[-1], 1e-300):
        raise WinnowError(
            f"covariance has an eigenvalue of {values[0]:.3g}: give a covariance, not a scatter of "
            "unlike features"
        )
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
