"""Stage ``prompts``: from a source of texts to curated prompts, split into training and held-out ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from curate.balance import OTHER, by_rules
from curate.prompts import Judge as Judging
from curate.prompts import curate, judge_by_rules
from curate.wording import normalise
from jobs import sources
from jobs.language.expand import Expand, filled, variants
from jobs.language.judge import Judge, judging, model
from jobs.language.texts import TextEncoderName, text_encoder
from jobs.progress import say
from jobs.run import Run
from jobs.sources import label
from jobs.stage import complete, units
from schemas.errors import WinnowError
from schemas.ids import digest, sample_id
from schemas.settings import Settings
from schemas.tables import TABLES
from storage.layout import create
from storage.snapshot import sealed_under

GOLDEN = (5**0.5 - 1) / 2
LONE = re.compile("[\ud800-\udfff]")  # half a character: JSON can hold it, UTF-8 cannot
TOKENS = 100  # of an answer, for each variant that it is to hold


class Balance(Settings):
    """What is kept is shared over categories: those in a ``column`` of the source, or those of ``rules``, name to
    regular expression, of which the first that a prompt holds counts. What has none is ``other``."""

    column: str | None = None
    rules: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_way(self) -> Balance:
        if (self.column is None) == (not self.rules):
            raise WinnowError("prompts.balance: needs one of column and rules; set one of them, or balance to null")
        by_rules([], self.rules)
        return self


class Prompts(Settings):
    """``source``: see `jobs.sources.rows`; null for templates alone. ``limit``: texts that are read of it at most.
    ``benchmark``: a source of prompts that must not be trained on. ``keep``: how many prompts stay, the nearest to as
    many k-means centres; null keeps all that pass. ``encoder``: of the space for that, see `jobs.language.texts`; null
    for features that need no model. ``held_out``: the share of them that is for evaluation only. ``near``: similarity
    of near duplicates, null to allow them."""

    source: str | None = "embedded"
    column: str = "text"
    limit: int | None = Field(None, ge=1)
    benchmark: str | None = None
    keep: int | None = Field(None, ge=2)
    held_out: float = Field(0.2, gt=0, le=0.5)
    longest: int = Field(1000, ge=1)
    least_clarity: float = Field(0.5, ge=0, le=1)
    least_specificity: float = Field(0.25, ge=0, le=1)
    near: float | None = Field(0.92, gt=0, le=1)
    judge: Judge = Judge()
    encoder: TextEncoderName | None = None
    balance: Balance | None = None
    expand: Expand = Expand()

    @model_validator(mode="after")
    def _fits_together(self) -> Prompts:
        if self.balance and self.keep is None:
            raise WinnowError("prompts.balance shares what is kept; set prompts.keep, or balance to null")
        if self.expand.variants and self.judge.kind == "rules":
            raise WinnowError("prompts.expand.variants needs a language model; set prompts.judge")
        if self.source is None and not self.expand.templates:
            raise WinnowError("prompts.source is null; set it, or prompts.expand.templates")
        return self

    def spec(self) -> dict[str, Any]:
        """What of the settings decides the prompts: not how patiently a judge is asked, but all that it says."""
        judge = None if self.judge.kind == "rules" else model(self.judge).revision
        encoder = text_encoder(self.encoder).revision if self.encoder else None
        plain = self.model_dump(mode="json", exclude={"judge", "encoder"})
        return plain | {"judge": judge, "encoder": encoder}


@dataclass(frozen=True)
class Text:
    """A text to be curated. ``source``: where it comes from, for people. ``parent``: the place in the list of the text
    that it is a variant of. ``category``: "" where it has none."""

    text: str
    source: str
    category: str = ""
    parent: int | None = None


def texts(settings: Prompts, seed: int) -> list[Text]:
    """The texts of the source, and those of the templates."""
    column = settings.balance.column if settings.balance else None
    found = []
    if settings.source is not None:
        name = label(settings.source)
        read_ = sources.rows(settings.source, settings.column, column, settings.limit)
        found = [Text(text, name, category.strip()) for text, category in read_]
    return found + [Text(text, f"template: {template}") for text, template in filled(settings.expand, seed)]


def _whole(text: str) -> str:
    return LONE.sub("\ufffd", text)


def benchmark(settings: Prompts) -> list[str]:
    """The texts that must not be trained on."""
    return sources.read(settings.benchmark, settings.column) if settings.benchmark else []


def rows(settings: Prompts, seed: int, given: Sequence[Text], run: Run | None = None) -> pa.Table:
    """The prompts table of the given texts: every distinct one once, kept or with the reason why not. A language
    model's answers are kept in the store of ``run``."""
    given = list(given)
    judge: Judging = judge_by_rules
    if settings.judge.kind != "rules":
        assert run is not None
        judge = judging(run, settings.judge)
    options: dict[str, Any] = {
        "longest": settings.longest,
        "least_clarity": settings.least_clarity,
        "least_specificity": settings.least_specificity,
        "near": settings.near,
        "benchmark": benchmark(settings),
        "judge": judge,
        "seed": seed % 2**31,
    }
    if settings.expand.variants:
        assert run is not None
        good = [i for i, prompt in enumerate(curate([one.text for one in given], **options)) if prompt.kept]
        writer = model(settings.judge, max(settings.judge.longest, TOKENS * settings.expand.variants))
        more = variants(run, settings.expand, writer, [normalise(given[i].text) for i in good], seed)
        given += [Text(text, "", given[good[at]].category, good[at]) for text, at in more]
    if settings.encoder:
        options["embed"] = text_encoder(settings.encoder).encode
    categories = None
    if settings.balance:
        categories = [one.category or OTHER for one in given]
        if settings.balance.rules:
            categories = by_rules([normalise(one.text) for one in given], settings.balance.rules)
    curated = curate([one.text for one in given], keep=settings.keep, categories=categories, **options)
    kept = [i for i, prompt in enumerate(curated) if prompt.kept]
    root = [i if one.parent is None else one.parent for i, one in enumerate(given)]
    held_out = _held_out([root[i] for i in kept], settings.held_out, seed)
    if len(held_out) == len({root[i] for i in kept}):
        reasons = "; ".join(sorted({p.reason for p in curated if p.reason})[:3]) or "they are variants of one text"
        raise WinnowError(
            f"prompts source {settings.source!r}: {len(kept)} of {len(given)} prompts pass, 2 are needed; "
            f"reasons were such as {reasons}"
        )
    # A dropped text may repeat: its place keeps the rows apart, so that every reason is kept.
    numbers = [sample_id(["prompt", p.text if p.kept else [p.text, i]]) for i, p in enumerate(curated)]
    made = []
    for i, (one, prompt) in enumerate(zip(given, curated, strict=True)):
        made.append(
            {
                "prompt_id": numbers[i],
                "text": _whole(prompt.text),
                "source": _whole(one.source) if one.parent is None else f"expanded from {numbers[one.parent]}",
                "split": "eval" if root[i] in held_out else "train",
                "cluster": prompt.cluster if prompt.cluster >= 0 else None,
                "kept": prompt.kept,
                "reason": _whole(prompt.reason) or None,
                "category": _whole(categories[i]) if categories else None,
            }
        )
    return pa.Table.from_pylist(made, schema=TABLES["prompts"].schema)


