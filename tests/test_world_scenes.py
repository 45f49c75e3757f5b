"""The embedded world: captions and scenes are one thing, and the judge measures what it says."""

import json
from dataclasses import fields
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
from jobs.world.judge import NONE, DigitReader, judge, read_places
from jobs.world.reader import SLOTS, SlotReader, log_likelihood, slots
from jobs.world.scenes import (
    COLOURS,
    DIGITS,
    PALETTE,
    RELATIONS,
    Handwriting,
    Scene,
    all_captions,
    caption,
    draw_scenes,
    parse,
    render,
)
from schemas.errors import WinnowError

digit, colour = st.integers(0, 9), st.sampled_from(COLOURS)
background = st.none() | colour
scenes = st.builds(lambda d, c, b: Scene((d,), (c,), None, b), digit, colour, background) | st.builds(
    Scene, st.tuples(digit, digit), st.tuples(colour, colour), st.sampled_from(RELATIONS), background
)


@given(scenes)
def test_parse_undoes_caption(scene: Scene) -> None:
    assert parse(caption(scene)) == scene
    assert parse(f"  {caption(scene).upper()} ".replace(" ", "\n ")) == scene


@pytest.mark.parametrize(
    "text", ["", "a red fox", "red seven", "a red seven on a pink background", "a red seven left of", "a red seven.",
             "a red seven below a white eight", "a red eleven", "x" * 100_000],
)  # fmt: skip
def test_other_texts_are_refused_in_one_short_line(text: str) -> None:
    with pytest.raises(WinnowError, match="not a caption") as caught:
        parse(text)
    assert len(str(caught.value)) < 300


def test_captions_are_distinct_and_always_the_same() -> None:
    captions = all_captions()
    assert captions == all_captions() and len(set(captions)) == len(captions)
    singles = [text for text in captions if parse(text).relation is None]
    assert len(singles) == 10 * 6 * 5 and len(captions) - len(singles) in range(55, 61)
    assert all(parse(text).background not in parse(text).colours for text in captions)


def test_every_word_is_one_token() -> None:
    captions = all_captions()
    tokenizer = word_tokenizer([caption(s) for s in draw_scenes(4000, np.random.default_rng(0), pairs=0.5)])
    for text in captions[:40] + captions[-40:]:
        assert len(tokenizer(text).input_ids) == len(text.split()) + 2
    assert len({tuple(tokenizer(text).input_ids) for text in captions}) == len(captions)


@pytest.fixture(scope="module")
def hand() -> Handwriting:
    """Real handwriting, scikit-learn's."""
    images, labels, _ = build.digits(None)
    return build.slices(images, labels, 0)["judge"]


@pytest.fixture(scope="module")
def drawn() -> list[Scene]:
    return draw_scenes(300, np.random.default_rng(3), pairs=0.5)


