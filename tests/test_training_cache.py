"""The trainer's cache: what it gives is what the encoders give, encoded once, whatever happens to its files."""

import hashlib
import io
import json
import math
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from conftest import WORDS, ForkServer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from jobs import digest, models
from jobs.families import family
from jobs.training import cache as caches
from jobs.training import packs
from jobs.training.buckets import Buckets
from jobs.training.cache import Cache, Example, build
from jobs.training.loader import Loader, batches
from schemas.errors import WinnowError


def picture(number: int, width: int = 32, height: int = 32) -> bytes:
    rng = np.random.default_rng(number)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(file, "png")
    return file.getvalue()


def examples(n: int = 21, width: int = 32, height: int = 32, first: int = 0) -> list[Example]:
    """Each with its own image; every text comes thrice."""
    words = [*dict.fromkeys(" ".join(WORDS).split())]
    return [
        Example(1000 + i, f"{words[i // 3 % 17]} {WORDS[i // 51 % 4]}", 0.5 * i, picture(i, width, height))
        for i in range(first, first + n)
    ]


def direct(pipe: Any, rows: list[Example], batch: int, picture: Callable[[Image.Image], Any] = np.asarray) -> Any:
    """Latents as the autoencoder itself gives them, ``batch`` images a call."""
    config, made = pipe.vae.config, []
    for start in range(0, len(rows), batch):
        images = [Image.open(io.BytesIO(row.file)).convert("RGB") for row in rows[start : start + batch]]
        pixels = torch.from_numpy(np.stack([np.asarray(picture(image)) for image in images])).permute(0, 3, 1, 2)
        with torch.no_grad():
            mean = pipe.vae.encode(pixels.float() / 127.5 - 1).latent_dist.mean
        made.append((mean - (config.shift_factor or 0)) * config.scaling_factor)
    return torch.cat(made)


def everything(cache: Cache) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    rows = np.arange(len(cache))
    return cache.latents(rows), cache.conditions(rows, np.zeros(len(rows), bool))


def same(one: Cache, other: Cache) -> bool:
    (x, told), (y, heard) = everything(one), everything(other)
    return torch.equal(x, y) and told.keys() == heard.keys() and all(torch.equal(told[k], heard[k]) for k in told)


@pytest.fixture
def sd(stable_diffusion: Path) -> Any:
    return models.load(str(stable_diffusion))


