"""Distances to D_0: of each kind, beside the machine's own matrix product and beside the usual libraries.

Standard normal float32 rows of an SD latent's size; where a covariance is taken, of an embedding's. All are in memory
when the clock starts, and all use the threads that they use by themselves. What takes minutes is measured on fewer
rows, ours on the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import faiss
import numpy as np
import torch
from scipy.spatial.distance import cdist
from sklearn.covariance import LedoitWolf
from sklearn.metrics import pairwise_distances, pairwise_distances_chunked
from sklearn.neighbors import NearestNeighbors

from bench.peak import memory
from bench.ratio import Ratio, compare
from curate.distance import mean_distance, nearest
from curate.mahalanobis import mahalanobis

DIM, EMBEDDING, K = 16_384, 768, 10
ROWS, FEW = 5000, 200  # of samples; D_0 has ROWS
TURNS = 3


def rows(count: int, seed: int, dim: int = DIM) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dim), dtype=np.float32)


def embeddings(count: int, seed: int) -> np.ndarray:
    return rows(count, seed, EMBEDDING)


def by_product(x: np.ndarray, ref: np.ndarray) -> None:
    for i in range(0, len(x), 1000):
        x[i : i + 1000] @ ref.T


def by_torch(x: np.ndarray, ref: np.ndarray) -> np.ndarray:
    return torch.cdist(torch.from_numpy(x), torch.from_numpy(ref)).mean(1).numpy()


def by_scikit(x: np.ndarray, ref: np.ndarray) -> np.ndarray:
    return pairwise_distances(x, ref).mean(axis=1)


def by_scikit_chunks(x: np.ndarray, ref: np.ndarray) -> np.ndarray:
    chunks = pairwise_distances_chunked(x, ref, reduce_func=lambda part, _: part.mean(axis=1), working_memory=256)
    return np.concatenate(list(chunks))


def by_scipy(x: np.ndarray, ref: np.ndarray) -> np.ndarray:
    return cdist(x, ref).mean(axis=1)


def ours(x: np.ndarray, ref: np.ndarray) -> np.ndarray:
    return mean_distance(x, ref)


def our_cosine(x: np.ndarray, ref: np.ndarray) -> np.ndarray:
    return mean_distance(x, ref, "cosine")


def scikit_cosine(x: np.ndarray, ref: np.ndarray) -> np.ndarray:
    return pairwise_distances(x, ref, metric="cosine").mean(axis=1)


def scikit_mahalanobis(x: np.ndarray, ref: np.ndarray) -> np.ndarray:
    squared = LedoitWolf().fit(ref.astype(np.float64)).mahalanobis(x.astype(np.float64))
    return np.sqrt(squared * (len(ref) - 1) / len(ref))  # its covariance divides by N, ours by N - 1


def our_neighbours(x: np.ndarray, ref: np.ndarray) -> np.ndarray:
    return nearest(x, ref, K)[0]


def faiss_neighbours(x: np.ndarray, ref: np.ndarray) -> np.ndarray:
    index = faiss.IndexFlatL2(x.shape[1])
    index.add(ref)
    return index.search(x, K)[1]


def scikit_neighbours(x: np.ndarray, ref: np.ndarray) -> np.ndarray:
    return NearestNeighbors(n_neighbors=K, algorithm="brute").fit(ref).kneighbors(x, return_distance=False)


def torch_neighbours(x: np.ndarray, ref: np.ndarray) -> np.ndarray:
    return torch.cdist(torch.from_numpy(x), torch.from_numpy(ref)).topk(K, largest=False).indices.numpy()


def scipy_neighbours(x: np.ndarray, ref: np.ndarray) -> np.ndarray:
    return np.argsort(cdist(x, ref), axis=1)[:, :K]


def run() -> list[Ratio]:
    """Seconds against each, then the peak of memory beyond the rows themselves."""
    x, ref = rows(ROWS, 0), rows(ROWS, 1)
    some, found = x[:FEW], []
    truth = np.argsort(cdist(some, ref), axis=1)[:, :K]
    same = float(np.mean(np.sort(our_neighbours(some, ref), axis=1) == np.sort(truth, axis=1)))
    alike = float(np.mean(np.sort(our_neighbours(x, ref), axis=1) == np.sort(faiss_neighbours(x, ref), axis=1)))
    mean = f"mean L2, {{}} × {ROWS} of {DIM:,}; within {_off(ours, by_scipy, x, ref):.1g} of float64"
    near = f"{K}-NN, {{}} × {ROWS} of {DIM:,}; {alike:.2%} as FAISS, {same:.2%} as float64"
    fresh, known = embeddings(ROWS, 0), embeddings(ROWS, 1)
    cosine = f"{{}} × {ROWS} of {DIM:,}; within {_off(our_cosine, scikit_cosine, x, ref):.1g} of theirs"
    off = _off(mahalanobis, scikit_mahalanobis, fresh, known)
    shaped = f"{{}} × {ROWS} of {EMBEDDING}; within {off:.1g} of theirs"
    for name, own, other, what, most, others in (
        ("mean distance, ours / fp32 product", ours, by_product, mean, x, ref),
        ("mean distance, ours / torch.cdist", ours, by_torch, mean, x, ref),
        ("mean distance, ours / scikit-learn", ours, by_scikit, mean, x, ref),
        ("mean distance, ours / scikit-learn in chunks", ours, by_scikit_chunks, mean, x, ref),
        ("mean distance, ours / scipy cdist", ours, by_scipy, mean, some, ref),
        ("k-NN, ours / FAISS flat", our_neighbours, faiss_neighbours, near, x, ref),
        ("k-NN, ours / torch.cdist", our_neighbours, torch_neighbours, near, x, ref),
        ("k-NN, ours / scikit-learn", our_neighbours, scikit_neighbours, near, x, ref),
        ("k-NN, ours / scipy cdist", our_neighbours, scipy_neighbours, near, some, ref),
        ("mean cosine distance, ours / scikit-learn", our_cosine, scikit_cosine, cosine, x, ref),
        ("Mahalanobis distance, ours / scikit-learn", mahalanobis, scikit_mahalanobis, shaped, fresh, known),
    ):
        calls = partial(own, most, others), partial(other, most, others)
        found.append(compare(name, what.format(len(most)), *calls, TURNS))
    del x, ref, some, fresh, known
    all_rows, few_rows = (ROWS, ROWS), (FEW, ROWS)
    for name, own, other, make, counts in (
        ("mean distance, memory beside torch.cdist", ours, by_torch, rows, all_rows),
        ("mean distance, memory beside scikit-learn", ours, by_scikit, rows, all_rows),
        ("mean distance, memory beside scipy cdist", ours, by_scipy, rows, few_rows),
        ("k-NN, memory beside FAISS flat", our_neighbours, faiss_neighbours, rows, all_rows),
        ("k-NN, memory beside torch.cdist", our_neighbours, torch_neighbours, rows, all_rows),
        ("k-NN, memory beside scikit-learn", our_neighbours, scikit_neighbours, rows, all_rows),
        ("k-NN, memory beside scipy cdist", our_neighbours, scipy_neighbours, rows, few_rows),
        ("mean cosine distance, memory beside scikit-learn", our_cosine, scikit_cosine, rows, all_rows),
        ("Mahalanobis distance, memory beside scikit-learn", mahalanobis, scikit_mahalanobis, embeddings, all_rows),
    ):
        found.append(memory(name, own, other, make, counts))
    return found


def _off(own: Callable[..., Any], other: Callable[..., Any], x: np.ndarray, ref: np.ndarray) -> float:
    """How far ours is from theirs at most, as a share of it, in a few rows."""
    return float(np.max(np.abs(own(x[:FEW], ref) / other(x[:FEW], ref) - 1)))
