"""Diff: what changed from one round to another: recipe, model, kept samples, scores, drift, verdict."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.metrics import HEADLINES, half_width, judgement, name_of, shown
from jobs.summary import Source, main_arm, opened, summarise
from schemas.errors import WinnowError
from storage.layout import clean
from storage.snapshot import sealed_under

Round = tuple[str, int]  # arm and number


def diff(store: Path, before: str, after: str) -> list[str]:
    """Lines that tell what ``after`` has otherwise than ``before``: each a round ("2", of the arm that the guard
    judges) or "arm:round". WinnowError where there is no such round."""
    with opened(store) as source:
        summary = summarise(source)
        one, two = (_round(source, summary, name) for name in (before, after))
        lines = [f"{_named(one)} → {_named(two)}"]
        for part in (_recipe(source, one, two), _models(source, one, two), _kept(source, one, two),
                     _scores(source, one, two), _figures(summary, one, two)):  # fmt: skip
            lines += part
    return lines


def _round(source: Source, summary: dict[str, Any], text: str) -> Round:
    arm, _, number = text.rpartition(":")
    arm = arm or main_arm(summary) or ""
    known = "SELECT DISTINCT round FROM samples WHERE arm = $arm AND split = 'train' ORDER BY round"
    rounds = [row["round"] for row in source.rows(known, arm=arm)]
    if not number.isdecimal() or int(number) not in rounds:
        have = ", ".join(map(str, rounds)) or "none"
        raise WinnowError(f"round {text!r}: not in {source.store}; {arm or 'it'} has {have}; write 2 or arm:2")
    return arm, int(number)


def _named(one: Round) -> str:
    return f"{one[0]} round {one[1]}"


def _sealed(source: Source, one: Round) -> dict[str, Any]:
    """The recipe that the round was made under, as its last stage that there is says."""
    arm, number = clean(one[0]), one[1]
    for folder in (f"rounds/round-{number}/arm-{arm}", f"selections/round-{number}/selection-{arm}",
                   f"samples/round-{number}/arm-{arm}"):  # fmt: skip
        if (found := sealed_under(source.store, folder)) is not None:
            return found
    return {}


def _recipe(source: Source, one: Round, two: Round) -> Iterator[str]:
    old, new = _flat(_sealed(source, one)), _flat(_sealed(source, two))
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if not changed:
        yield "recipe: the same"
    for key in changed:
        yield f"recipe {key}: {old.get(key)!r} → {new.get(key)!r}"


def _flat(values: dict[str, Any], lead: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{lead}{key}.") if isinstance(value, dict) and value else {lead + key: value}
    return flat


def _models(source: Source, one: Round, two: Round) -> Iterator[str]:
    for what, sql in (
        ("images made by", "SELECT DISTINCT model AS said FROM samples WHERE arm = $arm AND round = $round AND "
                           "split = 'train'"),
        ("model trained", "SELECT model AS said FROM rounds WHERE arm = $arm AND round = $round"),
        ("verdict", "SELECT verdict || ': ' || reason AS said FROM rounds WHERE arm = $arm AND round = $round"),
    ):  # fmt: skip
        said = [
            ", ".join(sorted(row["said"] for row in source.rows(sql, arm=arm, round=number))) or "none yet"
            for arm, number in (one, two)
        ]
        yield f"{what}: {said[0]}" if said[0] == said[1] else f"{what}: {said[0]} → {said[1]}"


def _kept(source: Source, one: Round, two: Round) -> Iterator[str]:
    found = [
        source.rows(
            "SELECT count(*) AS n, count(*) FILTER (WHERE kept) AS kept, count(DISTINCT prompt_id) FILTER (WHERE kept) "
            "AS prompts, avg(weight) FILTER (WHERE kept) AS weight FROM selections JOIN samples USING (sample_id) "
            "WHERE selection = $arm AND selections.round = $round",
            arm=arm, round=number,
        )[0]
        for arm, number in (one, two)
    ]  # fmt: skip
    [shared] = source.rows(
        "SELECT count(DISTINCT prompt_id) AS prompts FROM "
        "(SELECT prompt_id FROM curated WHERE selection = $a AND round = $r) SEMI JOIN "
        "(SELECT prompt_id FROM curated WHERE selection = $b AND round = $s) USING (prompt_id)",
        a=one[0], r=one[1], b=two[0], s=two[1],
    )  # fmt: skip
    told = (f"{row['kept']:,} of {row['n']:,} samples, {row['prompts']:,} prompts" for row in found)
    yield f"kept: {' → '.join(told)}; {shared['prompts']:,} prompts in both"
    yield f"mean weight: {' → '.join(shown('', row['weight']) for row in found)}"


def _scores(source: Source, one: Round, two: Round) -> Iterator[str]:
    def means(which: Round) -> dict[str, float]:
        rows = source.rows(
            "SELECT scorer, avg(value) AS mean FROM selections JOIN scores USING (sample_id) WHERE kept AND "
            "selection = $arm AND selections.round = $round GROUP BY scorer",
            arm=which[0], round=which[1],
        )  # fmt: skip
        return {row["scorer"]: row["mean"] for row in rows}

    old, new = means(one), means(two)
    for scorer in sorted(old.keys() | new.keys()):
        yield f"mean {scorer} of the kept: {shown('', old.get(scorer))} → {shown('', new.get(scorer))}"


def _figures(summary: dict[str, Any], one: Round, two: Round) -> Iterator[str]:
    """Both models on the held-out prompts, and whether the change is beyond noise."""
    old, new = (
        next((row["metrics"] for row in summary["arms"].get(arm, {}).get("rounds", ()) if row["round"] == number), {})
        for arm, number in (one, two)
    )
    both = old.keys() & new.keys()
    if not both:
        yield "measured: not both of them; run 'winnow evaluate'"
    for metric in [*(name for name in HEADLINES if name in both), *sorted(both - {*HEADLINES})]:
        told = (f"{shown(metric, row['value'])}{_half(metric, row)}" for row in (old[metric], new[metric]))
        yield f"{name_of(metric)}: {' → '.join(told)}, {judgement(metric, old[metric], new[metric])}"


def _half(metric: str, figure: dict[str, Any]) -> str:
    half = half_width(figure)
    return "" if half is None else f" ± {shown(metric, half, 3 if half >= 100 else 2)}"
