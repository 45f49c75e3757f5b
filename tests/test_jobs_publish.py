"""Publishing: what is written, what is refused, and that readers of a Hub see all or nothing, wherever it fails."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import World
from hub_server import TOKEN, Blob, Hub
from PIL import Image

from jobs import cards, votes
from jobs.metrics import shown
from jobs.publish import _refuse_secrets, publish
from jobs.summary import opened, summarise
from jobs.upload import SUMS, Item, item, summed, to_hub
from schemas.errors import WinnowError
from storage import snapshot
from storage.snapshot import Spent, numbers, seal
from storage.verify import verify

Winnow = Callable[..., Any]
Two = list[list[Item]]
LICENSED = [(["publish", "license"], "cc-by-4.0")]
TO = "ada/digits"
REPO = f"datasets/{TO}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its storage is a server of its own
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    yield server
    server.shutdown()
    server.server_close()


def shards(world: World, round: int) -> pa.Table:
    listed = world.rows(
        f"SELECT path FROM shards WHERE selection = 'curated' AND round = {round} AND format = 'parquet' ORDER BY path"
    )
    return pa.concat_tables(pq.read_table(world.store / row["path"]) for row in listed)


def sums(folder: Path) -> dict[str, str]:
    lines = (folder / SUMS).read_text().splitlines()
    return {line[66:]: line[:64] for line in lines}


def card(text: str) -> tuple[dict[str, Any], str]:
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def load(code: str, hub: Hub, tmp_path: Path, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """Run ``code`` as somebody else would, with nothing but the Hub's address."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HOME": str(tmp_path / "reader"), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )


READ = """
import hashlib, json
from datasets import load_dataset
rows = load_dataset("ada/digits", split="train", revision={revision!r})
raw = rows.with_format("arrow")[:]
files = [hashlib.sha256(image.as_py()["bytes"]).hexdigest() for image in raw["image"]]
columns = [raw[name].to_pylist() for name in ("key", "weight", "text")]
print(json.dumps([*columns, files, rows[0]["image"].size]))
"""


def as_read(table: pa.Table) -> list[Any]:
    """What READ prints of these rows."""
    files = [hashlib.sha256(image["bytes"]).hexdigest() for image in table["image"].to_pylist()]
    size = list(Image.open(io.BytesIO(table["image"][0].as_py()["bytes"])).size)
    return [table["key"].to_pylist(), table["weight"].to_pylist(), table["text"].to_pylist(), files, size]


# --- what is written ---------------------------------------------------------------------------------------


