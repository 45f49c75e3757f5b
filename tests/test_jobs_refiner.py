"""Refinement: masks, what stays and what changes, what is accepted, and seams."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import latents, masks, models
from jobs.refine import Refine
from jobs.refiner import Refiner, level_of
from jobs.scorers import Scorer
from schemas.errors import WinnowError

TEXTS = ["a red seven on a blue background", "a cyan zero", "a white one on a black background", "a green three"]
#: Of 255: other batch mates move floats by rounding, which may move a pixel by one.
ONE = 1


@pytest.fixture(scope="module")
def pipe() -> Any:
    torch.set_num_threads(1)
    return models.load("embedded")


@pytest.fixture(scope="module")
def images(pipe: Any) -> np.ndarray:
    from jobs.generate import Generate, Sampler

    made = Sampler(pipe, Generate(steps=8, guidance=1.0))(TEXTS, [1, 2, 3, 4])
    return np.round(made * 255).astype(np.uint8)


def run(pipe: Any, images: np.ndarray, judge: Any = None, seeds: Any = ((10, 11, 12, 13),), **how: Any) -> list[Any]:
    refiner = Refiner(pipe, Refine(**({"steps": 10} | how)), 1.0, judge)
    return list(refiner(images, TEXTS[: len(images)], seeds))


def outside(text: str, height: int, width: int, scale: int, grow: int) -> np.ndarray:
    """Pixels [H, W] that lie outside the described region grown by latents: by loops over the description."""
    _, size, cells = text.replace(":", "").split(" ", 2)
    grid = int(size.split("×")[0])
    inside = np.zeros((height // scale, width // scale), bool)
    for number in map(int, cells.split()):
        for y in range(height // scale):
            for x in range(width // scale):
                edge = [round(side / scale * k / grid) for side in (height,) for k in range(grid + 1)]
                row = next(k for k in range(grid) if edge[k] <= y < edge[k + 1])
                column = next(k for k in range(grid) if edge[k] <= x < edge[k + 1])
                inside[y, x] |= row * grid + column == number
    grown = np.zeros_like(inside)
    for y, x in np.argwhere(inside):
        grown[max(0, y - grow) : y + grow + 1, max(0, x - grow) : x + grow + 1] = True
    return ~np.kron(grown, np.ones((scale, scale), bool))


def test_pasted_pixels_outside_the_region_are_the_original(pipe: Any, images: np.ndarray) -> None:
    """Exactly, over several loops, however the regions move."""
    seeds = [[10, 11, 12, 13], [20, 21, 22, 23], [30, 31, 32, 33]]
    loops = run(pipe, images, seeds=seeds, mask="random", grid=4, share=0.2, dilate=1, paste=0, level=0.9)
    now = images
    for attempts in loops:
        for i in range(4):
            kept = outside(attempts.regions[i], *images.shape[1:3], pipe.vae_scale_factor, 1)
            assert 0.2 < kept.mean() < 0.95
            np.testing.assert_array_equal(attempts.pixels[i][kept], now[i][kept])
            assert (attempts.pixels[i][~kept] != now[i][~kept]).any()
        assert np.abs(attempts.pixels.astype(int) - now).max() > 100
        now = attempts.pixels


def test_without_pasting_what_is_kept_is_as_the_autoencoder_gives_it(pipe: Any, images: np.ndarray) -> None:
    """The error of one round trip, and a little that the decoder sees across the edge; loops do not wear it away, as
    round trips would."""

    def trip(some: np.ndarray) -> np.ndarray:
        return np.round(latents.decode(pipe.vae, latents.encode(pipe.vae, some)) * 255).astype(np.uint8)

    below = slice(images.shape[1] // 2, None)

    def error(some: np.ndarray) -> np.ndarray:
        return np.abs(some.astype(int) - images)[:, below]

    once, thrice = trip(images), trip(trip(trip(images)))
    seeds = [[k] * 4 for k in range(8)]
    loops = run(pipe, images, seeds=seeds, mask="box", box=(0, 0, 1, 0.4), paste=None)
    assert error(loops[0].pixels).mean() < 1.2 * error(once).mean()
    assert error(loops[7].pixels).mean() < 0.7 * error(thrice).mean()
    assert (error(run(pipe, images, mask="box", box=(0, 0, 1, 0.4))[0].pixels) == 0).all()


def test_partial_refinement_leaves_the_rest_within_the_autoencoders_tolerance(pipe: Any, images: np.ndarray) -> None:
    """Random regions, loop upon loop, nothing pasted: where none has been, an image is at most a little further from
    the original than one round trip takes it, however far the rest has changed; and edges do not show more than before.
    """

    def error(some: np.ndarray) -> np.ndarray:
        return np.abs(some.astype(int) - images)

    trip = np.round(latents.decode(pipe.vae, latents.encode(pipe.vae, images)) * 255).astype(np.uint8)
    seeds = [[100 * k + i for i in range(4)] for k in range(3)]
    loops = run(pipe, images, seeds=seeds, mask="random", grid=4, share=0.15, dilate=1, paste=None, level=0.6)
    untouched = np.ones(images.shape[:3], bool)
    for attempts in loops:
        for i in range(4):
            # A latent beyond the mask: the decoder sees across the edge.
            untouched[i] &= outside(attempts.regions[i], *images.shape[1:3], pipe.vae_scale_factor, 2)
        assert 0.05 < untouched.mean() < 0.9
        assert error(attempts.pixels)[untouched].mean() < 1.2 * error(trip)[untouched].mean()
        assert np.quantile(error(attempts.pixels)[untouched], 0.99) < 1.2 * np.quantile(error(trip)[untouched], 0.99)
    assert error(loops[-1].pixels)[~untouched].mean() > 2 * error(trip)[~untouched].mean()
    for attempts in loops:
        edges = [~outside(text, *images.shape[1:3], pipe.vae_scale_factor, 1) for text in attempts.regions]
        seams = [masks.seam(one, edge) for one, edge in zip(attempts.pixels, edges, strict=True)]
        before = [masks.seam(one, edge) for one, edge in zip(images, edges, strict=True)]
        assert np.mean(seams) < 1.3 * np.mean(before)


def test_a_sample_is_its_own(pipe: Any, images: np.ndarray) -> None:
    """Levels and regions of its own, the same whatever stands beside it, and the same again."""
    how = {"mask": "random", "level": (0.3, 0.8), "guidance": None}
    [together] = run(pipe, images, **how)
    assert len(set(together.levels)) > 1 and len(set(together.regions)) > 1
    [again] = run(pipe, images, **how)
    np.testing.assert_array_equal(again.pixels, together.pixels)
    for i in range(4):
        [alone] = list(Refiner(pipe, Refine(steps=10, **how), 1.0)(images[i : i + 1], [TEXTS[i]], [[10 + i]]))
        assert np.abs(alone.pixels[0].astype(int) - together.pixels[i]).max() <= ONE
        assert alone.levels[0] == together.levels[i] and alone.regions[0] == together.regions[i]
        assert alone.evaluations[0] == together.evaluations[i]


def test_evaluations_are_the_networks_passes(pipe: Any, images: np.ndarray) -> None:
    passes = []
    handle = pipe.unet.register_forward_hook(lambda _, args, answer: passes.append(len(answer.sample)))
    [some] = run(pipe, images, level=(0.2, 0.9))
    assert sum(passes) == sum(some.evaluations)
    for at, count in zip(some.levels, some.evaluations, strict=True):
        assert count == pytest.approx(10 * at, abs=1.01)  # this flow's steps are spaced evenly
    passes.clear()
    [guided] = list(Refiner(pipe, Refine(steps=10, level=0.5), 3.0)(images, TEXTS, [[1, 2, 3, 4]]))
    handle.remove()
    assert sum(passes) == sum(guided.evaluations) and len(set(guided.evaluations)) == 1
    assert guided.evaluations[0] % 2 == 0


def brightness(pixels: Any, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([np.asarray(image, float).mean() for image in pixels]), np.zeros(len(prompts), bool)


def test_what_is_worse_is_kept_out_and_the_next_loop_goes_on_from_what_was_accepted(
    pipe: Any, images: np.ndarray
) -> None:
    judge = Scorer("brightness", "1", brightness)
    seeds = [[100 * k + i for i in range(4)] for k in range(6)]
    loops = run(pipe, images, judge, seeds, accept="better", scorer="scene-clip", margin=0.5, mask="box", level=0.7)
    now = images.astype(float)
    for attempts in loops:
        np.testing.assert_allclose(attempts.before, now.mean(axis=(1, 2, 3)))
        np.testing.assert_allclose(attempts.after, attempts.pixels.mean(axis=(1, 2, 3)))
        np.testing.assert_array_equal(attempts.accepted, attempts.after > attempts.before + 0.5)
        side = images.shape[1] // 4
        np.testing.assert_array_equal(attempts.pixels[:, : side - 1], images[:, : side - 1])  # outside the box
        now[attempts.accepted] = attempts.pixels[attempts.accepted]
    verdicts = np.stack([attempts.accepted for attempts in loops])
    assert verdicts.any() and not verdicts.all()
    always = run(pipe, images, judge, seeds[:2], scorer="scene-clip", level=0.7)
    assert all(attempts.accepted.all() and attempts.before is not None for attempts in always)


def test_a_refinement_that_shows_nothing_is_not_accepted(
    pipe: Any, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = latents.decode

    def broken(vae: Any, some: torch.Tensor) -> np.ndarray:
        made = inner(vae, some)
        made[1], made[2] = float("nan"), 0.5
        return made

    monkeypatch.setattr("jobs.refiner.decode", broken)
    [attempts] = run(pipe, images)
    assert attempts.accepted.tolist() == [True, False, False, True]


def test_an_image_that_the_model_cannot_take_is_named(pipe: Any) -> None:
    with pytest.raises(WinnowError, match=r"18×17 pixels, and this model takes multiples of .*refine\.where"):
        run(pipe, np.zeros((1, 17, 18, 3), np.uint8), seeds=[[1]])


@given(
    st.integers(2, 8), st.floats(0.01, 1), st.integers(8, 40), st.integers(8, 40), st.integers(0, 2**63 - 1)
)
@settings(max_examples=60, deadline=None)
def test_random_cells(grid: int, share: float, height: int, width: int, seed: int) -> None:
    """So many whole cells as the share says, no cell twice, the same again, as described."""
    how = Refine(mask="random", grid=grid, share=share)
    mask, text = masks.draw(how, height, width, seed)
    cells = [int(word) for word in text.split(": ")[1].split()]
    assert len(set(cells)) == len(cells) == max(1, round(share * grid * grid)) and max(cells) < grid**2
    lines, columns = (np.rint(np.linspace(0, side, grid + 1)).astype(int) for side in (height, width))
    expected = np.zeros_like(mask)
    for cell in cells:
        row, column = cell // grid, cell % grid
        expected[lines[row] : lines[row + 1], columns[column] : columns[column + 1]] = True
    np.testing.assert_array_equal(mask, expected)
    again, same = masks.draw(how, height, width, seed)
    assert same == text and (again == mask).all()


def test_cells_are_drawn_evenly() -> None:
    counts = np.zeros(16)
    for seed in range(2000):
        counts[[int(word) for word in masks.draw(Refine(mask="random"), 8, 8, seed)[1].split(": ")[1].split()]] += 1
    expected = 2000 * 4 / 16
    assert counts.sum() == 2000 * 4 and np.abs(counts - expected).max() < 5 * np.sqrt(expected * 0.75)


@given(st.floats(0.01, 1), st.floats(0.01, 1), st.integers(0, 2**63 - 1))
def test_a_level_lies_in_its_range(one: float, other: float, seed: int) -> None:
    low, high = sorted((one, other))
    assert low <= level_of(Refine(level=(low, high)), seed) <= high + 1e-12
    assert level_of(Refine(level=one), seed) == one


def test_a_mask_grows_by_latents_and_blends_inside_its_edge() -> None:
    mask = torch.zeros(1, 1, 9, 12, dtype=torch.bool)
    mask[0, 0, 4, 5] = True
    grown = masks.dilate(mask, 2)
    expected = torch.cartesian_prod(torch.arange(2, 7), torch.arange(3, 8))
    assert torch.equal(grown.nonzero()[:, 2:].unique(dim=0), expected)
    assert torch.equal(masks.dilate(mask, 0), mask)
    share = masks.share_of_new(grown, 36, 48, 3)[0, :, :, 0]
    for y in range(36):
        for x in range(48):
            # How deep inside the square of 20 × 20 pixels it lies, 1 at its edge.
            deep = min(y - 7, x - 11, 28 - y, 32 - x)
            assert share[y, x] == pytest.approx(min(max(deep, 0) / 4, 1)), (y, x)
    assert (masks.share_of_new(torch.ones(1, 1, 4, 4), 16, 16, 3) == 1).all()
    top = torch.zeros(1, 1, 4, 4)
    top[:, :, :2] = 1
    assert masks.share_of_new(top, 16, 16, 1)[0, :, :, 0].tolist() == [[1] * 16] * 7 + [[0.5] * 16] + [[0] * 16] * 8


def test_seams_of_images_that_are_made() -> None:
    mask = np.zeros((32, 32), bool)
    mask[8:24, 8:24] = True
    ramp = np.add.outer(np.arange(32.0), np.arange(32.0))[:, :, None].repeat(3, 2)
    assert masks.seam(ramp, mask) == pytest.approx(1)
    # 4 · 16 neighbours across the edge; a step of 5 there makes each change 6 or, against the ramp, 4.
    assert masks.seam(ramp + 5 * mask[:, :, None], mask) == pytest.approx((6 + 4) / 2)
    noise = np.random.default_rng(0).normal(size=(200, 200, 3))
    square = np.zeros((200, 200), bool)
    square[50:150, 50:150] = True
    assert masks.seam(noise, square) == pytest.approx(1, abs=0.06)
    pasted = np.where(square[:, :, None], noise + 4, noise)
    assert masks.seam(pasted, square) > 3 * masks.seam(noise, square)
    smooth = masks.share_of_new(torch.from_numpy(square)[None, None], 200, 200, 19)[0]
    assert masks.seam(noise + 4 * smooth, square) < 1.1
    for nothing in (np.zeros_like(mask), np.ones_like(mask)):
        assert np.isnan(masks.seam(ramp, nothing))
    assert np.isnan(masks.seam(np.full((32, 32, 3), 7.0), mask))


def test_pasting_leaves_less_of_a_seam_with_a_wider_blend(pipe: Any, images: np.ndarray) -> None:
    """On the model's own images, against the untouched ones."""
    side = images.shape[1]
    pixels = np.zeros((side, side), bool)
    pixels[side // 4 : side - side // 4, side // 4 : side - side // 4] = True

    def mean(some: np.ndarray) -> float:
        return float(np.mean([masks.seam(image, pixels) for image in some]))

    hard = run(pipe, images, mask="box", level=0.95, paste=0)[0].pixels
    soft = run(pipe, images, mask="box", level=0.95, paste=3)[0].pixels
    assert mean(soft) < mean(hard)


@pytest.mark.parametrize(("how", "line"), [
    ({"level": 0.0}, "refine.level is 0.0"), ({"level": (0.6, 0.4)}, "refine.level is"),
    ({"level": 1.5}, "refine.level is 1.5"),
    ({"box": (0.5, 0, 0.5, 1)}, "refine.box is"), ({"accept": "better"}, "needs a scorer; set refine.scorer"),
])  # fmt: skip
def test_settings_that_cannot_be_are_refused(how: dict[str, Any], line: str) -> None:
    with pytest.raises(WinnowError, match=line):
        Refine(**how)


def test_cells_finer_than_the_latents_are_refused() -> None:
    """Some would be none, and an image its own refinement."""
    with pytest.raises(WinnowError, match=r"refine\.grid is 16, of latents that are 8×12; give at most 8"):
        masks.draw(Refine(mask="random", grid=16), 12, 8, 0)
    assert all(masks.draw(Refine(mask="random", grid=8, share=0.01), 8, 8, seed)[0].sum() == 1 for seed in range(20))


def test_a_box_takes_no_latent_by_rounding() -> None:
    mask = masks.draw(Refine(mask="box", box=(0, 0, 0.28, 0.07)), 100, 25, 0)[0]
    assert mask[:7, :7].all() and mask.sum() == 49
