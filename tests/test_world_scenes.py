"""The embedded world: captions and scenes are one thing, and the judge measures what it says."""

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jobs.world import WEIGHTS, build
from jobs.world.clip import one_slot_wrong
from jobs.world.generator import word_tokenizer
from jobs.world.judge import NONE, DigitReader, judge, read_ink, spoil
from jobs.world.reader import SLOTS, SlotReader, log_likelihood, slots
from jobs.world.scenes import (
    BACKGROUNDS,
    DIGITS,
    INKS,
    PALETTE,
    Handwriting,
    Scene,
    all_captions,
    caption,
    draw_scenes,
    parse,
    render,
)
from schemas.errors import WinnowError

scenes = st.builds(
    Scene, st.integers(0, 9), st.sampled_from(INKS), st.none() | st.sampled_from(BACKGROUNDS)
)


@given(scenes)
def test_parse_undoes_caption(scene: Scene) -> None:
    assert parse(caption(scene)) == scene
    assert parse(f"  {caption(scene).upper()} ".replace(" ", "\n ")) == scene


@pytest.mark.parametrize(
    "text", ["", "a red fox", "red seven", "a red seven on a pink background", "a red seven on a", "a red seven.",
             "a black seven", "a red eleven", "x" * 100_000],
)  # fmt: skip
def test_other_texts_are_refused_in_one_short_line(text: str) -> None:
    with pytest.raises(WinnowError, match="not a caption") as caught:
        parse(text)
    assert len(str(caught.value)) < 300


def test_captions_are_distinct_and_always_the_same() -> None:
    captions = all_captions()
    assert captions == all_captions() and len(set(captions)) == len(captions)
    assert len(captions) == 10 * 6 * 3 and all(parse(text).background for text in captions)


def test_the_tokenizer_is_the_same_each_time() -> None:
    one, other = word_tokenizer(all_captions()), word_tokenizer(all_captions())
    assert one.get_vocab() == other.get_vocab()


def test_every_word_is_one_token() -> None:
    captions = all_captions()
    tokenizer = word_tokenizer(captions)
    for text in [*captions, "a red seven"]:
        assert len(tokenizer(text).input_ids) == len(text.split()) + 2
    assert len({tuple(tokenizer(text).input_ids) for text in captions}) == len(captions)


@pytest.fixture(scope="module")
def hand() -> Handwriting:
    """Real handwriting, scikit-learn's."""
    images, labels, _ = build.digits(None)
    return build.slices(images, labels, 0)["judge"]


@pytest.fixture(scope="module")
def drawn() -> list[Scene]:
    return draw_scenes(300, np.random.default_rng(3))


