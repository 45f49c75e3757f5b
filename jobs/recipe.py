"""A recipe: one table of settings a stage, from a YAML file, and what each arm changes in it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from jobs.distance import Distance
from jobs.embed import Embed
from jobs.evaluate import Evaluate, Reference
from jobs.export import Export
from jobs.generate import Generate
from jobs.guard import Guard
from jobs.prompts import Prompts
from jobs.questions import Publish
from jobs.refine import Refine
from jobs.run import BASE
from jobs.score import Score
from jobs.select import Select, choosing, selecting
from jobs.tournament import Tournament
from jobs.train import Train
from jobs.weigh import Weigh
from schemas.errors import WinnowError
from schemas.settings import Settings, explain

REAL = ("fd_real", "kid_real", "cmmd_real", "density_real", "coverage_real")
ARM = 100  # bytes of a name that is a part of a file's, with the round and digests beside it
RECIPES = Path(__file__).parent / "recipes"
FREE = {"floors", "policies", "rules", "lists", "options"}  # tables with names of the user's choice


class Recipe(Settings):
    """``name`` is the file's; ``arms``: by arm, the tables and keys that it has otherwise ({}: none)."""

    name: str
    model: str
    seed: int = 0
    rounds: int = Field(8, ge=1)
    threads: int | None = Field(None, ge=1)
    prompts: Prompts = Prompts()
    generate: Generate = Generate()
    reference: Reference = Reference()
    embed: Embed = Embed()
    score: Score = Score()
    refine: Refine = Refine()
    distance: Distance = Distance()
    select: Select = Select()
    tournament: Tournament = Tournament()
    weigh: Weigh = Weigh()
    export: Export = Export()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    guard: Guard = Guard()
    publish: Publish = Publish()
    arms: dict[str, dict[str, Any]] = Field(default_factory=lambda: {"curated": {}}, min_length=1)

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        """What one table needs of another, said before the work and not after it."""
        for arm in self.arms:
            if not (0 < len(arm.encode()) <= ARM and arm.isprintable()) or arm[0] == "." or {"/", "\\"} & set(arm):
                raise WinnowError(
                    f"arms {arm!r}: folders are named after it; take up to {ARM} bytes that can be printed, without "
                    "slashes and not beginning with a dot"
                )
            if arm == BASE:
                raise WinnowError(f"arms {arm!r}: is what the base model makes for all arms; take another name")
        spaces, scorers = self.embed.encoders, self.score.scorers
        for key, space in (("distance.space", self.distance.space), ("select.space", self.select.space)):
            if space is not None and space not in spaces:
                have = ", ".join(spaces) or "nothing"
                raise WinnowError(f"{key} is {space!r}, which embed.encoders does not make; it has {have}")
        if self.select.policy == "pareto" and len(selecting(self)) < 2:
            raise WinnowError("select.policy 'pareto' weighs scorers against each other; name two or more")
        least = {"knn": self.distance.k + 1, "mahalanobis": 3}.get(self.distance.kind, 2)
        if self.distance.space and self.distance.match == "prompt" and self.reference.images_per_prompt < least:
            raise WinnowError(
                f"distance.match 'prompt' needs {least} images of D_0 for each prompt; set reference.images_per_prompt"
            )
        for key, names in (("select.scorers", self.select.scorers or ()), ("select.floors", self.select.floors)):
            for name in names:
                if name not in scorers:
                    have = ", ".join(scorers) or "nothing"
                    raise WinnowError(f"{key} names {name!r}, which score.scorers does not make; it has {have}")
        return self

    def check_round(self) -> None:
        """What a whole round needs beyond its single stages, said before the work: distances for the weights, and a
        guard that judges by what is measured and does not select, since a loop that is judged by the score that it
        pushes up sees no end of progress."""
        if self.weigh.by == "distance" and self.distance.space is None:
            raise WinnowError("weigh.by 'distance' needs distances; set distance.space, or weigh.by to 'nothing'")
        if not selecting(self) and self.select.reads_scores and self.select.picks is None:
            raise WinnowError(f"select.policy {self.select.policy!r} needs scores; name scorers in score.scorers")
        if not selecting(self) and self.weigh.by == "advantage":
            raise WinnowError("weigh.by 'advantage' needs scores; name scorers in score.scorers, or in select.scorers")
        asked, have = self.generate.prompts, self.reference.prompts
        if self.distance.space and self.distance.match == "prompt" and have is not None and (
            asked is None or asked * self.rounds > have
        ):  # fmt: skip
            raise WinnowError(
                f"distance.match 'prompt' needs D_0 for every prompt of every round, and reference.prompts is {have}; "
                "set it to null, which is all of them"
            )
        self._check_neon()
        if self.train.method != "none" and "parquet" not in self.export.formats:
            raise WinnowError(
                f"export.formats is {', '.join(self.export.formats)}, and training reads Parquet; add parquet, or set "
                "train.method to 'none'"
            )
        if self.guard.enabled:
            self.check_guard()

    def _check_neon(self) -> None:
        """Neon goes away from what it trains on, which must not be what is better than the rest."""
        select, reject = self.select, self.generate.reject
        if self.train.neon is None or self.train.method == "none":
            return
        if self.train.neon_on == "selection" and (select.policy != "random" or select.floors or select.picks):
            other = "set train.neon_on to 'candidates', or " if self.train.method == "full" else ""
            raise WinnowError(
                f"train.neon on 'selection' goes away from what is selected by {select.policy!r}, floors or "
                f"picks; {other}set select.policy to 'random' without them"
            )
        if reject is not None:
            raise WinnowError(
                f"train.neon goes away from candidates as they come, and generate.reject keeps those that "
                f"{reject.by!r} prefers; set one of the two to null"
            )

    def check_guard(self) -> None:
        """What the guard needs: a metric that is measured and does not select."""
        if self.train.method == "none":
            raise WinnowError("guard judges new models, and train.method is 'none'; set guard.enabled to false")
        if not self.evaluate.space:
            raise WinnowError("guard needs the diversity in evaluate.space; set it, or guard.enabled to false")
        metric, measured = self.guard.metric, self.evaluate
        # Distances to D_0 are no choice: to its own output the base is nearest by construction.
        metrics = ["diversity", *(REAL if measured.real else ())]
        named = [*self.score.scorers, *measured.scorers, *([measured.judge] if measured.judge else [])]
        scored = list(dict.fromkeys(map(measured.metric_of, named)))
        metrics += [*scored, *(f"win_rate:{name}" for name in scored)]
        selects = set(map(measured.metric_of, choosing(self)))
        metrics = [name for name in metrics if name.removeprefix("win_rate:") not in selects]
        if metric not in metrics:
            why = "selects" if metric.removeprefix("win_rate:") in selects else "is not measured"
            raise WinnowError(
                f"guard.metric is {metric!r}, which {why}; choose among {', '.join(metrics)}, or set guard.enabled "
                "to false"
            )

    def for_arm(self, arm: str) -> Recipe:
        """The recipe with that arm's changes applied; its ``arms`` stays, so that the file is told apart."""
        if arm not in self.arms:
            raise WinnowError(f"arm {arm!r}: not in recipe {self.name!r}; it has {', '.join(self.arms)}")
        return _parse(merge(self.model_dump(), self.arms[arm]), f"recipe {self.name}, arm {arm}")


