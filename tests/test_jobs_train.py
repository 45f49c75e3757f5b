"""The stages around training: advantage weights, steps the other way, the cache between rounds, what is seen."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import World
from conftest import rows as query
from safetensors.torch import load_file

from jobs import recipe as recipes
from jobs import samples
from jobs.export import export
from jobs.generate import generate
from jobs.prompts import prompts
from jobs.run import Run
from jobs.score import score
from jobs.select import decide, picked, select
from jobs.train import Train, train, trained_model, unselected
from jobs.weigh import weigh
from schemas.errors import WinnowError
from storage.layout import create

PROMPTS = "a red fox in the snow\ntwo green birds on a wire\nan old boat under a bridge\nthe blue house by the sea\n"
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, stable_diffusion: Path) -> Run:
    """A round up to its shards: 3 prompts of 4 images, 2 of each kept, weighed by their advantage."""
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("train")
    (home / "prompts.txt").write_text(PROMPTS)
    recipe = {
        "model": str(stable_diffusion), "threads": 1,
        "prompts": {"source": str(home / "prompts.txt"), "held_out": 0.25},
        "generate": {"images_per_prompt": 4, "steps": 2, "guidance": 1.0, "batch": 6},
        "score": {"scorers": ["guidance-gap:" + str(stable_diffusion)]},
        "select": {"keep": 2},
        "weigh": {"by": "advantage", "temperature": 1.0, "most": 3.0},
        "train": {"steps": 3, "batch": 4, "lr": 1e-3},
        "evaluate": {"scorers": ["guidance-gap:" + str(stable_diffusion)]},
        "guard": {"metric": "diversity"},
        "arms": {"curated": {}},
    }  # fmt: skip
    (home / "mine.yaml").write_text(json.dumps(recipe))
    made = Run(create(home / "store"), recipes.load(str(home / "mine.yaml")).for_arm("curated"), 1, "curated")
    up_to_shards(made)
    return made


def up_to_shards(run: Run) -> None:
    for stage in (prompts, generate, score, select, weigh, export):
        stage(run)


def changed(run: Run, **settings: Any) -> Run:
    recipe = recipes.override(run.recipe, [(["train", key], value) for key, value in settings.items()])
    return Run(run.store, recipe, run.round, run.arm)


def weights_of(run: Run, file: str = UNET) -> dict[str, torch.Tensor]:
    train(run)
    return load_file(Path(trained_model(run)) / file)


def test_weights_are_the_advantage_over_all_images_of_the_prompt(run: Run) -> None:
    scored = query(run.store, "SELECT sample_id, prompt_id, value FROM samples JOIN scores USING (sample_id)")
    weights = {row["sample_id"]: row["weight"] for row in query(run.store, "SELECT sample_id, weight FROM weights")}
    assert len(scored) == 12 and len(weights) == 6
    for row in scored:
        if row["sample_id"] in weights:
            peers = np.array([other["value"] for other in scored if other["prompt_id"] == row["prompt_id"]])
            advantage = (row["value"] - peers.mean()) / peers.std()
            assert weights[row["sample_id"]] == pytest.approx(min(np.exp(advantage), 3.0), rel=1e-5)
    assert max(weights.values()) > 1 and len(set(weights.values())) >= 3


def test_neon_goes_the_other_way(run: Run, stable_diffusion: Path) -> None:
    start = load_file(stable_diffusion / UNET)
    trained, away = weights_of(run), weights_of(changed(run, neon=0.5))
    for name, begun in start.items():
        torch.testing.assert_close(away[name], begun - 0.5 * (trained[name] - begun), atol=1e-6, rtol=1e-5)
    assert max((trained[name] - start[name]).abs().max() for name in start) > 1e-4


def test_neon_on_candidates_adds_the_way_back_from_a_second_model(run: Run, stable_diffusion: Path) -> None:
    start, trained = load_file(stable_diffusion / UNET), weights_of(run)
    once, twice = (weights_of(changed(run, neon=w, neon_on="candidates")) for w in (0.5, 1.0))
    # The second model is start − (once − trained) / 0.5, whatever w is, and no copy of the first.
    for name in start:
        torch.testing.assert_close(twice[name] - trained[name], 2 * (once[name] - trained[name]), atol=1e-6, rtol=1e-4)
    moved = max((once[name] - trained[name]).abs().max() for name in start)
    apart = max((once[name] - trained[name] + 0.5 * (trained[name] - start[name])).abs().max() for name in start)
    assert moved > 1e-4 and apart > 1e-4


def test_the_second_model_learns_from_candidates_alike(run: Run) -> None:
    drawn = list(unselected(run, 5))
    rows = {row["sample_id"]: row for row in query(run.store, "SELECT sample_id, prompt, image FROM samples")}
    candidates = query(run.store, "SELECT sample_id FROM samples WHERE round = 1 AND split = 'train'")
    assert len({one.sample_id for one in drawn}) == 5
    assert {one.sample_id for one in unselected(run, 10**6)} == {row["sample_id"] for row in candidates}
    for one in drawn:
        assert (one.text, one.file) == (rows[one.sample_id]["prompt"], rows[one.sample_id]["image"]["bytes"])
        assert one.weight == 1


def test_two_trainings_do_not_fit_into_one_lora() -> None:
    with pytest.raises(WinnowError, match="neon_on 'candidates'.*'full'"):
        Train(method="lora", neon=1.0, neon_on="candidates")


def test_neon_turns_a_lora_round(run: Run) -> None:
    file = "pytorch_lora_weights.safetensors"
    trained, away = (weights_of(changed(run, method="lora", rank=2, neon=neon), file) for neon in (None, 2.0))
    down, up = ([name for name in trained if f"lora.{way}." in name or f"lora_{way}" in name] for way in ("down", "up"))
    down, up = down or [n for n in trained if "lora_A" in n], up or [n for n in trained if "lora_B" in n]
    assert down and len(down) == len(up) == len(trained) / 2
    assert all(torch.equal(trained[name], away[name]) for name in down)
    for name in up:
        torch.testing.assert_close(away[name], -2.0 * trained[name])
    assert max(trained[name].abs().max() for name in up) > 1e-4


def test_interpolation_goes_a_part_of_the_way(run: Run, stable_diffusion: Path) -> None:
    start = load_file(stable_diffusion / UNET)
    trained, part = weights_of(run), weights_of(changed(run, interpolate=0.25))
    for name, begun in start.items():
        torch.testing.assert_close(part[name], 0.75 * begun + 0.25 * trained[name], atol=1e-7, rtol=1e-5)
    assert max((part[name] - trained[name]).abs().max() for name in start) > 1e-4
    file = "pytorch_lora_weights.safetensors"
    whole, half = (weights_of(changed(run, method="lora", rank=2, interpolate=a), file) for a in (None, 0.5))
    up = [name for name in whole if "lora.up." in name or "lora_B" in name]
    assert up
    for name in whole:
        torch.testing.assert_close(half[name], whole[name] * (0.5 if name in up else 1), atol=1e-8, rtol=1e-5)


def test_what_says_how_far_a_round_goes_is_one_setting() -> None:
    with pytest.raises(WinnowError, match="train.neon and train.interpolate both say how far"):
        Train(neon=0.5, interpolate=0.5)


def test_a_step_of_neon_into_nowhere_is_no_model(run: Run) -> None:
    away = changed(run, neon=1e300, steps=2)
    with pytest.raises(WinnowError, match=r"not finite after a step of Neon of 1e\+300; lower train\.neon"):
        train(away)
    with pytest.raises(WinnowError, match="is not trained"):
        trained_model(away)


def test_what_killed_processes_left_goes_with_the_state(run: Run) -> None:
    again = changed(run, clip=0.6)
    train(again)
    left = run.store / "checkpoints" / f"{Path(trained_model(again)).name}.99999.draft"
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(b"half")
    train(again)
    assert not left.exists()


def test_what_is_seen_of_training(run: Run) -> None:
    watched = changed(run, watch=2, validation=0.5, sheet=1, window=[0, 500], min_snr=5.0, normalise="batch")
    train(watched)
    name = Path(trained_model(watched)).name
    folder = run.store / "reports" / name
    lines = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3] and all(line["validation"] > 0 for line in lines)
    assert {path.name for path in folder.glob("*.png")} == {"sheet-00002.png", "sheet-00003.png"}
    assert not list((run.store / "checkpoints").glob("*"))


def test_a_model_is_the_same_files_whether_its_texts_were_cached_or_not(run: Run) -> None:
    once = changed(run, clip=0.7)
    shutil.rmtree(run.store / "cache", ignore_errors=True)
    found = []
    for _ in range(2):
        train(once)
        folder = Path(trained_model(once))
        found.append({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()})
        shutil.rmtree(folder)
    assert len(found[0]) > 8 and found[0] == found[1]


def test_a_later_round_encodes_only_what_is_new(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Round 2 accumulates: 6 rows of round 1 that are cached, and 6 of its own."""
    from jobs.training import cache

    train(run)
    recipe = recipes.override(run.recipe, [(["export", "accumulate"], True), (["train", "method"], "full")])
    later = Run(run.store, recipe, 2, "curated")
    start = trained_model(run)
    monkeypatch.setattr(Run, "start_model", lambda self: start)
    up_to_shards(later)
    encoded: list[int] = []
    inner = cache.encode

    def count(vae: Any, images: np.ndarray, *args: Any) -> Any:
        encoded.append(len(images))
        return inner(vae, images, *args)

    monkeypatch.setattr(cache, "encode", count)
    train(later)
    assert sum(encoded) == 6


