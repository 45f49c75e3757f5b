"""Drift between two sets of features: ours beside what is usually written with SciPy and scikit-learn.

Two clouds of float32 rows of an embedding's size, their centres apart. Theirs are the textbook formulas: the root of
the product of two covariances, whole kernel matrices, neighbours by brute force. The words say how far both figures
are apart.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from scipy.linalg import sqrtm
from sklearn.metrics import pairwise_distances
from sklearn.metrics.pairwise import polynomial_kernel, rbf_kernel
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize

from bench.peak import memory
from bench.ratio import Ratio, compare
from curate.drift import frechet_distance
from curate.manifold import manifold
from curate.mmd import cmmd, kid

ROWS, DIM, K = 5000, 768, 5
TURNS = 3


def rows(count: int, seed: int) -> np.ndarray:
    """Rows [count, DIM] float32, the odd seeds' a little off."""
    made = np.random.default_rng(seed).standard_normal((count, DIM), dtype=np.float32)
    return made + np.float32(0.1 * (seed % 2))


def gaussians(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """The covariances of both, and the distance without that of their roots."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    mine, other, apart = np.cov(x.T), np.cov(y.T), x.mean(axis=0) - y.mean(axis=0)
    return mine, other, float(apart @ apart + np.trace(mine) + np.trace(other))


def frechet_by_root(x: np.ndarray, y: np.ndarray) -> float:
    mine, other, apart = gaussians(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return apart - 2 * float(np.trace(sqrtm(mine @ other).real))


def frechet_by_eigenvalues(x: np.ndarray, y: np.ndarray) -> float:
    mine, other, apart = gaussians(x, y)
    return apart - 2 * float(np.sqrt(np.maximum(np.linalg.eigvals(mine @ other).real, 0)).sum())


def kid_by_kernels(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x.astype(np.float64), y.astype(np.float64)

    def within(side: np.ndarray) -> float:
        kernel = polynomial_kernel(side, degree=3, coef0=1)
        return (kernel.sum() - np.trace(kernel)) / (len(side) * (len(side) - 1))

    return float(within(x) + within(y) - 2 * polynomial_kernel(x, y, degree=3, coef0=1).mean())


def cmmd_by_kernels(x: np.ndarray, y: np.ndarray) -> float:
    x, y = (normalize(side.astype(np.float64)) for side in (x, y))
    own, cross, other = (rbf_kernel(*pair, gamma=1 / 200).mean() for pair in ((x, x), (x, y), (y, y)))
    return float(1000 * (own + other - 2 * cross))


def manifold_by_neighbours(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    reach_x, reach_y = (
        NearestNeighbors(n_neighbors=K, algorithm="brute").fit(side).kneighbors()[0][:, -1] for side in (x, y)
    )
    apart = pairwise_distances(x, y)
    inside = apart <= reach_y
    reached = apart <= reach_x[:, None]
    return np.array([inside.any(1).mean(), reached.any(0).mean(), inside.sum(1).mean() / K, inside.any(0).mean()])


def our_manifold(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    found = manifold(x, y, K)
    return np.array([found.inside.mean(), found.reached.mean(), found.density.mean(), found.covered.mean()])


def kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    return kid(x, y).value


def clip_distance(x: np.ndarray, y: np.ndarray) -> float:
    return cmmd(x, y).value


#: What is measured, ours, theirs, and by what theirs is made.
PAIRS: list[tuple[str, Callable[..., Any], Callable[..., Any], str]] = [
    ("Fréchet distance", frechet_distance, frechet_by_root, "scipy sqrtm"),
    ("Fréchet distance", frechet_distance, frechet_by_eigenvalues, "numpy eigvals"),
    ("KID", kernel_distance, kid_by_kernels, "scikit-learn kernels"),
    ("CMMD", clip_distance, cmmd_by_kernels, "scikit-learn kernels"),
    ("precision, recall, density, coverage", our_manifold, manifold_by_neighbours, "scikit-learn"),
]


def run() -> list[Ratio]:
    """Seconds against each, then the peak of memory beyond the rows themselves."""
    x, y, found = rows(ROWS, 0), rows(ROWS, 1), []
    for name, ours, theirs, by in PAIRS:
        apart = float(np.max(np.abs(ours(x, y) / theirs(x, y) - 1)))
        what = f"{ROWS} × {ROWS} of {DIM}; the figures differ by {apart:.0e} of theirs"
        found.append(compare(f"{name}, ours / {by}", what, partial(ours, x, y), partial(theirs, x, y), TURNS))
    for name, ours, theirs, by in PAIRS:
        found.append(memory(f"{name}, memory beside {by}", ours, theirs, rows, (ROWS, ROWS)))
    return found