def _held_out(families: list[int], share: float, seed: int) -> set[int]:
    """The families, a text and its variants, that are for evaluation only: a variant of what was trained on would be
    no stranger to the model."""
    distinct = list(dict.fromkeys(families))
    # Steps of the golden ratio through the source fall evenly on whatever blocks and periods it has, so that what is
    # held out is a fair picture of what is trained on.
    places = (np.arange(len(distinct)) * GOLDEN + seed % 2**31 / 2**31) % 1
    return {distinct[at] for at in places.argsort()[: max(1, round(share * len(distinct)))]}


def prompts(run: Run, keep: bool = False) -> None:
    """Curate the recipe's source once a store. With ``keep``, prompts that the store has stay as they are."""
    create(run.store)
    settings = run.recipe.prompts
    name = label(settings.source) if settings.source is not None else "templates"
    if keep:
        sql = "SELECT min(source) AS first, count(*) AS n, count(*) FILTER (source = $name) AS mine FROM prompts"
        held = run.query(f"{sql} WHERE kept", name=name).to_pylist()[0]
        if held["n"]:
            if not held["mine"] and settings.source is not None:
                say(f"prompts: the {held['n']} that the store has, from {held['first']}, not {settings.source}")
            for key in _changed(run):
                say(f"prompts: prompts.{key} has changed since; the store keeps the prompts that it has")
            return
    seed = run.seed("prompts")
    given = texts(settings, seed)
    content = [digest(sorted([one.text, one.category] for one in given))]
    if settings.benchmark:
        content.append(digest(sorted(benchmark(settings))))
    one = pa.table({"sample_id": pa.array([seed])})
    spec = ["prompts", settings.spec(), content, run.recipe.seed]
    work = units("prompts", {}, one, 1, spec)
    complete(run, "prompts", "prompts", work, lambda: lambda _: rows(settings, seed, given, run))


def _changed(run: Run) -> list[str]:
    """The settings that are not those under which the store's prompts were sealed, the source aside."""
    try:
        before = (sealed_under(run.store, "prompts") or {}).get("prompts", {})
    except WinnowError:  # an old snapshot is damaged, which verify tells: the rounds need the newest alone
        return []
    now = run.recipe.model_dump(mode="json")["prompts"]
    return [key for key in now if before and key != "source" and before.get(key) != now[key]]


def chosen(run: Run, split: str, n: int | None) -> pa.Table:
    """``n`` kept prompts of a split (prompt_id, text); training rounds go on where the last one stopped."""
    found = run.query(
        "SELECT prompt_id, text FROM prompts WHERE kept AND split = $split ORDER BY prompt_id", split=split
    )
    if not found.num_rows:
        raise WinnowError(f"prompts: the store has no kept {split} prompts; run 'winnow prompts' first")
    n = min(n or found.num_rows, found.num_rows)
    start = (run.round - 1) * n if split == "train" and run.round > 0 else 0
    return found.take(np.arange(start, start + n) % found.num_rows)
