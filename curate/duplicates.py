"""Near duplicates, kept greedily: the first of each kind stays, whatever resembles a kept row goes.

So every dropped row is near to the row that it is said to double, which chains of neighbours do not promise.
"""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Sequence

import faiss
import numpy as np
from numpy.typing import ArrayLike, NDArray

from curate.arrays import Float64s, Ints, matrix
from curate.rows import exact, lengths
from schemas.errors import WinnowError

Shingles = NDArray[np.uint64]

BLOCK = 1024
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+")  # scripts without spaces: a word a sign
PERMUTATIONS = 128


def by_vector(features: ArrayLike, threshold: float, order: ArrayLike | None = None) -> tuple[Ints, Float64s]:
    """Which kept row each row doubles, by cosine similarity of features [N, D] >= threshold (to 1e-6).

    order: row indices [N], first the row to keep among duplicates; default as they come.
    Returns the row doubled [N], -1 where the row is kept, and the similarity to it [N] (0 where kept).
    Exact (flat search among the kept rows), in memory for the kept rows and one block.
    """
    x = matrix("features", features)
    _share("threshold", threshold)
    length = lengths(x, "drop that sample")
    least = threshold - 1e-6  # equal rows come to 1 only within float32
    order = np.arange(len(x)) if order is None else np.asarray(order)
    twin = np.full(len(x), -1, dtype=np.int64)
    likeness = np.zeros(len(x))
    index, kept = faiss.IndexFlatIP(x.shape[1]), np.empty(0, dtype=np.int64)
    for start in range(0, len(order), BLOCK):
        rows = order[start : start + BLOCK]
        block = exact(x[rows], length[rows]).astype(np.float32)
        if index.ntotal:
            near, place = index.search(block, 1)
            best, place = near[:, 0], place[:, 0]
            hit = best >= least
            twin[rows[hit]], likeness[rows[hit]] = kept[place[hit]], best[hit]
        within = block @ block.T
        for i, row in enumerate(rows):
            if twin[row] < 0:
                later = i + 1 + np.flatnonzero((within[i, i + 1 :] >= least) & (twin[rows[i + 1 :]] < 0))
                twin[rows[later]], likeness[rows[later]] = row, within[i, later]
        alive = twin[rows] < 0
        index.add(block[alive])
        kept = np.concatenate([kept, rows[alive]])
    return twin, np.minimum(likeness, 1.0)


def by_text(texts: Sequence[str], threshold: float) -> tuple[Ints, Float64s]:
    """Which earlier kept text each text doubles, by Jaccard similarity of runs of 1 to 3 words >= threshold.

    Returns the text doubled [N], -1 where kept, and the similarity [N] (0 where kept). Case and punctuation
    do not count. Candidates come from MinHash (Broder 1997) in bands, which overlook a pair at the threshold
    with a chance of about 1 %, and are then compared exactly, so no text is dropped by chance.
    """
    index = _TextIndex(threshold)
    twin, likeness = np.full(len(texts), -1, dtype=np.int64), np.zeros(len(texts))
    for i, text in enumerate(texts):
        shingles = _shingles(text)
        twin[i], likeness[i] = index.find(shingles)
        if twin[i] < 0:
            index.add(i, shingles)
    return twin, likeness


def match_text(texts: Sequence[str], known: Sequence[str], threshold: float) -> tuple[Ints, Float64s]:
    """The known text most like each text, found and measured as by `by_text`: indices [N], -1 where none
    reaches the threshold, and similarities [N]."""
    index = _TextIndex(threshold)
    for j, text in enumerate(known):
        index.add(j, _shingles(text))
    found = [index.find(_shingles(text)) for text in texts]
    return np.array([j for j, _ in found], dtype=np.int64), np.array([s for _, s in found], dtype=np.float64)


class _TextIndex:
    """Texts by their MinHash signature, cut into bands of r values; texts that share a band are candidates.

    r is the largest that finds a pair at the threshold with a chance of 99 %: 1 - (1 - threshold^r)^(128/r).
    """

    def __init__(self, threshold: float) -> None:
        _share("threshold", threshold)
        r = max(
            r for r in (1, 2, 4, 8, 16) if r == 1 or 1 - (1 - threshold**r) ** (PERMUTATIONS // r) >= 0.99
        )
        rng = np.random.default_rng(0)
        odd = rng.integers(0, 2**64, 2 * PERMUTATIONS + r, dtype=np.uint64) | np.uint64(1)
        self.factors, self.mixers, self.fold = np.split(odd, [PERMUTATIONS, 2 * PERMUTATIONS])
        self.threshold = threshold
        self.shingles: dict[int, Shingles] = {}
        self.buckets: defaultdict[int, list[int]] = defaultdict(list)

    def add(self, i: int, shingles: Shingles) -> None:
        self.shingles[i] = shingles
        for band in self._bands(shingles):
            self.buckets[band].append(i)

    def find(self, shingles: Shingles) -> tuple[int, float]:
        """The most similar text at or above the threshold, the first of equals, else (-1, 0)."""
        best, likeness = -1, 0.0
        for j in sorted({j for band in self._bands(shingles) for j in self.buckets.get(band, ())}):
            shared = len(np.intersect1d(shingles, self.shingles[j], assume_unique=True))
            similarity = shared / (len(shingles) + len(self.shingles[j]) - shared)
            if similarity >= self.threshold and similarity > likeness:
                best, likeness = j, similarity
        return best, likeness

    def _bands(self, shingles: Shingles) -> list[int]:
        if not len(shingles):
            return []
        hashes = shingles[:, None] * self.factors  # multiply, mix the high bits down, multiply again
        hashes = (hashes ^ (hashes >> np.uint64(29))) * self.mixers
        bands = (hashes.min(axis=0).reshape(-1, len(self.fold)) * self.fold).sum(axis=1, dtype=np.uint64)
        return (bands ^ np.arange(len(bands), dtype=np.uint64)).tolist()


def _shingles(text: str) -> Shingles:
    """Sorted hashes of the runs of 1, 2 and 3 words; the same in every process.

    Runs of 3 tell "a red three left of a green three" from its mirror, and a run that comes again counts
    again, for it may be the only difference.
    """
    word = np.array(
        [zlib.crc32(w.encode("utf-8", "replace")) for w in WORD.findall(text.casefold())], np.uint64
    )
    pair = (word[:-1] << np.uint64(32)) | word[1:]
    triple = pair[:-1] * np.uint64(0x9E3779B97F4A7C15) + word[2:]
    runs = np.sort(np.concatenate([word, pair, triple]))
    again = np.arange(len(runs)) - np.searchsorted(runs, runs)
    return np.unique(runs + again.astype(np.uint64) * np.uint64(0xD6E8FEB86659FD93))


def _share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise WinnowError(f"duplicate {name} is {value}: give a similarity above 0 and at most 1")
