"""Recipes: those that ship load, single settings can be changed, arms are laid over the rest."""

from pathlib import Path

import pytest
import yaml
from conftest import sets

from jobs import recipe as recipes
from jobs.encoders import ENCODERS
from jobs.named import known, pick
from jobs.scorers import SCORERS, Scorer
from schemas.errors import WinnowError


@pytest.mark.parametrize("name", recipes.names())
def test_every_shipped_recipe_loads_and_so_do_its_arms(name: str) -> None:
    recipe = recipes.load(name)
    assert recipe.name == name
    for arm in recipe.arms:
        mine = recipe.for_arm(arm)
        for scorer in mine.select.scorers or mine.score.scorers:
            assert scorer in mine.score.scorers, "selects by what is not scored"
        if mine.weigh.by == "distance":
            assert mine.distance.space in mine.embed.encoders
        # What judges is never what selects.
        assert mine.guard.metric not in mine.score.scorers and mine.evaluate.judge not in mine.score.scorers


def test_the_embedded_recipes_ship() -> None:
    assert {"embedded", "embedded-fast"} <= set(recipes.names())


@pytest.mark.parametrize("name", ["embedded", "embedded-fast"])
def test_the_control_arm_differs_in_selection_and_weight_only_and_trains_alike(name: str) -> None:
    recipe = recipes.load(name)
    curated, naive = recipe.for_arm("curated"), recipe.for_arm("naive")
    assert (naive.select.policy, naive.weigh.by, naive.guard.enabled) == ("random", "nothing", False)
    for table in ("prompts", "reference", "export", "train"):
        assert getattr(curated, table) == getattr(naive, table)
    assert curated.select.keep == naive.select.keep and curated.generate.prompts == naive.generate.prompts
    assert naive.generate.images_per_prompt > naive.select.keep
    assert (curated.model, curated.seed, curated.rounds) == (naive.model, naive.seed, naive.rounds)
    # Both arms are measured by the same.
    assert {*curated.score.scorers, *curated.evaluate.scorers} == {*naive.score.scorers, *naive.evaluate.scorers}
    assert curated.evaluate == naive.evaluate


def test_a_recipe_is_a_fixed_point_of_its_own_dump(tmp_path: Path) -> None:
    recipe = recipes.load("embedded")
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert recipes.load(str(tmp_path / "again.yaml")) == recipe


def test_single_settings_can_be_changed() -> None:
    recipe = recipes.load("embedded")
    changed = recipes.override(recipe, sets({"generate.steps": 3, "seed": 9, "select.floors.scene-clip": 0.1}))
    assert (changed.generate.steps, changed.seed, changed.select.floors) == (3, 9, {"scene-clip": 0.1})
    assert recipes.override(changed, sets({"select.floors": {}})).select.floors == {}
    assert recipes.override(recipe, [(["refine", "where"], True)]).refine.where == "true"
    cleared = recipes.override(changed, sets({"arms.naive.select": {"floors": {}}, "arms.curated": {}}))
    assert cleared.for_arm("naive").select.floors == {} and cleared.for_arm("curated").select.floors
    assert changed.generate.batch == recipe.generate.batch and changed.train == recipe.train
    assert recipe.generate.steps != 3
    assert recipes.override(recipe, []) is recipe


