"""The sampling loop: step by step, it is the pipeline's own call; from a level, diffusers' image-to-image."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pipelines
import pytest
import torch
from conftest import WORDS
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import models, sampling
from jobs.families import Conditions, family
from jobs.generate import Generate, Sampler
from schemas.errors import WinnowError

SEEDS = [5, 6, 7]
TEXTS = WORDS[:3]
EMBEDDED = ["a red seven on a blue background", "a cyan zero", "a white one on a black background"]

#: By case: the kind of pipeline, and the scheduler in its place, null: its own.
CASES: dict[str, tuple[str, Any]] = {
    "sd-pndm": ("sd", None),
    "sd-dpm": ("sd", lambda config: diffusers.DPMSolverMultistepScheduler.from_config(config)),
    "sd-ddim": ("sd", lambda config: diffusers.DDIMScheduler.from_config(config, clip_sample=False)),
    "sd-ancestral": ("sd", lambda config: diffusers.EulerAncestralDiscreteScheduler.from_config(config)),
    "sd-heun": ("sd", lambda config: diffusers.HeunDiscreteScheduler.from_config(config)),
    "sd-v": ("sd", lambda config: diffusers.EulerDiscreteScheduler.from_config(
        config, prediction_type="v_prediction", timestep_spacing="trailing")),
    "sdxl": ("sdxl", None),
    "sd3": ("sd3", None),
    "sd3-no-t5": ("sd3-no-t5", None),
    "sd3-shifts": ("sd3", lambda config: diffusers.FlowMatchEulerDiscreteScheduler.from_config(
        config, use_dynamic_shifting=True, max_shift=1.7)),
    "flux": ("flux", None),
    "flux-shifts": ("flux", lambda config: diffusers.FlowMatchEulerDiscreteScheduler.from_config(
        config, use_dynamic_shifting=True, base_shift=0.3)),
    "embedded": ("embedded", None),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def pipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, stable_diffusion: Path) -> Any:
    kind, scheduler = CASES[request.param]
    if kind in pipelines.BUILDERS:
        kind = str(pipelines.build(kind, tmp_path_factory.mktemp("models") / kind))
    made = models.load(str(stable_diffusion) if kind == "sd" else kind)
    if scheduler:
        made.scheduler = scheduler(made.scheduler.config)
    return made


def texts(pipe: Any) -> list[str]:
    return EMBEDDED if pipe.vae.config.sample_size == 16 else TEXTS


def shape(pipe: Any) -> tuple[int, int, int]:
    side = 32 // pipe.vae_scale_factor
    return pipe.vae.config.latent_channels, side, side


def conditions(pipe: Any) -> tuple[Any, Any]:
    encode = Conditions(pipe)
    return encode(texts(pipe)), encode([None] * 3)


def latents(pipe: Any) -> torch.Tensor:
    return torch.randn(3, *shape(pipe), generator=torch.Generator().manual_seed(1)) * 0.7


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def drawn(pipe: Any) -> tuple[torch.Tensor, list[torch.Generator]]:
    """Noise as diffusers draws it, and the generators as they are left."""
    random = generators()
    return torch.cat([torch.randn(1, *shape(pipe), generator=one) for one in random]), random


def last(steps: Any) -> Any:
    *_, end = steps
    return end


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_from_noise_it_is_the_pipelines_own_call(pipe: Any, guidance: float) -> None:
    calls = []
    handle = family(pipe).model(pipe).register_forward_hook(lambda *_: calls.append(1))
    expected = Sampler(pipe, Generate(steps=6, guidance=guidance, width=32, height=32)).denoise(texts(pipe), SEEDS)
    handle.remove()
    noise, random = drawn(pipe)
    assert torch.equal(noise, sampling.noise(shape(pipe), SEEDS, "cpu"))
    steps = list(sampling.walk(pipe, *conditions(pipe), noise, 6, guidance, random=random))
    torch.testing.assert_close(steps[-1].x, expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.1
    # Every step is seen and counted: the pipeline makes both passes of a guided step in one call.
    guided = guidance > 1 and "Flux" not in type(pipe).__name__
    assert len(steps) == len(calls) and [s.evaluations for s in steps] == [
        (i + 1) * (2 if guided else 1) for i in range(len(calls))
    ]
    assert all((s.gap is None) is not guided for s in steps)
    assert [s.t for s in steps] == sorted((s.t for s in steps), reverse=True)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_from_a_level_it_is_image_to_image(pipe: Any, guidance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers begins at a step, and this at the level of that step."""
    if isinstance(pipe.scheduler, diffusers.PNDMScheduler):
        pytest.skip("begun amid its steps, PNDM of diffusers lacks the second half of its first step")
    clean, steps, strength = latents(pipe), 8, 0.5
    times = sampling.starts(pipe, steps, clean)
    level = times[steps - int(steps * strength)] / 1000
    noise, random = drawn(pipe)
    ours = last(sampling.walk(pipe, *conditions(pipe), noise, steps, guidance, clean, level, random=random))

    told, untold = conditions(pipe)
    guided = guidance > 1 and "Flux" not in type(pipe).__name__
    if guided:
        told |= {f"negative_{key}": value for key, value in untold.items()}
    other = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    size = {} if hasattr(pipe, "unet") else {"height": 32, "width": 32}
    given = clean
    if clean.shape[1] not in (4, 16):  # diffusers takes such a tensor for pixels, and encodes it
        rows = iter(clean / pipe.vae.config.scaling_factor)
        monkeypatch.setattr(pipe.vae, "encode", lambda _: SimpleNamespace(latents=next(rows)[None]))
        given = torch.zeros(3, 3, 16, 16)
    made = other(
        **told, image=given, strength=strength, num_inference_steps=steps, guidance_scale=guidance,
        generator=generators(), output_type="latent", **size,
    ).images  # fmt: skip
    made = pipe._unpack_latents(made, 32, 32, pipe.vae_scale_factor) if "Flux" in type(pipe).__name__ else made
    torch.testing.assert_close(ours.x, made, atol=1e-4, rtol=0)
    assert (made - clean).abs().max() > 0.1
    passes = 7 if pipe.scheduler.order == 2 else 4  # of the second order, but for the last step
    assert ours.evaluations == passes * (2 if guided else 1)


