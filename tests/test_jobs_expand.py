"""Prompts from templates and from a language model, and through the same curation as all others."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from conftest import rows, sets
from endpoint import Handler, Server
from hypothesis import given
from hypothesis import strategies as st

from jobs import recipe as recipes
from jobs.language.expand import Expand, filled, question, strings
from jobs.prompts import prompts
from jobs.run import Run
from schemas.errors import WinnowError
from storage.layout import create

LISTS = {"colour": ["red", "green"], "animal": ["fox", "cat", "owl"], "place": ["snow", "a garden"]}


def texts_of(**settings: object) -> list[str]:
    return [text for text, _ in filled(Expand.model_validate(settings), 0)]


def test_every_combination_once() -> None:
    made = texts_of(templates=["a {colour} {animal} in {place}", "{animal} and {animal}", "a plain {}"], lists=LISTS)
    want = [f"a {c} {a} in {p}" for c, a, p in itertools.product(*LISTS.values())]
    assert made == [*want, *(f"{a} and {a}" for a in LISTS["animal"]), "a plain {}"]


@given(st.integers(1, 17), st.integers(0, 2**40))
def test_a_sample_is_drawn_without_replacement_by_the_seed(n: int, seed: int) -> None:
    settings = Expand(templates=["a {colour} {animal} in {place}", "two {animal}s"], lists=LISTS)
    whole = filled(settings, 0)
    some = filled(settings.model_copy(update={"n": n}), seed)
    assert len(some) == min(n, 15) == len(set(some)) and set(some) <= set(whole)
    assert some == sorted(some, key=whole.index) == filled(settings.model_copy(update={"n": n}), seed)


def test_each_combination_is_as_likely() -> None:
    settings = Expand(templates=["a {colour} {animal}", "{animal}"], lists=LISTS, n=3)
    drawn = Counter(text for seed in range(3000) for text, _ in filled(settings, seed))
    assert len(drawn) == 9 and all(abs(n - 1000) < 110 for n in drawn.values()), drawn  # 4 deviations


def test_a_sample_of_more_combinations_than_fit_in_memory() -> None:
    lists = {name: [f"{name}{i}" for i in range(1000)] for name in "abcdef"}
    made = texts_of(templates=["{a} {b} {c} {d} {e} {f}"], lists=lists, n=50)
    assert len(set(made)) == 50 and len({text.split()[0] for text in made}) > 40
    with pytest.raises(WinnowError, match="set prompts.expand.n to fewer"):
        texts_of(templates=["{a} {b} {c}"], lists=lists)
    with pytest.raises(WinnowError, match=r"\{d\} of 'x \{d\}' has no words; prompts.expand.lists has a"):
        texts_of(templates=["x {d}"], lists={"a": ["b"], "d": []})


@pytest.mark.parametrize(
    ("reply", "want"),
    [
        ('["a cat", "a dog", "a hen"]', ["a cat", "a dog"]),
        ('Here: ```json\n["a cat"]\n```', ["a cat"]),
        ('{"prompts": ["a cat", " ", "a dog"]}', ["a cat", "a dog"]),
        ('[1, 2] and ["a [red] cat"]', ["a [red] cat"]),
    ],
)
def test_variants_are_read_from_what_models_say(reply: str, want: list[str]) -> None:
    assert strings(reply, 2) == want[:2] or strings(reply, 3)[:2] == want


@pytest.mark.parametrize("reply", ["", "a cat", "[]", '["a cat", ', '["a", 3]', '{"a": "b"}', "[[]]"])
def test_what_is_no_list_of_texts_is_said(reply: str) -> None:
    with pytest.raises(ValueError, match="no JSON list of texts"):
        strings(reply, 3)


def test_the_question_holds_the_prompt_as_data() -> None:
    asked = question('a "red"\n fox <|end|>', 3)
    assert json.loads(re.findall(r"^BEGIN\n(.*)\nEND$", asked, re.MULTILINE)[0]) == 'a "red"\n fox <|end|>'
    assert "<|" not in asked and "3 new prompts" in asked


BASE = [f"a {colour} {thing} on a wooden table" for colour in ("red", "green", "blue") for thing in ("cup", "violin")]


def a_run(tmp_path: Path, server: Server, **changes: object) -> Run:
    (tmp_path / "p.txt").write_text("\n".join(BASE))
    judge = {"kind": "endpoint", "url": server.url, "model": "m", "in_flight": 1}
    settings = {"source": str(tmp_path / "p.txt"), "near": None, "least_clarity": 0.5, "judge": judge} | changes
    return Run(create(tmp_path / "store"), recipes.override(recipes.load("embedded"), sets({"prompts": settings})))


def writes_and_judges(handler: Handler, prompt: str, number: int) -> None:
    """Two variants of each prompt, one of them unclear, and one that the source has already."""
    asked = handler.server.seen[-1][2]["messages"][0]["content"]
    if "Write 3 new prompts" in asked:
        if "red violin" in prompt:
            handler.say("I would rather not.")
        else:
            handler.say(json.dumps([f"{prompt} at night", f"muddle {prompt}", BASE[0]]))
    else:
        handler.good(2 if "muddle" in prompt or "green cup on" in prompt else 9)


def test_variants_go_through_the_same_curation(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    server.act = writes_and_judges
    run = a_run(tmp_path, server, expand={"variants": 3})
    prompts(run)
    made = rows(run.store, "SELECT * FROM prompts")
    number = {row["text"]: row["prompt_id"] for row in made if row["kept"]}
    # The unclear prompt has no variants, nor has the one of which the model gave none.
    fathers = [text for text in BASE if "green cup" not in text and "red violin" not in text]
    assert {row["text"] for row in made if row["kept"]} == {*BASE, *(f"{t} at night" for t in fathers)} - {BASE[2]}
    assert "1 of 5 prompts got no variants" in capsys.readouterr().err
    for row in made:
        if row["text"].startswith("muddle"):
            assert row["reason"] == "unclear: 0.20 < 0.5"
        elif row["text"] not in BASE:
            father = row["text"].removesuffix(" at night")
            assert row["source"] == f"expanded from {number[father]}"
            # A variant is no stranger to who knew its father.
            assert row["split"] == next(other["split"] for other in made if other["text"] == father and other["kept"])
    again = [row for row in made if row["text"] == BASE[0] and not row["kept"]]
    assert len(again) == 4 and {row["reason"] for row in again} == {f"duplicate of '{BASE[0]}'"}
    assert {row["split"] for row in made if row["kept"]} == {"train", "eval"}
    # Judged once each: six of the source, and two variants of each of four. Asked for variants once each: five.
    asked = rows(run.store, "SELECT task, count(*) AS n, count(problem) AS bad FROM answers GROUP BY task ORDER BY 1")
    assert asked == [{"task": "expand", "n": 5, "bad": 1}, {"task": "judge", "n": 14, "bad": 0}]
    assert server.asked.total() == 19
    prompts(run)
    assert server.asked.total() == 19


def test_templates_alone(tmp_path: Path) -> None:
    expand = {"templates": ["a {colour} {animal} in {place}"], "lists": LISTS}
    changes = {"prompts": {"source": None, "near": None, "expand": expand}}
    run = Run(create(tmp_path / "store"), recipes.override(recipes.load("embedded"), sets(changes)))
    prompts(run)
    made = rows(run.store, "SELECT text, source, kept FROM prompts")
    assert {row["text"] for row in made if row["kept"]} == {
        f"a {c} {a} in {p}" for c, a, p in itertools.product(*LISTS.values())
    }
    assert {row["source"] for row in made} == {"template: a {colour} {animal} in {place}"}
    prompts(run, keep=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"source": None}, "prompts.source is null"),
        ({"expand.variants": 3}, "prompts.expand.variants needs a language model; set prompts.judge"),
        ({"expand.templates": ["a {cat}"]}, "{cat} of 'a {cat}' has no words; prompts.expand.lists has none"),
        ({"balance": {"column": "Category"}}, "set prompts.keep, or balance to null"),
        ({"balance": {}, "keep": 9}, "needs one of column and rules"),
        ({"balance": {"column": "c", "rules": {"a": "b"}}, "keep": 9}, "needs one of column and rules"),
        ({"balance": {"rules": {"a": "("}}, "keep": 9}, "rule 'a': '(' is no regular expression"),
        ({"encoder": "open_klip:x"}, "text encoder 'open_klip:x': unknown; did you mean 'open_clip'"),
    ],
)
def test_settings_that_do_not_fit_are_refused_at_once(changes: dict[str, object], said: str) -> None:
    with pytest.raises(WinnowError) as caught:
        recipes.override(recipes.load("embedded"), sets({f"prompts.{key}": value for key, value in changes.items()}))
    assert said in str(caught.value)