class Calls:
    """How many images and texts a pipeline's encoders were given."""

    def __init__(self, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images = self.texts = 0
        see, read = pipe.vae.encode, pipe.encode_prompt

        def encode(pixels: Any, *args: Any, **kwargs: Any) -> Any:
            self.images += len(pixels)
            return see(pixels, *args, **kwargs)

        def encode_prompt(texts: Any, *args: Any, **kwargs: Any) -> Any:
            self.texts += len(texts)
            return read(texts, *args, **kwargs)

        monkeypatch.setattr(pipe.vae, "encode", encode)
        monkeypatch.setattr(pipe, "encode_prompt", encode_prompt)

    def since(self) -> tuple[int, int]:
        """Images and texts since it was last asked."""
        found, self.images, self.texts = (self.images, self.texts), 0, 0
        return found


@pytest.mark.parametrize("kind", ["sd", *pipelines.BUILDERS, "embedded"])
def test_it_gives_what_the_encoders_give_and_encodes_once(
    kind: str, stable_diffusion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = {"sd": str(stable_diffusion), "embedded": "embedded"}.get(kind)
    pipe = models.load(folder or str(pipelines.build(kind, tmp_path / "model")))
    rows = examples(width=16, height=16) if kind == "embedded" else examples()
    calls = Calls(pipe, monkeypatch)
    cache = build(pipe, iter(rows), tmp_path / "cache")
    assert calls.since() == (21, 7 + 1)
    assert len(cache) == 21 and cache.sample_ids.tolist() == [row.sample_id for row in rows]
    assert cache.sample_ids.dtype == np.int64 and cache.weights.dtype == np.float32
    assert cache.weights.tolist() == [row.weight for row in rows] and not cache.bucket.any()

    latents, told = everything(cache)
    assert latents.dtype == torch.float32 and cache.shapes == [tuple(latents.shape[1:])]
    assert torch.equal(latents, direct(pipe, rows, 16))
    torch.testing.assert_close(latents, direct(pipe, rows, 1), atol=1e-5, rtol=1e-5)
    made_by, texts = family(pipe), list(dict.fromkeys(row.text for row in rows))
    with torch.no_grad():
        together, nothing = made_by.encode(pipe, texts), made_by.unconditional(pipe)
        alone = {row.text: made_by.encode(pipe, [row.text]) for row in rows}
    assert told.keys() == together.keys()
    for key in told:
        assert told[key].dtype == together[key].dtype
        assert torch.equal(told[key], together[key][[texts.index(row.text) for row in rows]])
        expected = torch.cat([alone[row.text][key] for row in rows])
        torch.testing.assert_close(told[key], expected, atol=1e-5, rtol=1e-4)
    some, dropped = np.array([5, 2, 2, 20]), np.array([False, True, False, True])
    mixed = cache.conditions(some, dropped)
    assert torch.equal(cache.latents(some), latents[some])
    for key in told:
        expected = [nothing[key][0] if gone else told[key][row] for row, gone in zip(some, dropped, strict=True)]
        assert torch.equal(mixed[key], torch.stack(expected))

    calls.since()
    assert same(build(pipe, rows, tmp_path / "cache"), cache)
    assert calls.since() == (0, 0)


def test_a_later_round_encodes_only_what_is_new(sd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(sd, monkeypatch)
    build(sd, examples(21), tmp_path)
    calls.since()
    more = [*examples(10, first=40), *examples(21), *examples(9, first=15), *examples(2, first=40)]
    cache = build(sd, more, tmp_path)
    # Of 40…49 all are new, of 15…23 the last three; texts hold for three rows: 13, 14, 15, 16 and 7.
    assert calls.since() == (10 + 3, 5)
    torch.testing.assert_close(everything(cache)[0], direct(sd, more, 1), atol=1e-5, rtol=1e-5)
    calls.since()
    # Twice in one build, most of them in a batch before.
    assert len(build(sd, [*examples(40, first=100), *examples(40, first=100)], tmp_path)) == 80
    assert calls.since() == (40, 14)
    assert len(cache) == 42 and torch.equal(cache.latents(np.array([0])), cache.latents(np.array([40])))


def test_rounds_share_and_other_encoders_do_not(
    stable_diffusion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, pipe = examples(5), models.load(str(stable_diffusion))
    build(pipe, rows, tmp_path / "cache")

    def encoded(change: Callable[[Any], None]) -> tuple[int, int]:
        """What a model costs that is ``pipe`` but for a change, as saved and loaded again."""
        changed = models.load(str(stable_diffusion))
        change(changed)
        changed.save_pretrained(tmp_path / "changed")
        again = models.load(str(tmp_path / "changed"))
        with monkeypatch.context() as patch:
            calls = Calls(again, patch)
            cache = build(again, rows, tmp_path / "cache")
            found = calls.since()
        torch.testing.assert_close(everything(cache)[0], direct(again, rows, 16), atol=1e-6, rtol=0)
        return found

    def nudge(p: torch.nn.Parameter) -> None:
        p.data.view(-1)[0] += 1e-3

    def words(p: Any) -> None:
        p.tokenizer.model_max_length = 12

    assert encoded(lambda p: p("a red fox", num_inference_steps=1, output_type="latent")) == (0, 0)  # used
    assert encoded(lambda p: nudge(p.unet.conv_out.weight)) == (0, 0)
    assert encoded(lambda p: nudge(p.vae.encoder.conv_in.weight)) == (5, 0)
    assert encoded(lambda p: p.vae.register_to_config(scaling_factor=0.2)) == (5, 0)
    assert encoded(lambda p: nudge(next(p.text_encoder.parameters()))) == (0, 3)
    assert encoded(words) == (0, 3)
    assert encoded(lambda p: None) == (0, 0)


def test_a_slow_tokenizer_is_known_by_its_merges(tmp_path: Path) -> None:
    from transformers import CTRLTokenizer

    def words(name: str, *merges: str) -> Any:
        folder = tmp_path / name
        folder.mkdir()
        vocabulary = {"<unk>": 0, "a": 1, "b": 2, "c": 3, "ab": 4, "bc": 5}
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
        return CTRLTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))

    one, same, other = words("one", "a b", "b c"), words("same", "a b", "b c"), words("other", "b c", "a b")
    assert not hasattr(one, "backend_tokenizer") and one.get_vocab() == other.get_vocab()
    assert digest.tokenizer(one) == digest.tokenizer(same) != digest.tokenizer(other)


def test_the_precision_of_the_encoders_is_theirs(sd: Any, tmp_path: Path) -> None:
    fine = build(sd, examples(5), tmp_path)
    sd.to(torch.bfloat16)
    coarse = build(sd, examples(5), tmp_path)
    assert coarse.conditions(np.array([0]), np.array([False]))["prompt_embeds"].dtype == torch.bfloat16
    # The autoencoder's weights were rounded: other numbers, though again in float32.
    assert coarse.latents(np.array([0])).dtype == torch.float32
    assert not torch.equal(coarse.latents(np.array([0])), fine.latents(np.array([0])))


def every_pack(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.safetensors") if "staging" not in path.parts)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pack for every call of an encoder."""
    monkeypatch.setattr(packs, "PACK_BYTES", 1)


def test_a_pack_is_named_by_its_bytes_and_holds_its_keys(sd: Any, tmp_path: Path, small: None) -> None:
    rows = examples(21)
    cache = build(sd, rows, tmp_path)
    found = every_pack(tmp_path)
    assert len(found) == 2 + 2 and not list((tmp_path / "staging").iterdir())
    latents = {}
    for path in found:
        assert path.stem == hashlib.sha256(path.read_bytes()).hexdigest()
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"kind": path.parent.relative_to(tmp_path).as_posix()}
        tensors = load_file(path)
        if "latents" in tensors:
            latents |= {bytes(key.tolist()): x for key, x in zip(tensors["keys"], tensors["latents"], strict=True)}
    assert len(latents) == 21
    for number, row in enumerate(rows):
        key = hashlib.sha256(row.file).digest()
        assert torch.equal(latents[key], cache.latents(np.array([number]))[0])


def damages(size: int) -> dict[str, Callable[[bytearray], Any]]:
    def flip(at: int) -> Callable[[bytearray], Any]:
        def change(whole: bytearray) -> bytearray:
            whole[at] ^= 4
            return whole

        return change

    places = [0, 7, 9, 30, 60, 150, 300, size // 3, size // 2, size - 700, size - 1]
    cuts = [0, 7, 100, size // 2, size - 1]
    made: dict[str, Callable[[bytearray], Any]] = {f"flip {at}": flip(at) for at in places}
    made |= {f"cut at {at}": lambda whole, at=at: whole[:at] for at in cuts}
    return made | {"longer": lambda whole: whole + b"x", "zeros": lambda whole: bytes(len(whole))}


@pytest.mark.parametrize("which", ["latents", "conditions"])
def test_damage_is_named_and_mended(
    sd: Any, tmp_path: Path, small: None, which: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    rows = examples(21)
    expected = build(sd, rows, tmp_path)
    calls = Calls(sd, monkeypatch)
    first, last = (path for path in every_pack(tmp_path) if which in str(path))
    whole, names = first.read_bytes(), every_pack(tmp_path)
    held = len(load_file(first)["keys"])
    for what, change in damages(len(whole)).items():
        first.unlink()  # mapped by `expected`: its bytes are not to change
        first.write_bytes(change(bytearray(whole)))
        capsys.readouterr()
        again = build(sd, rows, tmp_path)
        said = capsys.readouterr().err
        assert same(again, expected), what
        assert calls.since() == ((held, 0) if which == "latents" else (0, held)), what
        assert first.read_bytes() == whole and every_pack(tmp_path) == names, what
        assert said.count("\n") == 1 and str(first) in said and "damaged" in said and str(last) not in said, what


def test_a_damaged_pack_that_none_of_its_keys_leads_to_gives_way(sd: Any, tmp_path: Path, capsys: Any) -> None:
    """With its only key changed nobody looks into the pack, and the new one of the same rows has its name."""
    rows = examples(1)
    expected = build(sd, rows, tmp_path)
    (path,) = (path for path in every_pack(tmp_path) if "latents" in str(path))
    whole = path.read_bytes()
    at = whole.index(hashlib.sha256(rows[0].file).digest())
    path.unlink()
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert same(build(sd, rows, tmp_path), expected) and path.read_bytes() == whole
    assert f"{path}: damaged" in capsys.readouterr().err


def test_a_pack_of_another_kind_or_no_pack_is_not_read(
    sd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    rows = examples(5)
    expected = build(sd, rows, tmp_path)
    (path,) = (path for path in every_pack(tmp_path) if "latents" in str(path))
    moved = path.parent.with_name("64x64-float32") / path.name
    moved.parent.mkdir()
    moved.write_bytes(path.read_bytes())
    (path.parent / "notes.txt").write_text("mine")
    calls = Calls(sd, monkeypatch)
    larger = build(sd, rows, tmp_path, size=64)
    assert f"{moved}: damaged (of another kind)" in capsys.readouterr().err
    assert calls.since() == (5, 0) and larger.shapes == [(4, 32, 32)]
    assert same(build(sd, rows, tmp_path), expected) and calls.since() == (0, 0)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_no_change_of_any_bit_gives_another_number(data: Any) -> None:
    numbers = [*range(40)]
    keys = [hashlib.sha256(bytes([number])).digest() for number in numbers]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(packs, "say", lambda line: None)
        patch.setattr(packs, "PACK_BYTES", 1)
        for _ in range(3):
            kept = packs.Packs(Path(folder), "numbers", lambda items: {"x": torch.tensor(items).view(-1, 1)})
            for key, number in zip(keys, numbers, strict=True):
                kept.want(key, number)
            kept.settle()
            assert kept.take(kept.find(b"".join(keys)))["x"].flatten().tolist() == numbers
            assert len(every_pack(Path(folder))) == 3
            path = data.draw(st.sampled_from(every_pack(Path(folder))))
            whole = bytearray(path.read_bytes())
            bit = data.draw(st.integers(0, 8 * len(whole) - 1))
            whole[bit // 8] ^= 1 << bit % 8
            path.unlink()
            path.write_bytes(whole[: data.draw(st.sampled_from([len(whole), len(whole) - 1, bit // 8]))])


def test_keys_that_end_in_zeros_are_told_apart(tmp_path: Path) -> None:
    """NumPy's strings do not show zeros at their end."""
    keys = [bytes(32), b"a" + bytes(31), b"a" + bytes(30) + b"a", bytes(31) + b"a", b"\xff" * 32]
    encode = lambda items: {"x": torch.tensor(items)}  # noqa: E731
    for _ in range(2):
        kept = packs.Packs(tmp_path, "numbers", encode)
        for number, key in enumerate(keys):
            kept.want(key, number)
        kept.settle()
        kept.write()
        assert kept.take(kept.find(b"".join(keys)))["x"].tolist() == list(range(5))
        missing = kept.find(b"\xfe" * 32 + b"b" + bytes(31) + b"\xff" * 32)
        assert missing[:2].tolist() == [[-1, -1]] * 2 and missing[2].tolist() == [0, 4]
        encode = lambda items: pytest.fail("nothing is new")  # noqa: E731


def test_an_old_pack_is_written_before_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(packs.time, "monotonic", lambda: now[0])
    kept = packs.Packs(tmp_path, "numbers", lambda items: {"x": torch.tensor(items)})

    def want(first: int, last: int) -> int:
        for number in range(first, last):
            kept.want(hashlib.sha256(str(number).encode()).digest(), number)
        return len(every_pack(tmp_path))

    assert want(0, 64) == 0
    now[0] += 59
    assert want(64, 80) == 0
    now[0] += 2
    assert want(80, 95) == 0 and want(95, 96) == 1
    now[0] += 59  # counted anew
    assert want(96, 112) == 1
    now[0] += 61
    kept.keep()
    assert len(every_pack(tmp_path)) == 2


class File(bytes):
    """An image file that is counted while anybody holds it."""

    alive = most = 0

    def __new__(cls, data: bytes) -> "File":
        File.alive += 1
        File.most = max(File.most, File.alive)
        return super().__new__(cls, data)

    def __del__(self) -> None:
        File.alive -= 1


@pytest.fixture
def counted() -> Iterator[type[File]]:
    File.alive = File.most = 0
    yield File


def test_rows_stream_through(tmp_path: Path, counted: type[File]) -> None:
    data = [picture(i, 16, 16) for i in range(20)]
    rows = (Example(i, WORDS[i % 4], 1.0, counted(data[i % 20] + i.to_bytes(4, "big"))) for i in range(300))
    cache = build(models.load("embedded"), rows, tmp_path)
    assert len(cache) == 300 and counted.alive == 0
    assert counted.most <= packs.TOGETHER + 2
    # The same pixels from 15 different files.
    latents = cache.latents(np.arange(300))
    torch.testing.assert_close(latents[:20], latents[280:], atol=1e-5, rtol=1e-5)


def test_many_buckets_hold_few_files(
    sd: Any, tmp_path: Path, counted: type[File], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caches, "WAITING", 20)
    monkeypatch.setattr(caches, "TIDY", 8)
    monkeypatch.setattr(caches, "PACK_BYTES", 5_000)
    sizes = [(16 + 2 * (i % 7), 16 + 2 * (i % 5)) for i in range(120)]
    rows = [(i, picture(i, *size)) for i, size in enumerate(sizes)]
    cache = build(sd, (Example(i, WORDS[i % 4], 1.0, counted(file)) for i, file in rows), tmp_path, None, Buckets())
    assert counted.most <= 20 + 8 + 2 and len(cache.shapes) == 35
    for i, (width, height) in enumerate(sizes):
        assert cache.shapes[cache.bucket[i]] == (4, height // 2, width // 2)
    for i in range(0, 120, 17):
        expected = direct(sd, [Example(i, "", 1.0, rows[i][1])], 1)
        torch.testing.assert_close(cache.latents(np.array([i])), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="too many values"):
        cache.latents(np.array([0, 1]))


def test_buckets_take_images_of_any_shape(sd: Any, tmp_path: Path, capsys: Any) -> None:
    """Area 64², step 16: by hand 64×64, 48×80, 80×48; 32×128 is beyond the ratio."""
    sizes = [(64, 64), (200, 180), (60, 100), (400, 100), (100, 400), (40, 60), (30, 30)]
    expected = [(64, 64), (64, 64), (48, 80), (80, 48), (48, 80), (48, 80), (64, 64)]
    rows = [Example(i, WORDS[i % 4], 1.0, picture(i, *size)) for i, size in enumerate(sizes)]
    cache = build(sd, rows, tmp_path, 64, Buckets(step=16, ratio=2.0))
    assert [cache.shapes[b] for b in cache.bucket] == [(4, h // 2, w // 2) for w, h in expected]
    assert "2 of 7 images are smaller" in capsys.readouterr().err
    for i, (width, height) in enumerate(expected):
        w, h = sizes[i]
        scale = max(width / w, height / h)
        left, top = math.floor((w - width / scale) / 2), math.floor((h - height / scale) / 2)
        box = left, top, min(w, left + width / scale), min(h, top + height / scale)
        cut = lambda image, box=box, size=(width, height): image.resize(size, Image.Resampling.LANCZOS, box)  # noqa: E731
        torch.testing.assert_close(cache.latents(np.array([i])), direct(sd, [rows[i]], 1, cut), atol=0.02, rtol=0)
    with pytest.raises(WinnowError, match=r"train\.size: 8 pixels, less than a bucket's step of 16; set it to 16"):
        build(sd, rows, tmp_path, 8, Buckets(step=16))


def test_a_loader_over_buckets_gives_each_row_its_own(sd: Any, tmp_path: Path) -> None:
    sizes = [(64, 64), (48, 80), (80, 48)]
    rows = [Example(i, WORDS[i % 4], 1.0, picture(i, *sizes[i % 3])) for i in range(11)]
    cache = build(sd, rows, tmp_path, 64, Buckets(step=16))
    alone = {i: direct(sd, [rows[i]], 1)[0] for i in range(11)}
    told = [cache.conditions(np.array([i]), np.array([False]))["prompt_embeds"][0] for i in range(11)]
    nothing = cache.conditions(np.array([0]), np.array([True]))["prompt_embeds"][0]
    seen = set()
    drawn = batches(cache.bucket, 4, 5)
    with Loader((rows, cache.latents(rows), cache.conditions(rows, rows % 4 == 1)) for rows in drawn) as loader:
        for _, (rows, latents, condition) in zip(range(12), loader, strict=False):
            assert latents.shape[1:] == cache.shapes[cache.bucket[rows[0]]]
            for row, x, words in zip(rows, latents, condition["prompt_embeds"], strict=True):
                torch.testing.assert_close(x, alone[row], atol=1e-5, rtol=1e-5)
                assert torch.equal(words, nothing if row % 4 == 1 else told[row])
                seen.add(int(row))
    assert len(seen) == 11


def test_sizes_that_cannot_be_trained_are_refused(sd: Any, tmp_path: Path) -> None:
    several = [*examples(3), *examples(1, 32, 34)]
    with pytest.raises(WinnowError, match=r"train: the images have several sizes; set train\.size"):
        build(sd, several, tmp_path)
    assert len(build(sd, several, tmp_path, 32)) == 4
    flux = models.load(str(pipelines.build("flux", tmp_path / "flux")))
    said = r"images of 32×34 pixels do not fit this model; it takes multiples of 4, set train\.size to one"
    for buckets in (None, Buckets()):
        with pytest.raises(WinnowError, match=said):
            build(flux, examples(2, 32, 34), tmp_path, None, buckets)
    with pytest.raises(WinnowError, match="images of 1×1 pixels do not fit"):
        build(sd, examples(1, 1, 1), tmp_path)


@pytest.mark.parametrize("file", [b"", b"no image", picture(0)[:40], picture(0)[:1500]])
def test_an_image_that_cannot_be_read_is_named(sd: Any, tmp_path: Path, file: bytes) -> None:
    rows = [*examples(17), Example(77, "a red fox", 1.0, file)]
    with pytest.raises(WinnowError, match="sample 77: not a readable image"):
        build(sd, rows, tmp_path)
    assert len(build(sd, rows[:17], tmp_path)) == 17


def test_no_rows_and_odd_texts(sd: Any, tmp_path: Path) -> None:
    cache = build(sd, [], tmp_path)
    assert len(cache) == 0 and cache.shapes == [] and cache.bucket.shape == (0,)
    texts = ["", " ", "\0", "ä ö 漢字 🦊", "a red fox " * 50]
    cache = build(sd, [Example(-(2**63), text, 1.0, picture(0)) for text in texts], tmp_path)
    told = cache.conditions(np.arange(5), np.zeros(5, bool))["prompt_embeds"]
    with torch.no_grad():
        expected = torch.cat([family(sd).encode(sd, [text])["prompt_embeds"] for text in texts])
    torch.testing.assert_close(told, expected, atol=1e-5, rtol=1e-4)
    assert cache.sample_ids.tolist() == [-(2**63)] * 5


def test_reading_leaves_the_packs_as_they_are(sd: Any, tmp_path: Path) -> None:
    cache = build(sd, examples(3), tmp_path)
    before = [path.read_bytes() for path in every_pack(tmp_path)]
    cache.latents(np.arange(3)).zero_()
    cache.conditions(np.arange(3), np.ones(3, bool))["prompt_embeds"].zero_()
    assert [path.read_bytes() for path in every_pack(tmp_path)] == before
    assert cache.latents(np.arange(3)).abs().min() > 0


def build_limited(model: str, folder: str) -> None:
    """A process that may write no file above 70 kB, as on a full disk: the latents of 16 rows, not of 44."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, 70_000))
    rows = [*examples(16), *examples(3)]
    build(models.load(model), rows, Path(folder))
    build(models.load(model), examples(60), Path(folder))


def test_a_full_disk_says_so_and_loses_nothing(stable_diffusion: Path, forks: ForkServer, tmp_path: Path) -> None:
    log, folder = tmp_path / "log", tmp_path / "cache"
    forks.start("test_training_cache:build_limited", str(stable_diffusion), str(folder), log=log)
    assert forks.wait() == 1
    last = log.read_text().splitlines()[-1]
    assert "WinnowError" in last and "MiB left; free space" in last and "latents-" in last, last
    assert len(every_pack(folder)) == 3 and not list((folder / "staging").iterdir())
    again = build(models.load(str(stable_diffusion)), examples(60), folder)
    assert same(again, build(models.load(str(stable_diffusion)), examples(60), tmp_path / "whole"))


def build_apart(model: str, folder: str) -> None:
    """What the killed process runs: a pack for every call of an encoder."""
    packs.PACK_BYTES = 1
    build(models.load(model), examples(100), Path(folder))


def test_kill_9_keeps_what_was_finished(
    stable_diffusion: Path, forks: ForkServer, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, call, log = models.load(str(stable_diffusion)), "test_training_cache:build_apart", tmp_path / "log"
    expected = build(pipe, examples(100), tmp_path / "whole")
    names = [path.relative_to(tmp_path / "whole") for path in every_pack(tmp_path / "whole")]
    assert len(names) == 7 + 3 + 1  # of 100 images, of 34 texts, of no text
    kills = kept = 0
    for wanted in (1, 2, 4, 5, 7):  # killed when so many packs are there
        child = forks.start(call, str(stable_diffusion), str(tmp_path / "cache"), log=log)
        while len(found := every_pack(tmp_path / "cache")) < wanted:
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        kills += forks.wait() == -9
        found = every_pack(tmp_path / "cache")
        assert len(found) >= kept and {path.relative_to(tmp_path / "cache") for path in found} <= {*names}
        kept = len(found)
    assert kills >= 3 and kept >= 7
    calls = Calls(pipe, monkeypatch)
    resumed = build(pipe, examples(100), tmp_path / "cache")
    images, texts = calls.since()
    assert images <= 100 - 16 * 4 and texts <= 35
    assert same(resumed, expected)
    assert [path.relative_to(tmp_path / "cache") for path in every_pack(tmp_path / "cache")] == names


def test_kill_9_at_any_file_operation(forks: ForkServer, tmp_path: Path) -> None:
    log, events = tmp_path / "log", 0
    while True:
        events += 1
        folder = tmp_path / f"cache {events}"
        forks.start("test_training_cache:write_apart", str(folder), str(events), log=log)
        status = forks.wait()
        finished = every_pack(folder)
        for path in finished:
            assert path.stem == hashlib.sha256(path.read_bytes()).hexdigest()
        write(folder)  # goes on, and gives the same
        assert [path.name for path in every_pack(folder)] == [path.name for path in every_pack(tmp_path / "cache 1")]
        if status == 0:
            break
        assert status == -9, log.read_text()
    assert events > 10 and len(finished) == 2


def write(folder: Path) -> None:
    """Two packs of one number each."""
    kept = packs.Packs(folder, "numbers", lambda items: {"x": torch.tensor(items)})
    for number in range(2):
        kept.want(hashlib.sha256(bytes([number])).digest(), number)
        kept.settle()
        kept.write()


def write_apart(folder: str, events: str) -> None:
    """Killed at that many file operations."""
    left = int(events)

    def count(event: str, args: Any) -> None:
        nonlocal left
        if event in ("open", "os.link", "os.remove", "os.mkdir", "os.rename"):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    write(Path(folder))


def test_two_processes_build_at_once(stable_diffusion: Path, forks: ForkServer, tmp_path: Path, small: None) -> None:
    pipe, log = models.load(str(stable_diffusion)), tmp_path / "log"
    expected = build(pipe, examples(100), tmp_path / "whole")
    forks.start("test_training_cache:build_apart", str(stable_diffusion), str(tmp_path / "cache"), log=log)
    mine = build(pipe, examples(100), tmp_path / "cache")
    assert forks.wait() == 0, log.read_text()
    assert same(mine, expected) and same(build(pipe, examples(100), tmp_path / "cache"), expected)
    assert len(every_pack(tmp_path / "cache")) == len(every_pack(tmp_path / "whole"))
    assert "damaged" not in log.read_text()
