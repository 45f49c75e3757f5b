"""Early rejection: what goes on is the best so far and comes out as it would have, and what it cost is told."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ForkServer, files, rows, sets
from PIL import Image

from jobs import models
from jobs import recipe as recipes
from jobs.explain import explain, words
from jobs.generate import Generate, generate
from jobs.plan import plan
from jobs.prompts import prompts
from jobs.rejection import Reject, draft
from jobs.replay import replay
from jobs.run import Run
from jobs.sampler import Sampler
from jobs.scorers import scorer
from schemas.errors import WinnowError
from storage.layout import create
from storage.verify import verify

TEXTS = ["a red seven on a blue background", "a cyan zero", "a white one on a black background"]
SMALL: dict[str, Any] = {
    "threads": 1, "generate.prompts": 10, "generate.images_per_prompt": 4, "generate.steps": 6, "generate.batch": 12,
    "generate.retries": 8, "generate.reject": {"at": 0.5, "keep": 2, "by": "scene-clip"},
}  # fmt: skip


@pytest.fixture(scope="module")
def pipe() -> Any:
    torch.set_num_threads(1)
    return models.load("embedded")


def run_in(store: Path, **how: Any) -> Run:
    recipe = recipes.override(recipes.load("embedded-fast"), sets(SMALL | how))
    run = Run(create(store), recipe.for_arm("curated"))
    prompts(run, keep=True)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A round's candidates, of which half were finished."""
    made = run_in(tmp_path_factory.mktemp("rejected") / "store")
    assert generate(made)
    return made


def begun(pipe: Any, by: str, guidance: float, keep: int = 2, n: int = 4) -> tuple[Any, Sampler, list[str], list[int]]:
    draw = Sampler(pipe, Generate(steps=6, guidance=guidance))
    texts, seeds = [text for text in TEXTS for _ in range(n)], list(range(n * len(TEXTS)))
    judge = None if by.endswith("-gap") else scorer(by)
    groups = np.repeat(np.arange(len(TEXTS)), n)
    return draft(draw, Reject(at=0.5, keep=keep, by=by), judge, texts, seeds, groups), draw, texts, seeds


def test_a_scorer_decides_by_the_estimates(pipe: Any) -> None:
    """Against each image walked alone: its estimate of the clean image after three of six steps, decoded and scored."""
    passes: list[int] = []
    handle = pipe.unet.register_forward_hook(lambda _, args, answer: passes.append(len(answer.sample)))
    made, draw, texts, seeds = begun(pipe, "scene-clip", 1.0)
    handle.remove()
    values = []
    for text, seed in zip(texts, seeds, strict=True):
        third = list(draw.walk([text], [seed]))[2]
        pixels = np.round(draw.decode(third.clean)[0] * 255).astype(np.uint8)
        values.append(float(scorer("scene-clip").score([Image.fromarray(pixels)], [text])[0][0]))
    np.testing.assert_allclose(made.values, values, atol=1e-3)
    for group in np.arange(12).reshape(3, 4):
        assert set(group[made.kept[group]]) == set(group[np.argsort(-made.values[group])[:2]])
    assert made.evaluations.tolist() == [6 if kept else 3 for kept in made.kept]
    assert sum(passes) == made.evaluations.sum()
    whole = draw.denoise(texts, seeds)[torch.from_numpy(made.kept)]
    torch.testing.assert_close(made.latents, whole, atol=1e-3, rtol=0)


def test_the_gap_is_summed_over_the_steps_and_costs_nothing(pipe: Any) -> None:
    made, draw, texts, seeds = begun(pipe, "largest-gap", 3.0, keep=1)
    steps = list(draw.walk(texts, seeds))
    gaps = sum(step.gap for step in steps[:3]).numpy()  # type: ignore[union-attr, misc]
    np.testing.assert_allclose(made.values, gaps, rtol=1e-4)
    assert made.evaluations.sum() == 12 * 6 + 3 * 6
    for group in np.arange(12).reshape(3, 4):
        assert made.kept[group].argmax() == gaps[group].argmax() and made.kept[group].sum() == 1
    torch.testing.assert_close(made.latents, steps[-1].x[torch.from_numpy(made.kept)], atol=1e-3, rtol=0)
    other = begun(pipe, "smallest-gap", 3.0, keep=3)[0]
    np.testing.assert_array_equal(other.kept, ~made.kept)