def test_render_is_decided_by_its_rng(hand: Handwriting, drawn: list[Scene]) -> None:
    one, again, other = (render(drawn[:20], hand, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one.dtype == np.uint8 and one.shape == (20, 32, 32, 3)
    np.testing.assert_array_equal(one, again)
    assert (one != other).any(axis=(1, 2, 3)).all()


def test_drawn_scenes_can_be_seen(drawn: list[Scene]) -> None:
    assert {len(scene.digits) for scene in drawn} == {1, 2}
    assert {d for scene in drawn for d in scene.digits} == set(range(10))
    assert all(scene.background not in scene.colours for scene in drawn)


def test_slices_of_the_handwriting_are_disjoint_and_whole() -> None:
    images = np.arange(1200, dtype=np.int64).repeat(64).reshape(1200, 8, 8)
    cut = build.slices((images % 256).astype(np.uint8), np.arange(1200), 0)
    labels = np.concatenate([part.labels for part in cut.values()])
    assert sorted(labels) == list(range(1200)) and set(cut) == set(build.SLICES)
    assert all(len(part.labels) > 50 for part in cut.values())


class Perfect(torch.nn.Module):
    """Stands in for the digit network alone: it answers what it was told, place by place."""

    def __init__(self, digits: list[int]) -> None:
        super().__init__()
        self.digits = digits

    def forward(self, ink: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert ink.shape == (len(self.digits), 1, 24, 24) and 0 <= ink.min() <= ink.max() <= 1
        return torch.nn.functional.one_hot(torch.tensor(self.digits), NONE + 1).float(), ink.flatten(1)[:, :64]


def verdicts(images: np.ndarray, told: list[Scene], true: list[Scene]) -> np.ndarray:
    """The judge with a perfect digit network: every place it asks for is read as the true scene has it, in turn."""
    answers = [d for asked, scene in zip(told, true, strict=True)
               for d in (scene.digits * 2)[: len(asked.digits)]]  # fmt: skip
    return judge(Perfect(answers), images, told)[0]  # type: ignore[arg-type]


def test_the_judge_accepts_what_is_right(hand: Handwriting, drawn: list[Scene]) -> None:
    """Colours, places and background are measured; the digits are given."""
    images = render(drawn, hand, np.random.default_rng(4))
    assert verdicts(images, drawn, drawn).mean() > 0.93  # at 8×8 pixels some strokes are faint


def changed(scene: Scene, slot: str) -> Scene | None:
    from dataclasses import replace

    free = [c for c in COLOURS if c not in (*scene.colours, scene.background)]
    if slot == "colour":
        return replace(scene, colours=(*scene.colours[:-1], free[0]))
    if slot == "background":
        return replace(scene, background=free[0]) if scene.background else None
    if slot == "relation":
        other = {"left of": "above", "above": "left of"}
        return replace(scene, relation=other[scene.relation]) if scene.relation else None
    return replace(scene, digits=(*scene.digits[:-1], (scene.digits[-1] + 3) % 10))


@pytest.mark.parametrize("slot", ["colour", "background", "digit"])
def test_the_judge_rejects_one_wrong_slot(hand: Handwriting, drawn: list[Scene], slot: str) -> None:
    pairs = [(scene, wrong) for scene in drawn if (wrong := changed(scene, slot))]
    assert len(pairs) > 50
    true, told = [scene for scene, _ in pairs], [wrong for _, wrong in pairs]
    images = render(true, hand, np.random.default_rng(5))
    right = verdicts(images, true, true)
    assert right.mean() > 0.93
    assert verdicts(images, told, true)[right].mean() < 0.01


def test_a_wrong_relation_shows_other_ink(hand: Handwriting) -> None:
    """Read at the places of the other relation, the windows cut the digits: that is what class NONE is for. With
    different colours the measure alone tells, in most scenes."""
    rng = np.random.default_rng(6)
    true = [scene for scene in draw_scenes(200, rng, pairs=1.0) if scene.colours[0] != scene.colours[1]]
    told = [wrong for scene in true if (wrong := changed(scene, "relation"))]
    images = render(true, hand, rng)
    right, fooled = verdicts(images, true, true), verdicts(images, told, true)
    assert right.mean() > 0.93 and fooled.mean() < 0.75
    for image, scene, wrong in zip(images[:50], true, told, strict=False):
        here, there = read_places(image, scene.relation), read_places(image, wrong.relation)
        assert all(np.abs(a.ink - b.ink).max() > 0.3 for a, b in zip(here, there, strict=True))


def test_an_empty_place_has_no_colour() -> None:
    image = np.full((32, 32, 3), PALETTE["blue"], np.uint8)
    for relation in (None, *RELATIONS):
        for place in read_places(image, relation):
            assert place.background == "blue" and place.colour is None and not place.ink.any()
    assert not judge(DigitReader().eval(), image[None], [Scene((7,), ("red",), None, "blue")])[0][0]


@pytest.mark.parametrize("ink", COLOURS)
@pytest.mark.parametrize("ground", COLOURS)
def test_every_pair_of_colours_is_told(ink: str, ground: str) -> None:
    if ink == ground:
        return
    image = np.empty((32, 32, 3), np.uint8)
    image[:] = PALETTE[ground]
    image[10:22, 14:18] = PALETTE[ink]
    (place,) = read_places(image, None)
    assert (place.background, place.colour) == (ground, ink)
    assert place.ink.max() > 0.99 and 0.02 < (place.ink > 0.5).mean() < 0.1


@given(scenes.filter(lambda scene: scene.background not in scene.colours), st.integers(0, 2**32))
def test_one_slot_wrong_differs_in_exactly_one_slot(scene: Scene, seed: int) -> None:
    wrong = one_slot_wrong(scene, np.random.default_rng(seed))
    different = [f.name for f in fields(Scene) if getattr(scene, f.name) != getattr(wrong, f.name)]
    assert len(different) == 1
    for name in ("digits", "colours"):
        one, other = getattr(scene, name), getattr(wrong, name)
        assert len(one) == len(other) and sum(a != b for a, b in zip(one, other, strict=True)) == (name in different)
    assert parse(caption(wrong)) == wrong and wrong.background not in wrong.colours


def test_slots_are_what_the_caption_says() -> None:
    said = slots(Scene((3, 8), ("green", "white"), "above", None))
    assert said == [1 + RELATIONS.index("above"), 3, 8, COLOURS.index("green"), COLOURS.index("white"), -1]
    assert slots(Scene((3,), ("green",), None, "red")) == [0, 3, -1, COLOURS.index("green"), -1, COLOURS.index("red")]


def test_log_likelihood_is_the_sum_over_the_said_slots() -> None:
    torch.manual_seed(0)
    model, images = SlotReader().eval(), torch.randn(4, 3, 32, 32)
    some = draw_scenes(4, np.random.default_rng(0), pairs=0.5)
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
    assert image.size == (32, 32)


def test_the_shipped_clip_is_an_ordinary_one() -> None:
    import open_clip

    place = f"local-dir:{WEIGHTS / 'clip'}"
    model, _, preprocess = open_clip.create_model_and_transforms(place)
    from PIL import Image

    pixels = preprocess(Image.new("RGB", (32, 32)))[None]
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
        "real": ["judge_accuracy", "diversity", "scenes"],
    }.items():  # fmt: skip
        assert {*names, "seconds", "cpu_seconds", "cores"} <= set(card["parts"][part]), part


def test_sanity_of_the_shipped_judge(hand: Handwriting) -> None:
    """The only test of quality: what the card says of real scenes, and that a foreign hand is read far above chance."""
    from PIL import Image

    from jobs.world.judge import Judge

    card = json.loads((WEIGHTS / "card.json").read_text())
    assert card["parts"]["judge"]["accuracy"] > 0.9 and card["parts"]["judge"]["accepts_one_slot_wrong"] < 0.05
    scenes_ = draw_scenes(200, np.random.default_rng(7), pairs=0.0)
    images = [Image.fromarray(image) for image in render(scenes_, hand, np.random.default_rng(8))]
    right, features = Judge()(images, [caption(scene) for scene in scenes_])
    assert features.shape == (200, 64) and right.mean() > 0.3  # chance is 0.1


def test_real_moments_fit_the_judge() -> None:
    from jobs.evaluate import real_moments

    mean, cov = real_moments("embedded")
    assert mean.shape == (64,) and cov.shape == (64, 64)
    np.testing.assert_allclose(cov, cov.T)
    assert np.linalg.eigvalsh(cov).min() > -1e-6 * np.abs(cov).max()


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
    from jobs.evaluate import real_moments
    from jobs.models import load
    from jobs.world.judge import Judge
    from jobs.world.reader import Reader

    card = json.loads((built / "card.json").read_text())
    assert card["handwriting"] == "scikit-learn digits" and set(card["parts"]) == set(build.PARTS)
    images, texts = [Image.new("RGB", (32, 32), "red")], ["a white seven on a red background"]
    assert Judge(built / "judge.safetensors")(images, texts)[1].shape == (1, 64)
    assert Reader(built / "reader.safetensors")(images, texts)[0] <= 0
    assert -1 <= Clip(f"local-dir:{built / 'clip'}").score(images, texts)[0][0] <= 1
    assert real_moments(str(built / "real.safetensors"))[0].shape == (64,)
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


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WinnowError, match="unknown part 'eyes'; allowed are generator"):
        build.build(None, 0, tmp_path, ("eyes",))


def test_digits_are_named_as_captions_name_them() -> None:
    assert [parse(f"a red {name}").digits for name in DIGITS] == [(d,) for d in range(10)]