def test_an_arm_can_be_changed_and_what_it_does_not_say_is_like_the_rest() -> None:
    recipe = recipes.override(recipes.load("embedded"), sets({"arms.naive.train.lr": 5.0, "train.steps": 7}))
    assert recipe.for_arm("naive").train.lr == 5.0 and recipe.for_arm("curated").train.lr != 5.0
    assert recipe.for_arm("naive").train.steps == recipe.for_arm("curated").train.steps == 7
    assert recipe.for_arm("naive").select.policy == "random"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("generate.stepz", 3, "did you mean 'steps'"), ("generate.steps", "x", "generate.steps is 'x'"),
        ("train.ema", 1.0, "less than 1"), ("weigh.quantile", 1.0, "less than 1"), ("rounds", 0, "rounds is 0"),
        ("model", None, "model is None"), ("generate.format", "gif", "'png'"), ("evaluate.images_per_prompt", 1, "2"),
        ("prompts.keep", 1, "2"), ("distance.metric", "l3", "'l2', 'mse' or 'cosine'"), ("export.rows", 0, "1"),
        ("generate.width", 20, "multiple of 8"),
        ("evaluate.judge", "scene-jugde", "did you mean 'scene-judge'"), ("evaluate.space", "nope", "there are"),
    ],
)  # fmt: skip
def test_impossible_values_are_refused_with_the_key(key: str, value: object, said: str) -> None:
    with pytest.raises(WinnowError) as caught:
        recipes.override(recipes.load("embedded"), sets({key: value}))
    assert said in str(caught.value) and "recipe embedded" in str(caught.value), caught.value


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"distance.space": "scene-judge"}, "distance.space is 'scene-judge', which embed.encoders does not make"),
        ({"select.space": "vae:embedded"}, "select.space is 'vae:embedded', which embed.encoders does not make"),
        ({"select.scorers": ["scene-reader"]}, "select.scorers names 'scene-reader', which score.scorers does not"),
        ({"select.floors": {"scene-clop": 1}}, "select.floors names 'scene-clop'"),
        ({"select.policy": "top_k"}, "'top_k' needs select.budget"),
        ({"select.policy": "diverse", "select.budget": 9}, "'diverse' needs a space"),
        ({"select.dedup": 0.9}, "select.dedup needs a space"),
        ({"select.band": [0.5, 0.5]}, "select.band is [0.5, 0.5]"),
        ({"weigh.quantile": 0.99}, "weigh.tail is 0.99; give more than weigh.quantile"),
    ],
)
def test_tables_that_do_not_fit_together_are_refused_at_once(changes: dict[str, object], said: str) -> None:
    with pytest.raises(WinnowError) as caught:
        recipes.override(recipes.load("embedded"), sets(changes))
    assert said in str(caught.value) and "recipe embedded" in str(caught.value), caught.value


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"guard.metric": "scene-clip"}, "is 'scene-clip', which selects; choose among diversity, fd_real,"),
        ({"guard.metric": "win_rate:scene-clip"}, "which selects"),
        ({"evaluate.judge": "scene-clip", "guard.metric": "judge_accuracy"}, "which selects"),
        ({"evaluate.judge": "scene-clip", "guard.metric": "win_rate:judge_accuracy"}, "which selects"),
        ({"guard.metric": "fd_reel"}, "which is not measured"),
        ({"guard.metric": "fd_d0"}, "choose among diversity"),
        ({"score.scorers": []}, "'best_of_n' needs scores"),
        ({"evaluate.real": None}, "guard.metric is 'fd_real', which is not measured"),
        ({"evaluate.space": None}, "guard needs the diversity in evaluate.space"),
        ({"distance.space": None}, "weigh.by 'distance' needs distances"),
        ({"generate.reject": {"at": 0.5, "keep": 2, "by": "scene-reader"}, "guard.metric": "scene-reader"}, "selects"),
        ({"generate.reject": {"at": 0.5, "keep": 2, "by": "scene-judge"}, "guard.metric": "judge_accuracy"}, "selects"),
        ({"refine": {"where": "true", "accept": "better", "scorer": "scene-judge"}, "guard.metric": "judge_accuracy"},
         "selects"),
        ({"refine": {"accept": "better", "scorer": "scene-judge"}, "guard.metric": "judge_accuracy"}, ""),
        ({"score.scorers": ["scene-clip", "scene-reader"], "refine.where": '"rank:Scene-Reader" > 1',
          "select.scorers": ["scene-clip"], "guard.metric": "scene-reader"}, "selects"),
        ({"select.policy": "random", "weigh.by": "advantage", "guard.metric": "scene-clip"}, "selects"),
        ({"select": {"policy": "sql", "sql": 'SELECT sample_id FROM candidates WHERE "SCENE-CLIP" > 0'},
          "guard.metric": "scene-clip"}, "selects"),
        ({"select": {"policy": "sql", "sql": "SELECT sample_id FROM candidates"}, "guard.metric": "scene-clip"}, ""),
        ({"select": {"policy": "sql", "sql": "SELECT sample_id FROM candidates"}, "weigh.by": "advantage"},
         "weigh.by 'advantage' needs scores; name scorers in score.scorers, or in select.scorers"),
        ({"select": {"policy": "sql", "sql": "SELECT sample_id FROM candidates", "scorers": ["scene-clip"]},
          "weigh.by": "advantage"}, ""),
        ({"distance.match": "prompt", "distance.kind": "mean", "reference.prompts": 60, "generate.prompts": 60},
         "distance.match 'prompt' needs D_0 for every prompt of every round, and reference.prompts is 60"),
        ({"distance.match": "prompt", "distance.kind": "mean"}, ""),
        ({"weigh.quantile": 0.995, "weigh.sigma2": 1.0}, ""),
        ({"train.neon": 0.5}, "goes away from what is selected by 'best_of_n', floors or picks; set train.neon_on"),
        ({"train.neon": 0.5, "select.policy": "random"}, ""),
        ({"train.neon": 0.5, "train.neon_on": "candidates"}, ""),
        ({"train.neon": 0.5, "train.neon_on": "candidates", "generate.reject": {"by": "scene-clip", "keep": 8}},
         "generate.reject keeps those that 'scene-clip' prefers"),
        ({"guard.metric": "judge_accuracy"}, ""),
        ({"guard.metric": "win_rate:scene-reader"}, ""),
        ({"guard.metric": "scene-clip", "guard.enabled": False}, ""),
        ({"guard.metric": "scene-clip", "select.policy": "random"}, ""),
    ],
)
def test_a_round_needs_a_guard_that_does_not_select_and_tables_that_fit(changes: dict[str, object], said: str) -> None:
    recipe = recipes.override(recipes.load("embedded"), sets(changes))
    if not said:
        recipe.check_round()
        return
    with pytest.raises(WinnowError) as caught:
        recipe.check_round()
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["embedded", "embedded-fast"])
def test_the_control_arm_takes_no_part_in_early_rejection(name: str) -> None:
    recipe = recipes.override(recipes.load(name), sets({"generate.reject": {"by": "scene-clip", "keep": 2}}))
    assert recipe.for_arm("curated").generate.reject and recipe.for_arm("naive").generate.reject is None


