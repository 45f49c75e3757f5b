"""The published scorers give the published numbers: each against another computation of the same, on small random
weights under their true names, on the true heads where they are at hand, and on the true shapes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, normalize, softmax

from jobs.checkpoint import check
from jobs.clip import Clip, tokens
from jobs.convert import convert
from jobs.scorers import SCORERS, scorer
from jobs.scorers.aesthetic import Aesthetic
from jobs.scorers.hps import Hps, fit
from jobs.scorers.image_reward import UNUSED, ImageReward, Network, Shape, published
from jobs.scorers.pickscore import PickScore
from schemas.errors import WinnowError

HEADS = Path(__file__).parents[2] / "shared" / "data" / "weights"
V1, V2 = HEADS / "aesthetic_v1_vit_l_14_linear.pth", HEADS / "aesthetic_v2_sac_logos_ava1_l14_linearMSE.pth"
WORDS = ["red", "fox", "snow", "blue", "house", "boat", "a", "the", "in"]
PROMPTS = ["a red fox in the snow", "the blue house", "boat"]
#: Relative and absolute: the published number, but for float32's rounding.
EXACT = {"rtol": 1e-4, "atol": 2e-6}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Floats stay equal, and nothing may reach for the network."""
    torch.set_num_threads(1)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Coarse random patches, so that every way of resizing matters, and differs."""
    rng = np.random.default_rng([seed, width, height])
    coarse = Image.fromarray(rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BILINEAR)
    return image.convert(mode) if mode != "RGBA" else Image.merge("RGBA", (*image.split(), image.convert("L")))


PICTURES = [picture(40, 40), picture(90, 50), picture(30, 70)]


def random_weights(module: torch.nn.Module, seed: int) -> None:
    """Weights large enough that every part of the network tells in the result."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.15)
            if "norm" in name.lower() and name.endswith("weight"):
                p.add_(1)


# --- HPS v2.1


def framed(image: Image.Image, size: int = 224) -> np.ndarray:
    """From the description: longer side to ``size``, black around it, (x/255 − mean)/std; [3, size, size]."""
    w, h = image.size
    longest = max(w, h)
    new_w, new_h = round(w * size / longest), round(h * size / longest)
    small = np.asarray(image.convert("RGB").resize((new_w, new_h), Image.Resampling.BICUBIC), np.float64)
    frame = np.zeros((size, size, 3))
    top, left = (size - new_h) // 2, (size - new_w) // 2
    frame[top : top + new_h, left : left + new_w] = small
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    return ((frame / 255 - mean) / std).transpose(2, 0, 1)


@pytest.mark.parametrize(
    "size", [(300, 200), (200, 300), (100, 61), (61, 100), (224, 224), (224, 100), (100, 224), (512, 512), (640, 3)]
)
def test_hps_frames_an_image_pixel_by_pixel(size: tuple[int, int]) -> None:
    image = picture(*size)
    mine = fit(image, 224)
    assert mine.shape == (3, 224, 224) and mine.dtype == torch.float32
    np.testing.assert_allclose(mine.numpy(), framed(image), atol=2e-6)


def test_hps_frames_every_mode_of_image_alike() -> None:
    grey = picture(90, 50, "L")
    np.testing.assert_array_equal(fit(grey, 32), fit(grey.convert("RGB"), 32))
    see_through = picture(90, 50, "RGBA")
    np.testing.assert_array_equal(fit(see_through, 32), fit(see_through.convert("RGB"), 32))


SMALL_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def small_clip() -> Any:
    import open_clip

    torch.manual_seed(1)
    return open_clip.CLIP(**SMALL_CLIP).eval()


