"""The whole loop on the embedded world: what every table holds, checked by other means than those that made it."""

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import datasets
import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import World, files
from conftest import rows as query
from contract import CONTRACT
from PIL import Image

from schemas.tables import TABLES
from storage.snapshot import latest, numbers
from storage.verify import verify

SCORERS = {"scene-clip", "scene-reader"}
DRIFT = {f"{measure}_{target}" for measure in ("fd", "kid", "cmmd", "density", "coverage") for target in ("d0", "real")}
LOOKS = {"brightness", "saturation"}
MEASURED = {"judge_accuracy", "diversity", *SCORERS, *DRIFT, *LOOKS}


@pytest.mark.parametrize("view", CONTRACT)
def test_every_view_has_its_columns_and_rows(world: World, view: str) -> None:
    found = world.table(f"SELECT * FROM {view}")
    assert found.num_rows > 0
    assert set(CONTRACT[view].split()) <= set(found.column_names)


def test_the_store_is_sound(world: World) -> None:
    report = verify(world.store)
    assert report.ok and not report.notes, (report.problems, report.notes)


def test_evaluations_hold_both_arms_from_the_base_on(world: World) -> None:
    for arm in ("curated", "naive"):
        for number in range(3):
            found = world.rows(f"SELECT * FROM evaluations WHERE arm = '{arm}' AND round = {number}")
            assert {row["metric"] for row in found} >= MEASURED, (arm, number)
            for row in found:
                assert math.isfinite(row["value"]) and row["ci_low"] <= row["ci_high"]
                assert row["n"] == 8 * 3
    # With what selects, only an arm that selects by a score agrees or disagrees.
    base = "SELECT metric, value FROM evaluations WHERE round = 0 AND arm = '{}' AND metric NOT LIKE 'agreement:%' " \
           "ORDER BY metric"  # fmt: skip
    assert world.rows(base.format("curated")) == world.rows(base.format("naive"))


def test_evaluated_means_are_those_of_the_scores(world: World) -> None:
    found = world.rows(
        "SELECT e.metric, e.value, avg(s.value) AS mean, count(*) AS n FROM evaluations e JOIN samples m ON "
        "m.round = e.round AND m.arm = CASE WHEN e.round = 0 THEN 'base' ELSE e.arm END AND m.split = 'eval' "
        "JOIN scores s ON s.sample_id = m.sample_id "
        "AND s.scorer = CASE WHEN e.metric = 'judge_accuracy' THEN 'scene-judge' ELSE e.metric END "
        "GROUP BY e.round, e.arm, e.metric, e.value"
    )
    assert len(found) == 2 * 3 * 3
    for row in found:
        assert row["n"] == 24 and row["value"] == pytest.approx(row["mean"], rel=1e-9), row


def test_drift_and_looks_are_those_of_the_images(world: World) -> None:
    from curate.drift import frechet_distance
    from curate.manifold import manifold
    from curate.mmd import cmmd, kid

    def vectors(where: str) -> np.ndarray:
        found = world.rows("SELECT vector FROM embeddings JOIN samples USING (sample_id) WHERE encoder = 'scene-judge' "
                           f"AND {where} ORDER BY prompt_id, sample_id")  # fmt: skip
        return np.array([row["vector"] for row in found])

    where = "arm = 'curated' AND samples.round = 2 AND split = 'eval'"
    mine, d0 = vectors(where), vectors("split = 'reference'")
    sql = "SELECT metric, value FROM evaluations WHERE arm = 'curated' AND round = 2"
    value = {row["metric"]: row["value"] for row in world.rows(sql)}
    expected = {
        "fd_d0": frechet_distance(mine, d0), "kid_d0": kid(mine, d0).value, "cmmd_d0": cmmd(mine, d0).value,
        "density_d0": manifold(mine, d0).density.mean(), "coverage_d0": manifold(mine, d0).covered.mean(),
    }  # fmt: skip
    assert {metric: value[metric] for metric in expected} == pytest.approx(expected, rel=1e-4)
    stored = [row["image"]["bytes"] for row in world.rows(f"SELECT image FROM samples WHERE {where}")]
    pictures = [Image.open(io.BytesIO(file)) for file in stored]
    rgb = np.stack([np.asarray(picture.convert("RGB"), float) for picture in pictures]) / 255
    assert value["brightness"] == pytest.approx((rgb @ [0.299, 0.587, 0.114]).mean(), abs=0.004)
    top = rgb.max(-1)
    saturation = np.divide(top - rgb.min(-1), top, out=np.zeros_like(top), where=top > 0)
    assert value["saturation"] == pytest.approx(saturation.mean(), abs=0.004)


