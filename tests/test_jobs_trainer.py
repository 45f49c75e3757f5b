"""The trainer: what its loss is, what a weight does, and that a killed run ends in the very same weights."""

import io
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ForkServer
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import norm

from jobs.train import Train
from jobs.trainer import Example, batch_rows, fine_tune, lr_factor, noised, objective, weighted_loss
from schemas.errors import WinnowError

KINDS = ["epsilon", "v_prediction", "flow"]


def scheduler_for(kind: str) -> Any:
    if kind == "flow":
        return FlowMatchEulerDiscreteScheduler()
    return DDPMScheduler(beta_schedule="scaled_linear", prediction_type=kind)


def tiny_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, attention_head_dim=4, norm_num_groups=4,
    ).eval()  # fmt: skip


def test_weighted_loss_is_the_formula() -> None:
    rng = np.random.default_rng(0)
    prediction, target = rng.normal(size=(2, 5, 4, 3, 3))
    weights = rng.uniform(0, 3, 5)
    expected = sum(w * ((p - t) ** 2).mean() for w, p, t in zip(weights, prediction, target, strict=True)) / 5
    got = weighted_loss(torch.tensor(prediction), torch.tensor(target), torch.tensor(weights))
    assert got.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_weight_2_is_the_sample_twice_and_weight_0_its_absence(kind: Any) -> None:
    unet, scheduler = tiny_unet(), scheduler_for(kind)
    random = torch.Generator().manual_seed(1)
    x, noise = torch.randn((2, 3, 4, 8, 8), generator=random)
    draw, context = torch.randn(3, generator=random), torch.randn((3, 5, 8), generator=random)

    def gradient(which: list[int], weights: list[float]) -> torch.Tensor:
        unet.zero_grad()
        noisy, t, target = noised(kind, scheduler, x[which], noise[which], draw[which])
        loss = weighted_loss(unet(noisy, t, context[which]).sample, target, torch.tensor(weights))
        (loss * len(which)).backward()  # the sum, not the mean
        return torch.cat([p.grad.flatten() for p in unet.parameters() if p.grad is not None])

    weighted = gradient([0, 1, 2], [2.0, 1.0, 0.0])
    repeated = gradient([0, 0, 1], [1.0, 1.0, 1.0])
    scale = repeated.abs().max()
    assert scale > 1e-3
    assert (weighted - repeated).abs().max() <= 1e-6 * max(1.0, scale.item())
    assert (weighted - gradient([0, 1, 2], [1.0, 1.0, 1.0])).abs().max() > 1e-2 * scale


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noised_is_what_the_scheduler_does(kind: Any) -> None:
    scheduler = scheduler_for(kind)
    random = torch.Generator().manual_seed(2)
    x, noise = torch.randn((2, 500, 4, 2, 2), generator=random)
    draw = torch.randn(500, generator=random)
    noisy, t, target = noised(kind, scheduler, x, noise, draw)
    np.testing.assert_array_equal(t, np.floor(norm.cdf(draw.double().numpy()) * 1000).astype(int))
    assert abs(t.double().mean().item() - 500) < 50  # uniform: standard error 13
    torch.testing.assert_close(noisy, scheduler.add_noise(x, noise, t))
    torch.testing.assert_close(target, noise if kind == "epsilon" else scheduler.get_velocity(x, noise, t))


def test_noised_flow_is_what_the_flow_scheduler_does() -> None:
    scheduler = scheduler_for("flow")
    random = torch.Generator().manual_seed(3)
    steps = scheduler.timesteps[[100, 400, 700, 950]]  # 1000 σ
    x, noise = torch.randn((2, 4, 4, 8, 8), generator=random)
    noisy, t, target = noised("flow", scheduler, x, noise, torch.logit(steps / 1000))
    torch.testing.assert_close(t, steps)
    torch.testing.assert_close(noisy, scheduler.scale_noise(x, steps, noise))
    sigma = (steps / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy - sigma * target, x)  # one exact step along the flow leads to the picture


def test_noised_never_leaves_the_training_steps() -> None:
    draw = torch.tensor([-40.0, 40.0])
    x = torch.zeros(2, 1, 1, 1)
    assert noised("epsilon", scheduler_for("epsilon"), x, x, draw)[1].tolist() == [0, 999]


