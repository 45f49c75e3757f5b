"""Publish: a curated selection, a whole store or a trained model, with its story, to the Hub or into a folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from jobs import cards
from jobs.models import LORA
from jobs.questions import QUESTIONS, Publish
from jobs.recipe import Recipe, override
from jobs.summary import Source, main_arm, opened, recipe_of, summarise
from jobs.upload import Item, item, summed, to_folder, to_hub
from schemas.errors import WinnowError
from storage.commit import Part
from storage.content import content_of
from storage.layout import MARKER
from storage.snapshot import numbers, told

WHAT = ("selection", "store", "model")
Setting = tuple[list[str], Any]  # the path of keys, and the value

# What tokens look like, also right after a line end as JSON writes it.
_SECRET = re.compile(
    r"(?:(?<![A-Za-z0-9])|\\[nrt])(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|github_pat_\w{20,}|gsk_[A-Za-z0-9]{20,}|AIza[A-Za-z0-9_-]{30,})"
)


def publish(
    store: Path, to: str, what: str = "selection", given: Recipe | None = None, sets: Sequence[Setting] = (),
    arm: str | None = None, round: int | None = None, folder: Path | None = None, public: bool = False,
    tag: str | None = None, unanswered: bool = False,
) -> str:  # fmt: skip
    """Publish ``what`` (of WHAT) to the repository ``to`` ("user/name"), or write the same files into ``folder``;
    returns where that is.

    By default that of the arm that the guard judges, of the round that it keeps, and with the answers of the recipe
    that the store was made with; ``given`` is another recipe of the same run, ``sets`` change single settings. With
    ``unanswered``, answers may be missing. Raises WinnowError where answers, shards or the model are missing, a file
    holds a token, and whatever ``to_hub`` and ``to_folder`` refuse.
    """
    _refuse_name(to)
    for keys, _ in sets:
        if keys[0] != "publish":
            raise WinnowError(f"--set {'.'.join(keys)}: the store was made with its own; set answers alone, publish.…")
    if what not in WHAT:
        raise WinnowError(f"--what {what!r}: unknown; allowed are {', '.join(WHAT)}")
    with opened(store) as source:
        summary = summarise(source)
        arm = arm or main_arm(summary)
        if arm is None:
            raise WinnowError(f"{store}: no arm has begun a round; run 'winnow round' first")
        if arm not in summary["arms"]:
            raise WinnowError(f"--arm {arm!r}: not in {store}; it has {', '.join(summary['arms']) or 'none'}")
        recipe = recipe_of(source, arm)
        if recipe is None:
            raise WinnowError(f"{store}: its recipe is of another Winnow; publish with that one")
        answers = _answers(recipe, given, sets, unanswered)
        if what == "store":
            _refuse_voters(source, answers)
        number = _round(source, what, arm, summary["arms"][arm]["kept_round"], round)
        items = summed(_files(cards.Story(source, summary, recipe, answers, arm, number, to), what))
    for one in items:
        _refuse_secrets(one)
    if folder:
        to_folder(items, folder)
        return str(folder)
    commit, name = to_hub(items, to, "model" if what == "model" else "dataset", not public, tag)
    return f"{to}: commit {commit[:12]}, tag {name}"


def _answers(recipe: Recipe, given: Recipe | None, sets: Sequence[Setting], unanswered: bool) -> Publish:
    """What people answered about a store that was made with ``recipe``."""
    if given and (given.model, given.prompts.source) != (recipe.model, recipe.prompts.source):
        raise WinnowError(
            f"recipe {given.name!r}: is of {given.model} and prompts from {given.prompts.source}, the store of "
            f"{recipe.model} and {recipe.prompts.source}; give the recipe of that run, or none"
        )
    answers = override(given or recipe, list(sets)).publish
    if (missing := answers.missing()) and not unanswered:
        more = f" (and {', '.join(missing[1:])})" if missing[1:] else ""
        raise WinnowError(
            f"publish.{missing[0]} is missing: {QUESTIONS[missing[0]]}{more}; write it into the recipe's table "
            f"'publish', give --set publish.{missing[0]}=…, or publish --unanswered, which the card then says"
        )
    return answers


def _refuse_name(to: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        if to.count("/") != 1:
            raise HFValidationError("it has no user, or more than one")
        validate_repo_id(to)
    except HFValidationError as error:
        raise WinnowError(f"--to {to!r}: no name of a repository ({error}); write user/name") from error


def _refuse_voters(source: Source, answers: Publish) -> None:
    """The table of votes says who voted what, and a store is a store again with all of its tables alone."""
    names = [row["voter"] for row in source.rows("SELECT DISTINCT voter FROM votes ORDER BY voter")]
    if names and not answers.voters:
        raise WinnowError(
            f"--what store: its votes name {len(names)} who voted; set publish.voters to true where they agree, or "
            "publish a selection, which holds no votes"
        )


def _round(source: Source, what: str, arm: str, kept: int | None, asked: int | None = None) -> int:
    """The round that is asked for, else the one that the guard keeps or, where it keeps none and no model is asked for,
    the newest."""
    if asked is None and what == "model" and kept == 0:
        raise WinnowError(f"--what model: the guard keeps the base, no round of {arm!r}; give --round to publish one")
    table = "rounds WHERE arm" if what == "model" else "selections WHERE selection"
    sql = f"SELECT DISTINCT round FROM {table} = $arm AND round > 0 ORDER BY round"
    rounds = [row["round"] for row in source.rows(sql, arm=arm)]
    if not rounds:
        raise WinnowError(f"{source.store}: arm {arm!r} has finished no round; run 'winnow round' first")
    if asked is None:
        return kept if kept in rounds else rounds[-1]
    if asked not in rounds and what == "store":  # of the others more can be said, see `_selection` and `_model`
        raise WinnowError(f"--round {asked}: not in {arm!r}; it has {', '.join(map(str, rounds))}")
    return asked


def _files(story: cards.Story, what: str) -> list[Item]:
    """The data, what the card shows, the card, and the recipe."""
    if what == "model":
        data = _model(story.source, story.arm, story.round)
        card, shown = cards.model(story, any(one.path == LORA for one in data))
    elif what == "store":
        configs = _store(story.source)
        data = [*_frame(story.source), *(one for config in configs for one in config.items)]
        card, shown = cards.dataset(story, what, configs)
    else:
        config = _selection(story.source, story.arm, story.round)
        data = config.items
        card, shown = cards.dataset(story, what, [config])
    answered = story.recipe.model_copy(update={"publish": story.answers})
    recipe = cards.anywhere(yaml.safe_dump(answered.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    return [item("README.md", card.encode()), item("recipe.yaml", recipe.encode()), *shown, *data]


def _selection(source: Source, arm: str, round: int) -> cards.Config:
    """The round's training shards, as they were sealed, under the names that the Hub's own have."""
    found = source.rows(
        "SELECT path, sha256, rows FROM shards WHERE selection = $arm AND round = $round AND format = 'parquet' "
        "ORDER BY path",
        arm=arm, round=round,
    )  # fmt: skip
    if not found:
        raise WinnowError(
            f"shards: round {round} of {arm!r} is not exported as Parquet; run 'winnow export' first, with parquet in "
            "export.formats"
        )
    items = [
        item(f"data/train-{i:05d}-of-{len(found):05d}.parquet", source.store / row["path"], row["sha256"])
        for i, row in enumerate(found)
    ]
    return cards.Config("default", ("data/train-*",), items, sum(row["rows"] for row in found))


def _store(source: Source) -> list[cards.Config]:
    """Every table as a config of its sealed parts (embeddings: one an encoder, since their lengths differ)."""
    groups: dict[str, list[Part]] = {}
    for part in source.snapshot.parts:
        encoder = re.search(r"/encoder-([^/]+)/", part.path)
        groups.setdefault(part.table + (f"-{encoder[1]}" if encoder else ""), []).append(part)
    configs = []
    for name, parts in sorted(groups.items()):
        folders = sorted({part.path.rpartition("/")[0] for part in parts})
        items = [item(part.path, source.store / part.path, part.sha256) for part in parts]
        configs.append(
            cards.Config(name, tuple(f"{folder}/*.parquet" for folder in folders), items, sum(p.rows for p in parts))
        )
    return configs


def _frame(source: Source) -> list[Item]:
    """What makes the published tables a store again: its marker and its snapshots up to the one that is published."""
    known = [number for number in numbers(source.store) if number <= source.snapshot.number]
    snapshots = [item(f"snapshots/{number:06d}.json", told(source.store, number, cards.anywhere)) for number in known]
    return [item(MARKER, source.store / MARKER), *snapshots]


def _model(source: Source, arm: str, round: int) -> list[Item]:
    found = source.rows("SELECT model FROM rounds WHERE arm = $arm AND round = $round", arm=arm, round=round)
    name = found[0]["model"] if found else ""
    if not name.startswith("models/"):
        raise WinnowError(
            f"--round {round}: {arm!r} trained no model there, or it is not judged yet; see "
            'winnow sql "SELECT arm, round, model FROM rounds"'
        )
    folder = source.store / name
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        raise WinnowError(f"{folder}: is missing; run 'winnow train' again, or restore it from a copy")
    rows = source.rows("SELECT revision FROM models WHERE model = $model", model=name)  # an older Winnow listed none
    if rows and content_of(folder) not in {row["revision"] for row in rows}:
        raise WinnowError(f"{name}: is not as it was trained; 'winnow verify' names the cure")
    return [item(path.relative_to(folder).as_posix(), path) for path in files]


def _refuse_secrets(one: Item) -> None:
    """Cards, recipes and snapshots are read by everybody: no token may stand in them."""
    from huggingface_hub import get_token

    if not one.path.endswith((".md", ".yaml", ".json")):
        return
    text = one.read().decode(errors="replace")
    token = get_token()
    if _SECRET.search(text) or (token and token in text):
        raise WinnowError(f"{one.path}: holds what looks like a token; take it out of the recipe, and revoke it")