def test_agreement_is_the_rank_correlation_within_prompts(world: World) -> None:
    from scipy.stats import spearmanr

    found = world.rows(
        "SELECT prompt_id, list(a.value ORDER BY sample_id) AS a, list(b.value ORDER BY sample_id) AS b FROM samples "
        "JOIN scores a USING (sample_id) JOIN scores b USING (sample_id) WHERE a.scorer = 'scene-clip' "
        "AND b.scorer = 'scene-reader' AND arm = 'curated' AND samples.round = 1 AND split = 'eval' GROUP BY prompt_id"
    )
    mean = np.mean([spearmanr(row["a"], row["b"]).statistic for row in found])
    sql = "SELECT metric, value FROM evaluations WHERE arm = 'curated' AND round = 1 AND metric LIKE 'agreement:%'"
    value = {row["metric"]: row["value"] for row in world.rows(sql)}
    assert value["agreement:scene-reader"] == pytest.approx(mean)
    # The naive arm selects by no score: there is nothing to agree with.
    assert not world.rows(sql.replace("curated", "naive"))


def test_win_rates_compare_the_same_prompt_and_seed(world: World) -> None:
    for number in (1, 2):
        pairs = world.rows(
            "SELECT a.value AS mine, b.value AS base FROM samples x JOIN samples y ON x.prompt_id = y.prompt_id "
            "AND x.seed = y.seed JOIN scores a ON a.sample_id = x.sample_id JOIN scores b ON b.sample_id = y.sample_id "
            f"WHERE x.arm = 'curated' AND x.round = {number} AND x.split = 'eval' AND y.arm = 'base' "
            "AND y.split = 'eval' AND a.scorer = 'scene-reader' AND b.scorer = 'scene-reader'"
        )
        assert len(pairs) == 24
        rate = np.mean([(p["mine"] > p["base"]) + 0.5 * (p["mine"] == p["base"]) for p in pairs])
        metric = "win_rate:scene-reader"
        sql = f"SELECT value FROM evaluations WHERE arm = 'curated' AND round = {number} AND metric = '{metric}'"
        assert world.rows(sql)[0]["value"] == pytest.approx(rate)


def test_held_out_prompts_are_never_trained_on(world: World) -> None:
    used = "SELECT DISTINCT prompt_id FROM samples WHERE split {} 'eval'"
    trained = {row["prompt_id"] for row in world.rows(used.format("!="))}
    measured = {row["prompt_id"] for row in world.rows(used.format("="))}
    assert len(measured) == 8 and len(trained) == 24 and not trained & measured
    splits = {row["prompt_id"]: row["split"] for row in world.rows("SELECT * FROM prompts WHERE kept")}
    assert {splits[number] for number in measured} == {"eval"}
    assert {splits[number] for number in trained} == {"train"}


