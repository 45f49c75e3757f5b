"""The training loop: its loss, what a weight does to the gradient, what is drawn, and what is refused."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORDS, build_stable_diffusion
from PIL import Image

from jobs import lora, models
from jobs.families import family
from jobs.train import Train
from jobs.training.cache import Cache, Example, build
from jobs.training.loop import Trainer, fine_tune, lr_factor, weighted_loss
from schemas.errors import WinnowError
from schemas.ids import sample_id

KINDS = ["epsilon", "v_prediction", "flow"]


def examples(weights: list[float]) -> list[Example]:
    rng = np.random.default_rng(5)
    made = []
    for i, weight in enumerate(weights):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(file, "png")
        made.append(Example(sample_id(["row", i]), WORDS[i % len(WORDS)], weight, file.getvalue()))
    return made


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Stable Diffusion that predicts ε, v or a flow."""
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("models") / "sd"
    if request.param != "flow":
        return build_stable_diffusion(home, prediction_type=request.param)
    from diffusers import DPMSolverMultistepScheduler

    pipe = models.load(str(build_stable_diffusion(home.with_name("base"))))
    how = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "steps_offset": 1}
    pipe.scheduler = DPMSolverMultistepScheduler(**how)
    pipe.save_pretrained(home)
    return home


def start(folder: Path, tmp_path: Path, weights: list[float], **how: Any) -> Trainer:
    """A trainer of a fresh copy of the model."""
    settings = Train(**({"batch": len(weights), "clip": 1e9} | how))
    pipe = models.load(str(folder))
    if settings.method == "lora":
        lora.attach(pipe, 4, 3)
        with torch.no_grad():  # a fresh LoRA hides A's gradient behind B = 0
            for name, p in pipe.unet.named_parameters():
                if "lora_B" in name:
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return Trainer(pipe, build(pipe, examples(weights), tmp_path / "cache"), settings, 7)


def gradient(trainer: Trainer, rows: list[int], **changed: Any) -> torch.Tensor:
    """The gradient of one step on these rows of a batch that has one noise and one timestep for each row number."""
    n = len(trainer.data)
    whole = trainer.batch(0, np.arange(n))
    some = torch.tensor(rows)
    told = {key: value[some] for key, value in whole.told.items()}
    batch = dataclasses.replace(
        whole, rows=np.array(rows), latents=whole.latents[some], noise=whole.noise[some], t=whole.t[some],
        told=told, weights=whole.weights[some], **{"total": 1.0} | changed,
    )  # fmt: skip
    found = []

    def take() -> None:
        found.append(torch.cat([p.grad.flatten() for p in trainer.flat.parameters if p.grad is not None]).clone())

    trainer.optimiser.step = take  # type: ignore[method-assign]
    trainer.step(0, batch)
    return found[0]


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("micro_batch", [None, 1, 2])
def test_weight_2_is_the_sample_twice_and_weight_0_its_absence(
    folder: Path, tmp_path: Path, method: str, micro_batch: int | None
) -> None:
    how = {"method": method, "micro_batch": micro_batch, "precision": "float32"}
    weighted = gradient(start(folder, tmp_path, [2.0, 1.0, 0.0], **how), [0, 1, 2])
    plain = start(folder, tmp_path, [1.0, 1.0, 1.0], **how)
    repeated, whole = gradient(plain, [0, 0, 1]), gradient(plain, [0, 1, 2])
    scale = repeated.abs().max()
    assert scale > 1e-3
    assert (weighted - repeated).abs().max() <= 1e-6 * max(1.0, float(scale))
    assert (weighted - whole).abs().max() > 1e-2 * scale