@pytest.fixture(scope="module")
def hps_file(small_clip: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As published: pickled, under ``state_dict``."""
    path = tmp_path_factory.mktemp("hps") / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": small_clip.state_dict()}, path)
    return path


def test_hps_is_the_cosine_of_open_clip(small_clip: Any, hps_file: Path) -> None:
    import open_clip

    ids = open_clip.get_tokenizer("ViT-H-14")(PROMPTS)
    pixels = torch.tensor(np.stack([framed(image, 28) for image in PICTURES]), dtype=torch.float32)
    with torch.no_grad():
        image, text, scale = small_clip(pixels, ids)
    values, cut = Hps(str(hps_file), SMALL_CLIP).score(PICTURES, PROMPTS)
    assert scale > 10  # so that a score with the scale in it would not pass
    np.testing.assert_allclose(values, (image * text).sum(1), **EXACT)
    assert not cut.any()


def test_a_converted_checkpoint_scores_alike(
    hps_file: Path, image_reward: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    """In safetensors, found by its folder, too."""
    convert(hps_file, tmp_path / "HPS_v2.1_compressed.safetensors")
    pickled, converted = Hps(str(hps_file), SMALL_CLIP), Hps(str(tmp_path), SMALL_CLIP)
    np.testing.assert_array_equal(pickled.score(PICTURES, PROMPTS)[0], converted.score(PICTURES, PROMPTS)[0])
    assert pickled.revision != converted.revision
    folder = image_reward[0]
    convert(folder / "ImageReward.pt", tmp_path / "ImageReward.safetensors")
    (tmp_path / "vocab.txt").write_bytes((folder / "vocab.txt").read_bytes())
    values = [ImageReward(str(place), SHAPE).score(PICTURES, PROMPTS)[0] for place in (folder, tmp_path)]
    np.testing.assert_array_equal(*values)


def test_hps_is_vit_h_14() -> None:
    import open_clip

    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    assert shapes["visual.proj"] == (1280, 1024) and shapes["text_projection"] == (1024, 1024)
    assert shapes["visual.conv1.weight"] == (1280, 3, 14, 14) and shapes["positional_embedding"] == (77, 1024)


# --- PickScore


@pytest.fixture(scope="module")
def clip_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reduced CLIPModel with its processor, as ``save_pretrained`` writes them; 77 places for tokens."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    from jobs.world.generator import word_tokenizer

    tokenizer = word_tokenizer(PROMPTS)
    tokenizer.model_max_length = 77
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    marks = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
             "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    config = CLIPConfig(
        text_config=small | marks | {"vocab_size": len(tokenizer), "max_position_embeddings": 77},
        vision_config=small | {"image_size": 28, "patch_size": 14},
        projection_dim=24,
    )
    torch.manual_seed(2)
    model = CLIPModel(config)
    random_weights(model, 2)
    model.logit_scale.data.fill_(4.6)
    folder = tmp_path_factory.mktemp("pick") / "pickscore"
    model.save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def pickscore_by_hand(folder: Path, images: list[Image.Image], prompts: list[str]) -> np.ndarray:
    """exp(logit_scale)·cosine out of the whole model's own forward pass, one pair at a time."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    values = []
    for image, prompt in zip(images, prompts, strict=True):
        seen = processor(images=image, return_tensors="pt")
        read = processor(text=prompt, truncation=True, max_length=77, return_tensors="pt")
        with torch.no_grad():
            values.append(model(**seen, **read).logits_per_image.item())
    return np.array(values)


def test_pickscore_is_clip_with_its_scale(clip_model: Path) -> None:
    prompts = [*PROMPTS[:2], " ".join(["fox"] * 100)]
    values, cut = PickScore(str(clip_model)).score(PICTURES, prompts)
    expected = pickscore_by_hand(clip_model, PICTURES, prompts)
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(values, expected, **EXACT | {"atol": 1e-4})
    assert cut.tolist() == [False, False, True]


# --- ImageReward

SHAPE = Shape(size=32, patch=16, width=24, depth=2, heads=2, text_width=32, text_depth=2, text_heads=4, words=60)


def published_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published file: BLIP's vision tower and BERT as their repositories name them."""
    w, t, patches = shape.width, shape.text_width, (shape.size // shape.patch) ** 2
    eye, text = "blip.visual_encoder.", "blip.text_encoder."
    found: dict[str, tuple[int, ...]] = {
        eye + "cls_token": (1, 1, w),
        eye + "pos_embed": (1, patches + 1, w),
        eye + "patch_embed.proj.weight": (w, 3, shape.patch, shape.patch),
        eye + "patch_embed.proj.bias": (w,),
        text + "embeddings.position_ids": (1, 512),
        text + "embeddings.word_embeddings.weight": (shape.words, t),
        text + "embeddings.position_embeddings.weight": (512, t),
        "blip.vision_proj.weight": (256, w),
        "blip.vision_proj.bias": (256,),
        "blip.text_proj.weight": (256, t),
        "blip.text_proj.bias": (256,),
    }

    def layer(name: str, out: int, into: int | None = None) -> None:
        found[name + ".weight"] = (out,) if into is None else (out, into)
        found[name + ".bias"] = (out,)

    for i in range(shape.depth):
        block = f"{eye}blocks.{i}."
        for part, out, into in (("norm1", w, None), ("attn.qkv", 3 * w, w), ("attn.proj", w, w), ("norm2", w, None),
                                ("mlp.fc1", 4 * w, w), ("mlp.fc2", w, 4 * w)):  # fmt: skip
            layer(block + part, out, into)
    layer(eye + "norm", w)
    layer(text + "embeddings.LayerNorm", t)
    for i in range(shape.text_depth):
        block = f"{text}encoder.layer.{i}."
        for attention, into in (("attention", t), ("crossattention", w)):
            layer(f"{block}{attention}.self.query", t, t)
            layer(f"{block}{attention}.self.key", t, into)
            layer(f"{block}{attention}.self.value", t, into)
            layer(f"{block}{attention}.output.dense", t, t)
            layer(f"{block}{attention}.output.LayerNorm", t)
        layer(block + "intermediate.dense", 4 * t, t)
        layer(block + "output.dense", t, 4 * t)
        layer(block + "output.LayerNorm", t)
    for name, out, into in (("0", 1024, t), ("2", 128, 1024), ("4", 64, 128), ("6", 16, 64), ("7", 1, 16)):
        layer(f"mlp.layers.{name}", out, into)
    return found


def test_every_published_tensor_of_image_reward_finds_its_place() -> None:
    with torch.device("meta"):
        network = Network(Shape())
        shapes = published_shapes(Shape())
        checkpoint = {name: torch.empty(shape) for name, shape in shapes.items()}
    check(network, checkpoint, "image-reward", UNUSED, published)  # none missing, none unknown, all shapes alike
    used = {published(name) for name in network.state_dict()}
    assert used | set(UNUSED) == set(checkpoint) and len(used) == len(network.state_dict()) == 620
    assert shapes["blip.visual_encoder.pos_embed"] == (1, 197, 1024)
    parameters = sum(p.numel() for name, p in checkpoint.items() if name in used)
    assert 440e6 < parameters < 450e6  # the published file holds 1.79 GB of float32


@pytest.fixture(scope="module")
def image_reward(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Random tensors under the published names, in a file with a BERT tokenizer beside it."""
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("reward")
    generator = torch.Generator().manual_seed(3)
    state = {}
    for name, shape in published_shapes(SHAPE).items():
        state[name] = torch.randn(shape, generator=generator) * (0.05 if name.startswith("mlp") else 0.3)
        if "norm" in name.lower() and name.endswith("weight"):
            state[name] += 1
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    state["mlp.layers.7.weight"] *= 40
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        state[f"blip.visual_encoder.{name}"] *= 0.01  # small enough for the first norm's epsilon to tell
    torch.save(state, folder / "ImageReward.pt")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    return folder, state


def reward_by_hand(state: dict[str, Tensor], pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """ImageReward from its description in plain tensor algebra, on the published names: [N]."""

    def dense(x: Tensor, name: str) -> Tensor:
        return linear(x, state[name + ".weight"], state[name + ".bias"])

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        return layer_norm(x, x.shape[-1:], state[name + ".weight"], state[name + ".bias"], eps)

    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, hide: Tensor | None = None) -> Tensor:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        weights = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if hide is not None:
            weights = weights.masked_fill(hide[:, None, None, :], float("-inf"))
        return (softmax(weights, -1) @ v).transpose(1, 2).flatten(2)

    eye = "blip.visual_encoder."
    patches = torch.nn.functional.conv2d(
        pixels, state[eye + "patch_embed.proj.weight"], state[eye + "patch_embed.proj.bias"], stride=SHAPE.patch
    )
    x = torch.cat([state[eye + "cls_token"].expand(len(pixels), 1, -1), patches.flatten(2).transpose(1, 2)], 1)
    x = x + state[eye + "pos_embed"]
    for i in range(SHAPE.depth):
        block = f"{eye}blocks.{i}."
        q, k, v = dense(norm(x, block + "norm1", 1e-6), block + "attn.qkv").chunk(3, -1)
        x = x + dense(attend(q, k, v, SHAPE.heads), block + "attn.proj")
        x = x + dense(gelu(dense(norm(x, block + "norm2", 1e-6), block + "mlp.fc1")), block + "mlp.fc2")
    seen = norm(x, eye + "norm", 1e-6)

    text = "blip.text_encoder."
    y = state[text + "embeddings.word_embeddings.weight"][ids]
    y = y + state[text + "embeddings.position_embeddings.weight"][: ids.shape[1]]
    y = norm(y, text + "embeddings.LayerNorm", 1e-12)
    for i in range(SHAPE.text_depth):
        block = f"{text}encoder.layer.{i}."
        for part, source, hide in (("attention", None, mask == 0), ("crossattention", seen, None)):
            other = y if source is None else source
            names = [f"{block}{part}.self.{each}" for each in ("query", "key", "value")]
            mixed = attend(dense(y, names[0]), dense(other, names[1]), dense(other, names[2]), SHAPE.text_heads, hide)
            y = norm(y + dense(mixed, f"{block}{part}.output.dense"), f"{block}{part}.output.LayerNorm", 1e-12)
        wide = gelu(dense(y, block + "intermediate.dense"))
        y = norm(y + dense(wide, block + "output.dense"), block + "output.LayerNorm", 1e-12)
    z = y[:, 0]
    for i in (0, 2, 4, 6, 7):
        z = dense(z, f"mlp.layers.{i}")
    return (z[:, 0] - 0.16717362830052426) / 1.0333394966054072


def test_image_reward_is_its_description(image_reward: tuple[Path, dict[str, Tensor]]) -> None:
    folder, state = image_reward
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    pixels, ids = [], []
    for image, prompt in zip(PICTURES, PROMPTS, strict=True):
        w, h = image.size
        scale = 32 / min(w, h)
        small = image.resize((max(32, int(w * scale)), max(32, int(h * scale))), Image.Resampling.BICUBIC)
        left, top = round((small.width - 32) / 2), round((small.height - 32) / 2)
        square = np.asarray(small.crop((left, top, left + 32, top + 32)), np.float64)
        pixels.append(((square / 255 - mean) / std).transpose(2, 0, 1))
        ids.append([2, *(5 + WORDS.index(word) for word in prompt.split()), 3])  # [CLS] … [SEP]
    padded = torch.tensor([each + [0] * (35 - len(each)) for each in ids])
    mask = torch.tensor([[1] * len(each) + [0] * (35 - len(each)) for each in ids])
    expected = reward_by_hand(state, torch.tensor(np.stack(pixels), dtype=torch.float32), padded, mask).numpy()
    values, cut = ImageReward(str(folder), SHAPE).score(PICTURES, PROMPTS)
    assert np.ptp(expected) > 0.1 and not cut.any()
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)


def test_image_reward_depends_on_image_and_prompt(image_reward: tuple[Path, dict[str, Tensor]]) -> None:
    judge = ImageReward(str(image_reward[0] / "ImageReward.pt"), SHAPE)
    values = judge.score([PICTURES[0], PICTURES[1], PICTURES[0]], [PROMPTS[0], PROMPTS[0], PROMPTS[1]])[0]
    assert len(np.unique(values.round(4))) == 3


# --- aesthetic


@pytest.mark.parametrize(("version", "path"), [("v1", V1), ("v2", V2)])
def test_the_true_aesthetic_heads_are_the_affine_map_of_their_layers(version: Any, path: Path) -> None:
    if not path.is_file():
        pytest.skip(f"{path.name} is not here")
    state = {k: v.double() for k, v in torch.load(path, weights_only=True, map_location="cpu").items()}
    matrix, shift = torch.eye(768, dtype=torch.float64), torch.zeros(768, dtype=torch.float64)
    for layer in [""] if version == "v1" else [f"layers.{i}." for i in (0, 2, 4, 6, 7)]:
        matrix, shift = state[layer + "weight"] @ matrix, state[layer + "weight"] @ shift + state[layer + "bias"]
    assert matrix.shape == (1, 768)
    generator = torch.Generator().manual_seed(0)
    features = normalize(torch.randn((50, 768), generator=generator, dtype=torch.float64), dim=1)
    expected = features @ matrix[0] + shift[0]
    np.testing.assert_allclose(Aesthetic(version, str(path)).of(features.float()), expected, rtol=1e-4)
    assert expected.std() > 0.1  # the features tell


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """An open_clip model whose features have 768 numbers, and a head of random weights beside it."""
    import open_clip

    from jobs.scorers.head import Head

    folder = tmp_path_factory.mktemp("aesthetic")
    config = SMALL_CLIP | {"embed_dim": 768, "quick_gelu": True}
    torch.manual_seed(4)
    model = open_clip.CLIP(**config).eval()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {"size": 28}}))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    head = Head()
    random_weights(head, 4)
    torch.save(head.state_dict(), folder / "head.pth")
    save_file(head.state_dict(), folder / "head.safetensors")
    return folder, model


@pytest.mark.parametrize("form", ["head.pth", "head.safetensors"])
def test_the_aesthetic_score_sees_the_unit_feature(tower: tuple[Path, Any], form: str) -> None:
    folder, model = tower
    state = torch.load(folder / "head.pth", weights_only=True)
    matrix, shift = torch.eye(768), torch.zeros(768)
    for i in (0, 2, 4, 6, 7):
        weight, bias = state[f"layers.{i}.weight"], state[f"layers.{i}.bias"]
        matrix, shift = weight @ matrix, weight @ shift + bias
    pixels = []
    for image in PICTURES:
        w, h = image.size
        scale = 28 / min(w, h)
        small = image.resize((int(w * scale), int(h * scale)), Image.Resampling.BICUBIC)
        left, top = round((small.width - 28) / 2), round((small.height - 28) / 2)
        pixels.append(framed(small.crop((left, top, left + 28, top + 28)), 28))
    with torch.no_grad():
        feature = model.encode_image(torch.tensor(np.stack(pixels), dtype=torch.float32))
    expected = (feature / feature.norm(dim=1, keepdim=True)) @ matrix[0] + shift[0]
    found = scorer(f"aesthetic-v2:{folder / form}")
    values, cut = found.score(PICTURES, PROMPTS)
    np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-5)
    assert values.shape == (3,) and not cut.any() and found.name == f"aesthetic-v2:{folder / form}"
    other = scorer(f"aesthetic-v2:{folder / form}").score(PICTURES, ["boat"] * 3)[0]
    np.testing.assert_array_equal(other, values)


def test_openai_weights_get_the_activation_that_they_were_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """open_clip warns and goes on with another GELU where the name does not say so: the numbers would be off."""
    import open_clip

    (tmp_path / "tiny-vit.json").write_text(json.dumps(SMALL_CLIP))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(5)
    right = open_clip.CLIP(**SMALL_CLIP, quick_gelu=True).eval()
    torch.save(right.state_dict(), tmp_path / "weights.pt")
    tag = {"url": "", "hf_hub": "", "quick_gelu": True}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-vit", {"openai": tag})
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(tmp_path / "weights.pt"))
    clip = Clip("tiny-vit/openai")
    mine = clip.images(PICTURES)
    pixels = torch.stack([clip.loaded[1](image) for image in PICTURES])
    with torch.no_grad():
        np.testing.assert_allclose(mine, normalize(right.encode_image(pixels), dim=1), atol=1e-6)
        wrong = open_clip.CLIP(**SMALL_CLIP).eval()
        wrong.load_state_dict(right.state_dict())
        assert abs(mine - normalize(wrong.encode_image(pixels), dim=1).numpy()).max() > 1e-4


# --- all of them


@pytest.fixture(params=["hps", "pickscore", "image-reward", "aesthetic", "open_clip"])
def judge(request: pytest.FixtureRequest) -> Callable[[list[Image.Image], list[str]], tuple[np.ndarray, np.ndarray]]:
    if request.param == "hps":
        return Hps(str(request.getfixturevalue("hps_file")), SMALL_CLIP).score
    if request.param == "pickscore":
        return PickScore(str(request.getfixturevalue("clip_model"))).score
    if request.param == "image-reward":
        return ImageReward(str(request.getfixturevalue("image_reward")[0]), SHAPE).score
    folder = request.getfixturevalue("tower")[0]
    if request.param == "aesthetic":
        return Aesthetic("v2", str(folder / "head.pth")).score
    return Clip(f"local-dir:{folder}").score


def test_a_batch_of_one_is_a_batch_of_many(judge: Any) -> None:
    images = [picture(40, 40), picture(90, 50, "L"), picture(30, 70, "RGBA"), picture(28, 28), picture(300, 200)]
    prompts = ["a red fox in the snow", "", "the blue house", "boat boat boat", "a red fox in the snow"]
    together, _ = judge(images, prompts)
    alone = np.concatenate([judge([image], [prompt])[0] for image, prompt in zip(images, prompts, strict=True)])
    assert together.shape == (5,) and together.dtype == np.float32 and np.isfinite(together).all()
    np.testing.assert_allclose(alone, together, rtol=1e-4, atol=1e-5)
    backwards = judge(images[::-1], prompts[::-1])[0][::-1]
    np.testing.assert_allclose(backwards, together, rtol=1e-4, atol=1e-5)


def test_grey_and_transparent_images_are_read_as_their_colours(judge: Any) -> None:
    for image in (picture(90, 50, "L"), picture(50, 90, "RGBA"), picture(40, 40, "P")):
        as_is, converted = judge([image], ["boat"])[0], judge([image.convert("RGB")], ["boat"])[0]
        np.testing.assert_array_equal(as_is, converted)


@pytest.mark.parametrize(("name", "limit"), [("hps", 77), ("pickscore", 77), ("image-reward", 35)])
def test_truncation_is_told_at_the_very_token(request: pytest.FixtureRequest, name: str, limit: int) -> None:
    """Two tokens are marks, so limit − 2 words fit, and one more does not."""
    if name == "hps":
        judge = Hps(str(request.getfixturevalue("hps_file")), SMALL_CLIP).score
    elif name == "pickscore":
        judge = PickScore(str(request.getfixturevalue("clip_model"))).score
    else:
        judge = ImageReward(str(request.getfixturevalue("image_reward")[0]), SHAPE).score
    counts = [0, limit - 3, limit - 2, limit - 1, limit, 20 * limit]
    texts = [" ".join(["fox"] * n) for n in counts]
    values, cut = judge([PICTURES[0]] * len(counts), texts)
    assert cut.tolist() == [n > limit - 2 for n in counts] and cut.dtype == bool
    assert values[-1] == pytest.approx(values[-2], abs=1e-5)  # what is cut is not read


def test_a_tokenizer_that_pads_with_other_than_zero_is_told_right() -> None:
    """SigLIP's: </s> ends and pads, and a text that just fits is whole."""

    def tokenize(texts: list[str], context_length: int = 8) -> Tensor:
        rows = [[*(len(word) + 1 for word in text.split())][: context_length - 1] for text in texts]
        return torch.tensor([row + [1] * (context_length - len(row)) for row in rows])

    texts = ["", "ab " * 3, "ab " * 7, "ab " * 8, "ab " * 500]
    assert tokens(tokenize, texts)[1].tolist() == [False, False, False, True, True]  # type: ignore[arg-type]


# --- what is refused, in one line


def lost(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name not in names}


def test_a_checkpoint_with_a_gap_is_refused(
    tmp_path: Path, small_clip: Any, image_reward: tuple[Path, dict[str, Tensor]], clip_model: Path
) -> None:
    gone = ["visual.proj", "ln_final.bias", "logit_scale", "visual.conv1.weight"]
    torch.save(lost(small_clip.state_dict(), *gone), tmp_path / "hps.pt")
    first = r"lacks 4 of \d+ tensors \(ln_final.bias, logit_scale, visual.conv1.weight, …\)"
    with pytest.raises(WinnowError, match=first):
        Hps(str(tmp_path / "hps.pt"), SMALL_CLIP).score(PICTURES, PROMPTS)

    torch.save(lost(image_reward[1], "blip.visual_encoder.norm.bias"), tmp_path / "ImageReward.pt")
    with pytest.raises(WinnowError, match=r"lacks 1 of \d+ tensors \(blip.visual_encoder.norm.bias\)"):
        _ = ImageReward(str(tmp_path / "ImageReward.pt"), SHAPE).network
    torch.save(image_reward[1] | {"blip.surprise": torch.zeros(1)}, tmp_path / "ImageReward.pt")
    with pytest.raises(WinnowError, match=r"does not know \(blip.surprise\)"):
        _ = ImageReward(str(tmp_path / "ImageReward.pt"), SHAPE).network
    torch.save(image_reward[1] | {"mlp.layers.7.bias": torch.zeros(2)}, tmp_path / "ImageReward.pt")
    with pytest.raises(WinnowError, match=r"mlp.layers.7.bias is \[2\], the model's \[1\]"):
        _ = ImageReward(str(tmp_path / "ImageReward.pt"), SHAPE).network

    from safetensors.torch import load_file

    state = load_file(clip_model / "model.safetensors")
    for path in clip_model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file(lost(state, "visual_projection.weight"), tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(WinnowError, match=r"pickscore.*lacks 1 of \d+ tensors \(visual_projection.weight\)"):
        PickScore(str(tmp_path)).score(PICTURES, PROMPTS)


@pytest.mark.parametrize("name", ["hps-v2.1", "image-reward", "aesthetic-v2", "aesthetic-v1", "pickscore"])
def test_a_path_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(WinnowError, match=rf"scorer '{name}:/no/such/place': no ") as said:
        scorer(f"{name}:/no/such/place")
    assert "\n" not in str(said.value)


def test_a_head_that_is_nowhere_to_be_downloaded_says_where_it_is() -> None:
    with pytest.raises(WinnowError, match=r"aesthetic-v1.*not on the Hub.*github.com/LAION-AI"):
        scorer("aesthetic-v1")


REPOSITORIES = {
    "hps-v2.1": "xswu/HPSv2",
    "image-reward": "THUDM/ImageReward",
    "pickscore": "yuvalkirstain/PickScore_v1",
    "aesthetic-v2": "trl-lib/ddpo-aesthetic-predictor",
}


@pytest.mark.parametrize("name", REPOSITORIES)
def test_the_published_weights_come_from_the_hub(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    asked = []

    def model_info(self: Any, repo: str, **_: Any) -> Any:
        asked.append(repo)
        raise RuntimeError("no network here")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    with pytest.raises(WinnowError, match=rf"scorer '{name}': the Hub cannot be reached \(no network here\)"):
        scorer(name)
    assert asked == [REPOSITORIES[name]]


@pytest.mark.parametrize(
    ("name", "near"),
    [("hps-v2", "hps-v2.1"), ("hps-v2.0:/x", "hps-v2.1"), ("pick-score", "pickscore"), ("imagereward", "image-reward")],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(WinnowError, match=rf"unknown; did you mean '{near}'\? there are .*aesthetic-v1.*pickscore"):
        scorer(name)


def test_a_scorer_keeps_its_name_and_the_digest_of_its_weights(hps_file: Path, tmp_path: Path) -> None:
    found = scorer(f"hps-v2.1:{hps_file}")
    assert found.name == f"hps-v2.1:{hps_file}" and len(found.revision) == 16
    (tmp_path / hps_file.name).write_bytes(hps_file.read_bytes() + b"x")
    assert scorer(f"hps-v2.1:{tmp_path}").revision != found.revision
    assert {"hps-v2.1", "pickscore", "image-reward", "aesthetic-v1", "aesthetic-v2"} <= set(SCORERS)