@pytest.mark.parametrize("rows", [[0, 2], [1]])
def test_sent_some_rows_it_goes_on_with_these_alone(pipe: Any, rows: list[int]) -> None:
    """Whatever history the scheduler has of the others; and two walks may take turns."""
    clean = latents(pipe)
    mask = torch.zeros(3, 1, *clean.shape[2:], dtype=torch.bool)
    mask[..., : clean.shape[3] // 2] = True
    for more in ((), (clean, 0.7, mask)):
        noise, random = drawn(pipe)
        whole = list(sampling.walk(pipe, *conditions(pipe), noise, 6, 4.0, *more, random=random))
        walks = [sampling.walk(pipe, *conditions(pipe), noise, 6, 4.0, *more, random=drawn(pipe)[1]) for _ in range(2)]
        for _ in range(2):
            for walk in walks:
                next(walk)
        ends = [[walk.send(rows), *walk][-1] for walk in walks]
        for end in ends:
            torch.testing.assert_close(end.x, whole[-1].x[rows], atol=1e-4, rtol=0)
            torch.testing.assert_close(end.clean, whole[-1].clean[rows], atol=1e-4, rtol=0)
            assert end.evaluations == whole[-1].evaluations


def knowing(pipe: Any, monkeypatch: pytest.MonkeyPatch, clean: torch.Tensor, noise: torch.Tensor) -> None:
    """A network that knows which noise is in which latents, in the place of the pipeline's."""
    config, alpha_bar = pipe.scheduler.config, getattr(pipe.scheduler, "alphas_cumprod", None)

    def predict(_: Any, x: torch.Tensor, t: torch.Tensor, told: Any) -> torch.Tensor:
        if config.get("prediction_type") == "epsilon":
            return noise
        if config.get("prediction_type") == "v_prediction":
            assert alpha_bar is not None
            sigma = ((1 - alpha_bar) / alpha_bar).sqrt()[int(t[0])]  # its timesteps are whole
            return (noise - sigma * clean) / (1 + sigma**2).sqrt()
        return noise - clean

    kind = replace(family(pipe), predict=predict)
    monkeypatch.setattr(sampling, "family", lambda _: kind)


@pytest.mark.parametrize("level", [0.2, 0.55, 0.95])
def test_a_network_that_knows_the_noise_comes_back_to_the_latents(
    pipe: Any, level: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step then takes the latents to its own level, so the walk begins, goes on and ends where it should."""
    if isinstance(pipe.scheduler, diffusers.EulerAncestralDiscreteScheduler):
        pytest.skip("draws other noise in each step")
    clean, (noise, _) = latents(pipe), drawn(pipe)
    told, untold = conditions(pipe)
    knowing(pipe, monkeypatch, clean, noise)
    seen = list(sampling.walk(pipe, told, untold, noise, 10, 1.0, clean, level))
    for step in seen:
        torch.testing.assert_close(step.clean, clean, atol=2e-3, rtol=0)
    assert 1000 * level - 260 < seen[0].t <= 1000 * level
    # The last level of PNDM and DDIM is ᾱ of timestep 0, which is not quite 1.
    almost = 0.12 if hasattr(pipe.scheduler, "final_alpha_cumprod") else 2e-3
    torch.testing.assert_close(seen[-1].x, clean, atol=almost, rtol=0)


def test_outside_a_mask_is_the_original(pipe: Any) -> None:
    """At every level what it is there with the same noise, by the formula of the scheduler's paper; at the end, to the
    bit, itself."""
    clean, (noise, random) = latents(pipe), drawn(pipe)
    mask = torch.zeros(3, 1, *clean.shape[2:], dtype=torch.bool)
    mask[0, :, :3], mask[1, :, 2:5, 4:] = True, True
    told, untold = conditions(pipe)
    seen = list(sampling.walk(pipe, told, untold, noise, 8, 4.0, clean, 0.8, mask, random))
    config = pipe.scheduler.config
    alpha_bar = getattr(pipe.scheduler, "alphas_cumprod", None)
    for step, after in pairwise(seen):
        if alpha_bar is None or config.get("use_flow_sigmas"):
            expected = (1 - after.t / 1000) * clean + after.t / 1000 * noise
        else:
            low, high = int(after.t), min(int(after.t) + 1, 999)
            share = after.t - low
            if hasattr(pipe.scheduler, "init_noise_sigma") and float(pipe.scheduler.init_noise_sigma) > 1:
                sigmas = ((1 - alpha_bar) / alpha_bar).sqrt()
                expected = clean + noise * torch.lerp(sigmas[low], sigmas[high], share)
            else:
                expected = alpha_bar[low].sqrt() * clean + (1 - alpha_bar[low]).sqrt() * noise
        kept = ~mask.expand_as(clean)
        rounded = 5e-3 if config.get("use_flow_sigmas") else 2e-4  # its timesteps are whole numbers, its levels not
        torch.testing.assert_close(step.x[kept], expected[kept], atol=rounded, rtol=2e-4)
    assert torch.equal(seen[-1].x[~mask.expand_as(clean)], clean[~mask.expand_as(clean)])
    changed = (seen[-1].x - clean).abs().amax(1)
    assert (changed[0][mask[0, 0]] > 1e-3).all() and torch.equal(seen[-1].x[2], clean[2])


def test_a_whole_mask_is_no_mask_and_rows_are_their_own(pipe: Any) -> None:
    if isinstance(pipe.scheduler, diffusers.EulerAncestralDiscreteScheduler):
        pytest.skip("draws other noise in each step")
    clean, (noise, _) = latents(pipe), drawn(pipe)
    told, untold = conditions(pipe)
    plain = last(sampling.walk(pipe, told, untold, noise, 5, 3.0, clean, 0.7)).x
    whole = torch.ones(3, 1, *clean.shape[2:], dtype=torch.bool)
    assert torch.equal(last(sampling.walk(pipe, told, untold, noise, 5, 3.0, clean, 0.7, whole)).x, plain)
    one = [{key: value[1:2] for key, value in told.items()}, {key: value[1:2] for key, value in untold.items()}]
    alone = last(sampling.walk(pipe, *one, noise[1:2], 5, 3.0, clean[1:2], 0.7)).x
    torch.testing.assert_close(alone[0], plain[1], atol=1e-4, rtol=1e-4)


def test_the_gap_is_of_the_predictions(stable_diffusion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a count over what the network answered, and the step by DDIM's formula."""
    pipe = models.load(str(stable_diffusion))
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    answers: list[torch.Tensor] = []
    pipe.unet.register_forward_hook(lambda _, args, answer: answers.append(answer.sample))
    noise, _ = drawn(pipe)
    steps = list(sampling.walk(pipe, *conditions(pipe), noise, 4, 2.5))
    x, kept = noise, pipe.scheduler.alphas_cumprod
    for i, (step, answer) in enumerate(zip(steps, answers, strict=True)):
        without, with_text = answer[:3], answer[3:]
        rms = [float((with_text[k] - without[k]).pow(2).mean() ** 0.5) for k in range(3)]
        assert step.gap is not None and step.gap.tolist() == pytest.approx(rms, rel=1e-5)
        made, here = without + 2.5 * (with_text - without), kept[int(step.t)]
        there = kept[int(steps[i + 1].t)] if i < 3 else kept[0]
        estimate = (x - (1 - here).sqrt() * made) / here.sqrt()
        torch.testing.assert_close(step.clean, estimate, atol=1e-3, rtol=1e-3)
        x = there.sqrt() * estimate + (1 - there).sqrt() * made
        torch.testing.assert_close(step.x, x, atol=1e-4, rtol=1e-4)


TIMES = st.lists(st.floats(1, 1000), min_size=1, max_size=30, unique=True).map(lambda t: sorted(t, reverse=True))


@given(TIMES, st.floats(1e-3, 1))
@settings(max_examples=200, deadline=None)
def test_a_level_begins_at_the_first_timestep_at_or_below_it(times: list[float], level: float) -> None:
    below = [t for t in times if t <= 1000 * level + 1e-3]
    if below:
        assert times[sampling.begin(times, level)] == max(below)
    else:
        with pytest.raises(WinnowError, match=r"the last of \d+ steps is at .*raise the level or the steps"):
            sampling.begin(times, level)


@pytest.mark.parametrize("level", [0.0, -1.0, 1.0001, float("nan")])
def test_what_is_no_level_is_refused(level: float) -> None:
    with pytest.raises(WinnowError, match="not a level of noise"):
        sampling.begin([900.0, 400.0], level)


def test_pndm_with_runge_kutta_steps_is_refused(stable_diffusion: Path) -> None:
    pipe = models.load(str(stable_diffusion))
    pipe.scheduler = diffusers.PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=False)
    with pytest.raises(WinnowError, match="skip_prk_steps"):
        sampling.starts(pipe, 5, torch.zeros(1, 4, 16, 16))


@pytest.mark.parametrize(
    ("kind", "scheduler", "key"),
    [("embedded", None, "flow_shift"), ("sd3", None, "shift"),
     ("flux", lambda config: diffusers.FlowMatchEulerDiscreteScheduler.from_config(config, use_dynamic_shifting=True),
      "shift")],
)  # fmt: skip
def test_a_shift_moves_the_levels_of_sampling_and_not_those_of_training(
    tmp_path: Path, kind: str, scheduler: Any, key: str
) -> None:
    made = models.load(kind if kind == "embedded" else str(pipelines.build(kind, tmp_path / kind)))
    if scheduler:
        made.scheduler = scheduler(made.scheduler.config)
    before = dict(made.scheduler.config)
    draw = Sampler(made, Generate(steps=6, guidance=1.0, shift=2.5, width=32, height=32))
    found = draw.denoise(texts(made), SEEDS)
    assert dict(made.scheduler.config) == before and family(draw.pipe).model(draw.pipe) is family(made).model(made)
    levels = [t / 1000 for t in sampling.starts(draw.pipe, 6, drawn(made)[0])]
    made.scheduler = made.scheduler.from_config(made.scheduler.config, **{key: 1.0}, use_dynamic_shifting=False)
    even = [t / 1000 for t in sampling.starts(made, 6, drawn(made)[0])]
    # SD3's and FLUX's schedulers end at a shifted level, from which the rest is evenly spaced.
    if kind == "embedded":
        assert levels == pytest.approx([2.5 * t / (1 + 1.5 * t) for t in even], abs=2e-3)
    assert all(moved > level for moved, level in zip(levels[1:], even[1:], strict=True))
    made.scheduler = made.scheduler.from_config(made.scheduler.config, **{key: 2.5})
    expected = Sampler(made, Generate(steps=6, guidance=1.0, width=32, height=32)).denoise(texts(made), SEEDS)
    assert torch.equal(found, expected)
    steps = sampling.walk(draw.pipe, *conditions(made), drawn(made)[0], 6, 1.0)
    torch.testing.assert_close(last(steps).x, expected, atol=1e-4, rtol=0)


def test_a_shift_that_a_scheduler_does_not_have_is_refused(tmp_path: Path, stable_diffusion: Path) -> None:
    with pytest.raises(WinnowError, match="this model predicts epsilon; set it to null"):
        Sampler(models.load(str(stable_diffusion)), Generate(shift=2.0))
    flux = models.load(str(pipelines.build("flux", tmp_path / "flux")))
    flux.scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, use_dynamic_shifting=True
    )
    with pytest.raises(WinnowError, match="DPMSolverMultistepScheduler shifts by the image's size; set it to null"):
        Sampler(flux, Generate(shift=2.0))