def names() -> list[str]:
    """The recipes that come with Winnow."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load(name: str) -> Recipe:
    """A recipe by the name it ships under, or from a .yaml file; each of its arms is checked, too."""
    path = Path(name)
    if path.suffix.lower() not in (".yaml", ".yml"):
        if name not in names():
            raise WinnowError(f"recipe {name[:60]!r}: unknown; there are {', '.join(names())}, or give a .yaml file")
        path = RECIPES / f"{name}.yaml"
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError, RuntimeError) as error:  # such as no UTF-8, or nobody's home
        raise WinnowError(f"recipe {name[:60]}: cannot be read ({error}); give a .yaml file") from error
    try:
        values = parsed(text)
    except yaml.YAMLError as error:
        raise WinnowError(f"recipe {name}: not YAML ({' '.join(str(error).split())}); mend the file") from error
    if not isinstance(values, dict):
        raise WinnowError(f"recipe {name}: holds {type(values).__name__}; write one 'key: value' a line")
    recipe = _parse({"name": path.stem} | values, os.fspath(path.name))
    for arm in recipe.arms:
        recipe.for_arm(arm)
    return recipe


class _Loader(yaml.SafeLoader):
    """YAML in which no key of a table comes twice: the last one would take the place of the others."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key.value, str):
                raise yaml.YAMLError(f"line {line}: a key is a list or a table; take a word")
            if key.value in lines and not key.tag.endswith(":merge"):
                raise yaml.YAMLError(f"key {key.value!r} comes twice, in lines {lines[key.value]} and {line}; keep one")
            lines[key.value] = line
        return super().construct_mapping(node, deep)


def parsed(text: str) -> Any:
    """The value of a YAML text; yaml.YAMLError where it has none."""
    try:
        return yaml.load(text, _Loader)
    except (ValueError, RecursionError) as error:  # such as of a date without such a month
        raise yaml.YAMLError(str(error)) from error


def override(recipe: Recipe, settings: list[tuple[list[str], Any]]) -> Recipe:
    """The recipe with single settings changed, each a path of keys and a value."""
    values = recipe.model_dump()
    for keys, value in settings:
        inner: Any = value
        for key in reversed(keys):
            inner = {key: inner}
        values = merge(values, inner)
    return _parse(values, f"recipe {recipe.name}") if settings else recipe


def _parse(values: dict[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise WinnowError(explain(error, where)) from error
    except WinnowError as error:  # a name that no table knows
        raise WinnowError(f"{where}: {error}") from error


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` laid on ``base``, table by table; of those whose names are free an empty one clears what was there."""
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        both = isinstance(inner, dict) and isinstance(value, dict) and (value or key not in FREE)
        merged[key] = merge(inner, value) if both else value
    return merged