def test_the_loss_is_its_formula(folder: Path, tmp_path: Path) -> None:
    """Written out for each row, from the U-Net itself."""
    weights = [1.0, 0.5, 2.0, 0.25]
    for normalise, total in (("none", 4), ("mean", 4 * 0.9375), ("batch", 3.75)):
        for min_snr in (None, 5.0):
            flow = "flow" in models.load(str(folder)).scheduler.config.get("prediction_type")
            if flow and min_snr:
                continue
            trainer = start(folder, tmp_path, weights, normalise=normalise, min_snr=min_snr, prompt_dropout=0.5)
            batch = trainer.batch(3, np.array([2, 0, 3, 1]))
            t = batch.t
            expected = 0.0
            pipe = trainer.pipe
            for i in range(4):
                x, noise = batch.latents[i : i + 1].double(), batch.noise[i : i + 1].double()
                if flow:
                    share = float(t[i]) / 1000
                    noisy, target, scale = (1 - share) * x + share * noise, noise - x, 1.0
                else:
                    kept = float(pipe.scheduler.alphas_cumprod[t[i]])
                    noisy, snr = kept**0.5 * x + (1 - kept) ** 0.5 * noise, kept / (1 - kept)
                    epsilon = pipe.scheduler.config.prediction_type == "epsilon"
                    target = noise if epsilon else kept**0.5 * noise - (1 - kept) ** 0.5 * x
                    scale = min(snr, 5) / (snr if epsilon else snr + 1) if min_snr else 1.0
                with torch.no_grad():
                    said = pipe.unet(noisy.float(), t[i : i + 1], batch.told["prompt_embeds"][i : i + 1]).sample
                expected += weights[batch.rows[i]] * scale * float(((said.double() - target) ** 2).mean())
            got = trainer.loss(batch)[0].item()
            assert got == pytest.approx(expected / total, rel=1e-4), (normalise, min_snr)


def test_weighted_loss_is_the_formula() -> None:
    rng = np.random.default_rng(0)
    prediction, target = rng.normal(size=(2, 5, 4, 3, 3))
    weights = rng.uniform(0, 3, 5)
    each = [((p - t) ** 2).mean() for p, t in zip(prediction, target, strict=True)]
    loss, rows = weighted_loss(torch.tensor(prediction), torch.tensor(target), torch.tensor(weights), 7.0)
    assert loss.item() == pytest.approx(np.dot(weights, each) / 7, rel=1e-6)
    np.testing.assert_allclose(rows, each, rtol=1e-6)


def test_a_window_is_never_left_in_training(folder: Path, tmp_path: Path) -> None:
    trainer = start(folder, tmp_path, [1.0] * 8, window=(100, 130))
    seen: list[float] = []
    predict = trainer.family.predict

    def spy(pipe: Any, noisy: Any, t: torch.Tensor, told: Any) -> Any:
        seen.extend(t.tolist())
        return predict(pipe, noisy, t, told)

    trainer.family = dataclasses.replace(trainer.family, predict=spy)
    for step in range(6):
        trainer.step(step, trainer.batch(step, np.arange(8)))
    assert len(seen) == 48 and 100 <= min(seen) < 108 and 122 < max(seen) < 130


def test_bfloat16_keeps_its_weights_in_float32(folder: Path, tmp_path: Path) -> None:
    exact = gradient(start(folder, tmp_path, [1.0] * 4, precision="float32"), [0, 1, 2, 3])
    trainer = start(folder, tmp_path, [1.0] * 4, precision="bfloat16")
    rounded = gradient(trainer, [0, 1, 2, 3])
    assert {p.dtype for p in trainer.flat.parameters} == {torch.float32} and rounded.dtype == torch.float32
    apart = (rounded - exact).norm() / exact.norm()
    assert 1e-4 < apart < 0.05


def test_draws_belong_to_the_step_and_dropped_prompts_to_the_seed(folder: Path, tmp_path: Path) -> None:
    trainer = start(folder, tmp_path, [1.0] * 8, prompt_dropout=0.4)
    rows = np.arange(8)
    first, again, other = trainer.batch(5, rows), trainer.batch(5, rows), trainer.batch(6, rows)
    assert torch.equal(first.noise, again.noise) and torch.equal(first.t, again.t)
    assert not torch.equal(first.noise, other.noise)
    nothing = trainer.data.conditions(rows[:1], np.array([True]))["prompt_embeds"]
    told = [trainer.batch(step, rows).told["prompt_embeds"] for step in range(40)]
    dropped = [sum(torch.equal(row, nothing[0]) for row in some) for some in told]
    assert 320 * 0.4 - 35 < sum(dropped) < 320 * 0.4 + 35  # 4 standard deviations of 8.8


def test_learning_rate_falls_from_1_to_the_floor() -> None:
    factors = [lr_factor(step, 10, 0.1) for step in range(11)]
    assert factors[0] == 1 and factors[-1] == pytest.approx(0.1) and factors == sorted(factors, reverse=True)
    assert factors[5] == pytest.approx(0.55)
    assert {lr_factor(step, 10, 1.0) for step in range(11)} == {1.0}