def quantile(values: list[float], q: float) -> float:
    """Linear between the order statistics."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def test_weights_are_the_closed_form_of_the_distances(world: World) -> None:
    own = [row["value"] for row in world.rows("SELECT value FROM distances WHERE round = 0")]
    assert len(own) == 12 * 3
    beta = quantile(own, 0.9)
    sigma2 = quantile(own, 0.99) - beta
    found = world.rows(
        "SELECT weight, d.value AS distance FROM selections s JOIN distances d USING (sample_id) "
        "WHERE kept AND selection = 'curated'"
    )
    assert len(found) == 24
    for row in found:
        d = row["distance"]
        expected = 1.0 if d <= beta else math.exp(-(d - beta) / sigma2)
        assert row["weight"] == pytest.approx(expected, rel=1e-12)
    naive = world.rows("SELECT DISTINCT weight FROM selections WHERE selection = 'naive' AND kept")
    assert naive == [{"weight": 1.0}]
    assert world.rows("SELECT DISTINCT weight FROM selections WHERE NOT kept") == [{"weight": 0.0}]


def vectors(world: World, where: str) -> tuple[np.ndarray, np.ndarray]:
    found = world.table(
        f"SELECT sample_id, vector FROM embeddings JOIN samples USING (sample_id) WHERE {where} ORDER BY sample_id"
    )
    return found["sample_id"].to_numpy(), np.array(found["vector"].to_pylist())


def test_distances_are_the_mean_of_the_ten_nearest_of_d0(world: World) -> None:
    _, d0 = vectors(world, "encoder = 'scene-clip' AND arm = 'base' AND split = 'reference'")
    numbers_, x = vectors(world, "encoder = 'scene-clip' AND arm = 'curated' AND split = 'train'")
    expected = np.sort(np.linalg.norm(x[:, None] - d0[None], axis=2), axis=1)[:, :10].mean(1)
    found = world.rows("SELECT sample_id, value FROM distances WHERE round > 0 ORDER BY sample_id")
    assert [row["sample_id"] for row in found] == numbers_.tolist()
    np.testing.assert_allclose([row["value"] for row in found], expected, rtol=1e-5)
    own = np.linalg.norm(d0[:, None] - d0[None], axis=2)
    np.fill_diagonal(own, np.inf)
    found = world.rows("SELECT sample_id, value FROM distances WHERE round = 0 ORDER BY sample_id")
    np.testing.assert_allclose([row["value"] for row in found], np.sort(own, 1)[:, :10].mean(1), rtol=1e-5)


def test_sql_agrees_with_numpy(world: World) -> None:
    found = world.rows(
        "SELECT prompt, avg(value) AS mean, max(value) AS best, count(*) AS n FROM scores JOIN samples "
        "USING (sample_id) WHERE scorer = 'scene-clip' AND split = 'train' AND arm = 'curated' "
        "GROUP BY prompt ORDER BY prompt"
    )
    by_prompt: dict[str, list[float]] = {}
    prompts, values = {}, {}
    for path in (world.store / "tables" / "samples").rglob("*.parquet"):
        for row in pq.read_table(path, columns=["sample_id", "prompt", "split", "arm"]).to_pylist():
            if (row["split"], row["arm"]) == ("train", "curated"):
                prompts[row["sample_id"]] = row["prompt"]
    for path in (world.store / "tables" / "scores").rglob("*.parquet"):
        for row in pq.read_table(path, columns=["sample_id", "scorer", "value"]).to_pylist():
            if row["scorer"] == "scene-clip" and row["sample_id"] in prompts:
                values[row["sample_id"]] = row["value"]
    for number, value in values.items():
        by_prompt.setdefault(prompts[number], []).append(value)
    assert [row["prompt"] for row in found] == sorted(by_prompt) and len(found) == 24
    for row in found:
        expected = by_prompt[row["prompt"]]
        assert row["n"] == len(expected) == 4
        assert (row["mean"], row["best"]) == (pytest.approx(np.mean(expected)), max(expected))


def test_the_curated_arm_keeps_the_highest_score_of_each_prompt(world: World) -> None:
    for number in (1, 2):
        found = world.rows(
            "SELECT prompt_id, sample_id, kept, rank, value, reason FROM selections s JOIN samples m USING (sample_id) "
            f"JOIN scores c USING (sample_id) WHERE selection = 'curated' AND s.round = {number} "
            "AND scorer = 'scene-clip'"
        )
        assert len(found) == 12 * 4
        for prompt in {row["prompt_id"] for row in found}:
            group = sorted((row for row in found if row["prompt_id"] == prompt), key=lambda row: -row["value"])
            assert [row["kept"] for row in group] == [True, False, False, False]
            assert [row["rank"] for row in group] == [1, 2, 3, 4]


def test_the_naive_arm_draws_as_many_unread(world: World) -> None:
    found = world.rows(
        "SELECT round, prompt_id, count(*) FILTER (WHERE kept) AS kept, count(*) AS n FROM selections "
        "JOIN samples USING (sample_id, round) WHERE selection = 'naive' GROUP BY ALL"
    )
    assert len(found) == 24 and {(row["kept"], row["n"]) for row in found} == {(1, 2)}
    assert {
        row["reason"].split()[0]
        for row in world.rows("SELECT reason FROM selections WHERE selection = 'naive' AND NOT kept")
    } == {"draw"}


@pytest.fixture(scope="module")
def candidates(world: World) -> tuple[Any, np.ndarray, np.ndarray]:
    """The rows of round 1 of the curated arm, their scores and their unit vectors."""
    from jobs import samples
    from jobs.embed import vectors_of
    from jobs.score import scores_of

    run = world.runs["curated"]
    _, x = vectors_of(run, "scene-clip", "train")
    scores = scores_of(run, "train", ("scene-clip",))["scene-clip"]
    return samples.of(run, "train"), scores, x / np.linalg.norm(x, axis=1, keepdims=True)


def decide(world: World, candidates: Any, **settings: Any) -> Any:
    from jobs.select import Select
    from jobs.select import decide as by_settings

    decision = by_settings(world.runs["curated"], Select(**settings), ("scene-clip",), candidates[0])
    assert all(bool(reason) != kept for reason, kept in zip(decision.reason, decision.kept, strict=True))
    return decision


def test_top_k_keeps_the_highest_of_all(world: World, candidates: Any) -> None:
    decision = decide(world, candidates, policy="top_k", budget=5)
    assert set(np.flatnonzero(decision.kept)) == set(np.argsort(candidates[1])[-5:])


def test_a_band_keeps_from_its_places_only(world: World, candidates: Any) -> None:
    decision = decide(world, candidates, policy="quantile_band", band=(0.5, 1.0), keep=1)
    assert decision.kept.sum() == 12 and set(decision.rank[decision.kept]) <= {3, 4}


def test_floors_and_dedup_come_before_the_policy(world: World, candidates: Any) -> None:
    _, scores, x = candidates
    floor = float(np.median(scores))
    above = x[scores >= floor]
    alike = float(np.quantile((above @ above.T)[np.triu_indices(len(above), 1)], 0.9))  # a tenth of all pairs
    decision = decide(world, candidates, floors={"scene-clip": floor}, space="scene-clip", dedup=alike, keep=4)
    kept = decision.kept
    assert 0 < kept.sum() < 24 and scores[kept].min() >= floor
    likeness = x[kept] @ x[kept].T - 2 * np.eye(kept.sum())
    assert likeness.max() < alike
    reasons = [str(reason) for reason in decision.reason[~kept]]
    assert sum(reason.startswith("below floor") for reason in reasons) == (scores < floor).sum()
    assert any(reason.startswith("near duplicate of") for reason in reasons)


def test_diverse_takes_from_every_cluster(world: World, candidates: Any) -> None:
    decision = decide(world, candidates, policy="diverse", budget=20, space="scene-clip")
    assert decision.kept.sum() == 20


def test_every_reject_has_a_reason_and_no_keeper_has(world: World) -> None:
    found = world.rows("SELECT kept, reason FROM selections")
    assert all((row["reason"] == "") == row["kept"] for row in found)
    assert sum(not row["kept"] for row in found) == 2 * 12 * 3 + 2 * 12
    assert all(row["reason"] for row in world.rows("SELECT reason FROM prompts WHERE NOT kept"))


def test_curated_has_one_row_for_each_kept_sample(world: World) -> None:
    kept = world.rows("SELECT selection, round, sample_id, weight FROM selections WHERE kept ORDER BY ALL")
    found = world.rows("SELECT selection, round, sample_id, weight FROM curated ORDER BY ALL")
    assert found == kept and len(found) == 48
    joined = "SELECT c.*, s.value FROM curated c JOIN scores s USING (sample_id) WHERE selection = 'curated'"
    for row in world.rows(joined):
        assert row["scores"]["scene-clip"] == row["value"]
        assert row["image"]["bytes"].startswith(b"\x89PNG") and row["prompt"]


def test_both_arms_train_alike(world: World) -> None:
    found = world.rows("SELECT selection, round, sum(rows) AS n FROM shards GROUP BY ALL ORDER BY ALL")
    # `accumulate` is on: the second round trains on both selections.
    assert [row["n"] for row in found] == [12, 24, 12, 24]
    curated, naive = (world.runs[arm].recipe for arm in ("curated", "naive"))
    assert curated.train == naive.train and curated.export == naive.export


def test_rounds_hold_verdicts_and_lineage(world: World) -> None:
    found = {(row["arm"], row["round"]): row for row in world.rows("SELECT * FROM rounds")}
    assert set(found) == {(arm, number) for arm in ("curated", "naive") for number in range(3)}
    for (arm, number), row in found.items():
        assert row["verdict"] in {"promote", "stop", "rollback"} and row["reason"]
        if number:
            before = found[arm, number - 1]["model"]
            assert row["parent_model"] == before and row["model"].startswith(f"models/{arm}-r{number}-")
            assert (world.store / row["model"] / "model_index.json").is_file()
            assert row["seconds"] > 0
            assert row["images"] == 12 * (4 if arm == "curated" else 2) + 24
        else:
            assert (row["verdict"], row["parent_model"], row["model"]) == ("promote", None, "embedded")
            assert row["images"] == 36 + 24
    assert found["naive", 2]["verdict"] == "stop"


def test_each_round_samples_with_the_model_before_it(world: World) -> None:
    from jobs.models import revision

    rounds = {(row["arm"], row["round"]): row["model"] for row in world.rows("SELECT * FROM rounds")}
    found = world.rows("SELECT DISTINCT arm, round, split, model FROM samples")
    assert len(found) == 2 + 2 * 2 * 2
    for row in found:
        by = row["round"] - (row["split"] == "train") if row["arm"] != "base" else 0
        model = rounds[row["arm"] if row["arm"] != "base" else "curated", by]
        path = model if by == 0 else str(world.store / model)
        assert row["model"].endswith(f"@{revision(path)}"), row


def test_training_moved_the_weights(world: World) -> None:
    from safetensors.numpy import load_file

    from jobs.models import MODELS

    file = "unet/diffusion_pytorch_model.safetensors"
    models = [MODELS["embedded"], *sorted((world.store / "models").iterdir())]
    assert len(models) == 5
    states = [load_file(model / file)["conv_in.weight"].astype(np.float32) for model in models]
    for i, one in enumerate(states):
        for other in states[:i]:
            assert 0 < np.abs(one - other).max() < 0.5


def load_dataset(pattern: Path, cache: Path) -> Any:
    return datasets.load_dataset("parquet", data_files=str(pattern), split="train", cache_dir=str(cache))


def test_samples_load_as_a_hugging_face_dataset(world: World, tmp_path: Path) -> None:
    found = load_dataset(world.store / "tables" / "samples" / "**" / "*.parquet", tmp_path)
    assert len(found) == world.rows("SELECT count(*) AS n FROM samples")[0]["n"]
    image = found[0]["image"]
    assert isinstance(image, Image.Image) and image.size == (16, 16) == (found[0]["width"], found[0]["height"])


def test_shards_load_as_a_training_set(world: World, tmp_path: Path) -> None:
    folder = next((world.store / "shards").glob("curated-r2-*"))
    found = load_dataset(folder / "*.parquet", tmp_path)
    assert {"image", "text", "weight"} <= set(found.column_names) and len(found) == 24
    stored = {row["sample_id"]: row for row in world.rows("SELECT * FROM curated WHERE selection = 'curated'")}
    assert {row["sample_id"] for row in found} == set(stored)
    for row in found:
        same = stored[row["sample_id"]]
        assert (row["text"], row["weight"]) == (same["prompt"], same["weight"])
        assert isinstance(row["image"], Image.Image)


def test_manifest_names_what_was_exported(world: World) -> None:
    import hashlib

    for row in world.rows("SELECT * FROM shards"):
        content = (world.store / row["path"]).read_bytes()
        assert (row["bytes"], row["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


def test_other_readers_see_the_same_rows(world: World) -> None:
    import polars

    pattern = str(world.store / "tables" / "scores" / "**" / "*.parquet")
    total = world.rows("SELECT count(*) AS n, fsum(value) AS total FROM scores")[0]
    seen = polars.read_parquet(pattern)
    assert (seen.height, seen["value"].sum()) == (total["n"], pytest.approx(total["total"]))
    assert duckdb.sql(f"SELECT count(*) FROM '{pattern}'").fetchall() == [(total["n"],)]


def test_snapshots_keep_the_recipe_and_the_past(world: World) -> None:
    found = numbers(world.store)
    assert found == list(range(1, len(found) + 1))
    assert latest(world.store).recipe["generate"]["steps"] == 2
    then = world.table("SELECT count(*) FROM samples").to_pylist()
    from storage.query import user_query

    assert user_query(world.store, "SELECT count(*) AS n FROM samples", 1).to_pylist() == [{"n": 0}]
    assert user_query(world.store, "SELECT count(*) FROM samples", found[-1]).to_pylist() == then


def test_every_stage_of_a_round_says_what_it_took(world: World) -> None:
    spent = latest(world.store).spent
    told = {one.stage.partition(" ")[0] for one in spent if (one.arm, one.round) == ("curated", 1)}
    inside = {"generate", "embed", "score", "distance", "select", "weigh", "export", "train", "evaluate"}
    assert told == {"prompts", *inside, "guard"}
    for arm in world.runs:
        [seconds] = world.table(f"SELECT seconds FROM rounds WHERE arm = '{arm}' AND round = 1")["seconds"].to_pylist()
        mine = [one for one in spent if (one.arm, one.round) == (arm, 1) and one.stage.partition(" ")[0] in inside]
        assert 0.5 * seconds < sum(one.seconds for one in mine) <= seconds + 0.1


def test_running_every_stage_again_adds_nothing(world: World) -> None:
    from jobs.round import loop

    before = files(world.store)
    for run in world.runs.values():
        outcome = loop(run)
        assert outcome.model
    assert files(world.store) == before


def test_every_verb_again_is_a_no_op(world: World, tmp_path: Path, winnow: Any) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(json.dumps(world.recipe.model_dump(mode="json")))
    before = files(world.store)
    where = ("--recipe", recipe, "--store", world.store)
    assert winnow("prompts", *where).status == 0
    for arm in ("curated", "naive"):
        for verb in [
            "generate",
            "embed",
            "score",
            "distance",
            "select",
            "weigh",
            "export",
            "train",
            "evaluate",
            "guard",
        ]:
            if (arm, verb) == ("naive", "distance"):
                continue
            said = winnow(verb, *where, "--arm", arm, "--round", 2)
            assert said.status == 0, (verb, said.err)
        for split in ("reference", "eval"):
            assert winnow("generate", *where, "--arm", arm, "--round", 1, "--split", split).status == 0
        assert winnow("round", *where, "--arm", arm, "--round", 1).status == 0
    said = winnow("loop", *where, "--arm", "naive")
    assert "the model to keep is that of round 2" in said.out
    assert files(world.store) == before


# Nothing is wired to the embedded world: another model, other scorers, prompts from a file.

PROMPTS = """a red fox in the deep snow
two green birds on a wire
an old boat under a stone bridge
the blue house by the sea
the blue house by the sea
a wooden table with three apples
a black cat sleeping on a chair
"""
MINE = '''
import numpy as np
from jobs.encoders import Encoder
from jobs.scorers import Scorer

def redness():
    """Mean of red less mean of blue."""
    def score(images, prompts):
        pixels = np.stack([np.asarray(image, np.float64) for image in images])
        return (pixels[..., 0] - pixels[..., 2]).mean((1, 2)), np.zeros(len(images), bool)
    return Scorer("mine", "1", score)

def colours():
    def encode(images, prompts):
        return np.stack([np.asarray(image, np.float64).mean((0, 1)) for image in images])
    return Encoder("mine", "1", encode)
'''


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory, stable_diffusion: Path, clip_folder: Path) -> Any:
    """One round of a random Stable Diffusion, scored by a random open_clip and a user's scorer."""
    from jobs import recipe as recipes
    from jobs.round import loop
    from jobs.run import Run
    from storage.layout import create

    home = tmp_path_factory.mktemp("foreign")
    (home / "minescorers").mkdir()
    (home / "minescorers" / "__init__.py").touch()
    (home / "minescorers" / "colour.py").write_text(MINE)
    sys.path.insert(0, str(home))
    (home / "my prompts.txt").write_text(PROMPTS)
    clip, vae = f"open_clip:local-dir:{clip_folder}", f"vae:{stable_diffusion}"
    recipe = {
        "model": str(stable_diffusion), "rounds": 1, "threads": 1,
        "prompts": {"source": str(home / "my prompts.txt"), "held_out": 0.34},
        "generate": {"images_per_prompt": 4, "steps": 3, "guidance": 3.0, "batch": 8, "format": "webp"},
        "reference": {"images_per_prompt": 8},
        "embed": {"encoders": [vae, "minescorers.colour:colours"]},
        "score": {"scorers": [clip, "minescorers.colour:redness"]},
        "distance": {"space": vae, "kind": "mean", "metric": "l2"},
        "select": {"keep": 2, "fuse": "rank", "space": "minescorers.colour:colours", "dedup": 0.99999999},
        "weigh": {"quantile": 0.5},
        "export": {"reference_share": 0.5, "rows": 5},
        "train": {"steps": 3, "batch": 4, "lr": 1e-4, "prompt_dropout": 0.1},
        "evaluate": {"images_per_prompt": 4, "space": "minescorers.colour:colours", "resamples": 5},
        "guard": {"metric": "diversity"},
        "arms": {"mine": {}},
    }  # fmt: skip
    (home / "mine.yaml").write_text(json.dumps(recipe))
    loaded = recipes.load(str(home / "mine.yaml"))
    run = Run(create(home / "store"), loaded.for_arm("mine"), 1, "mine")
    loop(run)
    yield run
    sys.path.remove(str(home))


