"""Encoders: the vectors are those of the models that they are named after, asked in another way."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from jobs import models
from jobs.encoders import ENCODERS, encoder
from jobs.images import array
from jobs.latents import Latents, decode, encode
from jobs.world import WEIGHTS
from schemas.errors import WinnowError


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Floats stay equal, and nothing may reach for the network."""
    torch.set_num_threads(1)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


def pictures(size: int = 32, n: int = 5) -> list[Image.Image]:
    rng = np.random.default_rng(size)
    return [Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(n)]


def shake(model: torch.nn.Module) -> None:
    """Weights large enough that images differ in the result."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)


# --- latents


def by_hand(vae: Any, images: list[Image.Image]) -> np.ndarray:
    """Latent means [N, C·h·w], one image at a time."""
    made = []
    for image in images:
        pixels = torch.tensor(np.asarray(image), dtype=torch.float32).permute(2, 0, 1)[None] / 255 * 2 - 1
        with torch.no_grad():
            made.append(vae.encode(pixels).latent_dist.mean.flatten().numpy())
    return np.stack(made)


def test_raw_and_scaled_latents(stable_diffusion: Path) -> None:
    from diffusers import AutoencoderKL

    images = pictures()
    expected = by_hand(AutoencoderKL.from_pretrained(stable_diffusion / "vae"), images)
    raw = encoder(f"vae-raw:{stable_diffusion}").encode(images, [""] * 5)
    scaled = encoder(f"vae:{stable_diffusion}").encode(images, [""] * 5)
    assert raw.shape == (5, 4 * 16 * 16) and raw.dtype == scaled.dtype == np.float32
    np.testing.assert_allclose(raw, expected, atol=1e-5)
    np.testing.assert_allclose(scaled, expected * 0.18215, atol=1e-5)


def test_scaled_latents_subtract_the_shift(tmp_path: Path, stable_diffusion: Path) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(stable_diffusion / "vae")
    vae.register_to_config(scaling_factor=0.3611, shift_factor=0.1159)  # as FLUX has them
    vae.save_pretrained(tmp_path / "vae")
    images = pictures()
    scaled = encoder(f"vae:{tmp_path / 'vae'}").encode(images, [""] * 5)
    np.testing.assert_allclose(scaled, (by_hand(vae, images) - 0.1159) * 0.3611, atol=1e-5)


def test_scaled_latents_by_channel_and_back(stable_diffusion: Path) -> None:
    """Some autoencoders have a mean and deviation of each channel; decoding undoes either scale."""
    from diffusers import AutoencoderKL

    vae, images = AutoencoderKL.from_pretrained(stable_diffusion / "vae").eval(), pictures()
    pixels = array(images)
    with torch.no_grad():
        expected = vae.decode(torch.from_numpy(by_hand(vae, images)).view(5, 4, 16, 16)).sample
    expected = (expected / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(decode(vae, encode(vae, pixels)), expected, atol=1e-5)
    means, deviations = np.array([0.1, -0.2, 0.3, 0.0]), np.array([2.0, 0.5, 1.0, 4.0])
    vae.register_to_config(scaling_factor=0.5, latents_mean=means.tolist(), latents_std=deviations.tolist())
    raw = by_hand(vae, images).reshape(5, 4, 16, 16)
    scaled = (raw - means.reshape(4, 1, 1)) * 0.5 / deviations.reshape(4, 1, 1)
    np.testing.assert_allclose(encode(vae, pixels).numpy(), scaled, atol=1e-5)
    np.testing.assert_allclose(decode(vae, encode(vae, pixels)), expected, atol=1e-5)


def test_a_bare_autoencoder_is_that_of_its_pipeline(stable_diffusion: Path, tmp_path: Path) -> None:
    bare = tmp_path / "vae"
    shutil.copytree(stable_diffusion / "vae", bare)
    images = pictures()
    inside, outside = encoder(f"vae:{stable_diffusion}"), encoder(f"vae:{bare}")
    np.testing.assert_array_equal(inside.encode(images, [""] * 5), outside.encode(images, [""] * 5))
    assert inside.revision == outside.revision


def test_the_autoencoder_alone_is_loaded(
    stable_diffusion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "sd"
    shutil.copytree(stable_diffusion, copy)
    for part in ("unet", "text_encoder"):
        shutil.rmtree(copy / part)
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("the whole pipeline"))
    assert encoder(f"vae:{copy}").encode(pictures(), [""] * 5).shape == (5, 1024)
    before = encoder(f"vae:{stable_diffusion}").revision
    assert encoder(f"vae:{copy}").revision == before  # another text encoder makes no other latents


def test_latents_of_the_embedded_model() -> None:
    latents = Latents("embedded")
    assert latents.folder == WEIGHTS / "pipeline" / "vae"
    assert latents.flat(pictures(16)).shape == (5, 8 * 8 * 8)


def test_other_kinds_of_autoencoder(tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    tiny = AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                           num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))  # fmt: skip
    tiny.save_pretrained(tmp_path / "tiny")
    images = pictures()
    pixels = torch.tensor(np.stack([np.asarray(image) for image in images]), dtype=torch.float32)
    with torch.no_grad():
        expected = tiny.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1).latents.flatten(1)
    raw = encoder(f"vae-raw:{tmp_path / 'tiny'}").encode(images, [""] * 5)
    np.testing.assert_allclose(raw, expected, atol=1e-5)


def test_what_is_no_autoencoder_is_named(tmp_path: Path, stable_diffusion: Path) -> None:
    for name, why in {
        "/no/such": "no such folder",
        str(tmp_path): "has neither vae/config.json",
        str(stable_diffusion / "unet"): "a UNet2DConditionModel encodes nothing",
        str(stable_diffusion / "scheduler"): "has neither",
    }.items():
        with pytest.raises(WinnowError, match=why) as said:
            Latents(name).flat(pictures())
        assert "\n" not in str(said.value)
    broken = tmp_path / "vae"
    shutil.copytree(stable_diffusion / "vae", broken)
    weights = broken / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(WinnowError, match=r"autoencoder '.*vae': cannot be loaded"):
        Latents(str(broken)).flat(pictures())
    with pytest.raises(WinnowError, match="several sizes"):
        Latents("embedded").flat([*pictures(16), *pictures(32)])


# --- transformers

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
EYE = SMALL | {"image_size": 28, "patch_size": 14}


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reduced models of random weights with their image processors, as ``save_pretrained`` writes them."""
    from transformers import (
        BitImageProcessor,
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        Dinov2Config,
        Dinov2Model,
        SiglipConfig,
        SiglipImageProcessor,
        SiglipModel,
    )

    torch.manual_seed(6)
    text = SMALL | {"vocab_size": 50, "max_position_embeddings": 16}
    wide = {"projection_dim": 24}  # the tower's own class reads it from the tower's settings
    edge, square = {"shortest_edge": 28}, {"height": 28, "width": 28}
    made = {
        "clip": (CLIPModel(CLIPConfig(text_config=text, vision_config=EYE | wide, **wide)),
                 CLIPImageProcessor(size=edge, crop_size=square)),
        "siglip": (SiglipModel(SiglipConfig(text_config=text, vision_config=EYE)), SiglipImageProcessor(size=square)),
        "dinov2": (Dinov2Model(Dinov2Config(**EYE)), BitImageProcessor(size=edge, crop_size=square)),
    }  # fmt: skip
    folders = {}
    for kind, (model, processor) in made.items():
        shake(model)
        folders[kind] = tmp_path_factory.mktemp("eyes") / kind
        model.save_pretrained(folders[kind])
        processor.save_pretrained(folders[kind])
    return folders


