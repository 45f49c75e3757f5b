"""Prompt curation, on made-up oddities and on prompts of real users where they lie beside the project."""

from __future__ import annotations

import csv
import itertools
import json
import re
import string
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate import prompts
from curate.clusters import representatives
from curate.duplicates import by_text, match_text
from curate.wording import clarity, defect, faults, normalise, specificity
from schemas.errors import WinnowError

DATA = Path(__file__).parents[2] / "shared" / "data" / "prompts"
COLOURS, DIGITS = ("red", "green", "blue", "white"), ("three", "seven", "eight", "nine")
CAPTIONS = [
    *(f"a {c} {d} on a {b} background" for c, d, b in itertools.product(COLOURS, DIGITS, COLOURS) if c != b),
    *(f"a {c} {d} left of a {b} {e}" for c, d, b, e in itertools.product(COLOURS, DIGITS, COLOURS, DIGITS)),
    "a cat", "a photo of a bench", "two dogs", "seven", "a mansion", "Paper with 2 + 2 = 5 on it.",
    'A man holding a sign that says "What is my name?"', "Дерево и лианы", "赤い猫",
]  # fmt: skip


def test_every_short_caption_is_kept() -> None:
    rows = prompts.curate(CAPTIONS)
    assert [row.text for row in rows] == CAPTIONS
    assert not [row for row in rows if not row.kept]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        (" \n\u200b , ", "empty"),
        ("a cat\0", r"U\+0000"),
        ("a \x1b[31mcat", r"U\+001B"),
        ("a \ud800 cat", r"U\+D800"),
        ("caf\ufffd in Paris", "lost in decoding"),
        ("1234 -- 5678", "no letters"),
        ("cat " * 300, "1199 characters, over 1000"),
        ("<https://i.mj.run/addfc-c81c/0_1.png> vintage photo of a man", "unclear.*links to a picture"),
        ("bee bee bee bee bee bee bee bee", "unclear.*says the same again"),
        ("Are you a candle? You are so hot.", "unclear.*talks to the reader"),
        ("Flying vehicle:3, magically:3, future:3, unique:2.5", "unclear.*mostly parameters"),
        ("Open circle eyeshadow palette with a", "unclear.*breaks off"),
        ("mlpf vgsn brltjk", "unclear.*no words of a language"),
        ("((((ugly)))), (((bad))), {{{{}}}}", "unclear.*more signs than letters"),
        ("masterpiece, best quality, 8k", "unspecific: 0.00 < 0.25"),
    ],
)
def test_a_dropped_prompt_says_why(text: str, said: str) -> None:
    row = prompts.curate([text])[0]
    assert not row.kept and row.cluster == -1
    assert re.search(said, row.reason), row.reason


@settings(deadline=None)
@given(st.text())
def test_judges_take_any_text(text: str) -> None:
    assert 0 <= clarity(text) <= 1 and 0 <= specificity(text) <= 1
    assert all(0 <= share < 1 for share in faults(text).values())
    assert normalise(normalise(text)) == normalise(text)
    defect(text)
    assert prompts.curate([text])[0].kept == (prompts.curate([text])[0].reason == "")


def test_specificity_grows_with_what_is_named() -> None:
    texts = ["a photo", "a cat", "a cat on a mat", "a black cat on a red mat beside a tall brass lamp"]
    assert np.all(np.diff([specificity(text) for text in texts]) > 0)


def test_duplicates_of_each_kind() -> None:
    long = "a castle on a hill above a misty lake at dawn with two ravens circling the highest of its towers"
    texts = [
        "A cat, on a mat", "a cat on a mat!", "a dog on a mat", long, f"{long} tonight",
        "DrawBench cat with a bowl", "drawbench CAT with a bowl.", "a cat  on a mat",
    ]  # fmt: skip
    rows = prompts.curate(texts, benchmark=["DrawBench cat with a bowl"])
    assert [row.kept for row in rows] == [True, False, True, True, False, False, False, False]
    assert rows[1].reason == "duplicate of 'A cat, on a mat'"
    assert rows[4].reason.startswith("near duplicate of 'a castle on a hill")
    assert rows[6].reason == "benchmark prompt: 'DrawBench cat with a bowl'"
    assert prompts.exact_duplicates(texts).tolist() == [-1, 0, -1, -1, -1, -1, 5, 0]
    assert prompts.blocklisted(["a cat", "an unseen dog"], ["a dog", "A CAT!"]).tolist() == [1, -1]


def test_a_benchmark_prompt_with_something_added_is_known() -> None:
    known = ["A squirrel gives an apple to a bird", "a photo of a bear", "an owl, on a bough, by a lake, at dawn"]
    texts = [
        "a squirrel gives an apple to a bird, bird feathers, by Durer, oil on canvas, trending, 8k, ultra sharp",
        "photo: A Squirrel gives an apple to a bird!",
        "a squirrel gives an apple to a bear",
        "A photo of a bear sitting in a car with leather seats",
        "the sign of an owl on a bough by a lake at dawn in fog and rain over hills of green grass and red sand",
        "an owl on a bough by a lake at dusk in fog and rain, hills",
    ]
    assert prompts.blocklisted(texts, known).tolist() == [0, 0, -1, -1, 2, -1]
    assert prompts.curate(texts, benchmark=known)[0].reason == f"benchmark prompt: '{known[0]}'"