def test_another_world_goes_the_whole_way(foreign: Any, clip_folder: Path) -> None:
    store = foreign.store
    assert verify(store).ok
    kept = query(store, "SELECT kept, text, reason FROM prompts")
    assert sorted(row["text"] for row in kept if row["kept"]) == sorted(set(PROMPTS.splitlines()))
    assert [row["reason"] for row in kept if not row["kept"]] == ["duplicate of 'the blue house by the sea'"]
    found = query(store, "SELECT DISTINCT metric FROM evaluations WHERE round = 1")
    clip = f"open_clip:local-dir:{clip_folder}"
    assert {clip, "minescorers.colour:redness", "fd_d0", "diversity"} <= {row["metric"] for row in found}
    rounds = query(store, "SELECT round, verdict FROM rounds ORDER BY round")
    assert rounds[0]["verdict"] == "promote" and rounds[1]["verdict"] in {"stop", "rollback"}
    images = query(store, "SELECT image, width FROM samples LIMIT 3")
    assert all(row["image"]["bytes"][8:12] == b"WEBP" and row["width"] == 32 for row in images)


def test_a_users_scorer_scores(foreign: Any) -> None:
    from jobs.images import decode

    found = query(
        foreign.store,
        "SELECT image, value FROM samples JOIN scores USING (sample_id) WHERE scorer LIKE 'mine%' LIMIT 9",
    )
    for row in found:
        pixels = np.asarray(decode(row["image"]["bytes"]), float)
        assert row["value"] == pytest.approx((pixels[..., 0] - pixels[..., 2]).mean())


