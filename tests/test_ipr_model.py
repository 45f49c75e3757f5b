"""The region transformer, its loss and its training: formulas again, and resumed to the bit."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ForkServer
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from jobs.ipr.grid import Grid
from jobs.ipr.model import Prediction, RegionTransformer, Shape
from jobs.ipr.train import Training, load, loss, rate, train
from schemas.errors import WinnowError

SHAPE = Shape(16, 1, 2, classes=2)
HOW = Training(40, batch=16, lr=3e-3, warmup=5, ema=0.9, kind=0.5, keep=4)


class Stripes:
    """A small benchmark: 2 × 2 regions, all of one sign."""

    name, grid, classes = "stripes", Grid(2, 2, 2), 2

    def draw(self, n: int, rng: np.random.Generator, hand: str = "model") -> tuple[np.ndarray, np.ndarray]:
        sign = rng.integers(0, 2, n)
        images = np.tile((255 * sign)[:, None, None, None], (1, 4, 4, 1)).astype(np.uint8)
        return images, np.tile(sign[:, None], (1, 4))

    def valid(self, images: np.ndarray) -> np.ndarray:
        bright = images.reshape(len(images), -1) > 127
        return bright.all(1) | ~bright.any(1)

    def figures(self) -> dict[str, float]:
        return {}


def train_here(to: str) -> None:
    """What the other processes run."""
    train(Stripes(), SHAPE, HOW, 3, Path(to))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.sampled_from([1, 3]), st.integers(0, 2**32))
def test_join_undoes_cut_and_regions_are_tiles(rows: int, columns: int, patch: int, channels: int, seed: int) -> None:
    grid = Grid(rows, columns, patch, channels)
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (3, rows * patch, columns * patch, channels), np.uint8)
    regions = grid.cut(images)
    assert regions.shape == (3, rows * columns, patch * patch * channels) and regions.dtype == np.float32
    assert regions.min() >= -1 and regions.max() <= 1
    np.testing.assert_array_equal(grid.join(regions), images)
    r, c = rng.integers(rows), rng.integers(columns)
    tile = images[1, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch]
    np.testing.assert_allclose(regions[1, r * columns + c], tile.ravel() / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(grid.join(regions * 1000), np.where(images > 127, 255, 0))  # clipped


def test_places_are_rows_columns_and_boxes() -> None:
    places = Grid(9, 9, 1, box=3).places()
    assert places[[0, 8, 40, 80]].tolist() == [[0, 0, 0], [0, 8, 2], [4, 4, 4], [8, 8, 8]]
    assert np.unique(places[:, 2], return_counts=True)[1].tolist() == [9] * 9
    assert not Grid(2, 3, 1).places()[:, 2].any()


@pytest.mark.parametrize("images", [np.zeros((1, 4, 4, 1), np.float32), np.zeros((1, 4, 5, 1), np.uint8)])
def test_other_images_are_refused(images: np.ndarray) -> None:
    with pytest.raises(WinnowError, match=r"allowed are uint8 \(4, 4, 1\)"):
        Stripes.grid.cut(images)


def test_the_model_knows_levels_and_places_of_regions() -> None:
    torch.manual_seed(0)
    model = RegionTransformer(Grid(4, 4, 2, box=2), Shape(32, 2, 2)).eval()
    z, t = torch.randn(2, 16, 4), torch.rand(2, 16)
    found = model(z, t)
    assert found.x.shape == z.shape and found.log_var.shape == t.shape and found.logits is None
    other = t.clone()
    other[0, 5] = 1 - other[0, 5]
    moved = (model(z, other).x - found.x).abs().amax(2)
    assert (moved[0] > 0).all() and (moved[1] == 0).all()  # each region's level reaches all of its sample
    mixed = torch.randperm(16)
    assert (model(z[:, mixed], t[:, mixed]).x - found.x[:, mixed]).abs().max() > 1e-3  # places are not exchangeable


def test_what_predicts_the_velocity_predicts_the_region() -> None:
    torch.manual_seed(0)
    model = RegionTransformer(Grid(2, 2, 2), Shape(16, 1, 2, "u")).eval()
    z, t = torch.randn(2, 4, 4), torch.tensor([[0.0, 0.25, 0.5, 1.0]]).expand(2, 4)
    u = {}
    model.content.register_forward_hook(lambda _, __, out: u.update(out=out))
    found = model(z, t).x
    torch.testing.assert_close(found, z - t[..., None] * u["out"])
    assert torch.equal(found[:, 0], z[:, 0])  # a clean region is what it is


@pytest.mark.parametrize("kind", [0.0, 0.3])
def test_the_loss_is_its_formula(kind: float) -> None:
    rng = np.random.default_rng(0)
    x, guess = rng.normal(size=(2, 3, 5, 4))
    t = rng.choice([0.0, 0.05, 0.4, 1.0], (3, 5))
    log_var, logits, classes = rng.normal(size=(3, 5)), rng.normal(size=(3, 5, 6)), rng.integers(0, 6, (3, 5))
    weights = rng.choice([0.0, 0.5, 3.0], (3, 5))
    expected = 0.0
    for i in range(3):
        for r in range(5):
            e = np.square(guess[i, r] - x[i, r]).mean()
            each = e / max(t[i, r], 0.1) ** 2
            each += 0.01 * 0.5 * (e / np.exp(log_var[i, r]) + log_var[i, r])
            each += kind * (np.log(np.exp(logits[i, r]).sum()) - logits[i, r, classes[i, r]])
            expected += weights[i, r] * each
    told = [torch.from_numpy(a) for a in (x, t, weights, classes)]
    found = Prediction(*(torch.from_numpy(a) for a in (guess, log_var, logits)))
    assert loss(found, *told, kind).item() == pytest.approx(expected / 15, rel=1e-5)


def test_certainty_does_not_bend_the_prediction() -> None:
    x = torch.zeros(1, 2, 3)
    guess = torch.ones(1, 2, 3, requires_grad=True)
    log_var = torch.tensor([[5.0, -5.0]], requires_grad=True)
    loss(Prediction(guess, log_var, None), x, torch.ones(1, 2), torch.ones(1, 2), None).backward()
    assert guess.grad is not None and log_var.grad is not None
    torch.testing.assert_close(guess.grad, torch.full((1, 2, 3), 2 / 6))  # the first term's alone
    assert log_var.grad[0, 0] > 0 > log_var.grad[0, 1]  # towards an error of 1


def test_the_rate_rises_and_falls() -> None:
    how = Training(1000, warmup=100)
    rates = [rate(step, how) for step in range(1000)]
    assert rates[0] == 0.01 and rates[49] == 0.5 and rates[100] == 1 and max(rates) == 1
    assert rates[550] == pytest.approx(0.5, abs=0.01) and rates[-1] < 1e-4
    assert rates[100:] == sorted(rates[100:], reverse=True)


def test_it_learns(tmp_path: Path) -> None:
    """Whether all is dark or bright: half in noise, one clean region tells the others."""
    model = train(Stripes(), SHAPE, Training(200, batch=32, lr=5e-3, warmup=10, ema=0.9, kind=0.1), 0, tmp_path / "m")
    images, _ = Stripes().draw(100, np.random.default_rng(9))
    x = torch.from_numpy(Stripes.grid.cut(images))
    t = torch.tensor([0.0, 1.0, 1.0, 1.0]).expand(100, 4)
    with torch.no_grad():
        found = model(torch.lerp(x, torch.randn_like(x), t[..., None]), t).x
    assert (found[:, 1:].sign() == x[:, 1:]).float().mean() > 0.95


def test_killed_and_resumed_gives_the_same_weights_to_the_bit(forks: ForkServer, tmp_path: Path) -> None:
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    call, kept = "test_ipr_model:train_here", tmp_path / "killed.state" / "state.safetensors"
    forks.start(call, str(whole), log=log)
    assert forks.wait() == 0, log.read_text()
    steps = []
    for _ in range(20):
        before = kept.stat().st_mtime_ns if kept.exists() else 0
        child = forks.start(call, str(killed), log=log)
        while not (killed / "config.json").exists():
            now = kept.stat().st_mtime_ns if kept.exists() else 0
            if now != before:
                os.kill(child, signal.SIGKILL)
                break
            time.sleep(0.001)
        if forks.wait() != -9:
            break
        with safe_open(kept, "pt") as state:
            steps.append(int(state.metadata()["step"]))
    assert len(steps) >= 2 and steps == sorted(set(steps)) and not any(step % 4 for step in steps)
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, killed))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert not kept.parent.exists() and not list(tmp_path.glob(".draft-*"))
    assert json.loads((killed / "config.json").read_text())["figures"]["timed_from_step"] == steps[-1]


def test_a_state_of_other_settings_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "m.state"
    state.mkdir()
    (state / "settings.json").write_text("{}")
    with pytest.raises(WinnowError, match=r"m\.state: a run with other settings"):
        train_here(str(tmp_path / "m"))


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = train(Stripes(), SHAPE, Training(2, batch=4), 0, tmp_path / "m")
    model, config = load(tmp_path / "m")
    z, t = torch.randn(2, 4, 4), torch.rand(2, 4)
    for one, other in zip(made(z, t), model(z, t), strict=True):
        assert torch.equal(one, other)
    assert config["task"] == "stripes" and config["training"]["steps"] == 2 and config["figures"]["parameters"] > 1000
    assert sum(p.numel() for p in model.parameters()) == config["figures"]["parameters"]


@pytest.mark.parametrize("harm", ["absent", "no json", "other shape", "cut short"])
def test_a_broken_checkpoint_is_refused_in_one_line(tmp_path: Path, harm: str) -> None:
    folder = tmp_path / "m"
    train(Stripes(), SHAPE, Training(1, batch=4), 0, folder)
    if harm == "absent":
        folder = tmp_path / "none"
    if harm == "no json":
        (folder / "config.json").write_text("{")
    if harm == "other shape":
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(text.replace('"width": 16', '"width": 32'))
    if harm == "cut short":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(WinnowError, match="no model of regions .*train it") as caught:
        load(folder)
    assert "\n" not in str(caught.value)