def test_infinite_settings_are_refused() -> None:
    for key in ("train.lr", "generate.guidance", "weigh.beta", "train.clip"):
        for value in (float("inf"), float("nan")):
            with pytest.raises(WinnowError, match=key.replace(".", r"\.")):
                recipes.override(recipes.load("embedded"), sets({key: value}))


@pytest.mark.parametrize("arm", ["", "../../out", "a/b", "a\\b", ".hidden", "a\nb", "x" * 101, "é" * 51])
def test_arms_whose_folders_would_lie_elsewhere_are_refused(arm: str) -> None:
    with pytest.raises(WinnowError, match="folders are named after it"):
        recipes.override(recipes.load("embedded"), sets({"arms": {arm: {}}}))


def test_an_empty_arm_is_like_the_rest(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model: embedded\nname: mine\narms: {a: {}, b: {train: {steps: 2}}}\n")
    recipe = recipes.load(str(tmp_path / "mine.yaml"))
    assert recipe.for_arm("a").train.steps == recipe.train.steps and recipe.for_arm("b").train.steps == 2
    with pytest.raises(WinnowError, match="arm 'c': not in recipe 'mine'; it has a, b"):
        recipe.for_arm("c")


def test_names_resolve_or_are_refused_with_the_nearest() -> None:
    for table in (ENCODERS, SCORERS):
        for name in table:
            known("thing", name, table)
    known("scorer", "package.module:object", SCORERS)
    with pytest.raises(WinnowError, match=r"scorer 'opne_clip:x': unknown; did you mean 'open_clip'"):
        known("scorer", "opne_clip:x", SCORERS)
    with pytest.raises(WinnowError, match="it must return a Scorer"):
        pick("scorer", "importlib.metadata:packages_distributions", SCORERS, Scorer)


@pytest.mark.parametrize(
    ("text", "said"),
    [("generate: {steps: 2}\ngenerate: {prompts: 5}\n", "key 'generate' comes twice, in lines 1 and 2; keep one"),
     ("train:\n  lr: 1\n  lr: 2\n", "key 'lr' comes twice, in lines 2 and 3"),
     ("rounds: 2020-13-45\n", "not YAML"), (f"seed: {'1' * 5000}\n", "not YAML"), ("[" * 3000, "not YAML")],
)  # fmt: skip
def test_what_is_no_yaml_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(WinnowError, match=said):
        recipes.load(str(tmp_path / "mine.yaml"))


def test_tables_that_are_merged_are_no_repetition(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "model: embedded\nprompts: {source: embedded}\ngenerate: &it {steps: 2, batch: 4}\n"
        "arms: {curated: {generate: {<<: *it, steps: 3}}}\n"
    )
    recipe = recipes.load(str(tmp_path / "mine.yaml"))
    assert (recipe.generate.steps, recipe.for_arm("curated").generate.steps) == (2, 3)


@pytest.mark.parametrize("name", ["~nobody-here/x.yaml", "a" * 5000, "a\0.yaml", "a" * 5000 + ".yaml"])
def test_a_recipe_that_is_nowhere_is_one_line(name: str) -> None:
    with pytest.raises(WinnowError, match=r"unknown; there are|cannot be read"):
        recipes.load(name)