def test_an_open_clip_scorer_is_the_cosine(foreign: Any, clip_folder: Path) -> None:
    import open_clip
    import torch
    from torch.nn.functional import cosine_similarity

    from jobs.images import decode

    found = query(
        foreign.store,
        "SELECT image, prompt, value FROM samples JOIN scores USING (sample_id) WHERE scorer LIKE 'open_clip%' LIMIT 9",
    )
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{clip_folder}")
    with torch.no_grad():
        image = model.eval().encode_image(torch.stack([preprocess(decode(row["image"]["bytes"])) for row in found]))
        text = model.encode_text(tokenize([row["prompt"] for row in found]))
    expected = cosine_similarity(image, text).numpy()
    np.testing.assert_allclose([row["value"] for row in found], expected, atol=1e-5)


def test_the_vae_space_is_the_scaled_latent_mean(foreign: Any, stable_diffusion: Path) -> None:
    import torch
    from diffusers import AutoencoderKL

    from jobs.images import decode

    found = query(
        foreign.store,
        "SELECT image, vector FROM samples JOIN embeddings USING (sample_id) WHERE encoder LIKE 'vae%' LIMIT 5",
    )
    vae = AutoencoderKL.from_pretrained(stable_diffusion / "vae")
    pixels = torch.stack([torch.from_numpy(np.array(decode(row["image"]["bytes"]))) for row in found])
    with torch.no_grad():
        latents = vae.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mean * 0.18215
    np.testing.assert_allclose([row["vector"] for row in found], latents.flatten(1), atol=2e-3)


def test_shares_of_d0_are_mixed_in(foreign: Any) -> None:
    found = query(foreign.store, "SELECT rows FROM shards ORDER BY path")
    kept = query(foreign.store, "SELECT count(*) AS n FROM selections WHERE kept")[0]["n"]
    total = kept + round(0.5 * kept)
    assert [row["rows"] for row in found] == [5] * (total // 5) + ([total % 5] if total % 5 else [])
    shards = [pq.read_table(path) for path in sorted((foreign.store / "shards").rglob("*.parquet"))]
    reference = [row for shard in shards for row in shard.to_pylist() if row["round"] == 0]
    assert len(reference) == round(0.5 * kept) and {row["weight"] for row in reference} == {1.0}


def test_tables_have_the_declared_schema(world: World) -> None:
    for name, rules in TABLES.items():
        # In this world nobody asks a language model, nothing is rejected early or refined, and nobody votes.
        if name in ("answers", "drafts", "refinements", "votes", "strengths"):
            continue
        path = next((world.store / "tables" / name).rglob("*.parquet"))
        assert pq.read_schema(path).names == rules.schema.names
