"""Negative guidance: the formula on the predictions, and what it leaves as it was."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from conftest import WORDS, build_stable_diffusion

from jobs import models
from jobs.families import family
from jobs.generate import Generate, Negative, sampler
from schemas.errors import WinnowError


@pytest.fixture(scope="module", params=["sd", *pipelines.BUILDERS])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and one of the same shape whose last layer is another."""
    home = tmp_path_factory.mktemp("pair")
    build = build_stable_diffusion if request.param == "sd" else partial(pipelines.build, request.param)
    one = build(home / "one")
    pipe = models.load(str(one))
    with torch.no_grad():
        for parameter in family(pipe).model(pipe).parameters():
            parameter.mul_(0.9)
    pipe.save_pretrained(home / "other")
    return one, home / "other"


def settings(other: Path | None, weight: float = 1.0, **how: Any) -> Generate:
    negative = Negative(model=str(other), weight=weight) if other else None
    return Generate(**({"steps": 2, "guidance": 1.0, "width": 32, "height": 32} | how), negative=negative)


def test_one_step_is_moved_by_the_formula(pair: tuple[Path, Path]) -> None:
    """With one step of sampling the latents are affine in the prediction."""
    one, other = map(str, pair)
    own, theirs = (sampler(model, settings(None, steps=1)).denoise(WORDS[:2], [1, 2]) for model in (one, other))
    led = sampler(one, settings(pair[1], 0.7, steps=1)).denoise(WORDS[:2], [1, 2])
    assert (own - theirs).abs().max() > 1e-3
    torch.testing.assert_close(led, 1.7 * own - 0.7 * theirs, atol=1e-4, rtol=1e-3)


def test_without_weight_or_with_itself_nothing_moves(pair: tuple[Path, Path]) -> None:
    one, other = pair
    plain = sampler(str(one), settings(None))(WORDS[:2], [1, 2])
    for away in (settings(other, 0.0), settings(one, 3.0)):
        np.testing.assert_allclose(sampler(str(one), away)(WORDS[:2], [1, 2]), plain, atol=1e-4)
    assert np.abs(sampler(str(one), settings(other))(WORDS[:2], [1, 2]) - plain).max() > 1e-4


def test_another_architecture_is_refused(stable_diffusion: Path) -> None:
    with pytest.raises(WinnowError, match=r"generate\.negative\.model 'embedded': its denoiser is of another shape"):
        sampler(str(stable_diffusion), Generate(negative=Negative(model="embedded")))


def test_a_model_of_another_kind_is_refused(stable_diffusion: Path, tmp_path: Path) -> None:
    other = pipelines.build("sd3-no-t5", tmp_path / "sd3")
    with pytest.raises(WinnowError, match="is a StableDiffusion3Pipeline, and the model a StableDiffusionPipeline"):
        sampler(str(stable_diffusion), settings(other))
    pipe = models.load(str(stable_diffusion))
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    pipe.save_pretrained(tmp_path / "v")
    with pytest.raises(WinnowError, match="predicts 'v_prediction', and the model 'epsilon'"):
        sampler(str(stable_diffusion), settings(tmp_path / "v"))


def test_weight_0_is_none_and_two_networks_are_counted(pair: tuple[Path, Path]) -> None:
    one, other = pair
    assert settings(other, 0.0) == settings(None)
    counted = []
    for away in (settings(None), settings(other)):
        counted.append([step.evaluations for step in sampler(str(one), away).walk(WORDS[:2], [1, 2])][-1])
    assert counted[1] == 2 * counted[0]