def test_learning_rate_rises_first_where_told() -> None:
    factors = [lr_factor(step, 100, 0.1, 4) for step in range(100)]
    assert factors[:4] == pytest.approx([k / 5 * lr_factor(k - 1, 100, 0.1) for k in (1, 2, 3, 4)])
    assert factors[4:] == [lr_factor(step, 100, 0.1) for step in range(4, 100)]


@pytest.mark.parametrize(
    ("weights", "said"),
    [([1.0, float("nan")], "finite"), ([1.0, float("inf")], "finite"), ([0.0, 0.0], "not all 0"), ([1, -1.0], "0")],
)
def test_useless_weights_are_refused(stable_diffusion: Path, tmp_path: Path, weights: list[float], said: str) -> None:
    with pytest.raises(WinnowError, match=said) as caught:
        start(stable_diffusion, tmp_path, weights)
    assert "weigh and export again" in str(caught.value)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"window": (500, 400)}, r"train\.window is \[500, 400\]; give two timesteps"),
        ({"validation": 0.999999, "watch": 1}, r"train\.validation 0\.999999 holds back all 4 rows"),
        ({"window": (500, 1001)}, r"train\.window is \[500, 1001\]; give .* from 0 to 1000"),
        ({"validation": 0.1}, "nobody looks; set train.watch"),
    ],
)
def test_impossible_settings_are_named(stable_diffusion: Path, tmp_path: Path, how: dict[str, Any], said: str) -> None:
    with pytest.raises(WinnowError, match=said):
        start(stable_diffusion, tmp_path, [1.0] * 4, **how)


def test_a_loss_that_explodes_names_its_samples(stable_diffusion: Path, tmp_path: Path) -> None:
    """The latents of one row are damaged after the third step."""
    pipe, progress = models.load(str(stable_diffusion)), tmp_path / "p.safetensors"
    data = build(pipe, examples([1.0] * 6), tmp_path / "cache")
    settings = Train(steps=9, batch=6, lr=1e-4, checkpoint=1)
    broken: list[int] = []

    class Damaged(Cache):
        def latents(self, rows: np.ndarray) -> torch.Tensor:
            found = Cache.latents(self, rows).clone()
            broken.append(0)
            if len(broken) > 3:
                found[rows == 4] = float("nan")
            return found

    damaged = Damaged(**{field.name: getattr(data, field.name) for field in dataclasses.fields(data)})
    bad = data.sample_ids[4]
    with pytest.raises(WinnowError, match=rf"the loss is nan at step 3 \(samples {bad}\); what was kept before stays"):
        fine_tune(pipe, damaged, settings, 7, progress)
    fresh = models.load(str(stable_diffusion))
    assert Trainer(fresh, data, settings, 7).state.resume(progress) == 3
    assert all(torch.isfinite(p).all() for p in family(fresh).model(fresh).parameters())


def test_weights_that_a_step_spoils_are_never_kept(stable_diffusion: Path, tmp_path: Path) -> None:
    """The third step's learning rate throws the weights out of all numbers, with a finite loss and gradient."""
    pipe, progress = models.load(str(stable_diffusion)), tmp_path / "p.safetensors"
    data = build(pipe, examples([1.0] * 4), tmp_path / "cache")
    settings = Train(steps=3, batch=4, lr=1e-4, checkpoint=1)
    fine_tune(pipe, data, settings, 7, progress)
    whole = progress.read_bytes()
    wild = settings.model_copy(update={"lr": 1e39})
    with pytest.raises(WinnowError, match=r"weights are not finite after step 3; what was kept before stays"):
        fine_tune(models.load(str(stable_diffusion)), data, wild, 7, progress)
    assert progress.read_bytes() == whole


def test_a_gradient_that_is_none_is_refused(stable_diffusion: Path, tmp_path: Path) -> None:
    trainer = start(stable_diffusion, tmp_path, [1.0] * 4)
    before = [p.detach().clone() for p in trainer.flat.parameters]
    trainer.flat.parameters[3].register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(WinnowError, match=r"the gradient is (nan|inf) at step 0, with a loss of [0-9.]+; what"):
        trainer.step(0, trainer.batch(0, np.arange(4)))
    assert all(torch.equal(p, b) for p, b in zip(trainer.flat.parameters, before, strict=True))