def test_a_selection_in_a_folder(world: World, tmp_path: Path, winnow: Winnow, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    said = winnow("publish", "--to", TO, "--store", world.store, "--round", 2, "--dry-run", folder,
                  "--set", "publish.license=cc-by-4.0")  # fmt: skip
    assert said.status == 0 and said.out.strip() == str(folder) and not said.err
    listed = sums(folder)
    assert set(listed) | {SUMS} == {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    for path, sha in listed.items():
        assert hashlib.sha256((folder / path).read_bytes()).hexdigest() == sha
    head, body = card((folder / "README.md").read_text())
    assert head["license"] == "cc-by-4.0" and "synthetic" in head["tags"]
    makers = world.rows("SELECT DISTINCT model FROM samples WHERE arm = 'curated' AND split = 'train' ORDER BY model")
    assert head["source_model"] == [row["model"] for row in makers] and head["source_model_license"] == "apache-2.0"
    rows = shards(world, 2)
    info = head["dataset_info"][0]
    assert info["splits"][0]["num_examples"] == rows.num_rows and head["size_categories"] == ["n<1K"]
    assert {one["name"] for one in info["features"]} == set(rows.column_names)
    assert f'load_dataset("{TO}", split="train")' in body and "not answered" not in body
    assert all(sentence in body for sentence in world_story(world))
    scorers = world.rows(
        "SELECT DISTINCT scorer FROM scores JOIN selections USING (sample_id) WHERE selection = 'curated'"
    )
    assert scorers and all(f"| {row['scorer']} |" in body for row in scorers)
    with Image.open(folder / "assets" / "samples.png") as sheet:
        assert sheet.size[0] == 8 * 128
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert recipe["model"] == "embedded" and recipe["seed"] == world.recipe.seed

    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    loaded = datasets.load_dataset(str(folder), split="train")
    assert loaded.with_format("arrow")[:].cast(rows.schema).equals(rows)


def world_story(world: World) -> list[str]:
    with opened(world.store) as source:
        return summarise(source)["story"]


def test_a_whole_store_is_a_store_again(world: World, tmp_path: Path, winnow: Winnow) -> None:
    folder = tmp_path / "out"
    publish(world.store, TO, "store", sets=LICENSED, folder=folder)
    head, _ = card((folder / "README.md").read_text())
    tables = {config["config_name"]: config for config in head["configs"]}
    assert {"prompts", "samples", "scores", "embeddings-scene-clip", "weights", "evaluations"} <= set(tables)
    assert tables["samples"]["default"] is True
    infos = {info["config_name"]: info["splits"][0]["num_examples"] for info in head["dataset_info"]}
    for view in ("prompts", "samples", "scores", "distances", "selections", "rounds"):
        [count] = world.rows(f"SELECT count(*) AS n FROM {view}")
        assert infos[view] == count["n"]
    said = winnow("sql", "SELECT count(*) AS n FROM curated", "--store", folder, "--format", "json")
    assert json.loads(said.out) == world.rows("SELECT count(*) AS n FROM curated")
    problems = verify(folder).problems
    assert problems and all(problem.startswith("shards/") for problem in problems)  # they are left out
    [row] = world.rows("SELECT min(sample_id) AS sample_id FROM samples WHERE round = 1 AND split = 'train'")
    assert winnow("replay", row["sample_id"], "--store", folder).status == 0


def test_a_published_store_does_not_tell_where_its_owner_lives(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its snapshots hold the recipes of all stages, with the paths that were given."""
    home = tmp_path / "home-of-anna"
    store, copy = tmp_path / "store", tmp_path / "copy"
    shutil.copytree(world.store, store)
    recipe = snapshot.load(store, numbers(store)[-1]).recipe
    seal(store, "train", [], {**recipe, "model": str(home / "model")}, Spent("train", "curated", 1, 1.0))
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: home))
    publish(store, TO, "store", sets=LICENSED, folder=copy)
    assert not [path for path in copy.rglob("*.json") if "home-of-anna" in path.read_text()]
    assert snapshot.load(copy, numbers(copy)[-1]).recipe["model"] == "~/model"


@pytest.mark.parametrize("home", ["/", "/data"])
def test_a_home_that_is_the_root_or_the_start_of_a_name_changes_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    publish(world.store, TO, sets=LICENSED, round=1, folder=tmp_path / "plain")
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: Path(home)))
    publish(world.store, TO, sets=LICENSED, round=1, folder=tmp_path / "out")
    assert sums(tmp_path / "out") == sums(tmp_path / "plain")


def test_names_of_columns_stay_those_of_the_files(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scorer may be named by a path below the home folder."""
    home = tmp_path / "anna"
    one = pa.table({f"score:{home}/clip": [1.0], "model": ["m@1"]})
    pq.write_table(one, tmp_path / "one.parquet")
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: home))
    config = cards.Config("default", ("data/train-*",), [item("data/train-0.parquet", tmp_path / "one.parquet")], 1)
    with opened(world.store) as source:
        summary = summarise(source)
        recipe = world.recipe.for_arm("curated")
        story = cards.Story(source, summary, recipe, recipe.publish, "curated", 1, TO)
        head, _ = card(cards.dataset(story, "selection", [config])[0])
    assert {feature["name"] for feature in head["dataset_info"][0]["features"]} == set(one.column_names)


@pytest.mark.parametrize(("makers", "tag", "said"), [
    (["m@1", "n@2"], True, "All images are synthetic: made by `m@1`, `n@2`."),
    (["m@1", "own:photos"], False, "Some images are synthetic, made by `m@1`; others were\ntaken in, not made here: "
                                   "`own:photos`."),
    (["own:photos"], False, "The images were taken in, not made here: `own:photos`."),
])  # fmt: skip
def test_the_card_tells_what_made_the_published_images(
    world: World, tmp_path: Path, makers: list[str], tag: bool, said: str
) -> None:
    pq.write_table(pa.table({"model": makers}), tmp_path / "one.parquet")
    config = cards.Config("default", ("data/*",), [item("data/one.parquet", tmp_path / "one.parquet")], len(makers))
    with opened(world.store) as source:
        recipe = world.recipe.for_arm("curated")
        story = cards.Story(source, summarise(source), recipe, recipe.publish, "curated", 1, TO)
        head, body = card(cards.dataset(story, "selection", [config])[0])
    assert said in body and ("synthetic" in head["tags"]) is tag
    assert head.get("source_model") == ([name for name in makers if not name.startswith("own:")] or None)


def test_votes_are_published_where_voters_agree_alone(world: World, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(world.store, store)
    number = world.rows("SELECT min(sample_id) AS n FROM samples WHERE round = 1 AND split = 'train'")[0]["n"]
    votes.cast(store, "anna", "keep", number, None, "keep", 1.0)
    votes.gather(store)
    publish(store, TO, sets=LICENSED, round=1, folder=tmp_path / "selection")
    with pytest.raises(WinnowError, match="its votes name 1 who voted; set publish.voters to true"):
        publish(store, TO, "store", sets=LICENSED, folder=tmp_path / "out")
    publish(store, TO, "store", sets=[*LICENSED, (["publish", "voters"], True)], folder=tmp_path / "out")


def test_the_recipe_has_the_answers(world: World, tmp_path: Path) -> None:
    publish(world.store, TO, sets=LICENSED, round=1, folder=tmp_path / "out")
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["publish"]["license"] == "cc-by-4.0"
    with pytest.raises(WinnowError, match=r"--set generate\.steps: the store was made with its own"):
        publish(world.store, TO, sets=[*LICENSED, (["generate", "steps"], 9)], folder=tmp_path / "more")


@pytest.mark.parametrize("to", ["a/b.git", "é/x", "ada/a--b", "../digits", "ada/..", "ada", "a/b/c"])
def test_a_name_that_no_repository_can_have_is_named(world: World, tmp_path: Path, to: str) -> None:
    with pytest.raises(WinnowError, match="no name of a repository .*write user/name"):
        publish(world.store, to, sets=LICENSED, folder=tmp_path / "out")


@pytest.mark.parametrize("text", [
    'a line\\nhf_' + "a" * 30, "?api_key=AIza" + "b" * 35, "ghp_" + "c" * 36, "gsk_" + "d" * 30, '"sk-' + "e" * 30,
])  # fmt: skip
def test_what_looks_like_a_token_is_found(text: str) -> None:
    with pytest.raises(WinnowError, match="looks like a token"):
        _refuse_secrets(item("recipe.yaml", text.encode()))
    _refuse_secrets(item("recipe.yaml", b"a risk-" + b"f" * 30 + b", shf_" + b"g" * 30))


def test_each_config_of_a_store_loads(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    folder = tmp_path / "out"
    publish(world.store, TO, "store", sets=LICENSED, folder=folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    head, _ = card((folder / "README.md").read_text())
    for info in head["dataset_info"]:
        loaded = datasets.load_dataset(str(folder), info["config_name"], split="train")
        assert loaded.num_rows == info["splits"][0]["num_examples"] > 0
    samples = datasets.load_dataset(str(folder), split="train")
    assert samples.num_rows == world.rows("SELECT count(*) AS n FROM samples")[0]["n"]


def test_a_model_in_a_folder(world: World, tmp_path: Path) -> None:
    from jobs import models

    folder = tmp_path / "out"
    publish(world.store, TO, "model", sets=LICENSED, round=2, folder=folder)
    head, body = card((folder / "README.md").read_text())
    assert (head["library_name"], head["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert "lora" not in head["tags"] and "base_model" not in head
    assert f'DiffusionPipeline.from_pretrained("{TO}")' in body
    [row] = world.rows("SELECT value, model FROM evaluations JOIN rounds USING (round, arm) WHERE arm = 'curated' "
                       "AND round = 2 AND metric = 'diversity'")  # fmt: skip
    assert re.search(rf"\| Diversity within a prompt \| .* \| {shown('diversity', row['value'])} ± ", body)
    inside = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    trained = world.store / row["model"]
    assert {p.relative_to(trained).as_posix() for p in trained.rglob("*") if p.is_file()} <= inside
    pipe = models.load(str(folder))
    assert (pipe.unet.conv_in.weight == models.load(str(trained)).unet.conv_in.weight).all()


def test_no_model_is_published_unasked_where_the_guard_keeps_the_base(world: World, tmp_path: Path) -> None:
    from jobs.publish import _round

    with opened(world.store) as source:
        with pytest.raises(WinnowError, match="the guard keeps the base, no round of 'curated'; give --round"):
            _round(source, "model", "curated", 0)
        assert _round(source, "model", "curated", 1) == 1 and _round(source, "selection", "curated", 0) == 2
        assert _round(source, "model", "naive", None) == 2


def test_the_card_of_a_lora(tmp_path: Path, world: World) -> None:
    from jobs import cards
    from jobs.questions import Publish

    with opened(world.store) as source:
        recipe = world.recipe.model_copy(update={"model": "org/base"})
        story = cards.Story(source, summarise(source), recipe, Publish(license="mit"), "curated", 1, TO)
        head, body = card(cards.model(story, lora=True)[0])
    assert head["base_model"] == "org/base" and head["base_model_relation"] == "adapter" and "lora" in head["tags"]
    assert f'pipe.load_lora_weights("{TO}")' in body and 'from_pretrained("org/base")' in body
    assert "People: not answered" in body and "source_license, prompts, people, unsafe" in body


# --- what is refused ---------------------------------------------------------------------------------------


def test_nothing_is_published_without_answers(world: World, tmp_path: Path, winnow: Winnow) -> None:
    words = ("publish", "--to", TO, "--store", world.store, "--round", 1, "--dry-run")
    line = winnow(*words, tmp_path / "a").line
    assert "publish.license is missing" in line and "--set publish.license=" in line and "--unanswered" in line
    assert not (tmp_path / "a").exists()
    line = winnow(*words, tmp_path / "a", "--set", "publish.license=mit", "--set", "publish.people= ").line
    assert "publish.people is missing: whether real people are shown" in line
    assert winnow(*words, tmp_path / "a", "--unanswered").status == 0
    head, body = card((tmp_path / "a" / "README.md").read_text())
    assert "license" not in head and "Published although these answers are missing: license." in body


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "nobody"], "write user/name"),
        (["--what", "images"], "allowed are selection, store, model"),
        (["--arm", "third"], "it has curated, naive"),
        (["--round", "9"], "round 9 of 'curated' is not exported"),
        (["--what", "model", "--round", "9"], "trained no model there"),
        (["--what", "store", "--round", "9"], "--round 9: not in 'curated'; it has 1, 2"),
        (["--recipe", "sdxl-lora"], "give the recipe of that run"),
        (["--set", "publish.licence=mit"], "did you mean 'license'"),
    ],
)
def test_what_cannot_be_published_is_one_line(
    world: World, tmp_path: Path, winnow: Winnow, words: list[str], said: str
) -> None:
    words = ["--to", TO, *words, "--store", str(world.store), "--dry-run", str(tmp_path / "a")]
    assert said in winnow("publish", "--set", "publish.license=mit", *words).line


def test_a_token_goes_nowhere(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub, winnow: Winnow
) -> None:
    words = ("publish", "--to", TO, "--store", world.store, "--round", 1)
    line = winnow(*words, "--dry-run", tmp_path / "a", "--set", f"publish.license={TOKEN}").line
    assert "README.md: holds what looks like a token" in line and TOKEN not in line
    said = winnow(*words, "--set", "publish.license=mit")
    assert said.status == 0 and TOKEN not in said.out + said.err
    for name, data in hub.repos[REPO].files().items():
        assert TOKEN.encode() not in data, name
    assert not [p for p in world.store.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the Hub refuses the token" in winnow(*words, "--set", "publish.license=mit").line
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    assert "log in with 'hf auth login'" in winnow(*words, "--set", "publish.license=mit").line


def test_a_folder_that_is_in_use_is_left_alone(world: World, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(WinnowError, match="not empty"):
        publish(world.store, TO, sets=LICENSED, folder=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    for below in (tmp_path / "mine.txt" / "x", tmp_path / ("x" * 300)):
        with pytest.raises(WinnowError, match="mine.txt|xxx"):
            publish(world.store, TO, sets=LICENSED, folder=below)


def test_a_damaged_shard_does_not_leave(world: World, tmp_path: Path, hub: Hub) -> None:
    import shutil

    store = tmp_path / "store"
    shutil.copytree(world.store, store)
    [row] = world.rows("SELECT path FROM shards WHERE selection = 'curated' AND round = 1 AND format = 'parquet'")
    data = bytearray((store / row["path"]).read_bytes())
    data[1000] ^= 1
    (store / row["path"]).write_bytes(data)
    with pytest.raises(WinnowError, match="SHA-256"):
        publish(store, TO, sets=LICENSED, round=1, folder=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    with pytest.raises(WinnowError, match=r"train-00000-of-00001\.parquet: its SHA-256 is .*, should be"):
        publish(store, TO, sets=LICENSED, round=1)
    assert set(hub.repos[REPO].files()) == {".gitattributes"} and not hub.repos[REPO].tags


def test_a_repository_of_somebody_else_is_left_alone(world: World, hub: Hub) -> None:
    publish(world.store, "ada/other", sets=LICENSED, round=1)
    repo = hub.repos["datasets/ada/other"]
    repo.commit("main", {"mine.csv": Blob(b"a,b\n", False)})
    with pytest.raises(WinnowError, match=r"holds mine\.csv, which was not published from here"):
        publish(world.store, "ada/other", sets=LICENSED, round=1, tag="second")
    assert repo.files() == {"mine.csv": b"a,b\n"}


def test_a_list_of_sums_of_somebody_elses_is_no_sign_of_ours(world: World, hub: Hub) -> None:
    publish(world.store, "ada/sums", sets=LICENSED, round=1)
    repo = hub.repos["datasets/ada/sums"]
    listed = b"0" * 64 + b"  corpus.bin\n"
    repo.commit("main", {"corpus.bin": Blob(b"x", False), SUMS: Blob(listed, False)})
    with pytest.raises(WinnowError, match=r"holds SHA256SUMS, which was not published from here"):
        publish(world.store, "ada/sums", sets=LICENSED, round=1, tag="second")
    assert repo.files() == {"corpus.bin": b"x", SUMS: listed}


def test_what_is_private_is_not_said_to_be_public(world: World, hub: Hub) -> None:
    publish(world.store, "ada/hidden", sets=LICENSED, round=1)
    with pytest.raises(WinnowError, match="is private, and stays so"):
        publish(world.store, "ada/hidden", sets=LICENSED, round=2, public=True)


def test_what_a_stopped_upload_left_goes_with_the_next(world: World, hub: Hub) -> None:
    publish(world.store, TO, sets=LICENSED, round=1)
    repo = hub.repos[REPO]
    repo.branches["winnow-upload-0123456789ab"] = repo.branches["main"]
    repo.branches["mine"] = repo.branches["main"]
    publish(world.store, TO, sets=LICENSED, round=2)
    assert set(repo.branches) == {"main", "mine"}


def test_what_is_open_stays_untouched_unless_public_is_said(world: World, hub: Hub) -> None:
    publish(world.store, TO, sets=LICENSED, round=1, public=True)
    repo = hub.repos[REPO]
    assert not repo.private
    before = repo.branches["main"]
    with pytest.raises(WinnowError, match="open to all; publish with --public"):
        publish(world.store, TO, sets=LICENSED, round=2)
    assert repo.branches["main"] == before


def test_a_tag_is_never_moved(world: World, hub: Hub) -> None:
    publish(world.store, TO, sets=LICENSED, round=1, tag="v1")
    first = hub.repos[REPO].tags["v1"]
    with pytest.raises(WinnowError, match="the tag v1 names other files"):
        publish(world.store, TO, sets=LICENSED, round=2, tag="v1")
    assert hub.repos[REPO].tags == {"v1": first} and hub.repos[REPO].branches == {"main": first}


def test_a_card_that_the_hub_refuses_is_said_in_its_words(world: World, hub: Hub) -> None:
    with pytest.raises(WinnowError, match=r"refuses what it was sent \(Invalid metadata.*those that the Hub knows\)"):
        publish(world.store, TO, sets=[(["publish", "license"], "My Own")], round=1)
    assert set(hub.repos[REPO].files()) == {".gitattributes"}


# --- the Hub -----------------------------------------------------------------------------------------------


def test_readers_of_the_hub_get_the_same_rows(world: World, hub: Hub, tmp_path: Path, winnow: Winnow) -> None:
    said = winnow("publish", "--to", TO, "--store", world.store, "--round", 2, "--set", "publish.license=cc-by-4.0")
    assert said.status == 0 and not said.err, said.err
    repo = hub.repos[REPO]
    [(tag, commit)] = repo.tags.items()
    assert repo.private and repo.branches == {"main": commit} and f"tag {tag}" in said.out
    rows = shards(world, 2)
    for revision in (None, tag):
        read = load(READ.format(revision=revision), hub, tmp_path)
        assert read.returncode == 0, read.stderr
        assert json.loads(read.stdout) == as_read(rows)
    (tmp_path / "stranger").mkdir()
    stranger = load(READ.format(revision=None), hub, tmp_path / "stranger", token="hf_stranger")
    assert stranger.returncode != 0 and "doesn't exist on the Hub or cannot be accessed" in stranger.stderr


def test_only_what_changed_is_uploaded(world: World, hub: Hub) -> None:
    publish(world.store, TO, sets=LICENSED, round=1)
    repo = hub.repos[REPO]
    first, uploaded = dict(repo.files()), hub.uploaded
    commits, asked = len(repo.commits), len(hub.asked)
    publish(world.store, TO, sets=LICENSED, round=1)
    assert len(repo.commits) == commits and hub.uploaded == uploaded
    again = hub.asked[asked:]
    assert not [line for line in again if re.match("(PUT|DELETE)", line) or re.search("/(commit|preupload|tag)/", line)]
    publish(world.store, TO, sets=[(["publish", "license"], "mit")], round=1)
    assert hub.uploaded == uploaded and {n for n in first if repo.files()[n] != first[n]} == {
        "README.md", "recipe.yaml", SUMS
    }  # fmt: skip
    repo.commit("main", repo.commits[repo.branches["main"]] | {"LICENSE": Blob(b"mine", False)})
    publish(world.store, TO, sets=LICENSED, round=2)
    files = repo.files()
    assert files["LICENSE"] == b"mine" and pq.read_table(io.BytesIO(files["data/train-00000-of-00001.parquet"])).equals(
        shards(world, 2)
    )
    assert len(repo.tags) == 3 and set(repo.branches) == {"main"}


def test_what_is_published_no_more_is_removed(world: World, hub: Hub) -> None:
    publish(world.store, TO, "store", sets=LICENSED)
    before = set(hub.repos[REPO].files())
    publish(world.store, TO, sets=LICENSED, round=1)
    after = set(hub.repos[REPO].files())
    assert "winnow.json" in before and not [name for name in after if name.startswith(("tables/", "snapshots/"))]
    assert {"README.md", SUMS, "recipe.yaml", "data/train-00000-of-00001.parquet"} <= after
    assert ".gitattributes" in after


@pytest.fixture(scope="module")
def two(world: World, tmp_path_factory: pytest.TempPathFactory) -> Two:
    """The files that two rounds are published as, the first with one that the second has not."""
    made = []
    for round in (1, 2):
        folder = tmp_path_factory.mktemp("two") / "out"
        publish(world.store, TO, sets=LICENSED, round=round, folder=folder)
        paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
        items = [item(path.relative_to(folder).as_posix(), path) for path in paths]
        made.append(summed([*items, item("data/extra.parquet", b"extra")] if round == 1 else items))
    return made


@pytest.mark.parametrize("when", ["before", "after"])
def test_wherever_it_fails_it_goes_on_and_nobody_sees_half(two: Two, hub: Hub, when: str) -> None:
    """Round 1 is published; then round 2, with each request refused in turn, until a run needs no request that is
    refused. "after": the Hub did what it was asked, and only the answer is lost."""
    to_hub(two[0], TO, "dataset", private=True)
    repo = hub.repos[REPO]
    old = repo.files()
    start = dict(repo.commits), dict(repo.branches), dict(repo.tags), dict(repo.large)
    new: dict[str, bytes] | None = None
    failures = 0
    for number in range(1, 200):
        repo.commits, repo.branches, repo.tags, repo.large = (dict(one) for one in start)
        hub.asked.clear()
        hub.refuse = lambda n, path, number=number: when if n == number else None  # type: ignore[misc]
        failed = False
        try:
            to_hub(two[1], TO, "dataset", private=True)
        except WinnowError as error:
            failed = True
            assert "run the same command again" in str(error) and TOKEN not in str(error), error
        tags = {tag: repo.files(tag) for tag in repo.tags}
        hub.refuse = lambda n, path: None
        if failed:
            failures += 1
            seen = repo.files()
            to_hub(two[1], TO, "dataset", private=True)
            new = new or repo.files()
            assert seen in (old, new), f"request {number} left half of it"
            assert all(files in (old, new) for files in tags.values())
        assert repo.files() == (new or repo.files()) != old
        assert set(repo.branches) == {"main"} and len(repo.tags) == 2
        assert sorted(map(sorted, (repo.files(tag) for tag in repo.tags))) == sorted(map(sorted, (old, repo.files())))
        if number > len(hub.asked) and not failed:
            break
    assert failures >= 12 and not failed


def test_the_first_publication_survives_every_refusal(two: Two, hub: Hub) -> None:
    empty = {".gitattributes"}
    number, done = 0, False
    while not done:
        number += 1
        hub.repos.clear()
        hub.asked.clear()
        hub.refuse = lambda n, path, number=number: "after" if n == number else None  # type: ignore[misc]
        try:
            to_hub(two[0], TO, "dataset", private=True)
            done = number > len(hub.asked)
        except WinnowError:
            hub.refuse = lambda n, path: None
            assert REPO not in hub.repos or len(hub.repos[REPO].files()) == 1 or SUMS in hub.repos[REPO].files()
            to_hub(two[0], TO, "dataset", private=True)
        files = hub.repos[REPO].files()
        assert empty < set(files) and hub.repos[REPO].private
        listed = {line[66:]: line[:64] for line in files[SUMS].decode().splitlines()}
        assert {name: hashlib.sha256(files[name]).hexdigest() for name in listed} == listed
    assert number > 12


def test_a_hub_out_of_reach_is_told(world: World, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(WinnowError, match=r"cannot be reached \(.+\); run the same command again"):
        publish(world.store, TO, sets=LICENSED, round=1)


def test_a_large_publication_goes_in_batches_and_goes_on(
    world: World, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs import upload

    monkeypatch.setattr(upload, "BATCH_FILES", 5)
    fourth = lambda path: "/commit/" in path and sum("/commit/" in line for line in hub.asked) == 4  # noqa: E731
    hub.refuse = lambda n, path: "before" if fourth(path) else None
    with pytest.raises(WinnowError, match="status 501"):
        publish(world.store, TO, "store", sets=LICENSED)
    repo = hub.repos[REPO]
    [branch] = set(repo.branches) - {"main"}
    there, uploaded = len(repo.files(branch)) - 1, hub.uploaded
    assert there == 15 and set(repo.files()) == {".gitattributes"}
    hub.refuse = lambda n, path: None
    asked = len(hub.asked)
    publish(world.store, TO, "store", sets=LICENSED)
    sent = sum("/preupload/" in line for line in hub.asked[asked:])
    listed = repo.files()[SUMS].decode().splitlines()
    assert sent == -(-(len(listed) + 1 - there) // 5)
    assert hub.uploaded - uploaded < sum(len(data) for data in repo.files().values())


def test_a_model_goes_to_the_hub_as_a_model(world: World, hub: Hub, tmp_path: Path) -> None:
    publish(world.store, TO, "model", sets=LICENSED, round=1)
    assert hub.repos[f"models/{TO}"].private
    code = f'from diffusers import DiffusionPipeline; print(type(DiffusionPipeline.from_pretrained("{TO}")).__name__)'
    read = load(code, hub, tmp_path)
    assert read.returncode == 0, read.stderr
    assert read.stdout.split()[-1] == "StableDiffusionPipeline"
