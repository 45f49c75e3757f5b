"""The recipes that come with Winnow: each goes the whole way on a small pipeline of its very class, and says what it
takes."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import rows, sets
from PIL import Image

from jobs import recipe as recipes
from jobs.plan import PUBLISHED, plan, shape_of
from schemas.errors import WinnowError

PROMPTS = [
    f"{who} {what} {where}"
    for who in ("a red fox", "two green birds", "an old boat", "the blue house")
    for what in ("sleeping", "under a tree")
    for where in ("in the snow", "by the sea", "on a hill")
]
SCORERS = '''
import numpy as np
from jobs.scorers import Scorer

def _of(name, channel):
    def score(images, prompts):
        pixels = np.stack([np.asarray(image.resize((8, 8)), np.float64) for image in images])
        return pixels[..., channel].mean((1, 2)), np.zeros(len(images), bool)
    return Scorer(name, "1", score)

def red(): return _of("red", 0)
def green(): return _of("green", 1)
def blue(): return _of("blue", 2)
'''
#: By recipe, the small pipelines of its class.
RUNS = [
    ("rsidiff-sd14", "sd"), ("rsidiff-sd3-lora", "sd3"), ("rsidiff-sd3-lora", "sd3-no-t5"), ("sdxl-lora", "sdxl"),
    ("flux-lora", "flux"), ("refine-only", "sdxl"), ("own-images", "sdxl"),
]  # fmt: skip


@pytest.fixture(scope="module")
def scorers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    home = tmp_path_factory.mktemp("scorers")
    (home / "smallscorers.py").write_text(SCORERS)
    package = home / "smallrecipes"
    package.mkdir()
    (package / "__init__.py").touch()
    (home / "smallscorers.py").rename(package / "colour.py")
    sys.path.insert(0, str(home))
    yield "smallrecipes.colour"
    sys.path.remove(str(home))


def small(name: str, model: Path, home: Path, scorers: str, clip: Path) -> Any:
    """The recipe with its model, scorers and encoders in small; policy, training and guard stay as they are."""
    recipe = recipes.load(name)
    encoders = {}
    for encoder in recipe.embed.encoders:
        encoders[encoder] = f"vae:{model}" if encoder.startswith("vae:") else f"open_clip:local-dir:{clip}"
    space = f"open_clip:local-dir:{clip}"
    selecting = [f"{scorers}:red", f"{scorers}:green"]
    changes = {
        "model": str(model), "rounds": 2, "threads": 1, "prompts.source": str(home / "prompts.txt"), "prompts.keep": 20,
        "prompts.held_out": 0.2, "prompts.near": None, "generate.steps": 2, "generate.width": 32,
        "generate.height": 32, "reference.prompts": 6, "embed.encoders": list(encoders.values()),
        "score.scorers": selecting, "distance.space": encoders[recipe.distance.space], "distance.k": 3,
        "select.budget": 5, "evaluate.scorers": [f"{scorers}:blue"], "evaluate.space": space,
        "evaluate.prompts": 3, "evaluate.images_per_prompt": 2, "evaluate.resamples": 4,
        "guard.metric": f"{scorers}:blue", "train.steps": 3, "train.checkpoint": 2, "train.lr": 1e-3,
    }  # fmt: skip
    if name == "own-images":
        changes |= {"generate.source": str(home / "images"), "prompts.source": str(home / "images" / "metadata.jsonl"),
                    "prompts.keep": None, "train.size": 32}  # fmt: skip
    else:
        changes["generate.prompts"] = 6
    return recipes.override(recipe, sets(changes))


def images(folder: Path) -> None:
    """Images of different sizes, formats and modes, with captions; one caption has two."""
    folder.mkdir()
    rng = np.random.default_rng(3)
    lines = []
    for i, text in enumerate([*PROMPTS, PROMPTS[0]]):
        height, width = rng.integers(33, 60, 2)
        name = f"{i:02d}.{('png', 'jpg', 'webp')[i % 3]}"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(("name", "kind"), RUNS)
def test_a_recipe_goes_the_whole_way(
    name: str, kind: str, tmp_path: Path, stable_diffusion: Path, clip_folder: Path, scorers: str
) -> None:
    from jobs import models
    from jobs.round import loop
    from jobs.run import Run
    from storage.layout import create
    from storage.verify import verify

    model = stable_diffusion if kind == "sd" else pipelines.build(kind, tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    images(tmp_path / "images")
    recipe = small(name, model, tmp_path, scorers, clip_folder)
    run = Run(create(tmp_path / "store"), recipe.for_arm("curated"))
    outcome = loop(run)
    store = run.store
    closed = rows(store, "SELECT round, model, verdict FROM rounds WHERE round > 0 ORDER BY round")
    assert [row["round"] for row in closed] == [1, 2]
    kept = rows(store, "SELECT round, count(*) AS n, min(weight) AS low FROM curated GROUP BY round ORDER BY round")
    assert [row["n"] for row in kept] == [5, 5] and all(row["low"] > 0 for row in kept)
    assert verify(store).ok
    reasons = rows(store, "SELECT count(*) AS n FROM selections WHERE NOT kept AND reason = ''")
    assert reasons == [{"n": 0}]
    if recipe.train.method == "none":
        assert not list((store / "models").iterdir()) and {row["model"] for row in closed} == {str(model)}
        assert rows(store, "SELECT * FROM evaluations") == []
        return
    for row in closed:
        folder = store / row["model"]
        lora = recipe.train.method == "lora"
        assert models.layers(str(folder)) == ((str(model), folder) if lora else (str(folder), None))
    measured = rows(store, "SELECT round, metric FROM evaluations WHERE arm = 'curated'")
    assert {(r["round"], r["metric"]) for r in measured} >= {(n, f"{scorers}:blue") for n in (0, 1, 2)}
    assert outcome.verdict in ("stop", "rollback")
    if name == "own-images":
        assert rows(store, "SELECT DISTINCT model FROM samples WHERE split = 'train'") == [{"model": "own:images"}]
        stored = rows(store, "SELECT image, width, height, prompt FROM samples WHERE split = 'train' AND round = 1")
        files = {path.read_bytes(): path for path in (tmp_path / "images").glob("[0-9]*")}
        assert stored and all(row["image"]["bytes"] in files for row in stored)  # copied as they are
        captions = {json.loads(line)["file_name"]: json.loads(line)["text"]
                    for line in (tmp_path / "images" / "metadata.jsonl").read_text().splitlines()}  # fmt: skip
        for row in stored:
            path = files[row["image"]["bytes"]]
            assert captions[path.name] == row["prompt"]
            with Image.open(path) as image:
                assert image.size == (row["width"], row["height"])


def test_real_images_serve_as_d0_and_are_mixed_into_the_training(
    tmp_path: Path, stable_diffusion: Path, clip_folder: Path, scorers: str
) -> None:
    from jobs.plan import plan
    from jobs.round import loop
    from jobs.run import Run
    from storage.layout import create
    from storage.verify import verify

    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    images(tmp_path / "real")  # the first caption has two
    space = f"open_clip:local-dir:{clip_folder}"
    changes = {
        "rounds": 1, "reference.source": str(tmp_path / "real"), "reference.prompts": None,
        "reference.images_per_prompt": 1, "export.reference_share": 1.0, "train.size": 32,
        "embed.encoders": [space], "distance.space": space,
    }  # fmt: skip
    recipe = small("rsidiff-sd14", stable_diffusion, tmp_path, scorers, clip_folder)
    recipe = recipes.override(recipe, sets(changes)).for_arm("curated")
    assert plan(recipe, 20).images["D_0"] == 0
    store = create(tmp_path / "store")
    loop(Run(store, recipe))
    d0 = rows(store, "SELECT prompt, model, image FROM samples WHERE split = 'reference'")
    captions = [row["prompt"] for row in d0]
    learned = rows(store, "SELECT text FROM prompts WHERE kept AND split = 'train'")
    assert sorted(captions) == sorted(row["text"] for row in learned)  # one image each, of each that is learned
    assert {row["model"] for row in d0} == {"own:real"}
    files = {path.read_bytes() for path in (tmp_path / "real").glob("[0-9]*")}
    assert all(row["image"]["bytes"] in files for row in d0)
    [folder] = (store / "shards").glob("curated-r1-parquet-*")
    shard = pq.read_table(folder).to_pylist()
    real = [row for row in shard if row["image"]["bytes"] in files]
    assert len(shard) == 10 and len(real) == 5 and all(row["weight"] == 1 for row in real)
    assert rows(store, "SELECT count(*) AS n FROM distances WHERE value > 0")[0]["n"] > 0
    assert verify(store).ok


def test_a_limit_of_a_source_takes_the_same_images_every_round(tmp_path: Path) -> None:
    """And those that D_0 has, under the same limit."""
    from jobs.generate import generate
    from jobs.prompts import prompts
    from jobs.run import Run
    from storage.layout import create

    changes = {"generate.source": "embedded", "generate.source_limit": 2, "reference.source": "embedded",
               "reference.images_per_prompt": 2}  # fmt: skip
    recipe = recipes.override(recipes.load("embedded"), sets(changes)).for_arm("curated")
    run = Run(create(tmp_path / "store"), recipe)
    prompts(run)
    generate(run, "reference")
    for number in (1, 2):
        generate(run.at(number))
    found = rows(run.store, "SELECT round, prompt, sha256(image.bytes) AS file FROM samples ORDER BY ALL")
    of = {number: [(row["prompt"], row["file"]) for row in found if row["round"] == number] for number in (0, 1, 2)}
    assert of[0] == of[1] == of[2] and len(of[0]) == 2 * len({prompt for prompt, _ in of[0]}) == 2 * 144
    with pytest.raises(WinnowError, match="source_limit is of generate.source, and there is none"):
        recipes.override(recipe, sets({"generate.source": None}))


def test_a_round_without_training_trains_nothing(
    tmp_path: Path, stable_diffusion: Path, clip_folder: Path, scorers: str, winnow: Any
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    recipe = small("refine-only", stable_diffusion, tmp_path, scorers, clip_folder)
    (tmp_path / "mine.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    where = ("--recipe", tmp_path / "mine.yaml", "--store", tmp_path / "store")
    assert "train.method is 'none'" in winnow("train", *where).line
    assert not (tmp_path / "store" / "models").exists() or not list((tmp_path / "store" / "models").iterdir())


@pytest.mark.parametrize("name", sorted({name for name, _ in RUNS}))
def test_a_recipe_says_what_it_takes(name: str) -> None:
    text = (recipes.RECIPES / f"{name}.yaml").read_text()
    for line in plan(recipes.load(name), 1000).lines():
        assert f"# {line}\n" in text


def test_rsidiff_is_the_papers() -> None:
    """arXiv 2502.09963, section 4: SD 1.4, 8 rounds, 5,000 prompts and 300 samples each, batch 12, lr 1e-6, 30 epochs;
    SD3: 13,000 images, 1,000 kept, LoRA, lr 1e-6, 2,000 steps, 3 rounds."""
    one = recipes.load("rsidiff-sd14")
    assert (one.rounds, one.generate.prompts, one.select.budget) == (8, 5000, 300)
    assert (one.train.batch, one.train.lr, one.train.method) == (12, 1e-6, "full")
    assert one.train.steps * one.train.batch == 30 * one.select.budget
    assert one.prompts.keep and round(one.prompts.keep * (1 - one.prompts.held_out)) >= 8 * 5000
    three = recipes.load("rsidiff-sd3-lora")
    assert three.generate.prompts and three.generate.prompts * three.generate.images_per_prompt == 13_000
    assert (three.rounds, three.select.budget) == (3, 1000)
    assert (three.train.steps, three.train.lr, three.train.method) == (2000, 1e-6, "lora")
    for recipe in (one, three):
        assert not set(recipe.evaluate.scorers) & set(recipe.score.scorers)
        recipe.check_round()


def test_shapes_are_those_of_the_published_models() -> None:
    """Weights of the denoisers as published: 860 M (SD 1.4), 2.6 B (SDXL), 2.0 B (SD3 medium), 11.9 B (FLUX.1 dev)."""
    counts = {model: shape_of(model, None, None).parameters for model in PUBLISHED}
    assert counts["CompVis/stable-diffusion-v1-4"] == 859_520_964
    assert counts["stabilityai/stable-diffusion-xl-base-1.0"] == 2_567_463_684
    assert round(counts["stabilityai/stable-diffusion-3-medium-diffusers"] / 1e9, 1) == 2.0
    assert round(counts["black-forest-labs/FLUX.1-dev"] / 1e9, 1) == 11.9


def test_a_plan_counts_what_a_run_then_makes(
    tmp_path: Path, stable_diffusion: Path, clip_folder: Path, scorers: str
) -> None:
    """Images by count, and the weights of a model by the bytes on disk."""
    from jobs.round import loop
    from jobs.run import Run
    from storage.layout import create

    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    recipe = small("rsidiff-sd14", stable_diffusion, tmp_path, scorers, clip_folder).for_arm("curated")
    found = plan(recipe)
    run = Run(create(tmp_path / "store"), recipe)
    loop(run)
    counts = rows(run.store, "SELECT split, count(*) AS n FROM samples GROUP BY split")
    made = {row["split"]: row["n"] for row in counts}
    assert found.images == {
        "D_0": made["reference"], "candidates": made["train"], "refined": 0, "evaluation": made["eval"]
    }  # fmt: skip
    weights = sum(path.stat().st_size for path in (run.store / "models").rglob("*.safetensors"))
    assert found.bytes["models"] == pytest.approx(weights, rel=0.05)


def test_hours_follow_from_the_operations() -> None:
    """One image of SD 1.4: 50 steps, two passes each, and a decoding."""
    recipe = recipes.load("rsidiff-sd14")
    shape = shape_of(recipe.model, None, None)
    found = plan(recipe, tflops=100)
    assert found.hours["D_0"] == pytest.approx(5000 * (100 * shape.step + shape.decode) / 100 / 3600)
    assert found.hours["training"] == pytest.approx(8 * 750 * 12 * 3 * shape.step / 100 / 3600)
    assert plan(recipe, tflops=200).hours["D_0"] == pytest.approx(found.hours["D_0"] / 2)
    free = recipes.override(recipe, sets({"generate.guidance": 1.0}))
    assert plan(free, tflops=100).hours["D_0"] < 0.52 * found.hours["D_0"]


def test_a_plan_counts_what_is_written_twice_and_no_more_of_d0_than_there_is() -> None:
    recipe = recipes.override(recipes.load("embedded"), sets({"rounds": 2, "prompts.held_out": 0.2}))

    def planned(**changes: Any) -> Any:
        return plan(recipes.override(recipe, sets({key.replace("__", "."): v for key, v in changes.items()})), 180)

    plain = planned()
    rows = plain.bytes["shards"] / 3  # of a selection; two rounds of it, accumulated, are three
    d0 = plain.images["D_0"] * plain.bytes["images"] / sum(plain.images.values())
    assert planned(export__reference_share=0.25).bytes["shards"] == pytest.approx(1.25 * 3 * rows)
    assert planned(export__reference_share=1000).bytes["shards"] == pytest.approx(3 * rows + 2 * d0)
    assert planned(export__unweighted="repeats").bytes["shards"] == pytest.approx(2 * 3 * rows)
    neon = planned(train__neon=0.1, train__neon_on="candidates")
    assert neon.hours["training"] == pytest.approx(2 * plain.hours["training"])


def test_plan_speaks_to_people(winnow: Any) -> None:
    said = winnow("plan", "--recipe", "rsidiff-sd14")
    assert said.status == 0 and [line.split()[0] for line in said.out.splitlines()] == ["images", "disk", "hours"]
    assert "--prompts" in winnow("plan", "--recipe", "own-images").line
    assert "is not known here" in winnow("plan", "--recipe", "rsidiff-sd14", "--set", "model=some/one").line


@pytest.mark.parametrize(
    ("source", "column", "said"),
    [("ints.parquet", "text", "holds no images"), ("classes.parquet", "text", "holds no text"),
     ("nowhere", "text", "no such file or folder"), ("images", "label", "no column 'label', it has image, text"),
     ("bare", "text", "no column 'text'"), ("empty", "text", "cannot be read")],
)  # fmt: skip
def test_sources_of_own_images_that_do_not_serve_are_named(tmp_path: Path, source: str, column: str, said: str) -> None:
    from jobs.own import opened

    images(tmp_path / "images")
    (tmp_path / "bare").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "bare" / "a.png")
    (tmp_path / "empty").mkdir()
    for name, table in {
        "ints": {"image": [1, 2], "text": ["a", "b"]}, "classes": {"image": [b"x", b"y"], "text": [0, 1]},
    }.items():  # fmt: skip
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
    with pytest.raises(WinnowError, match="generate.source") as caught:
        opened(str(tmp_path / source), column, "generate")
    assert said in str(caught.value), caught.value


def test_an_image_that_is_not_there_is_named(tmp_path: Path) -> None:
    from jobs.own import _file, opened

    images(tmp_path / "images")
    found = opened(str(tmp_path / "images"), "text", "generate")
    for path in (tmp_path / "images").glob("[0-9]*"):
        path.unlink()
    with pytest.raises(WinnowError, match=r"row 3 has no image"):
        _file(found, 3, "images")


def test_no_more_is_kept_than_is_made() -> None:
    recipe = recipes.load("embedded-fast")
    made = recipe.generate.images_per_prompt
    most = plan(recipes.override(recipe, sets({"select.keep": made})), 180).bytes
    for more in ({"select.keep": 1000}, {"select.budget": 10**8}):
        assert plan(recipes.override(recipe, sets(more)), 180).bytes == most
    mixed = plan(recipes.override(recipe, sets({"export.reference_share": 1.0})), 180).bytes
    assert mixed["shards"] == 2 * plan(recipe, 180).bytes["shards"]