def jaccard(a: str, b: str) -> float:
    def runs(text: str) -> Counter[str]:
        words = text.split()
        return Counter(" ".join(words[i : i + n]) for n in (1, 2, 3) for i in range(len(words) - n + 1))

    one, two = runs(a), runs(b)
    return (one & two).total() / (one | two).total()


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9])
def test_near_duplicates_are_those_of_the_double_loop(threshold: float) -> None:
    rng = np.random.default_rng(0)
    words = np.array(list(string.ascii_lowercase))
    texts = []
    for _ in range(60):
        base = rng.choice(words, rng.integers(5, 40))
        for _ in range(3):
            base = base.copy()
            base[rng.integers(len(base))] = rng.choice(words)
            texts.append(" ".join(base))
    twin, likeness = by_text(texts, threshold)
    kept = [i for i in range(len(texts)) if twin[i] < 0]
    for i, j in enumerate(twin):  # nothing is dropped without cause
        if j >= 0:
            assert j < i and j in kept
            assert likeness[i] == pytest.approx(jaccard(texts[i], texts[j])) and likeness[i] >= threshold
    pairs = [(i, j) for i, j in itertools.combinations(kept, 2) if jaccard(texts[i], texts[j]) >= threshold]
    assert len(pairs) <= 0.03 * len(texts)  # what MinHash may overlook
    found = match_text(texts, texts, threshold)
    np.testing.assert_array_equal(found[1], 1)
    assert all(texts[i] == texts[j] for i, j in enumerate(found[0]))


def test_diverse_chooses_exactly_as_many_as_asked() -> None:
    rng = np.random.default_rng(0)
    points = np.repeat(rng.normal(size=(40, 3)), 2, axis=0) + 1000
    for k in (1, 7, 39, 40, 500):
        cluster, chosen = representatives(points, k)
        assert len(chosen) == len(set(chosen)) == min(k, 40)
        assert len({points[i].tobytes() for i in chosen}) == min(k, 40)
        np.testing.assert_array_equal(cluster[chosen], np.arange(len(chosen)))
        np.testing.assert_array_equal(cluster[::2], cluster[1::2])
        np.testing.assert_array_equal(representatives(points, k)[1], chosen)
    with pytest.raises(WinnowError, match="give 1 or more"):
        representatives(points, 0)


def test_diverse_covers_every_mode() -> None:
    rng = np.random.default_rng(1)
    mode = np.repeat(np.arange(5), [200, 50, 20, 5, 1])
    cluster, chosen = representatives(rng.normal(size=(276, 8)) * 0.01 + np.eye(8)[mode], 40)
    assert set(mode[chosen]) == set(range(5))
    assert all(mode[i] == mode[chosen[cluster[i]]] for i in range(276))


def test_keep_chooses_across_subjects() -> None:
    texts = [f"a {c} {animal} in the {place}" for animal in ("cat", "dog", "horse") for c in COLOURS
             for place in ("garden", "kitchen", "street")]  # fmt: skip
    rows = prompts.curate(texts, keep=6)
    kept = [row for row in rows if row.kept]
    assert len(kept) == 6 and sorted(row.cluster for row in kept) == list(range(6))
    assert all("is represented by" in row.reason and row.cluster >= 0 for row in rows if not row.kept)
    assert rows == prompts.curate(texts, keep=6)


def test_hashed_tfidf() -> None:
    texts = ["a red cat", "a red cat on a mat", "volcano at night", "🙂"]
    vectors = prompts.hashed_tfidf(texts, dim=16)
    assert vectors.shape == (4, 16)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 1, 1, 0])
    like = vectors @ vectors.T
    assert like[0, 1] > like[0, 2] + 0.3
    np.testing.assert_array_equal(prompts.hashed_tfidf(texts, dim=16), vectors)
    assert prompts.hashed_tfidf(["alone"], dim=4).shape == (1, 4)


def test_a_judge_of_ones_own() -> None:
    seen: list[str] = []

    def judge(texts: list[str]) -> tuple[list[float], list[float]]:
        seen.extend(texts)
        return [9.0 if "cat" in text else 3.0 for text in texts], [8.0] * len(texts)

    rows = prompts.curate(["a cat", "a dog", "A cat.", ""], judge=judge, least_clarity=6, least_specificity=6)
    assert [row.reason for row in rows] == [
        "",
        "unclear: 3.00 < 6",
        "duplicate of 'a cat'",
        "unreadable: empty",
    ]
    assert seen == ["a cat", "a dog"]
    with pytest.raises(WinnowError, match="1 rows where 2"):
        prompts.curate(["a cat", "a dog"], judge=lambda texts: ([1.0], [1.0]))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"texts": []}, "no prompts came"),
        ({"texts": ["a cat", None]}, "prompt 1 is None"),
        ({"keep": 0}, "keep is 0"),
        ({"near": 1.5}, "threshold is 1.5"),
    ],
)
def test_bad_input_is_refused(settings: dict, said: str) -> None:
    with pytest.raises(WinnowError, match=said):
        prompts.curate(**{"texts": ["a cat", "a dog"]} | settings)


@pytest.mark.skipif(not DATA.is_dir(), reason="no real prompts beside the project")
def test_real_prompts() -> None:
    users = (DATA / "pickapic_train.txt").read_text(encoding="utf-8").splitlines()[::10]
    rows = prompts.curate(users)
    assert len(rows) == len(users)
    assert 0.9 < np.mean([row.kept for row in rows]) < 0.995
    geneval = [
        json.loads(line)["prompt"] for line in (DATA / "geneval.jsonl").read_text("utf-8").splitlines()
    ]
    assert all(row.kept for row in prompts.curate(geneval))
    with (DATA / "parti_prompts.tsv").open(encoding="utf-8", newline="") as file:
        parti = [row["Prompt"] for row in csv.DictReader(file, delimiter="\t")]
    assert np.mean([row.kept for row in prompts.curate(parti)]) > 0.99
    assert not any(row.kept for row in prompts.curate(parti, benchmark=parti))
