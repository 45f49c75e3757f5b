"""Sampling: an image belongs to its seed, can be made again, and shows something."""

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import World, build_stable_diffusion
from PIL import Image

from jobs import models
from jobs.generate import Generate, Sampler, sound
from jobs.images import FLAT, decode, encode, fault, images_of
from jobs.run import Run
from schemas.errors import WinnowError
from schemas.ids import sample_id

SEEDS = [11, 22, 33, 44, 55]
#: Floats in [0, 1]; other batch mates move them by rounding only, other seeds by tenths.
ROUNDING = 2e-3
SIDES = {"sd": 32, "embedded": 16}
TEXTS = {
    "sd": ["a red fox in the snow", "the blue house", "two green birds", "an old boat", ""],
    "embedded": [
        "a red seven on a blue background", "a white one on a black background", "a green three on a purple background",
        "a cyan zero", "a yellow nine on a blue background",
    ],
}  # fmt: skip
SETTINGS = {"sd": Generate(steps=6, guidance=5.0), "embedded": Generate(steps=4, guidance=1.0)}


@pytest.fixture(scope="module", params=["sd", "embedded"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipe(kind: str, stable_diffusion: Path) -> Any:
    torch.set_num_threads(1)
    return models.load("embedded" if kind == "embedded" else str(stable_diffusion))


def test_an_image_depends_on_its_seed_alone(kind: str, pipe: Any) -> None:
    texts, settings = TEXTS[kind], SETTINGS[kind]
    together = Sampler(pipe, settings)(texts, SEEDS)
    assert together.shape == (5, SIDES[kind], SIDES[kind], 3) and 0 <= together.min() < together.max() <= 1
    backwards = Sampler(pipe, settings)(texts[::-1], SEEDS[::-1])[::-1]
    alone = np.concatenate([Sampler(pipe, settings)([text], [seed]) for text, seed in zip(texts, SEEDS, strict=True)])
    np.testing.assert_allclose(backwards, together, atol=ROUNDING)
    np.testing.assert_allclose(alone, together, atol=ROUNDING)
    others = Sampler(pipe, settings)(texts, [seed + 1 for seed in SEEDS])
    assert (abs(others - together).max(axis=(1, 2, 3)) > 50 * ROUNDING).all()


def test_a_replay_is_equal(kind: str, pipe: Any) -> None:
    first = Sampler(pipe, SETTINGS[kind])(TEXTS[kind], SEEDS)
    np.testing.assert_array_equal(Sampler(pipe, SETTINGS[kind])(TEXTS[kind], SEEDS), first)


@torch.no_grad()
def by_hand(pipe: Any, texts: list[str], seeds: list[int], steps: int, guidance: float) -> np.ndarray:
    """The sampling loop of the latent diffusion paper, with the parts of the pipeline and none of its code."""

    def context(some: list[str]) -> torch.Tensor:
        long = pipe.tokenizer.model_max_length
        ids = pipe.tokenizer(some, padding="max_length", max_length=long, truncation=True, return_tensors="pt")
        return pipe.text_encoder(ids.input_ids)[0]

    shape = (1, pipe.unet.config.in_channels, pipe.unet.config.sample_size, pipe.unet.config.sample_size)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    x = torch.cat(noise) * scheduler.init_noise_sigma
    with_text, without = context(texts), context([""] * len(texts))
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        prediction = pipe.unet(scaled, t, with_text).sample
        if guidance > 1:
            free = pipe.unet(scaled, t, without).sample
            prediction = free + guidance * (prediction - free)
        x = scheduler.step(prediction, t, x).prev_sample
    images = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
    return ((images / 2 + 0.5).clamp(0, 1)).permute(0, 2, 3, 1).numpy()


def test_sampling_is_the_loop_of_the_paper(kind: str, pipe: Any) -> None:
    settings = SETTINGS[kind]
    expected = by_hand(pipe, TEXTS[kind], SEEDS, settings.steps, settings.guidance)
    np.testing.assert_allclose(Sampler(pipe, settings)(TEXTS[kind], SEEDS), expected, atol=ROUNDING)


@pytest.mark.parametrize("format", ["png", "webp", "jpeg"])
def test_stored_bytes_decode_to_the_pixels(format: Any) -> None:
    smooth = np.stack(np.meshgrid(np.arange(40), np.arange(24), [0, 90, 180]), -1).sum(-1).astype(np.uint8)
    file = encode(smooth, format)
    assert Image.open(io.BytesIO(file)).format == format.upper()
    error = np.abs(np.asarray(decode(file), int) - smooth).max()
    assert error <= (6 if format == "jpeg" else 0)


def test_a_stored_image_can_be_made_again_from_its_row(world: World) -> None:
    """The first unit of the round's candidates: the pixels come back from prompt and seed."""
    run: Run = world.runs["curated"]
    made = world.table(
        "SELECT * FROM samples WHERE arm = 'curated' AND round = 1 AND split = 'train' ORDER BY sample_id LIMIT 7"
    )
    draw = Sampler(models.load("embedded"), run.recipe.generate)
    images = draw(made["prompt"].to_pylist(), made["seed"].to_pylist())
    stored = np.stack([np.asarray(image) for image in images_of(made)])
    difference = np.abs(np.round(images * 255).astype(int) - stored)
    assert difference.max() <= 1, difference.max()
    assert stored.std(axis=(1, 2)).max(axis=1).min() > FLAT


@pytest.mark.parametrize(
    ("pixels", "said"),
    [(np.zeros((8, 8, 3)), "black"), (np.full((8, 8, 3), 0.6), "flat"), (np.full((8, 8, 3), np.nan), "NaN")],
)
def test_faults_are_told_apart(pixels: np.ndarray, said: str) -> None:
    assert said in str(fault(pixels))
    rng = np.random.default_rng(0)
    assert fault(rng.random((8, 8, 3))) is None
    one = rng.random((8, 8, 3))
    one[3, 3, 1] = np.inf
    assert fault(one) == "NaN pixels"


def row(seed: int, text: str = "the blue house") -> dict[str, Any]:
    return {"sample_id": seed, "prompt_id": 1, "prompt": text, "seed": seed}


def sampled(draw: Sampler, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sound(draw, rows, draw.denoise([row["prompt"] for row in rows], [row["seed"] for row in rows]))


@pytest.mark.parametrize(("bias", "said"), [(-1.0, "black"), (0.2, "one flat colour"), (float("nan"), "NaN pixels")])
def test_a_broken_decoder_is_refused_in_one_line(stable_diffusion: Path, bias: float, said: str) -> None:
    pipe = models.load(str(stable_diffusion))
    pipe.vae.decoder.conv_out.weight.data.zero_()
    pipe.vae.decoder.conv_out.bias.data.fill_(bias)
    with pytest.raises(WinnowError) as caught:
        sampled(Sampler(pipe, Generate(steps=2, retries=2)), [row(1), row(2)])
    line = str(caught.value)
    assert f"2 of 2 images show nothing, the first ({said}) for prompt 'the blue house' after 3 seeds" in line
    assert "raise generate.retries" in line and "\n" not in line


def test_only_what_shows_nothing_is_sampled_again_with_its_next_seed(stable_diffusion: Path) -> None:
    """The decoder's contrast is set so that about half of the seeds give a flat image."""
    pipe = models.load(str(stable_diffusion))
    seeds, settings = list(range(100, 112)), Generate(steps=2, retries=12)
    texts = [row(seed)["prompt"] for seed in seeds]
    pipe.vae.decoder.conv_out.bias.data.zero_()
    spread = Sampler(pipe, settings)(texts, seeds).std(axis=(1, 2)).max(axis=1) * 255
    pipe.vae.decoder.conv_out.weight.data.mul_(FLAT / np.median(spread))
    flat = Sampler(pipe, settings)(texts, seeds).std(axis=(1, 2)).max(axis=1) * 255 < FLAT
    assert 3 <= flat.sum() <= 9

    made = sampled(Sampler(pipe, settings), [row(seed) for seed in seeds])
    assert [m["attempt"] > 0 for m in made] == flat.tolist()
    for seed, one in zip(seeds, made, strict=True):
        for _ in range(one["attempt"]):
            seed = sample_id(["retry", seed])
        assert one["seed"] == seed
        again = np.round(Sampler(pipe, settings)([one["prompt"]], [seed])[0] * 255)
        assert np.abs(again - one["pixels"]).max() <= 1
        assert one["sample_id"] in seeds and one["pixels"].std(axis=(0, 1)).max() > FLAT * 0.9


def test_a_model_that_shows_nothing_commits_nothing(tmp_path: Path, winnow: Any, stable_diffusion: Path) -> None:
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(stable_diffusion)
    pipe.vae.decoder.conv_out.weight.data.fill_(float("nan"))
    pipe.save_pretrained(tmp_path / "broken")
    (tmp_path / "prompts.txt").write_text("a red fox in the snow\nthe blue house by the sea\nan old boat\n")
    recipe = tmp_path / "broken.yaml"
    recipe.write_text(
        f"model: {tmp_path / 'broken'}\nprompts: {{source: {tmp_path / 'prompts.txt'}, held_out: 0.3}}\n"
        "generate: {steps: 2, images_per_prompt: 2}\nthreads: 1\n"
    )
    where = ("--recipe", recipe, "--store", tmp_path / "store")
    assert winnow("prompts", *where).status == 0
    assert "NaN pixels" in winnow("generate", *where).line
    assert not list((tmp_path / "store" / "tables" / "samples").rglob("*.parquet"))
    assert "no samples" not in winnow("verify", "--store", tmp_path / "store").out


def test_models_are_named_by_their_content(stable_diffusion: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / stable_diffusion.name
    shutil.copytree(stable_diffusion, copy)
    assert models.revision(str(copy)) == models.revision(str(stable_diffusion))
    other = build_stable_diffusion(tmp_path / "sd", prediction_type="v_prediction")
    assert models.revision(str(other)) != models.revision(str(stable_diffusion))


@pytest.mark.parametrize("name", ["/no/such/folder", "./here", "nothing", "a/b/c"])
def test_a_missing_model_is_named(name: str) -> None:
    with pytest.raises(WinnowError, match="no such folder"):
        models.locate(name)


def test_a_hub_out_of_reach_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*_: Any, **__: Any) -> None:
        raise RuntimeError("no route\nto host")  # what the client raises has changed between its versions

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    with pytest.raises(WinnowError, match="models/base.*no such folder.*reached .no route to host"):
        models.revision("models/base")


def test_a_folder_that_is_no_pipeline_is_named(tmp_path: Path) -> None:
    with pytest.raises(WinnowError, match=r"no model_index\.json"):
        models.locate(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(WinnowError, match="cannot be loaded"):
        models.load(str(tmp_path))


def test_damaged_weights_are_named(stable_diffusion: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(stable_diffusion, copy)
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(WinnowError, match=r"model '.*copy': cannot be loaded"):
        models.load(str(copy))


def test_missing_weights_are_named(stable_diffusion: Path, tmp_path: Path) -> None:
    """Of the text encoder, which transformers would draw at random; and of the U-Net, which diffusers leaves empty."""
    from safetensors.torch import load_file, save_file

    for part, name in (("text_encoder", "model.safetensors"), ("unet", "diffusion_pytorch_model.safetensors")):
        copy = tmp_path / part
        shutil.copytree(stable_diffusion, copy)
        weights = load_file(copy / part / name)
        lost = sorted(weights)[-1]
        save_file({k: v for k, v in weights.items() if k != lost}, copy / part / name, metadata={"format": "pt"})
        with pytest.raises(WinnowError, match=r"model '.*': (weights are missing: |cannot be loaded)") as caught:
            models.load(str(copy))
        if part == "text_encoder":
            assert lost.removeprefix("text_model.") in str(caught.value)
    models.load(str(stable_diffusion))


def test_a_folder_is_its_content_whatever_its_name(stable_diffusion: Path, tmp_path: Path) -> None:
    renamed = shutil.copytree(stable_diffusion, tmp_path / "another name")
    assert models.revision(str(renamed)) == models.revision(str(stable_diffusion))
