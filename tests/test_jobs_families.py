"""Families: what Winnow tells each kind of model is what the model's own pipeline tells it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from conftest import WORDS
from safetensors.torch import load_file, save_file

from jobs import lora, models
from jobs.families import FAMILIES, TOGETHER, Conditions, family
from jobs.generate import Generate, Sampler
from jobs.train import Train
from jobs.training.cache import Example, build
from jobs.training.loop import fine_tune
from schemas.errors import WinnowError

KINDS = ["sd", *pipelines.BUILDERS]


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, stable_diffusion: Path) -> Path:
    if request.param == "sd":
        return stable_diffusion
    return pipelines.build(request.param, tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture
def pipe(folder: Path) -> Any:
    return models.load(str(folder))


def told(pipe: Any, guidance: float, **how: Any) -> list[tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]]:
    """What the pipeline's own call, given texts, tells its network, and the answers."""
    calls = []

    def keep(_: Any, args: Any, kwargs: Any, answer: Any) -> None:
        calls.append((args, kwargs, answer[0] if isinstance(answer, tuple) else answer.sample))

    network = family(pipe).model(pipe)
    handle = network.register_forward_hook(keep, with_kwargs=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    how = {"num_inference_steps": 2, "width": 32, "height": 32, "output_type": "np"} | how
    pipe(WORDS[:2], guidance_scale=guidance, generator=generators, **how)
    handle.remove()
    return calls


def test_predict_tells_the_network_what_the_pipeline_does(pipe: Any) -> None:
    for args, kwargs, answer in told(pipe, 1.0):
        noisy = kwargs.get("hidden_states", args[0] if args else None)
        t = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        if "Flux" in type(pipe).__name__:
            noisy, answer = (pipe._unpack_latents(x, 32, 32, pipe.vae_scale_factor) for x in (noisy, answer))
            kwargs["guidance"].fill_(1.0)  # what training tells it
            t = 1000 * t
        made = family(pipe).predict(pipe, noisy, t.expand(len(noisy)), Conditions(pipe)(list(WORDS[:2])))
        assert made.shape == noisy.shape
        torch.testing.assert_close(made, answer, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sampling_with_conditions_is_sampling_with_texts(pipe: Any, guidance: float) -> None:
    how = {"num_inference_steps": 3, "guidance_scale": guidance, "width": 32, "height": 32, "output_type": "np"}
    expected = pipe(WORDS[:3], generator=[torch.Generator().manual_seed(seed) for seed in (5, 6, 7)], **how).images
    draw = Sampler(pipe, Generate(steps=3, guidance=guidance, width=32, height=32))
    np.testing.assert_allclose(draw(WORDS[:3], [5, 6, 7]), expected, atol=2e-4)
    one = draw([WORDS[1]], [6])
    np.testing.assert_allclose(one[0], expected[1], atol=2e-4)


@pytest.fixture
def asked(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The texts of every call of the pipeline's encoders."""
    encode, calls = pipe.encode_prompt, []

    def keep(texts: list[str], *args: Any, **kwargs: Any) -> Any:
        calls.append(list(texts))
        return encode(texts, *args, **kwargs)

    monkeypatch.setattr(pipe, "encode_prompt", keep)
    return calls


def test_each_text_is_encoded_once(pipe: Any, asked: list[list[str]]) -> None:
    conditions = Conditions(pipe)
    first = conditions([WORDS[0], WORDS[1], WORDS[0]])
    again = conditions([WORDS[1]])
    assert sorted(asked) == sorted([text] for text in WORDS[:2])
    for key in first:
        assert torch.equal(first[key][0], first[key][2]) and torch.equal(first[key][1], again[key][0])
        assert not torch.equal(first[key][0], first[key][1])


def test_texts_told_beforehand_are_encoded_together_wherever_one_begins(pipe: Any, asked: list[list[str]]) -> None:
    texts = [f"{first} {second}" for first in WORDS[0].split() for second in " ".join(WORDS).split()][
        : 2 * TOGETHER + 3
    ]
    texts = [*dict.fromkeys(texts)]
    batches = [texts[start : start + TOGETHER] for start in range(0, len(texts), TOGETHER)]
    assert len(batches) >= 2
    whole = Conditions(pipe, [*texts, *texts])
    every = whole([*texts, None])
    assert asked[: len(batches)] == batches and len(asked) == len(batches) + 1
    alone = Conditions(pipe)(texts)
    later = Conditions(pipe, texts, forget=True)
    last = later([texts[-1], texts[0]])
    for key in every:
        torch.testing.assert_close(every[key][:-1], alone[key], atol=1e-5, rtol=1e-4)
        assert torch.equal(last[key], every[key][[-2, 0]])
    assert set(later.known) == {*batches[-1], *batches[0]}
    asked.clear()
    later([texts[0]])
    later([texts[-1]])
    assert asked == [batches[-1]] and set(later.known) == set(batches[-1])


def examples() -> list[Any]:
    import io

    from PIL import Image

    rng = np.random.default_rng(5)
    made = []
    for i in range(5):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(file, "png")
        made.append(Example(i, WORDS[i % 2], [1.0, 0.5, 2.0, 1.0, 0.0][i], file.getvalue()))
    return made


def trained(folder: Path, tmp_path: Path, **how: Any) -> Any:
    settings = Train(**({"steps": 3, "batch": 4, "lr": 1e-3, "checkpoint": 0, "prompt_dropout": 0.3} | how))
    pipe = models.load(str(folder))
    if settings.method == "lora":
        lora.attach(pipe, settings.rank, 3)
    fine_tune(pipe, build(pipe, examples(), tmp_path / "cache"), settings, 7, tmp_path / "p.safetensors")
    return pipe


def difference(one: Any, other: Any) -> float:
    pairs = zip(family(one).model(one).parameters(), family(other).model(other).parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def test_micro_batches_and_checkpointing_change_memory_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    whole = trained(folder, tmp_path, method="full", lr=1e-4)
    parts = trained(folder, tmp_path, method="full", lr=1e-4, micro_batch=3, checkpointing=True)
    assert difference(whole, models.load(str(folder))) > 5e-5
    # Adam divides by the gradient's size, so a rounding error in a gradient near 0 shows as a share of lr.
    apart = zip(family(whole).model(whole).parameters(), family(parts).model(parts).parameters(), strict=True)
    moved = torch.cat([(a - b).detach().abs().flatten() for a, b in apart])
    assert moved.quantile(0.99) < 1e-6 and moved.max() < 3e-4


def test_a_lora_is_small_is_kept_and_goes_on(folder: Path, tmp_path: Path) -> None:
    pipe = trained(folder, tmp_path, method="lora", rank=2, lr=1e-2)
    network = family(pipe).model(pipe)
    names = [name for name, p in network.named_parameters() if p.requires_grad]
    assert names and all("lora" in name and "attn" in name for name in names)
    frozen = models.load(str(folder))
    base = dict(family(frozen).model(frozen).named_parameters())
    for name, p in network.named_parameters():
        if not p.requires_grad:
            assert torch.equal(p, base[name.replace(".base_layer", "")]), name

    kept = tmp_path / "kept"
    kept.mkdir()
    lora.save(pipe, kept, lora.Base(str(folder), models.revision(str(folder)), 2))
    assert {path.name for path in kept.iterdir()} == {lora.BASE, lora.WEIGHTS}
    assert models.layers(str(kept)) == (str(folder), kept)
    settings = Generate(steps=2, guidance=1.0, width=32, height=32)
    mine = Sampler(pipe, settings)(WORDS[:2], [1, 2])
    again = Sampler(models.load(str(kept)), settings)(WORDS[:2], [1, 2])
    np.testing.assert_allclose(again, mine, atol=1e-6)
    plain = Sampler(frozen, settings)(WORDS[:2], [1, 2])
    assert np.abs(plain - mine).max() > 1e-4

    # The next round goes on from these very numbers.
    more = models.load(str(folder))
    lora.attach(more, 2, 9, kept)
    layers = {name: p for name, p in family(more).model(more).named_parameters() if p.requires_grad}
    assert sorted(layers) == sorted(names)
    assert all(torch.equal(p, dict(network.named_parameters())[name]) for name, p in layers.items())
    with pytest.raises(WinnowError, match=r"train\.rank is 4, but the round starts from a LoRA of rank 2"):
        lora.attach(models.load(str(folder)), 4, 9, kept)


@pytest.mark.parametrize(
    ("damage", "said"),
    [("cut", "cannot be taken up"), ("missing", "cannot be taken up"), ("half", "or are missing, such as"),
     ("rank", "cannot be taken up"), ("model", r"base\.json: cannot be read")],
)  # fmt: skip
def test_a_damaged_lora_is_not_gone_on_from(stable_diffusion: Path, tmp_path: Path, damage: str, said: str) -> None:
    pipe = models.load(str(stable_diffusion))
    lora.attach(pipe, 2, 1)
    lora.save(pipe, tmp_path, lora.Base(str(stable_diffusion), models.revision(str(stable_diffusion)), 2))
    weights, base = tmp_path / lora.WEIGHTS, json.loads((tmp_path / lora.BASE).read_text())
    held = load_file(weights)
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "missing":
        weights.unlink()
    elif damage == "half":
        save_file({name: held[name] for name in sorted(held)[::2]}, weights)
    elif damage == "rank":
        save_file({name: torch.cat([t, t]) if t.shape[0] == 2 else torch.cat([t, t], 1) for name, t in held.items()},
                  weights)  # fmt: skip
    else:
        (tmp_path / lora.BASE).write_text(json.dumps(base | {"model": 3}))
    with pytest.raises(WinnowError, match=said):
        lora.attach(models.load(str(stable_diffusion)), 2, 1, tmp_path)


def test_a_fresh_lora_changes_nothing(pipe: Any) -> None:
    settings = Generate(steps=2, guidance=1.0, width=32, height=32)
    before = Sampler(pipe, settings)(WORDS[:2], [1, 2])
    lora.attach(pipe, 4, 1)
    np.testing.assert_array_equal(Sampler(pipe, settings)(WORDS[:2], [1, 2]), before)


def test_a_lora_of_another_base_is_refused(stable_diffusion: Path, tmp_path: Path) -> None:
    (tmp_path / lora.BASE).write_text(f'{{"model": "{stable_diffusion}", "revision": "0123", "rank": 2}}')
    with pytest.raises(WinnowError, match=r"trained on revision 0123 of .*restore that revision"):
        models.load(str(tmp_path))
    (tmp_path / lora.BASE).write_text("{")
    with pytest.raises(WinnowError, match=r"base\.json: cannot be read"):
        models.load(str(tmp_path))


def test_an_unknown_family_lists_those_that_there_are() -> None:
    class KandinskyPipeline:
        pass

    with pytest.raises(WinnowError, match="a KandinskyPipeline is not of a family") as caught:
        family(KandinskyPipeline())
    assert all(name in str(caught.value) for name in FAMILIES)


def test_a_memory_too_small_is_met_with_halves(
    stable_diffusion: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pipeline says it is out of memory for more than two images; the images are what they were."""
    pipe = models.load(str(stable_diffusion))
    texts, seeds, settings = [WORDS[0]] * 7, list(range(7)), Generate(steps=2, guidance=1.0)
    expected = Sampler(pipe, settings)(texts, seeds)
    draw, sizes = Sampler(pipe, settings), []
    inner, room = draw._denoise, 2

    def small(texts: list[str], seeds: list[int]) -> torch.Tensor:
        sizes.append(len(texts))
        if len(texts) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nMore.")
        return inner(texts, seeds)

    monkeypatch.setattr(draw, "_denoise", small)
    np.testing.assert_allclose(draw(texts, seeds), expected, atol=1e-5)
    assert sizes == [7, 4, 2, 2, 2, 1] and draw.halves.fits == 2
    assert "7 images at once do not fit into the memory; going on with 4" in capsys.readouterr().err
    sizes.clear()
    draw(texts[:4], seeds[:4])
    assert sizes == [2, 2]
    room = 0
    with pytest.raises(WinnowError, match="one image does not fit into the memory .CUDA out of memory"):
        draw(texts, seeds)


def test_a_decoder_out_of_memory_waits_for_its_turn(stable_diffusion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs import latents

    draw = Sampler(models.load(str(stable_diffusion)), Generate(steps=2, guidance=1.0))
    made, inner, left = draw.denoise(WORDS[:2], [1, 2]), latents.decode, [1]

    def small(vae: Any, some: torch.Tensor) -> np.ndarray:
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return inner(vae, some)

    monkeypatch.setattr(latents, "decode", small)
    np.testing.assert_array_equal(draw.decode(made), inner(draw.pipe.vae, made))
    left[0] = 2
    with pytest.raises(WinnowError, match="one image does not fit into the memory .CUDA out of memory"):
        draw.decode(made)


def test_sizes_that_a_model_cannot_take_are_named(folder: Path, tmp_path: Path) -> None:
    from jobs.generate import sampler

    pipe = models.load(str(folder))
    fits = family(pipe).patch * pipe.vae_scale_factor
    sampler(str(folder), Generate(width=8 * fits, height=32))
    if fits <= 8:  # settings refuse what is no multiple of 8; these small autoencoders scale by 2
        return
    with pytest.raises(WinnowError, match=f"takes multiples of {fits}"):
        sampler(str(folder), Generate(width=8, height=32))
