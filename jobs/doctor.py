"""Doctor: what of a recipe can run on this machine, and the cure for what cannot."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from jobs import devices, hub, models
from jobs.encoders import encoder
from jobs.evaluate import real_path, spaces
from jobs.language.judge import model as judge
from jobs.language.texts import text_encoder
from jobs.named import yours
from jobs.plan import plan
from jobs.recipe import Recipe
from jobs.scorers import scorer
from schemas.errors import WinnowError

FLOAT16 = 2  # bytes of a weight while sampling on a GPU


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. ``ok`` False: the recipe cannot run; None: it can, but look at this."""

    what: str
    ok: bool | None
    said: str

    def line(self) -> str:
        return f"{ {True: 'ok', False: 'wrong', None: 'note'}[self.ok] :<5} {self.what}: {self.said}"


def doctor(recipe: Recipe, store: Path, prompts: int | None = None) -> Iterator[Finding]:
    """Every finding about a recipe (of one arm) on this machine. Models are asked for their revision, from their folder
    or the Hub, and not loaded. ``prompts``: how many, for the estimate of the disk, where the recipe keeps all."""
    yield from _packages()
    yield _device(recipe)
    yield _disk(recipe, store, prompts)
    yield _token()
    yield from _names(recipe)
    yield from _files(recipe)
    if ":" in recipe.select.policy:
        yield _policy(recipe.select.policy)
    yield _round(recipe)


def _policy(name: str) -> Finding:
    try:
        yours("policy", name)
    except WinnowError as error:
        return Finding("policy", False, str(error))
    return Finding("policy", True, f"{name} can be imported")


def _round(recipe: Recipe) -> Finding:
    try:
        recipe.check_round()
    except WinnowError as error:
        return Finding("round", False, str(error))
    return Finding("round", True, "its stages go together")


def _packages() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    yield Finding("python", sys.version_info >= (3, 11), f"{sys.version.split()[0]}, needed is 3.11 or newer")
    try:
        listed = [Requirement(line) for line in metadata.requires("winnow") or ()]
    except metadata.PackageNotFoundError:
        yield Finding("packages", None, "winnow is not installed, so its requirements are unknown; run 'make setup'")
        return
    wanted = [one for one in listed if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = []
    for one in wanted:
        try:
            have = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{one} is missing")
            continue
        if not one.specifier.contains(have, prereleases=True):
            wrong.append(f"{one.name} is {have}, needed is {one.specifier}")
    said = f"{'; '.join(wrong)}; run 'make setup'" if wrong else f"all {len(wanted)} are there"
    yield Finding("packages", not wrong, said)


def _device(recipe: Recipe) -> Finding:
    import torch

    kind = devices.device()
    if kind != "cuda":
        large = recipe.model != "embedded" and _parameters(recipe) > 2e8
        tail = "; a model of this size takes minutes an image without a GPU" if large else ""
        return Finding("device", None if large else True, f"{kind}, {os.cpu_count()} cores{tail}")
    name, room = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    need = FLOAT16 * _parameters(recipe)
    said = f"{name}, {room / 1e9:.0f} GB; the denoiser's weights take {need / 1e9:.1f} GB"
    return Finding("device", need < room, said if need < room else f"{said}: take a smaller model or a larger GPU")


def _parameters(recipe: Recipe) -> int:
    from jobs.plan import shape_of

    try:
        return shape_of(recipe.model, recipe.generate.width, recipe.generate.height).parameters
    except WinnowError:  # of an unknown shape, or not there, which is said elsewhere
        return 0


def _disk(recipe: Recipe, store: Path, prompts: int | None) -> Finding:
    place = store.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    try:
        need = sum(plan(recipe, prompts).bytes.values())
    except WinnowError as error:
        return Finding("disk", None, f"{free / 1e9:.1f} GB free; how much is needed is unknown ({error})")
    said = f"{free / 1e9:.1f} GB free, about {need / 1e9:.2f} GB needed"
    return Finding("disk", need < free, said if need < free else f"{said}: take another STORE=, or webp or jpeg images")


def _token() -> Finding:
    from huggingface_hub import get_token

    there = bool(get_token())
    said = "a token is there" if there else "no token; public models need none, else log in with 'hf auth login'"
    where = hub.endpoint()
    return Finding("Hub", True, said + (f"; asked is {where} (HF_ENDPOINT)" if where else ""))


def _names(recipe: Recipe) -> Iterator[Finding]:
    """Models, scorers and encoders, each once."""
    asked: list[tuple[str, str, Callable[[str], Any]]] = [("model", recipe.model, models.revision)]
    if recipe.generate.negative:
        asked.append(("model", recipe.generate.negative.model, models.revision))
    if recipe.prompts.judge.kind == "local" and recipe.prompts.judge.model:
        asked.append(("judge", recipe.prompts.judge.model, lambda _: judge(recipe.prompts.judge).revision))
    if recipe.refine.where is not None and recipe.refine.model:
        asked.append(("model", recipe.refine.model, models.revision))
    scorers = [*recipe.score.scorers, *recipe.evaluate.scorers, recipe.evaluate.judge]
    scorers += [recipe.refine.scorer] if recipe.refine.where is not None else []
    scorers += [recipe.generate.reject.scorer] if recipe.generate.reject else []
    asked += [("scorer", name, lambda name: scorer(name).revision) for name in scorers if name]
    measured = spaces(recipe.evaluate)
    asked += [("encoder", name, lambda name: encoder(name).revision) for name in (*recipe.embed.encoders, *measured)]
    if recipe.prompts.encoder:
        asked.append(("text encoder", recipe.prompts.encoder, lambda name: text_encoder(name).revision))
    done: set[tuple[str, str]] = set()
    for kind, name, revision in asked:
        if (kind, name) in done:
            continue
        done.add((kind, name))
        try:
            yield Finding(f"{kind} {name}", True, f"revision {revision(name)}")
        except WinnowError as error:
            yield Finding(f"{kind} {name}", False, str(error))


def _there(key: str, path: str) -> Finding:
    try:
        there = Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError) as error:  # such as a name too long, or nobody's home
        return Finding(key, False, f"{path[:60]}: cannot be looked at ({error}); set another")
    return Finding(key, there, f"{path} {'is there' if there else 'does not exist; put it there or set another'}")


def _files(recipe: Recipe) -> Iterator[Finding]:
    """What is read from disk, and the key of a judge."""
    judge = recipe.prompts.judge
    if judge.key_env:
        there = bool(os.environ.get(judge.key_env))
        said = "set" if there else "not set; export the key in it"
        yield Finding("prompts.judge", there, f"{judge.key_env} is {said}")
    sources = {"prompts.source": recipe.prompts.source, "prompts.benchmark": recipe.prompts.benchmark,
               "generate.source": recipe.generate.source, "reference.source": recipe.reference.source}  # fmt: skip
    for key, source in sources.items():
        if source is None or source == "embedded" or source.startswith("hub:"):
            continue
        yield _there(key, source)
    picks = recipe.select.picks
    if picks not in (None, "votes") and "{" not in picks:  # the others are written while the loop runs
        yield _there("select.picks", picks)
    if recipe.evaluate.real:
        try:
            yield Finding("evaluate.real", True, f"{real_path(recipe.evaluate.real).name} is there")
        except WinnowError as error:
            yield Finding("evaluate.real", False, str(error))
