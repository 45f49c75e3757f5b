"""The guidance gap: its formula on ε, v and flow models, SDXL's extra conditions, and what its sign means."""

from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from conftest import WORDS, build_stable_diffusion
from PIL import Image

from jobs import models
from jobs.families import Conditions, family
from jobs.generate import Generate, Sampler
from jobs.images import array
from jobs.latents import encode
from jobs.scorers import scorer
from jobs.scorers.guidance_gap import LEVELS, SEED, GuidanceGap
from jobs.world.judge import Judge
from jobs.world.scenes import all_captions
from schemas.errors import WinnowError


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def pictures(*sizes: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for size in sizes]


def noises(shape: tuple[int, ...]) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(SEED)
    return [torch.randn(shape, generator=random) for _ in LEVELS]


def rms(difference: torch.Tensor) -> float:
    return float(difference.double().square().mean() ** 0.5)


@torch.no_grad()
def by_hand(pipe: Any, image: Image.Image, prompt: str) -> float:
    """The formula for one image, from the parts of the pipeline; predictions become ε before they are compared."""
    pixels = torch.tensor(np.asarray(image), dtype=torch.float32).permute(2, 0, 1)[None] / 127.5 - 1
    x = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    told, untold = (
        pipe.text_encoder(
            pipe.tokenizer(text, padding="max_length", max_length=pipe.tokenizer.model_max_length, truncation=True,
                           return_tensors="pt").input_ids
        )[0]
        for text in (prompt, "")
    )  # fmt: skip
    config, total = pipe.scheduler.config, 0.0
    for level, noise in zip(LEVELS, noises(x.shape[1:]), strict=True):

        def epsilon(text: torch.Tensor, level: float = level, noise: torch.Tensor = noise) -> torch.Tensor:
            if config.prediction_type == "flow_prediction":
                noisy = (1 - level) * x + level * noise
                return noisy + (1 - level) * pipe.unet(noisy, level * 1000, text).sample
            betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, 1000, dtype=torch.float64) ** 2
            kept = float((1 - betas).cumprod(0)[int(1000 * level)])
            noisy = kept**0.5 * x + (1 - kept) ** 0.5 * noise
            said = pipe.unet(noisy, int(1000 * level), text).sample
            return said if config.prediction_type == "epsilon" else kept**0.5 * said + (1 - kept) ** 0.5 * noisy

        total += rms(epsilon(told) - epsilon(untold))
    return total / len(LEVELS)


