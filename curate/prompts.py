"""Prompt curation (RSIDiff, arXiv 2502.09963, section 3.2): clear, specific, diverse, none twice.

`curate` runs it all; every prompt that is dropped keeps its reason.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

from curate import duplicates
from curate.arrays import Float64s, Ints, vector
from curate.balance import balanced
from curate.wording import clarity, defect, faults, normalise, specificity
from schemas.errors import WinnowError

#: Clarity and specificity of each text; as a third, if any, why a text could not be judged, "" where it was.
Judge = Callable[[Sequence[str]], tuple[ArrayLike, ArrayLike] | tuple[ArrayLike, ArrayLike, Sequence[str]]]
Embed = Callable[[Sequence[str]], ArrayLike]

HELD = 7  # words of a benchmark's prompt that make it known within a longer text


@dataclass(frozen=True)
class Prompt:
    """text: as it is to be used. reason: why it was dropped, "" where kept. cluster: -1 where dropped before
    the clusters were formed, or where none were asked for."""

    text: str
    kept: bool
    reason: str
    cluster: int


def judge_by_rules(texts: Sequence[str]) -> tuple[Float64s, Float64s]:
    """Clarity and specificity of each text, [N] and [N] in [0, 1], by the rules of `curate.wording`."""
    return np.array([clarity(text) for text in texts]), np.array([specificity(text) for text in texts])


def exact_duplicates(texts: Sequence[str]) -> Ints:
    """The first text that says the same, -1 where it is the first itself: [N]. Case, spaces and punctuation
    do not count."""
    first: dict[str, int] = {}
    same = [first.setdefault(_key(text), i) for i, text in enumerate(texts)]
    return np.array([j if j < i else -1 for i, j in enumerate(same)], dtype=np.int64)


def near_duplicates(texts: Sequence[str], threshold: float = 0.9) -> Ints:
    """The earlier kept text that a text nearly repeats, -1 where kept: [N]. See `duplicates.by_text`.

    One word exchanged in n leaves a similarity of (n - 3) / (n + 1): at 0.9 prompts of fewer than 39 words
    that differ in one are two prompts, and longer ones the same prompt.
    """
    return duplicates.by_text(texts, threshold)[0]


def blocklisted(texts: Sequence[str], benchmark: Sequence[str], threshold: float = 0.8) -> Ints:
    """The benchmark text that a text equals, nearly repeats or holds, -1 where none: [N]. Training on such a prompt
    would make the benchmark's figures worthless.

    Held is one of HELD words or more that stands in the text word for word, as users do who add a style to it; a
    shorter one ("a photo of a bear") stands in many prompts that owe it nothing.
    """
    exact = {_key(text): j for j, text in reversed(list(enumerate(benchmark)))}
    near = duplicates.match_text(texts, benchmark, threshold)[0]
    starts: defaultdict[tuple[str, ...], list[tuple[list[str], int]]] = defaultdict(list)
    for key, j in exact.items():
        if len(words := key.split()) >= HELD:
            starts[tuple(words[:HELD])].append((words, j))

    def found(text: str, near: int) -> int:
        key = _key(text)
        if key in exact or near >= 0:
            return exact.get(key, near)
        words = key.split()
        for at in range(len(words) - HELD + 1):
            for other, j in starts.get(tuple(words[at : at + HELD]), ()):
                if words[at : at + len(other)] == other:
                    return j
        return -1

    return np.array([found(text, int(j)) for text, j in zip(texts, near, strict=True)], dtype=np.int64)


def hashed_tfidf(texts: Sequence[str], dim: int = 128, seed: int = 0) -> Float64s:
    """A text embedding that needs no model: tf-idf of hashed words and word pairs, cut to [N, dim] by SVD.

    Rows have length 1, or 0 where a text holds no word. Relative to this set of texts: the same text in
    another set has another vector.
    """
    if not texts or dim < 1:
        raise WinnowError(f"{len(texts)} texts in {dim} dimensions: give 1 or more of each")
    hashing = HashingVectorizer(n_features=2**16, ngram_range=(1, 2), token_pattern=duplicates.WORD.pattern,
                                norm=None, alternate_sign=False)  # fmt: skip
    counts = TfidfTransformer(sublinear_tf=True).fit_transform(hashing.transform(texts))
    vectors = np.zeros((len(texts), dim))
    if len(texts) > 1 and counts.nnz:
        size = min(dim, len(texts) - 1)
        vectors[:, :size] = TruncatedSVD(size, n_iter=2, random_state=seed).fit_transform(counts)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 1e-9)


def curate(
    texts: Sequence[str], *, keep: int | None = None, longest: int = 1000, least_clarity: float = 0.5,
    least_specificity: float = 0.25, near: float | None = 0.9, benchmark: Sequence[str] = (),
    benchmark_near: float = 0.8, judge: Judge = judge_by_rules, embed: Embed = hashed_tfidf,
    categories: Sequence[str] | None = None, seed: int = 0,
) -> list[Prompt]:  # fmt: skip
    """One Prompt for each text, in order; the cheap tests run first and the judge sees only what they leave.

    keep: how many to keep at most, chosen for diversity; None keeps all that pass. near: similarity of near
    duplicates, None allows them. judge: texts -> clarity [n] and specificity [n], in the unit of the least
    values; what it could not judge is dropped. embed: texts -> [n, D]. categories: one of
    each text; what is kept is then shared over them as evenly as they reach.
    """
    if not texts:
        raise WinnowError("no prompts came: give 1 or more")
    if keep is not None and keep < 1:
        raise WinnowError(f"keep is {keep}: keep 1 prompt or more")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise WinnowError(f"prompt {i} is {text!r}: give text")
    if categories is not None and len(categories) != len(texts):
        raise WinnowError(f"{len(categories)} categories for {len(texts)} prompts: give one for each")
    clean = [normalise(text) for text in texts]
    reason = [defect(text, longest) or "" for text in texts]
    cluster = np.full(len(texts), -1, dtype=np.int64)

    def left() -> list[int]:
        return [i for i, why in enumerate(reason) if not why]

    def drop(found: Ints, said: Callable[[int], str]) -> None:
        for i, j in zip(left(), found, strict=True):
            if j >= 0:
                reason[i] = said(int(j))

    if benchmark:
        found = blocklisted([clean[i] for i in left()], benchmark, benchmark_near)
        drop(found, lambda j: f"benchmark prompt: {_short(benchmark[j])}")
    rows = left()
    drop(exact_duplicates([clean[i] for i in rows]), lambda j: f"duplicate of {_short(clean[rows[j]])}")
    if rows := left():
        judged = judge([clean[i] for i in rows])
        clear, specific = (vector("judge's scores", column, rows=len(rows)) for column in judged[:2])
        problems = judged[2] if len(judged) == 3 else [""] * len(rows)
        for i, c, s, problem in zip(rows, clear, specific, problems, strict=True):
            if problem:
                reason[i] = f"not judged: {problem}"
            elif c < least_clarity:
                why = f" ({', '.join(faults(clean[i]))})" if judge is judge_by_rules else ""
                reason[i] = f"unclear: {c:.2f} < {least_clarity:g}{why}"
            elif s < least_specificity:
                reason[i] = f"unspecific: {s:.2f} < {least_specificity:g}"
    rows = left()
    if near is not None:
        drop(
            near_duplicates([clean[i] for i in rows], near),
            lambda j: f"near duplicate of {_short(clean[rows[j]])}",
        )
    rows = left()
    if keep is not None and rows:
        kinds = [categories[i] for i in rows] if categories is not None else [""] * len(rows)
        member, chosen, share = balanced(embed([clean[i] for i in rows]), kinds, keep, seed)
        cluster[rows] = member
        count = Counter(kinds)
        for i, c, kind in zip(rows, member, kinds, strict=True):
            why = f"{kind!r} keeps {share[kind]} of {count[kind]}: " if categories is not None else ""
            if c < 0:
                reason[i] = f"{why}no place is left for it"
            elif i != rows[chosen[c]]:
                reason[i] = f"{why}cluster {c} is represented by {_short(clean[rows[chosen[c]]])}"
    return [
        Prompt(*row) for row in zip(clean, [not why for why in reason], reason, cluster.tolist(), strict=True)
    ]


def _key(text: str) -> str:
    clean = normalise(text).casefold()
    return " ".join(duplicates.WORD.findall(clean)) or clean


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