def test_what_people_picked_is_kept(run: Run, tmp_path: Path) -> None:
    """Three of one prompt, though the policy keeps two of each; the others say why they are not kept."""
    found = query(run.store, "SELECT sample_id, prompt_id FROM samples WHERE round = 1 AND split = 'train'")
    mine = [row["sample_id"] for row in found if row["prompt_id"] == found[0]["prompt_id"]][:3]
    (tmp_path / "picks-1.txt").write_text("\n".join(map(str, mine)) + "\n\n")
    recipe = recipes.override(run.recipe, [(["select", "picks"], str(tmp_path / "picks-{round}.txt"))])
    by_hand = Run(run.store, recipe, 1, "curated")
    rows = samples.of(by_hand, "train")
    chosen = picked(by_hand, recipe.select.picks)
    used = ("guidance-gap:" + recipe.model,)
    decision = decide(by_hand, recipe.select, used, rows, chosen)
    assert sorted(rows["sample_id"].to_numpy()[decision.kept]) == sorted(mine)
    assert set(decision.reason[~decision.kept]) == {"not picked by hand"} and sorted(decision.rank)[-3:] == [1, 2, 3]
    with pytest.raises(WinnowError, match="sealed already, made with other settings"):
        select(by_hand)
    wrong = {"": "is empty", "12\nabc\n": "cannot be read", f"{mine[0]}\n5\n": "sample 5 is no candidate"}
    for text, said in wrong.items():
        (tmp_path / "picks-1.txt").write_text(text)
        with pytest.raises(WinnowError, match=said):
            decide(by_hand, recipe.select, used, rows, picked(by_hand, recipe.select.picks))
    with pytest.raises(WinnowError, match=r"picks-2\.txt: cannot be read .*winnow sql"):
        picked(Run(run.store, recipe, 2, "curated"), recipe.select.picks)


