"""The benchmarks of refinement: fair by construction, from end to end in small, and as published."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import files, rows

from jobs.benchmarks import late, page, repair, spend
from jobs.benchmarks.__main__ import main
from jobs.benchmarks.damage import DAMAGES, PATCH
from jobs.benchmarks.late import BORDER, Experts
from jobs.benchmarks.measured import Measured, figures, look
from jobs.benchmarks.methods import BEST, METHODS, Method
from jobs.world.build import REAL, digits, slices
from jobs.world.scenes import Handwriting, caption, draw_scenes, parse, render

RESULTS = Path(__file__).parent.parent / "results"


@pytest.fixture(scope="module")
def hand() -> Handwriting:
    """scikit-learn's digits that nothing is trained on."""
    torch.set_num_threads(1)
    images, labels, _ = digits(None)
    return slices(images, labels, 0)["test"]


def seen(right: list[int], score: list[float], rng: np.random.Generator) -> Measured:
    prompts = np.repeat(["a red seven on a blue background", "a cyan zero on a black background"], len(right) // 2)
    return Measured(np.array(right, bool), np.array(score), rng.normal(size=(len(right), 64)), prompts)


def test_a_win_is_right_where_the_other_is_wrong() -> None:
    rng = np.random.default_rng(0)
    mine = seen([1, 1, 1, 0, 1, 0, 1, 1], [0.8] * 8, rng)
    other = seen([0, 1, 0, 1, 0, 0, 1, 1], [0.4] * 8, rng)
    found = figures(mine, {"one": other, "same": mine})
    assert found["n"] == 8 and found["accuracy"][0] == 0.75 and found["score"][0] == pytest.approx(0.8)
    one = found["one"]  # three wins, a loss, four alike
    assert one["decided"] == 4 and one["preferred_of_decided"][0] == 0.75 and one["preferred"][0] == 5 / 8
    assert one["score_change"][0] == pytest.approx(1.0)
    same = found["same"]
    assert same["preferred"] == [0.5, 0.5, 0.5] and same["decided"] == 0 and same["preferred_of_decided"] is None
    assert same["fd_change"][0] == pytest.approx(0) and same["score_change"][0] == 0
    for name in ("accuracy", "score", "fd_real"):
        value, low, high = found[name]
        assert low <= value <= high
    with pytest.raises(AssertionError, match="the same captions"):
        figures(mine, {"one": replace(other, prompts=other.prompts[::-1])})


def test_real_scenes_are_near_to_real_scenes(hand: Handwriting) -> None:
    rng = np.random.default_rng(0)
    prompts = [caption(scene) for scene in draw_scenes(300, rng) if scene.background]
    real = look(render([parse(text) for text in prompts], hand, rng), prompts)
    noise = look(rng.integers(0, 256, (len(prompts), 16, 16, 3)).astype(np.uint8), prompts)
    near, far = figures(real, {"one": noise}), figures(noise, {})
    assert near["fd_real"][0] < far["fd_real"][0] / 3 and near["one"]["fd_change"][0] < -0.6
    assert near["accuracy"][0] > 0.5 and near["score"][0] > 0.5 > far["score"][0]
    assert near["one"]["preferred"][0] > 0.7


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_where_its_mask_says(hand: Handwriting, name: str) -> None:
    rng = np.random.default_rng(1)
    scenes = draw_scenes(60, rng)
    images = render(scenes, hand, rng)
    made, masks = DAMAGES[name](images, scenes, hand, rng)
    assert made.shape == images.shape and made.dtype == np.uint8 and masks.shape == images.shape[:3]
    np.testing.assert_array_equal(made[~masks], images[~masks])
    moved = np.abs(made.astype(int) - images).max((1, 2, 3))
    assert (moved > 10).mean() > 0.9
    prompts = [caption(scene) for scene in scenes]
    spoilt = repair.verdicts(images, prompts) & ~repair.verdicts(made, prompts)
    assert spoilt.sum() >= 5
    if name == "patches swapped":  # no pixel is lost: those of one place are in the other
        assert (masks.sum((1, 2)) == 2 * PATCH**2).all()
        for one, other, mask in zip(images, made, masks, strict=True):
            a, b = (sorted(map(tuple, image[mask].tolist())) for image in (one, other))
            assert a == b


def test_damaged_and_drawn_cases_are_what_they_say(hand: Handwriting) -> None:
    for case in [*repair.damaged(hand, 8, 0), *repair.drawn(8, 0)]:
        assert len(case.pixels) == len(case.prompts) == 8
        assert (repair.verdicts(case.pixels, case.prompts) == case.right).all()


def test_what_is_changed_outside_the_damage(hand: Handwriting) -> None:
    case = repair.damaged(hand, 4, 0)[2]
    assert case.masks is not None
    after = case.pixels.copy()
    after[~case.masks] = np.clip(after[~case.masks].astype(int) + 6, 0, 255)
    expected = np.abs(after.astype(int) - case.pixels)[~case.masks].mean()
    found = repair.row(case, after)
    assert found["changed_outside"] == pytest.approx(expected) and found["changed"] < expected
    assert found["n"] == 4 and found["share"] == found["right"] / 4


def planned(method: Method) -> float:
    """Evaluations a sample, by hand."""
    how = method.sampling
    passes = 2 if how.get("guidance", 1) > 1 else 1
    steps = how.get("steps", 8)
    if reject := how.get("reject"):
        at = round(reject["at"] * steps)
        spent = (at * how["images_per_prompt"] + (steps - at) * reject["keep"]) * passes
    else:
        spent = method.first * (steps * passes + (10 if "gap" in (method.pick or "") else 0))
    return spent + (8 * method.refine["loops"] if method.refine else 0)


def test_budgets_are_kept_and_methods_are_told_apart() -> None:
    assert len({method.name for method in METHODS}) == len(METHODS)
    for method in METHODS:
        assert planned(method) <= method.budget and planned(method) >= 0.8 * method.budget
        assert method.first <= method.sampling.get("images_per_prompt", 4)
        assert (method.first > 1) == (method.pick is not None)
    order = [method.name for method in METHODS]
    for budget, name in BEST.items():  # it is there before those that are compared with it
        assert all(order.index(name) <= order.index(m.name) for m in METHODS if m.budget == budget)


SOME = ("one pass", "best of 4", "best of 3 + refine, level 0.5", "best of 3 + refine, level 0.25",
        "early rejection: 2 of 6 after 4 steps, then the best",
        "early rejection: 1 of 5 after 4 steps + refine, level 0.5, if better",
        "guided, early rejection by the largest gap: 1 of 3 after 4 steps", "best of 3 by the guidance gap",
        "best of 4 + refine, level 0.5, 4 loops, if better")  # fmt: skip


@pytest.fixture(scope="module")
def spent(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The table of SOME methods over 5 prompts and two tries, made twice: the second time from what is there."""
    home = tmp_path_factory.mktemp("spend")
    words = ["refine", "--store", str(home / "store"), "--out", str(home / "out"), "--rounds", "2", "--prompts", "5"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spend, "METHODS", tuple(m for m in METHODS if m.name in SOME))
        assert main(words) == 0
        first, before = (home / "out" / "refine.json").read_text(), files(home / "store")
        assert main(words) == 0
        assert files(home / "store") == before
    texts = [re.sub(r'"seconds": \d+', "", text) for text in (first, (home / "out" / "refine.json").read_text())]
    assert texts[0] == texts[1]
    return home, json.loads((home / "out" / "refine.json").read_text())


def test_each_method_spends_what_it_says(spent: tuple[Path, dict[str, Any]]) -> None:
    home, found = spent
    by = {row["method"]: row for row in found["rows"]}
    assert set(by) == set(SOME)
    for method in METHODS:
        if method.name in by:
            row = by[method.name]
            assert row["n"] == 10 and row["budget"] == method.budget
            assert row["evaluations"] == pytest.approx(planned(method), abs=0.01), method.name
            assert ("one" in row) == (method.name != "one pass")
            assert ("best" in row) == (method.name not in ("one pass", *BEST.values()) and BEST[row["budget"]] in by)
    text = (home / "out" / "refine.md").read_text()
    assert text == page.refine(found) and all(f"| {name} | {by[name]['evaluations']:.1f} |" in text for name in SOME)
    assert (home / "out" / "refine.png").stat().st_size > 1000


def test_the_best_is_taken_of_the_first_and_what_was_accepted_follows(spent: tuple[Path, dict[str, Any]]) -> None:
    """Against the rows of the stores: best of 3 looks at no fourth image, and a chain ends with its last accepted."""
    home = spent[0] / "store"
    method = next(m for m in METHODS if m.name == "best of 4 + refine, level 0.5, 4 loops, if better")
    found, _ = spend.play(home, method, 2, 5)
    run = spend.opened(home, method.sampling, 5)
    first = set(spend.first(run, 4, 2))
    assert len(first) == 40
    scored = rows(run.store, "SELECT sample_id, value FROM scores WHERE scorer = 'scene-clip'")
    scores = {row["sample_id"]: row["value"] for row in scored}
    samples = rows(run.store, "SELECT sample_id, round, prompt, prompt_id FROM samples")
    for one in found.to_pylist():
        mates = [s["sample_id"] for s in samples if (s["round"], s["prompt"]) == (one["round"], one["prompt"])]
        assert len(mates) == 8
        best = max((number for number in mates if number in first), key=lambda number: scores[number])
        notes = [store for store in home.glob("refined-*")
                 if rows(store, "SELECT max(loop) AS n FROM refinements") == [{"n": 4}]]  # fmt: skip
        [store] = notes
        chain = {row["sample_id"]: row for row in rows(store, "SELECT * FROM refinements")}
        now = best
        for loop in range(1, 5):
            [child] = [row for row in chain.values() if row["loop"] == loop and row["parent_id"] == now]
            now = child["sample_id"] if child["accepted"] else now
        assert one["sample_id"] == now


def test_experts_answer_for_their_own_timesteps() -> None:
    class Says(torch.nn.Module):
        config, dtype, device = "mine", torch.float32, torch.device("cpu")

        def __init__(self, word: str) -> None:
            super().__init__()
            self.word = word

        def forward(self, noisy: Any, t: Any, told: Any) -> str:
            return self.word

    both = Experts(Says("high"), Says("low"))
    for t, said in ((999.0, "high"), (BORDER, "high"), (BORDER - 0.01, "low"), (0.0, "low")):
        assert both(None, torch.full((3,), t), None) == both(None, torch.tensor(t), None) == said
    assert both.config == "mine" and both.dtype == torch.float32 and both.device.type == "cpu"


@pytest.fixture(scope="module")
def repaired(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Late models of four steps, made, and then used again."""
    home = tmp_path_factory.mktemp("late")
    words = ["late", "--store", str(home / "store"), "--out", str(home / "out"), "--steps", "4", "--images", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repair, "SCENES", 60)
        patch.setattr(late, "HOW", late.HOW.model_copy(update={"batch": 16}))
        assert main(words) == 0
        first, before = (home / "out" / "late.json").read_text(), files(home / "store" / "models")
        assert main(words) == 0
        assert files(home / "store" / "models") == before
    texts = [re.sub(r'"seconds": \d+', "", text) for text in (first, (home / "out" / "late.json").read_text())]
    assert texts[0] == texts[1]
    return home, json.loads((home / "out" / "late.json").read_text())


def test_late_models_are_trained_and_compared(repaired: tuple[Path, dict[str, Any]]) -> None:
    home, found = repaired
    assert {name: (model["windows"], model["steps"]) for name, model in found["models"].items()} == {
        "composition": ([[250, 500]], 4), "details": ([[0, 250]], 4), "both at once": ([[0, 500]], 4),
        "composition, then details": ([[250, 500], [0, 250]], 4),
        "details, then composition": ([[0, 250], [250, 500]], 4), "all timesteps": ([[0, 1000]], 4),
    }  # fmt: skip
    cases = [*DAMAGES, "drawn wrong", "drawn right"]
    ways = {row["way"] for row in found["rows"]}
    assert len(ways) == 4 + len(found["models"]) and len(found["rows"]) == len(ways) * len(cases)
    for row in found["rows"]:
        assert row["n"] == 3 and row["evaluations"] == (0 if "mask" in row["way"] or "filter" in row["way"] else 16)
        assert (row["changed_outside"] is None) == (row["case"] in ("blurred", "drawn wrong", "drawn right"))
    text = (home / "out" / "late.md").read_text()
    assert text == page.late(found) and all(f"| {way} |" in text for way in ways)
    assert (home / "out" / "late.png").stat().st_size > 1000


def test_each_of_two_windows_keeps_its_own_model(
    repaired: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever came first; the one that came second began with the other's weights, and no state is left behind."""
    home = repaired[0] / "store"
    assert not list(home.glob("*.safetensors"))
    monkeypatch.setattr(late, "HOW", late.HOW.model_copy(update={"batch": 16}))
    images, labels, _ = digits(None)
    data = late.cached(home, slices(images, labels, 0)["generator"], 60, 0)
    one = {m.name: late.trained(home, data, m, 4, 0)[0] for m in late.MODELS}
    ways = one["composition, then details"], one["details, then composition"]
    assert all(isinstance(way, Experts) for way in ways)

    def apart(a: Any, b: Any) -> float:
        return max(float((p - q).detach().abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True))

    fresh = late.trained(tmp_path, data, replace(late.MODELS[0], share=0.25), 4, 0)[0]
    assert apart(ways[0].high, ways[1].low) > 0 and apart(ways[0].high, ways[0].low) > 0
    # Both first windows start from the same random weights; a step is of the order of the learning rate.
    assert 0 < apart(ways[0].high, fresh) < 0.05


@pytest.mark.parametrize("words", [["late", "--data", "/nowhere/digits.npz"]])
def test_what_cannot_be_run_is_said_in_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("late: ") and said.count("\n") == 1


@pytest.mark.parametrize("name", [name for name in ("refine", "late") if (RESULTS / f"{name}.json").exists()])
def test_published_pages_are_of_their_figures(name: str) -> None:
    found = json.loads((RESULTS / f"{name}.json").read_text())
    assert (RESULTS / f"{name}.md").read_text() == getattr(page, name)(found)
    assert (RESULTS / f"{name}.png").exists() and REAL >= 50