@pytest.fixture(scope="module", params=["epsilon", "v_prediction", "flow"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    if request.param == "flow":
        return "embedded"
    return str(build_stable_diffusion(tmp_path_factory.mktemp("gap") / "sd", prediction_type=request.param))


def test_the_gap_is_its_formula(model: str) -> None:
    size = 16 if model == "embedded" else 32
    prompts = ["a red seven on a blue background", "a white one", ""] if model == "embedded" else [*WORDS[:2], ""]
    images = pictures(size, size, size)
    values, cut = scorer(f"guidance-gap:{model}").score(images, prompts)
    pipe = models.load(model)
    expected = [-by_hand(pipe, image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    assert values.dtype == np.float32 and not cut.any()
    np.testing.assert_allclose(values, expected, rtol=2e-4, atol=1e-6)
    assert values[2] == pytest.approx(0, abs=1e-6) and max(values[:2]) < -1e-4  # told nothing, nothing moves


def test_a_value_belongs_to_image_and_prompt_alone(stable_diffusion: Path) -> None:
    judge = GuidanceGap(str(stable_diffusion))
    images = [*pictures(32, 64, 32), pictures(32)[0].convert("L")]
    together, _ = judge.score(images, WORDS)
    alone = np.concatenate([judge.score([image], [text])[0] for image, text in zip(images, WORDS, strict=True)])
    np.testing.assert_allclose(alone, together, rtol=1e-4)
    np.testing.assert_array_equal(judge.score(images, WORDS)[0], together)
    assert len(np.unique(together)) == 4


def test_the_right_caption_scores_above_another() -> None:
    """What the sign means: where a picture is what its caption says, being told another one moves the model more."""
    judge = GuidanceGap("embedded")
    captions = [all_captions()[i] for i in np.random.default_rng(0).permutation(len(all_captions()))[:60]]
    pixels = Sampler(judge.pipe, Generate(steps=16, guidance=1.0))(captions, list(range(60)))
    images = [Image.fromarray((image * 255).round().astype(np.uint8)) for image in pixels]
    right = Judge()(images, captions)[0] > 0.5
    assert right.sum() > 15
    own, other = judge.score(images, captions)[0][right], judge.score(images, captions[7:] + captions[:7])[0][right]
    assert (own > other).mean() > 0.9 and own.mean() > other.mean() / 2


def test_a_cut_text_is_told_at_the_very_token(stable_diffusion: Path) -> None:
    """The tokenizer reads 10 tokens, two of them marks."""
    texts = [" ".join(["red"] * n) for n in (7, 8, 9, 50)]
    _, cut = GuidanceGap(str(stable_diffusion)).score(pictures(32) * 4, texts)
    assert cut.tolist() == [False, False, True, True]


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SDXL pipeline of random weights, 32×32 pixels: two text encoders, pooled text and sizes as conditions."""
    return pipelines.build("sdxl", tmp_path_factory.mktemp("gap") / "sdxl")


@torch.no_grad()
def test_sdxl_is_told_its_size_and_pooled_text(sdxl: Path) -> None:
    judge = GuidanceGap(str(sdxl))
    images = [pictures(32)[0], pictures(48)[0].resize((32, 64))]
    values, cut = judge.score(images, WORDS[:2])
    assert not cut.any()
    pipe = models.load(str(sdxl))
    for image, prompt, value in zip(images, WORDS, values, strict=False):
        width, height = image.size
        pixels = torch.tensor(np.asarray(image), dtype=torch.float32).permute(2, 0, 1)[None] / 127.5 - 1
        x = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
        ids = pipe.tokenizer(prompt, padding="max_length", max_length=16, return_tensors="pt").input_ids
        first = pipe.text_encoder(ids, output_hidden_states=True)
        second = pipe.text_encoder_2(ids, output_hidden_states=True)
        text = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
        total = 0.0
        for level, noise in zip(LEVELS, noises(x.shape[1:]), strict=True):
            kept = float(pipe.scheduler.alphas_cumprod[int(1000 * level)])
            noisy = kept**0.5 * x + (1 - kept) ** 0.5 * noise
            said = [
                pipe.unet(
                    noisy, int(1000 * level), on * text,
                    added_cond_kwargs={"text_embeds": on * second.text_embeds, "time_ids": sizes},
                ).sample
                for on in (1, 0)  # SDXL guides away from zeros
            ]  # fmt: skip
            total += rms(said[0] - said[1])
        assert value == pytest.approx(-total / len(LEVELS), rel=2e-4)


@pytest.mark.parametrize("kind", ["sd3", "sd3-no-t5", "flux"])
def test_a_transformer_is_asked_as_well(kind: str, tmp_path: Path) -> None:
    """For a flow the difference of the predictions counts with what the noise leaves of the image, 1 − σ."""
    folder = pipelines.build(kind, tmp_path / kind)
    images = pictures(32, 32)
    values, cut = scorer(f"guidance-gap:{folder}").score(images, WORDS[:2])
    pipe = models.load(str(folder))
    texts, nothing = Conditions(pipe)(WORDS[:2]), Conditions(pipe)([None, None])
    x = encode(pipe.vae, array(images))
    total = np.zeros(2)
    with torch.no_grad():
        for level, noise in zip(LEVELS, noises(x.shape[1:]), strict=True):
            noisy, t = (1 - level) * x + level * noise, torch.full((2,), 1000 * level)
            said = [family(pipe).predict(pipe, noisy, t, one) for one in (texts, nothing)]
            total += [(1 - level) * rms(a - b) for a, b in zip(*said, strict=True)]
    assert not cut.any() and (values < -1e-5).all()
    np.testing.assert_allclose(values, -total / len(LEVELS), rtol=1e-3)


def test_what_cannot_be_asked_is_named(tmp_path: Path) -> None:
    with pytest.raises(WinnowError, match=r"of which model\? write 'guidance-gap:embedded'"):
        scorer("guidance-gap")
    with pytest.raises(WinnowError, match="no such folder"):
        scorer("guidance-gap:/no/such")