def test_two_processes_train_one_model_in_one_store(run: Run, tmp_path: Path) -> None:
    """As ``accelerate launch`` starts them: one cache, one state, one model, that of a single process."""
    recipe = recipes.override(run.recipe, [(["train", "lr"], 1e-4), (["train", "micro_batch"], 1)])
    alone = weights_of(Run(run.store, recipe, 1, "curated"))
    home = shutil.copytree(run.store, tmp_path / "store")
    shutil.rmtree(home / "models")
    shutil.rmtree(home / "cache")
    (tmp_path / "mine.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    verb = ["train", "--recipe", tmp_path / "mine.yaml", "--store", home, "--arm", "curated", "--round", 1]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "jobs.cli",
         *map(str, verb)],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (model,) = (home / "models").iterdir()
    together = load_file(model / UNET)
    apart = torch.cat([(alone[name] - together[name]).abs().flatten() for name in alone])
    assert apart.quantile(0.99) < 1e-6 and apart.max() < 2e-4 and apart.max() > 0
    assert not list((home / "checkpoints").glob("*"))


def test_nothing_is_trained_where_nothing_is_to_be(run: Run) -> None:
    with pytest.raises(WinnowError, match=r"train\.method is 'none': nothing is trained"):
        train(changed(run, method="none"))


def test_a_model_does_not_tell_where_it_was_loaded_from(world: World) -> None:
    """Else equal weights have another revision in every checkout."""
    files = list((world.store / "models").rglob("*.json"))
    assert files and not [file for file in files if str(Path(__file__).parents[1]) in file.read_text()]