def test_a_memory_too_small_changes_nothing(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups are then cut in their middle, and still compared as a whole."""
    expected = begun(pipe, "scene-clip", 1.0)[0]
    inner, sizes = Sampler.walk, []

    def small(self: Sampler, texts: list[str], seeds: list[int]) -> Any:
        sizes.append(len(texts))
        if len(texts) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return inner(self, texts, seeds)

    monkeypatch.setattr(Sampler, "walk", small)
    made = begun(pipe, "scene-clip", 1.0)[0]
    assert sizes == [12, 6, 3, 3, 3, 3]
    np.testing.assert_array_equal(made.kept, expected.kept)
    np.testing.assert_array_equal(made.evaluations, expected.evaluations)
    torch.testing.assert_close(made.latents, expected.latents, atol=1e-3, rtol=0)


def test_an_estimate_that_is_no_number_goes_first(pipe: Any) -> None:
    from jobs.scorers import Scorer

    def score(images: list[Image.Image], texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        return np.tile([np.nan, -5.0, np.inf, -9.0], len(images) // 4), np.zeros(len(images), bool)

    draw, texts = Sampler(pipe, Generate(steps=4, guidance=1.0)), [TEXTS[0]] * 4
    judge = Scorer("mine", "1", score)
    made = draft(draw, Reject(by="scene-clip", keep=2), judge, texts, [1, 2, 3, 4], np.zeros(4, int))
    assert made.kept.tolist() == [False, True, False, True]


def test_what_was_begun_and_what_was_finished_are_rows(run: Run, tmp_path: Path) -> None:
    notes = rows(run.store, "SELECT * FROM drafts ORDER BY prompt_id, sample_id")
    made = {row["sample_id"]: row for row in rows(run.store, "SELECT * FROM samples WHERE round = 1")}
    assert len(notes) == 40 and {n["sample_id"] for n in notes if n["kept"]} == set(made) and len(made) == 20
    assert all(n["evaluations"] == (6 if n["kept"] else 3) and n["step"] == 3 for n in notes)
    assert {n["criterion"] for n in notes} == {"scene-clip"}
    for prompt in {n["prompt_id"] for n in notes}:
        mates = [n for n in notes if n["prompt_id"] == prompt]
        assert len(mates) == 4
        low, high = ([n["value"] for n in mates if n["kept"] is kept] for kept in (False, True))
        assert max(low) <= min(high)
    # Without rejection the same candidates are the same images, under the same names.
    whole = run_in(tmp_path / "whole", **{"generate.reject": None})
    generate(whole)
    every = {row["sample_id"]: row for row in rows(whole.store, "SELECT * FROM samples WHERE round = 1")}
    assert set(every) == {n["sample_id"] for n in notes}
    from jobs.images import decode

    for number, row in made.items():
        assert row["seed"] == every[number]["seed"] and row["attempt"] == every[number]["attempt"]
        a, b = (np.asarray(decode(one["image"]["bytes"])).astype(int) for one in (row, every[number]))
        assert np.abs(a - b).max() <= 1
    assert rows(whole.store, "SELECT count(*) AS n FROM drafts") == [{"n": 0}]
    assert verify(run.store).ok


def test_it_does_not_hang_on_the_batch(run: Run, tmp_path: Path) -> None:
    """Not even where a prompt has more images than a batch."""
    for batch in (3, 40):
        other = run_in(tmp_path / str(batch), **{"generate.batch": batch})
        generate(other)
        asked = "SELECT sample_id, kept, step, evaluations, round(value, 3) AS value FROM drafts ORDER BY sample_id"
        for a, b in zip(rows(run.store, asked), rows(other.store, asked), strict=True):
            assert a | {"value": 0} == b | {"value": 0} and a["value"] == pytest.approx(b["value"], abs=2e-3)


def test_again_it_does_nothing_and_otherwise_it_is_refused(run: Run) -> None:
    before = files(run.store)
    assert generate(run)
    assert files(run.store) == before
    for how in ({"at": 0.3}, {"keep": 1}, {"by": "scene-reader"}):
        given = {"generate.reject": SMALL["generate.reject"] | how}
        with pytest.raises(WinnowError, match="sealed already, made with other settings"):
            generate(replace(run, recipe=recipes.override(run.recipe, sets(given))))
    with pytest.raises(WinnowError, match="sealed already, made with other settings"):
        generate(replace(run, recipe=recipes.override(run.recipe, sets({"generate.reject": None}))))
    assert files(run.store) == before


def test_d0_and_held_out_prompts_are_sampled_whole(run: Run, tmp_path: Path) -> None:
    other = run_in(tmp_path / "store", **{"reference.prompts": 4, "evaluate.prompts": 4})
    generate(other, "reference"), generate(other, "eval", "embedded")
    count = rows(other.store, "SELECT split, count(*) AS n FROM samples GROUP BY ALL ORDER BY ALL")
    assert count == [{"split": "eval", "n": 16}, {"split": "reference", "n": 12}]
    assert rows(other.store, "SELECT count(*) AS n FROM drafts") == [{"n": 0}]


def test_a_finished_one_can_be_replayed_and_a_dropped_one_explained(run: Run, winnow: Any) -> None:
    [kept] = rows(run.store, "SELECT * FROM drafts WHERE kept ORDER BY sample_id LIMIT 1")
    [dropped] = rows(run.store, "SELECT * FROM drafts WHERE NOT kept ORDER BY value LIMIT 1")
    assert replay(run.store, kept["sample_id"]).largest <= 1
    told = words(explain(run.store, kept["sample_id"]))
    assert f"early rejection after step 3, by scene-clip: {kept['value']:.4f}, rank" in told and "went on, 6" in told
    said = winnow("explain", "--store", run.store, dropped["sample_id"])
    assert said.status == 0 and "never finished" in said.out and dropped["prompt"] in said.out
    assert f"{dropped['value']:.4f}, rank" in said.out and "of 4 for its prompt; ended there, 3 network" in said.out


def test_the_saving_is_told_and_planned(run: Run, winnow: Any, tmp_path: Path) -> None:
    import json

    recipe = tmp_path / "small.yaml"
    recipe.write_text(json.dumps(run.recipe.model_dump(mode="json") | {"arms": {"curated": {}}}))
    said = winnow("generate", "--recipe", recipe, "--store", run.store)
    assert said.out == "20 of 40 candidates were finished; 180 network evaluations, 25% fewer than for all of them\n"
    with_all = recipes.override(run.recipe, sets({"generate.reject": None}))
    few, many = plan(run.recipe, 180), plan(with_all, 180)
    assert few.spared == 0.25 and few.lines()[-1] == (
        "spared   25% of the candidates' network evaluations, by early rejection"
    )
    assert few.images["candidates"] == many.images["candidates"] / 2 == 20 * run.recipe.rounds
    # What is left of the hours: the evaluations, and the decoding of half as many images.
    assert 0.5 * many.hours["candidates"] < few.hours["candidates"] < 0.75 * many.hours["candidates"]
    assert len(many.lines()) == 3


def test_refinements_are_planned(run: Run) -> None:
    def refined(**how: Any) -> Any:
        given = {"generate.reject": None, "rounds": 3} | {f"refine.{key}": value for key, value in how.items()}
        return plan(recipes.override(run.recipe, sets(given)), 180)

    where = '"rank:scene-clip"'
    assert refined().images["refined"] == 0
    assert refined(where=f"{where} <= 2").images["refined"] == 3 * 20
    assert refined(where=f"{where} = 1", loops=2).images["refined"] == 3 * 20
    assert refined(where=f"{where} <= 9").images["refined"] == refined(where="true").images["refined"] == 3 * 40
    assert refined(where="width > 5", limit=7).images["refined"] == 21
    one, two = (refined(where="true", level=0.5, steps=12 * k) for k in (1, 2))
    of = one.hours["refined"] / one.images["refined"]
    whole = one.hours["candidates"] / one.images["candidates"]
    assert of == pytest.approx(whole)  # 6 steps each
    assert two.hours["refined"] > 1.5 * one.hours["refined"]
    guided = refined(where="true", level=0.5, steps=12, guidance=2.0)
    assert guided.hours["refined"] > 1.5 * one.hours["refined"]
    assert guided.hours["candidates"] == one.hours["candidates"]
    away = plan(recipes.override(run.recipe, sets({"generate.negative": {"model": "embedded", "weight": 0.5}})), 180)
    plain = plan(run.recipe, 180)
    for name, times in {"candidates": 2, "evaluation": 2, "D_0": 1}.items():  # but for the decoding
        assert 0.75 * times * plain.hours[name] < away.hours[name] <= times * plain.hours[name]


def killed(store: str) -> None:
    generate(run_in(Path(store)))


def test_killed_at_any_moment_it_ends_like_an_unbroken_run(run: Run, forks: ForkServer, tmp_path: Path) -> None:
    kills, store = 0, tmp_path / "store"
    for events in (70, 40, 25, 60, 30, 50):
        forks.start("test_jobs_rejection:killed", str(store), log=tmp_path / "log", events=events)
        status = forks.wait()
        assert status in (0, -9), (tmp_path / "log").read_text()
        kills += status == -9
        if (store / "tables").exists():
            assert rows(store, "SELECT count(*) AS n FROM samples ANTI JOIN drafts USING (sample_id)") == [{"n": 0}]
    forks.start("test_jobs_rejection:killed", str(store), log=tmp_path / "log")
    assert forks.wait() == 0, (tmp_path / "log").read_text()
    assert kills >= 2
    for sql in ("SELECT sample_id, sha256(image.bytes) FROM samples ORDER BY ALL",
                "SELECT sample_id, kept, evaluations FROM drafts ORDER BY ALL"):  # fmt: skip
        assert rows(store, sql) == rows(run.store, sql)
    assert verify(store).ok


@pytest.mark.parametrize(("how", "said"), [
    ({"reject": {"by": "scene-clip", "keep": 4}}, "keep is 4 of 4 images a prompt, so that none is rejected"),
    ({"reject": {"by": "largest-gap"}}, "generate.guidance is 1; raise it above 1, or reject by a scorer"),
    ({"reject": {"by": "scene-clip"}, "source": "images"}, "generate.source samples nothing; drop one"),
    ({"reject": {"by": "scene-clip"}, "steps": 1}, "needs a step before the last"),
    ({"reject": {"by": "no-such"}}, "criterion 'no-such': unknown"),
    ({"reject": {"by": "scene-clip", "at": 1.0}}, "reject.at is 1.0: .*less than 1"),
    ({"reject": {"at": 0.5}}, "key 'generate.reject.by' is missing"),
])  # fmt: skip
def test_what_cannot_be_rejected_is_said(how: dict[str, Any], said: str) -> None:
    with pytest.raises(WinnowError, match=said):
        recipes.override(recipes.load("embedded-fast"), sets({f"generate.{key}": value for key, value in how.items()}))


def test_a_model_without_a_gap_says_so(tmp_path: Path) -> None:
    import pipelines

    draw = Sampler(models.load(str(pipelines.build("flux", tmp_path / "flux"))), Generate(
        steps=3, guidance=3.0, width=32, height=32))  # fmt: skip
    with pytest.raises(WinnowError, match="this model is told its guidance and makes one prediction; reject by a"):
        draft(draw, Reject(by="largest-gap"), None, ["a fox", "a fox"], [1, 2], np.zeros(2, int))