@pytest.mark.parametrize(("n", "batch"), [(7, 3), (5, 12), (6, 6), (1, 4), (13, 1)])
def test_batches_cover_every_epoch_exactly(n: int, batch: int) -> None:
    epochs = 3 * batch  # so that the batches come out even
    drawn = np.concatenate([batch_rows(11, step, batch, n) for step in range(epochs * n // batch)])
    for epoch in drawn.reshape(epochs, n):
        assert sorted(epoch) == list(range(n))
    if n > 4:
        assert len({tuple(epoch) for epoch in drawn.reshape(epochs, n)}) > 1
        again = np.concatenate([batch_rows(12, step, batch, n) for step in range(epochs * n // batch)])
        assert (drawn != again).any()


def test_learning_rate_falls_from_1_to_the_floor() -> None:
    factors = [lr_factor(step, 10, 0.1) for step in range(11)]
    assert factors[0] == 1 and factors[-1] == pytest.approx(0.1) and factors == sorted(factors, reverse=True)
    assert factors[5] == pytest.approx(0.55)
    assert {lr_factor(step, 10, 1.0) for step in range(11)} == {1.0}


def test_learning_rate_rises_first_where_told() -> None:
    factors = [lr_factor(step, 100, 0.1, 4) for step in range(100)]
    assert factors[:4] == pytest.approx([k / 5 * lr_factor(k - 1, 100, 0.1) for k in (1, 2, 3, 4)])
    assert factors[4:] == [lr_factor(step, 100, 0.1) for step in range(4, 100)]


def examples(weights: list[float]) -> list[Example]:
    rng = np.random.default_rng(5)
    made = []
    for i, weight in enumerate(weights):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(file, "png")
        made.append(Example(i, f"a red fox {'in the snow' * (i % 2)}", weight, file.getvalue()))
    return made


SETTINGS = Train(steps=30, batch=4, lr=1e-3, lr_floor=0.1, ema=0.9, checkpoint=3, prompt_dropout=0.3)


def train_and_save(model: str, progress: str, out: str) -> None:
    """What the killed process runs."""
    from jobs import models

    pipe = models.load(model)
    fine_tune(pipe, examples([1.0, 0.5, 2.0, 1.0, 0.0]), SETTINGS, 7, Path(progress))
    save_file({k: v.contiguous() for k, v in pipe.unet.state_dict().items()}, out)


def test_killed_and_resumed_gives_the_same_weights_to_the_bit(
    stable_diffusion: Path, forks: ForkServer, tmp_path: Path
) -> None:
    call, log = "test_jobs_trainer:train_and_save", tmp_path / "log"
    forks.start(call, str(stable_diffusion), str(tmp_path / "a.pt"), str(tmp_path / "a.safetensors"), log=log)
    assert forks.wait() == 0, log.read_text()

    progress, out = tmp_path / "b.pt", tmp_path / "b.safetensors"
    steps: list[int] = []  # where each killed run had come to
    for _ in range(20):
        before = progress.stat().st_mtime_ns if progress.exists() else 0
        child = forks.start(call, str(stable_diffusion), str(progress), str(out), log=log)
        while not out.exists():  # the kill comes right after the next checkpoint
            now = progress.stat().st_mtime_ns if progress.exists() else 0
            if now != before:
                os.kill(child, signal.SIGKILL)
                break
            time.sleep(0.002)
        status = forks.wait()
        if status != -9:
            assert status == 0, log.read_text()
            break
        steps.append(torch.load(progress, weights_only=True)["step"])
    assert len(steps) >= 2 and steps == sorted(set(steps)) and not any(step % 3 for step in steps), steps
    base = load_file(stable_diffusion / "unet" / "diffusion_pytorch_model.safetensors")
    whole, resumed = load_file(tmp_path / "a.safetensors"), load_file(out)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert max((whole[name] - base[name]).abs().max().item() for name in whole) > 1e-4  # it did learn


@pytest.mark.parametrize(
    ("weights", "said"),
    [([1.0, float("nan")], "finite"), ([1.0, float("inf")], "finite"), ([0.0, 0.0], "not all 0"), ([1, -1.0], "0")],
)
def test_useless_weights_are_refused(stable_diffusion: Path, tmp_path: Path, weights: list[float], said: str) -> None:
    from jobs import models

    with pytest.raises(WinnowError, match=said) as caught:
        fine_tune(models.load(str(stable_diffusion)), examples(weights), SETTINGS, 7, tmp_path / "p.pt")
    assert "weigh and export again" in str(caught.value)


def test_a_loss_that_explodes_names_the_step(stable_diffusion: Path, tmp_path: Path) -> None:
    from jobs import models

    pipe = models.load(str(stable_diffusion))
    pipe.unet.conv_out.weight.data.fill_(float("nan"))
    with pytest.raises(WinnowError, match=r"the loss is nan at step 0 .*lower train\.lr"):
        fine_tune(pipe, examples([1.0] * 4), SETTINGS, 7, tmp_path / "p.pt")


def test_objective_follows_the_scheduler() -> None:
    assert [objective(scheduler_for(kind)) for kind in KINDS] == KINDS
    with pytest.raises(WinnowError, match="predicts 'sample'; epsilon, v_prediction and flow"):
        objective(DDPMScheduler(prediction_type="sample"))