def test_render_is_decided_by_its_rng(hand: Handwriting, drawn: list[Scene]) -> None:
    one, again, other = (render(drawn[:20], hand, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one.dtype == np.uint8 and one.shape == (20, 16, 16, 3)
    np.testing.assert_array_equal(one, again)
    assert (one != other).any(axis=(1, 2, 3)).all()


def test_drawn_scenes_are_of_every_kind(drawn: list[Scene]) -> None:
    assert {scene.digit for scene in drawn} == set(range(10)) and {scene.ink for scene in drawn} == set(INKS)
    assert {scene.background for scene in drawn} == {*BACKGROUNDS, None}


def test_slices_of_the_handwriting_are_disjoint_and_whole() -> None:
    images = np.arange(1200, dtype=np.int64).repeat(64).reshape(1200, 8, 8)
    cut = build.slices((images % 256).astype(np.uint8), np.arange(1200), 0)
    labels = np.concatenate([part.labels for part in cut.values()])
    assert sorted(labels) == list(range(1200)) and set(cut) == set(build.SLICES)
    assert all(len(part.labels) > 50 for part in cut.values())


class Perfect(torch.nn.Module):
    """Stands in for the digit network alone: it answers what it was told."""

    def __init__(self, digits: list[int]) -> None:
        super().__init__()
        self.digits = digits

    def forward(self, ink: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert ink.shape == (len(self.digits), 1, 16, 16) and 0 <= ink.min() <= ink.max() <= 1
        return torch.nn.functional.one_hot(torch.tensor(self.digits), NONE + 1).float(), ink.flatten(1)[:, :64]


def verdicts(images: np.ndarray, told: list[Scene], true: list[Scene]) -> np.ndarray:
    """The judge with a perfect digit network: it reads the true scene's digit."""
    return judge(Perfect([scene.digit for scene in true]), images, told)[0]  # type: ignore[arg-type]


def test_the_judge_accepts_what_is_right(hand: Handwriting, drawn: list[Scene]) -> None:
    """Colours are measured; the digits are given."""
    images = render(drawn, hand, np.random.default_rng(4))
    assert verdicts(images, drawn, drawn).mean() > 0.97  # at 8×8 pixels some strokes are faint


def changed(scene: Scene, slot: str) -> Scene | None:
    if slot == "ink":
        return replace(scene, ink=INKS[INKS.index(scene.ink) - 1])
    if slot == "background":
        if scene.background is None:
            return None
        return replace(scene, background=BACKGROUNDS[BACKGROUNDS.index(scene.background) - 1])
    return replace(scene, digit=(scene.digit + 3) % 10)


@pytest.mark.parametrize("slot", ["ink", "background", "digit"])
def test_the_judge_rejects_one_wrong_slot(hand: Handwriting, drawn: list[Scene], slot: str) -> None:
    both = [(scene, wrong) for scene in drawn if (wrong := changed(scene, slot))]
    assert len(both) > 200
    true, told = [scene for scene, _ in both], [wrong for _, wrong in both]
    images = render(true, hand, np.random.default_rng(5))
    right = verdicts(images, true, true)
    assert right.mean() > 0.97
    assert verdicts(images, told, true)[right].mean() == 0


def test_spoilt_ink_is_no_digit(hand: Handwriting, drawn: list[Scene]) -> None:
    ink = np.stack([read_ink(image).ink for image in render(drawn, hand, np.random.default_rng(4))])
    digits = np.array([scene.digit for scene in drawn])
    after, classes = spoil(ink, digits, np.random.default_rng(0))
    same = (after == ink).all(axis=(1, 2))
    assert (classes[same] == digits[same]).all() and 0.05 < (classes == NONE).mean() < 0.3
    for spoilt, whole in zip(after[classes == NONE], ink[classes == NONE], strict=True):
        assert (spoilt[:8] == whole[:8]).all() or (spoilt[:, :8] == whole[:, :8]).all()


def test_an_empty_picture_has_no_ink() -> None:
    image = np.full((16, 16, 3), PALETTE["blue"], np.uint8)
    reading = read_ink(image)
    assert reading.background == "blue" and reading.colour is None and not reading.ink.any()
    assert not judge(DigitReader().eval(), image[None], [Scene(7, "red", "blue")])[0][0]


@pytest.mark.parametrize("ink", INKS)
@pytest.mark.parametrize("ground", BACKGROUNDS)
def test_every_pair_of_colours_is_told(ink: str, ground: str) -> None:
    image = np.empty((16, 16, 3), np.uint8)
    image[:] = PALETTE[ground]
    image[5:11, 7:9] = PALETTE[ink]
    reading = read_ink(image)
    assert (reading.background, reading.colour) == (ground, ink)
    assert reading.ink.max() > 0.99 and (reading.ink > 0.5).sum() == 12


@given(scenes, st.integers(0, 2**32))
def test_one_slot_wrong_differs_in_exactly_one_slot(scene: Scene, seed: int) -> None:
    wrong = one_slot_wrong(scene, np.random.default_rng(seed))
    assert sum(getattr(scene, f.name) != getattr(wrong, f.name) for f in fields(Scene)) == 1
    assert parse(caption(wrong)) == wrong


def test_slots_are_what_the_caption_says() -> None:
    assert slots(Scene(3, "green")) == [3, INKS.index("green"), -1]
    assert slots(Scene(3, "green", "purple")) == [3, INKS.index("green"), BACKGROUNDS.index("purple")]


def test_log_likelihood_is_the_sum_over_the_said_slots() -> None:
    torch.manual_seed(0)
    model, images = SlotReader().eval(), torch.randn(4, 3, 16, 16)
    some = draw_scenes(4, np.random.default_rng(0))
    with torch.no_grad():
        got = log_likelihood(model, images, some).numpy()
        logits = model(images).numpy().astype(np.float64)
    starts = np.cumsum([0, *SLOTS])
    for value, row, scene in zip(got, logits, some, strict=True):
        expected = 0.0
        for slot, low, high in zip(slots(scene), starts, starts[1:], strict=False):
            part = row[low:high]
            expected += 0.0 if slot < 0 else part[slot] - np.log(np.exp(part).sum())
        assert value == pytest.approx(expected, rel=1e-4) and value <= 0


# The shipped weights: their shape and size, not how good they are.


def test_the_shipped_weights_are_small() -> None:
    total = sum(path.stat().st_size for path in WEIGHTS.rglob("*.safetensors"))
    assert 0 < total < 15e6
    assert not [path for path in WEIGHTS.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]


def test_the_shipped_pipeline_is_an_ordinary_one() -> None:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(WEIGHTS / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    (image,) = pipe("a red seven on a blue background", num_inference_steps=2, generator=generator).images
    assert image.size == (16, 16)


def test_the_shipped_clip_is_an_ordinary_one() -> None:
    import open_clip

    place = f"local-dir:{WEIGHTS / 'clip'}"
    model, _, preprocess = open_clip.create_model_and_transforms(place)
    from PIL import Image

    pixels = preprocess(Image.new("RGB", (16, 16)))[None]
    text = open_clip.get_tokenizer(place)(["a red seven"])
    model.eval()
    assert model.encode_image(pixels).shape == model.encode_text(text).shape == (1, 128)


def test_the_card_has_the_figures() -> None:
    card = json.loads((WEIGHTS / "card.json").read_text())
    assert set(card["parts"]) == set(build.PARTS)
    assert card["handwriting"] and card["digits"] >= 1000 and set(card["slices"]) == set(build.SLICES)
    for part, names in {
        "generator": ["autoencoder_rmse", "steps"], "clip": ["ranks_right_caption_first"],
        "reader": ["ranks_right_caption_first"], "judge": ["accuracy", "accepts_one_slot_wrong"],
        "real": ["judge_accuracy", "fd_of_its_halves", "diversity", "scenes"], "scenes": ["scenes", "least"],
    }.items():  # fmt: skip
        assert {*names, "seconds", "cpu_seconds", "cores"} <= set(card["parts"][part]), part


def test_sanity_of_the_shipped_judge(hand: Handwriting) -> None:
    """The only test of quality: what the card says of real scenes, and that a foreign hand is read far above chance."""
    from PIL import Image

    from jobs.world.judge import Judge

    card = json.loads((WEIGHTS / "card.json").read_text())
    assert card["parts"]["judge"]["accuracy"] > 0.9 and card["parts"]["judge"]["accepts_one_slot_wrong"] < 0.05
    scenes_ = draw_scenes(200, np.random.default_rng(7))
    images = [Image.fromarray(image) for image in render(scenes_, hand, np.random.default_rng(8))]
    right, features = Judge()(images, [caption(scene) for scene in scenes_])
    assert features.shape == (200, 64) and right.mean() > 0.3  # chance is 0.1


def test_real_features_are_those_of_the_prompts() -> None:
    from curate.drift import frechet_distance
    from jobs.evaluate import real_vectors

    sevens, threes = (real_vectors("embedded", [t for t in all_captions() if n in t]) for n in ("seven", "three"))
    assert sevens.shape[1] == threes.shape[1] == 64 and len(sevens) + len(threes) < 9000
    red, green = (real_vectors("embedded", [t for t in all_captions() if n in t]) for n in ("red", "green"))
    assert frechet_distance(sevens, threes) > 10 * frechet_distance(red, green)  # digits differ, colours do not
    with pytest.raises(WinnowError, match=r"evaluate\.real 'embedded': no features"):
        real_vectors("embedded", ["a red fox"])


def test_real_scenes_are_shipped_of_every_caption() -> None:
    from collections import Counter

    from jobs.images import decode
    from jobs.own import opened
    from jobs.world.judge import Judge

    scenes = opened("embedded", "text", "reference")
    assert Counter(scenes["text"]) == dict.fromkeys(all_captions(), build.EACH)
    some = scenes.select(range(0, len(scenes), 4))
    images = [decode(row["image"]["bytes"], "a scene") for row in some]
    assert {image.size for image in images} == {(16, 16)}
    assert np.mean(Judge()(images, list(some["text"]))[0]) > 0.9


def test_real_features_of_a_users_file(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from jobs.evaluate import real_vectors

    vectors = np.random.default_rng(0).normal(size=(50, 4))
    pq.write_table(pa.table({"vector": list(vectors)}), tmp_path / "real.parquet")
    np.testing.assert_array_equal(real_vectors(str(tmp_path / "real.parquet"), ["anything"]), vectors)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    bad = {"scalars": [1.0, 2.0], "words": [["a"], ["b"]], "one": [[1.0] * 4], "nan": [[float("nan")] * 4] * 2,
           "short": [[1.0] * 3] * 2}  # fmt: skip
    for name, column in bad.items():
        pq.write_table(pa.table({"vector": column}), tmp_path / f"{name}.parquet")
    for name in ("broken", "other", "absent", *bad):
        with pytest.raises(WinnowError, match=rf"evaluate.real .*{name}.parquet.*give"):
            real_vectors(str(tmp_path / f"{name}.parquet"), ["anything"], 4)


# make base, from end to end.


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every part from scikit-learn's digits, with as few steps as there can be."""
    from jobs.world import generator

    folder = tmp_path_factory.mktemp("base") / "weights"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator, "SCENES", 300)
        build.build(None, 0, folder, scale=0.001)
    return folder


def test_base_builds_everything(built: Path) -> None:
    from PIL import Image

    from jobs.clip import Clip
    from jobs.evaluate import real_vectors
    from jobs.models import load
    from jobs.world.judge import Judge
    from jobs.world.reader import Reader

    card = json.loads((built / "card.json").read_text())
    assert card["handwriting"] == "scikit-learn digits" and set(card["parts"]) == set(build.PARTS)
    images, texts = [Image.new("RGB", (16, 16), "red")], ["a white seven on a black background"]
    assert Judge(built / "judge.safetensors")(images, texts)[1].shape == (1, 64)
    assert Reader(built / "reader.safetensors")(images, texts)[0] <= 0
    assert -1 <= Clip(f"local-dir:{built / 'clip'}").score(images, texts)[0][0] <= 1
    assert real_vectors(str(built / "real.parquet"), texts).shape[1] == 64
    assert type(load(str(built / "pipeline"))).__name__ == "StableDiffusionPipeline"
    ours = {p.relative_to(built).as_posix() for p in built.rglob("*") if p.is_file()}
    theirs = {p.relative_to(WEIGHTS).as_posix() for p in WEIGHTS.rglob("*") if p.is_file()}
    assert ours == theirs


def test_building_one_part_again_gives_the_same(built: Path, tmp_path: Path) -> None:
    build.build(None, 0, tmp_path, ("reader",), scale=0.001)
    assert (tmp_path / "reader.safetensors").read_bytes() == (built / "reader.safetensors").read_bytes()
    build.build(None, 1, tmp_path / "other", ("reader",), scale=0.001)
    assert (tmp_path / "other" / "reader.safetensors").read_bytes() != (built / "reader.safetensors").read_bytes()


@pytest.mark.parametrize(
    "arrays", [{}, {"images": np.zeros((5, 8, 8)), "labels": np.zeros(5)}, {"images": np.zeros((2000, 8))}, None]
)
def test_other_handwriting_is_refused(tmp_path: Path, arrays: dict[str, Any] | None) -> None:
    path = tmp_path / "digits.npz"
    if arrays is not None:
        np.savez(path, **arrays)
    with pytest.raises(WinnowError, match=r"digits\.npz: .*; give"):
        build.digits(str(path))


def test_broken_handwriting_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "digits.npz"
    images = np.random.default_rng(0).integers(0, 256, (2000, 8, 8), np.uint8)
    np.savez_compressed(path, images=images, labels=np.arange(2000) % 10)
    build.digits(str(path))
    data = bytearray(path.read_bytes())
    flipped = bytes([*data[:60_000], data[60_000] ^ 255, *data[60_001:]])
    for broken in (flipped, data[: len(data) // 2], b"", b"PK\x03\x04"):
        path.write_bytes(broken)
        with pytest.raises(WinnowError, match=r"digits\.npz: .*; give"):
            build.digits(str(path))
    np.savez(path, images=np.zeros((2000, 8, 8), np.uint8), labels=np.arange(2000) % 9)
    with pytest.raises(WinnowError, match="labels 0 to 9"):
        build.digits(str(path))


def test_a_part_that_stops_half_way_leaves_the_old_one(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "weights"))

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "train_generator", stopped)
    before = {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    with pytest.raises(KeyboardInterrupt):
        build.build(None, 1, folder, ("generator",), scale=0.001)
    assert {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()} == before


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WinnowError, match="unknown part 'eyes'; allowed are generator"):
        build.build(None, 0, tmp_path, ("eyes",))


def test_digits_are_named_as_captions_name_them() -> None:
    assert [parse(f"a red {name}").digit for name in DIGITS] == list(range(10))