def asked_directly(kind: str, folder: Path, images: list[Image.Image]) -> np.ndarray:
    """The same vectors through the vision tower's own class, one image at a time."""
    from transformers import AutoImageProcessor, CLIPVisionModelWithProjection, Dinov2Model, SiglipVisionModel

    processor = AutoImageProcessor.from_pretrained(folder)
    vectors = []
    for image in images:
        pixels = processor(images=image, return_tensors="pt")
        with torch.no_grad():
            if kind == "clip":
                found = CLIPVisionModelWithProjection.from_pretrained(folder).eval()(**pixels).image_embeds
            elif kind == "siglip":
                found = SiglipVisionModel.from_pretrained(folder).eval()(**pixels).pooler_output
            else:
                found = Dinov2Model.from_pretrained(folder).eval()(**pixels).last_hidden_state[:, 0]
        vectors.append(found[0].numpy())
    stacked = np.stack(vectors)
    return stacked if kind == "dinov2" else stacked / np.linalg.norm(stacked, axis=1, keepdims=True)


@pytest.mark.parametrize(("kind", "width"), [("clip", 24), ("siglip", 32), ("dinov2", 32)])
def test_image_embeddings_are_those_of_the_model(kind: str, width: int, eyes: dict[str, Path]) -> None:
    images = [*pictures(40, 2), Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 90, 3), np.uint8))]
    found = encoder(f"{kind}:{eyes[kind]}")
    vectors = found.encode(images, ["", "whatever", ""])
    expected = asked_directly(kind, eyes[kind], images)
    assert vectors.shape == (3, width) and vectors.dtype == np.float32
    assert np.ptp(expected, axis=0).max() > 1e-3  # images differ
    np.testing.assert_allclose(vectors, expected, rtol=1e-4, atol=1e-5)
    assert found.name == f"{kind}:{eyes[kind]}" and len(found.revision) == 16


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
def test_grey_and_transparent_images_are_read_as_their_colours(kind: str, eyes: dict[str, Path]) -> None:
    grey = pictures(40, 1)[0].convert("L")
    clear = Image.merge("RGBA", (*pictures(50, 1)[0].split(), grey.resize((50, 50))))
    encode = encoder(f"{kind}:{eyes[kind]}").encode
    np.testing.assert_array_equal(
        encode([grey, clear], ["", ""]), encode([grey.convert("RGB"), clear.convert("RGB")], ["", ""])
    )


def test_a_model_of_another_kind_is_refused(eyes: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(WinnowError, match=r"of type 'clip', not dinov2 or"):
        encoder(f"dinov2:{eyes['clip']}").encode(pictures(), [""] * 5)
    with pytest.raises(WinnowError, match=r"encoder 'siglip:/no/such': no such folder"):
        encoder("siglip:/no/such")
    with pytest.raises(WinnowError, match=r"encoder 'clip:.*': the folder has no config.json"):
        encoder(f"clip:{tmp_path}").encode(pictures(), [""] * 5)


def test_a_model_with_a_gap_is_refused(eyes: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for kind, name in (("clip", "visual_projection.weight"), ("dinov2", "layernorm.bias")):
        copy = tmp_path / kind
        shutil.copytree(eyes[kind], copy)
        state = load_file(copy / "model.safetensors")
        del state[name]
        save_file(state, copy / "model.safetensors", {"format": "pt"})
        with pytest.raises(WinnowError, match=rf"lacks 1 of \d+ tensors \({name}\)"):
            encoder(f"{kind}:{copy}").encode(pictures(), [""] * 5)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(WinnowError, match=r"unknown; did you mean 'dinov2'\? there are .*vae-raw"):
        encoder("dino:facebook/dinov2-base")
    assert {"vae", "vae-raw", "clip", "siglip", "dinov2", "open_clip"} <= set(ENCODERS)
