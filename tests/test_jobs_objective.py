"""Objectives: against the schedulers' own formulas, the densities of the papers, and windows that are never left."""

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import norm

from jobs.objective import Objective, objective
from schemas.errors import WinnowError

KINDS = ["epsilon", "v_prediction", "flow"]


def scheduler_for(kind: str, **how: Any) -> Any:
    if kind == "flow":
        return FlowMatchEulerDiscreteScheduler(**how)
    return DDPMScheduler(beta_schedule="scaled_linear", prediction_type=kind, **how)


def normal(n: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def test_what_is_predicted_follows_the_scheduler() -> None:
    assert [objective(scheduler_for(kind)).kind for kind in KINDS] == KINDS
    with pytest.raises(WinnowError, match="predicts 'sample'; epsilon, v_prediction and flow"):
        objective(DDPMScheduler(prediction_type="sample"))
    for silent in ("IPNDMScheduler", "CMStochasticIterativeScheduler", "ScoreSdeVeScheduler", "KarrasVeScheduler",
                   "FlowMapEulerDiscreteScheduler"):  # fmt: skip
        with pytest.raises(WinnowError, match=f"{silent}, does not say what the model predicts"):
            objective(getattr(diffusers, silent)())
    for flow in ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"):
        assert objective(getattr(diffusers, flow)()).kind == "flow"
    with pytest.raises(WinnowError, match="a EDMEulerScheduler has noise levels of its own"):
        objective(EDMEulerScheduler())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noisy_and_target_are_the_schedulers(kind: str) -> None:
    scheduler, goal = scheduler_for(kind), objective(scheduler_for(kind))
    x, noise = normal(2 * 500 * 16).view(2, 500, 4, 2, 2)
    t = goal.times(normal(500))
    np.testing.assert_array_equal(t, np.floor(norm.cdf(normal(500).double().numpy()) * 1000).astype(int))
    noisy, target = goal.noisy(x, noise, t), goal.target(x, noise, t)
    torch.testing.assert_close(noisy, scheduler.add_noise(x, noise, t))
    torch.testing.assert_close(target, noise if kind == "epsilon" else scheduler.get_velocity(x, noise, t))
    # What in_noise makes of a difference of predictions is that of the ε that they mean.
    moved = normal(x.numel(), 5).view_as(x)
    kept = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    means = (lambda p: p) if kind == "epsilon" else (lambda p: kept.sqrt() * p + (1 - kept).sqrt() * noisy)
    expected = means(target + moved) - means(target)
    torch.testing.assert_close(goal.in_noise(t).view(-1, 1, 1, 1) * moved, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_is_the_flow_schedulers(shift: float) -> None:
    scheduler = scheduler_for("flow", shift=shift)
    goal = objective(scheduler)
    steps = scheduler.timesteps[[100, 400, 700, 950]]  # 1000 σ, shifted
    x, noise = normal(2 * 4 * 256).view(2, 4, 4, 8, 8)
    plain = FlowMatchEulerDiscreteScheduler().timesteps[[100, 400, 700, 950]]
    torch.testing.assert_close(goal.times(torch.logit(plain / 1000)), steps)
    noisy = goal.noisy(x, noise, steps)
    torch.testing.assert_close(noisy, scheduler.scale_noise(x, steps, noise))
    sigma = (steps / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy - sigma * goal.target(x, noise, steps), x)  # one exact step leads to the picture
    torch.testing.assert_close(goal.in_noise(steps), 1 - steps / 1000)


def test_a_shift_that_depends_on_the_size_is_left_to_sampling() -> None:
    draw = normal(100)
    moving = objective(scheduler_for("flow", shift=3.0, use_dynamic_shifting=True))
    torch.testing.assert_close(moving.times(draw), 1000 * torch.sigmoid(draw))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", ["uniform", "logit-normal"])
def test_times_have_their_density(kind: str, density: Any) -> None:
    """Half of the draws are below the median, a sixth below −1; in a window, of what the window leaves."""
    goal = objective(scheduler_for(kind))
    draw = torch.special.ndtri((torch.arange(20_000) + 0.5) / 20_000)
    share = norm.cdf if density == "uniform" else lambda z: 1 / (1 + np.exp(-z))
    whole = goal.times(draw, None, density).double().numpy()
    np.testing.assert_allclose(np.quantile(whole, [0.5, norm.cdf(-1)]), 1000 * share(np.array([0, -1])), atol=1.5)
    window = goal.times(draw, (100, 400), density).double().numpy()
    inside = whole[(whole >= 100) & (whole < 400)]
    for q in (0.1, 0.5, 0.9):
        assert np.quantile(window, q) == pytest.approx(np.quantile(inside, q), abs=1.5)


@given(
    st.sampled_from([("epsilon", 1.0), ("v_prediction", 1.0), ("flow", 1.0), ("flow", 3.0)]),
    st.integers(0, 999), st.integers(1, 1000), st.sampled_from(["uniform", "logit-normal"]),
    st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=20),
)  # fmt: skip
@example(("flow", 3.0), 250, 250, "logit-normal", [-50.0, 50.0])
@example(("epsilon", 1.0), 999, 1, "uniform", [-50.0, 50.0])
def test_a_window_is_never_left(
    model: tuple[str, float], low: int, width: int, density: Any, draws: list[float]
) -> None:
    kind, shift = model
    goal = objective(scheduler_for(kind, **({"shift": shift} if kind == "flow" else {})))
    high = min(1000, low + width)
    t = goal.times(torch.tensor(draws), (low, high), density)
    assert (t >= low).all() and (t < high).all()
    assert t.dtype == (torch.float32 if kind == "flow" else torch.int64)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_is_its_formula(kind: str) -> None:
    scheduler, t = scheduler_for(kind), torch.tensor([0, 1, 10, 300, 600, 999])
    kept = scheduler.alphas_cumprod[t].double().numpy()
    snr = kept / (1 - kept)
    expected = np.minimum(snr, 5) / (snr if kind == "epsilon" else snr + 1)
    np.testing.assert_allclose(objective(scheduler).min_snr(t, 5.0), expected, rtol=1e-4)
    assert expected[0] < 0.01 and (kind == "v_prediction" or expected[-1] == 1)


def test_min_snr_without_any_signal_is_finite() -> None:
    scheduler = scheduler_for("epsilon", rescale_betas_zero_snr=True)
    assert objective(scheduler).min_snr(torch.tensor([999]), 5.0).tolist() == [1.0]


@pytest.mark.parametrize("window", [(500, 500), (-1, 10), (0, 1001), (600, 300)])
def test_windows_that_are_none_are_named(window: tuple[int, int]) -> None:
    with pytest.raises(WinnowError, match="give two timesteps, low and high, from 0 to 1000"):
        objective(scheduler_for("flow")).check(window, None)
    with pytest.raises(WinnowError, match=r"train\.min_snr is for ε and v models"):
        objective(scheduler_for("flow")).check(None, 5.0)


@pytest.mark.parametrize(("shift", "window"), [(12.0, (0, 2)), (6.0, (0, 1)), (1 / 3, (999, 1000))])
def test_a_window_at_the_very_end_is_trained_all_over(shift: float, window: tuple[int, int]) -> None:
    """Where the normal distribution has less than a double's 1e-16 left."""
    draws = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    t = Objective("flow", 1000, None, shift).times(draws, window)
    assert window[0] <= t.min() < t.max() < window[1] and len(t.unique()) > 2_000
    order = draws.argsort()
    assert (t[order].diff() >= 0).all()
