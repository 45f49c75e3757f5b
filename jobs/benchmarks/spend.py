"""Each method played through Winnow's own stages, in a store for each way of sampling, and measured.

A round of a store is one try at all prompts, with the same seeds in every store: images of two methods that begin with
the same noise are compared. What is committed stays, so that a benchmark that was stopped goes on.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jobs import models
from jobs import recipe as recipes
from jobs.benchmarks.measured import Figures, Measured, figures, look
from jobs.benchmarks.methods import BEST, GAP, LOOK, METHODS, ONE, STEPS, Method
from jobs.generate import generate, plan
from jobs.images import array, images_of
from jobs.progress import bar
from jobs.prompts import prompts
from jobs.refine import refine
from jobs.run import Run
from jobs.score import score
from schemas.ids import digest
from storage.layout import create

MODEL = "embedded"
SHOWN = (ONE.name, "best of 4", "best of 3 + refine, level 0.5")
TILES = 24


def opened(home: Path, settings: dict[str, Any], of: int | None) -> Run:
    """The store of these images; ``of``: how many prompts, null: all."""
    whole = {"prompts.held_out": 0.001, "refine.model": MODEL}
    whole |= {"generate.prompts": of, "generate.batch": 192, "generate.steps": STEPS, "generate.shift": None}
    whole |= {f"generate.{key}": value for key, value in settings.items()}
    recipe = recipes.override(recipes.load(MODEL), [(key.split("."), value) for key, value in whole.items()])
    run = Run(create(home / f"sampled-{digest([whole, recipe.seed], 8)}"), recipe.for_arm("curated"))
    prompts(run, keep=True)
    return run


def sampled(run: Run, pick: str | None, rounds: int) -> None:
    """All rounds' images, and their scores where they are chosen by one."""
    for number in range(1, rounds + 1):
        generate(run.at(number), model=MODEL)
        if pick:
            score(run.at(number), scorers=(pick,))


def first(run: Run, n: int, rounds: int) -> list[int]:
    """The ids of the first n images that were begun for each prompt of each round."""
    each, numbers = run.recipe.generate.images_per_prompt, []
    for number in range(1, rounds + 1):
        rows = plan(run.at(number), "train", run.recipe.generate.prompts, each, models.revision(MODEL))
        numbers += [one for i, one in enumerate(rows["sample_id"].to_pylist()) if i % each < n]
    return numbers


def refined(run: Run, method: Method, chosen: list[int], rounds: int) -> Run:
    """A copy of the store in which the chosen images are refined."""
    assert method.refine is not None
    copy = run.store.with_name(f"refined-{digest([run.store.name, method.first, method.pick, method.refine], 8)}")
    if not copy.exists():
        draft = copy.with_suffix(".draft")
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(run.store, draft)
        draft.rename(copy)
    given = method.refine | {"where": f"sample_id IN ({', '.join(map(str, chosen))})"}
    recipe = recipes.override(run.recipe, [(["refine", key], value) for key, value in given.items()])
    run = replace(run, store=copy, recipe=recipe)
    for number in range(1, rounds + 1):
        refine(run.at(number))
    return run


def play(home: Path, method: Method, rounds: int, of: int | None) -> tuple[pa.Table, float]:
    """A row a try and prompt, in a fixed order: prompt and image; and network evaluations a sample."""
    run = opened(home, method.sampling, of)
    sampled(run, method.pick, rounds)
    looked = first(run, method.first, rounds)
    if run.recipe.generate.reject:  # all that were finished
        looked = run.query("SELECT sample_id FROM samples WHERE parent_id IS NULL")["sample_id"].to_pylist()
    chosen = run.query(
        "SELECT DISTINCT ON (samples.round, prompt_id) sample_id FROM samples LEFT JOIN (SELECT sample_id, value FROM "
        "scores WHERE scorer = $pick) USING (sample_id) WHERE sample_id IN (SELECT unnest($looked)) "
        "ORDER BY samples.round, prompt_id, value DESC, sample_id",
        pick=method.pick or "", looked=looked,
    )["sample_id"].to_pylist()  # fmt: skip
    spent = cost(run, method, len(chosen))
    if method.refine:
        run = refined(run, method, chosen, rounds)
        spent += run.query("SELECT sum(evaluations)::BIGINT AS n FROM refinements")["n"][0].as_py() / len(chosen)
    # Of a chain of refinements the last that was accepted, else the image itself.
    found = run.query(
        "SELECT DISTINCT ON (samples.round, prompt_id) sample_id, samples.round, prompt, image FROM samples "
        "LEFT JOIN refinements USING (sample_id) WHERE sample_id IN (SELECT unnest($chosen)) OR accepted "
        "ORDER BY samples.round, prompt_id, coalesce(loop, 0) DESC", chosen=chosen,
    )  # fmt: skip
    assert found.num_rows == len(chosen)
    return found, spent


def cost(run: Run, method: Method, samples: int) -> float:
    """Network evaluations a sample before refinement: as the store counts them where candidates were rejected."""
    made = run.recipe.generate
    if made.reject:
        return run.query("SELECT sum(evaluations)::BIGINT AS n FROM drafts")["n"][0].as_py() / samples
    each = made.steps * (2 if made.guidance > 1 else 1)
    return method.first * (each + (LOOK if method.pick == GAP else 0))


def measure(home: Path, rounds: int, of: int | None = None) -> tuple[list[Figures], np.ndarray]:
    """Figures of every method, and for the picture the same tries of SHOWN methods, uint8 [methods, TILES, H, W, 3]."""
    seen: dict[str, Measured] = {}
    rows, pictures = [], []
    with bar("benchmark refine", len(METHODS)) as advance:
        for method in METHODS:
            found, spent = play(home, method, rounds, of)
            pixels = array(images_of(found))
            seen[method.name] = look(pixels, found["prompt"].to_pylist())
            others = {"one": ONE.name, "best": BEST.get(method.budget)}
            against = {key: seen[name] for key, name in others.items() if name in seen and name != method.name}
            rows.append({"method": method.name, "budget": method.budget, "evaluations": spent,
                         **figures(seen[method.name], against)})  # fmt: skip
            if method.name in SHOWN:
                pictures.append(pixels[np.linspace(0, len(pixels) - 1, TILES).astype(int)])
            advance()
    return rows, np.stack(pictures)
