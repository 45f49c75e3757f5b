"""Samplers and refinement: exact counts, what never changes, seeds, and who is picked."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from jobs.ipr.grid import Grid
from jobs.ipr.model import Prediction, RegionTransformer, Shape
from jobs.ipr.refine import refine
from jobs.ipr.sampler import Pass, Sampler, step
from schemas.errors import WinnowError

GRID = Grid(4, 4, 2, box=2)


class Known(torch.nn.Module):
    """Answers what it was told, and keeps what it was asked."""

    def __init__(self, x: Tensor, log_var: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.grid, self.x, self.asked = GRID, torch.nn.Parameter(x), []
        self.log_var = log_var or (lambda t: torch.zeros_like(t))

    def forward(self, z: Tensor, t: Tensor) -> Prediction:
        self.asked.append((z.clone(), t.clone()))
        return Prediction(self.x.detach().expand_as(z), self.log_var(t), None)


def random_model() -> RegionTransformer:
    torch.manual_seed(0)
    return RegionTransformer(GRID, Shape(32, 2, 2)).eval()


def counted(model: torch.nn.Module) -> list[int]:
    """Grows by one with each call of the model, whoever counts besides."""
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return calls


passes = st.builds(
    Pass, st.integers(1, 6), st.sampled_from(["random", "certain"]), st.sampled_from([0.0, 0.3, 0.5, 0.7, 0.9, 1.0]),
    st.sampled_from([0.3, 0.5, 1.0]),
)  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(passes, st.integers(0, 16), st.integers(0, 2**32))
def test_what_is_not_chosen_stays_to_the_bit_and_evaluations_are_counted(how: Pass, n: int, seed: int) -> None:
    model = random_model()
    calls, rng = counted(model), np.random.default_rng(seed)
    chosen = torch.from_numpy(rng.permuted(np.tile(np.arange(16) < n, (3, 1)), axis=1))
    x = torch.from_numpy(rng.uniform(-1, 1, (3, 16, 4)).astype(np.float32))
    before = x.clone()
    sampler = Sampler(model, [seed, seed + 1, seed + 2])
    after = sampler.draw(x, chosen, how)
    assert torch.equal(x, before) and torch.equal(after[~chosen], x[~chosen])
    assert n == 0 or (after[chosen] != x[chosen]).any()
    expected = math.ceil(how.steps + (n - 1) * (1 - how.overlap) * how.steps - 1e-9) if n else 0
    assert len(calls) == sampler.evaluations == how.length(n) == expected


@settings(deadline=None, max_examples=40)
@given(passes, st.integers(1, 16))
def test_every_chosen_region_goes_from_its_level_to_clean_in_its_steps(how: Pass, n: int) -> None:
    """Seen from the model: what it is asked, and that regions end at exactly what it answers."""
    torch.manual_seed(1)
    model = Known(torch.randn(16, 4))
    chosen = torch.zeros(2, 16, dtype=torch.bool)
    chosen[0, :n] = chosen[1, 16 - n :] = True
    x = torch.randn(2, 16, 4)
    after = Sampler(model, [0, 1]).draw(x, chosen, how)  # type: ignore[arg-type]
    assert torch.equal(after[chosen], model.x.expand(2, -1, -1)[chosen])
    levels = torch.stack([t for _, t in model.asked])
    assert (levels[0][chosen] == how.level).all() and (levels[:, ~chosen] == 0).all()
    assert (levels.diff(dim=0) <= 0).all()
    under_way = ((levels > 0) & (levels < how.level)).sum(0)[chosen]
    assert (under_way <= how.steps).all()
    if how.overlap in (0.0, 1.0):  # whole numbers: each level is asked for once, from the top
        ramp = how.level * (1 - np.arange(how.steps) / how.steps)
        for sample, region in chosen.nonzero().tolist():
            seen = levels[:, sample, region]
            np.testing.assert_allclose(sorted(set(seen[seen > 0].tolist()), reverse=True), ramp, atol=1e-6)


def test_one_after_the_other_and_all_at_once() -> None:
    free = torch.ones(1, 16, dtype=torch.bool)
    for overlap, most in ((0.0, 1), (1.0, 16)):
        model = Known(torch.zeros(16, 4))
        Sampler(model, [0]).draw(torch.zeros(1, 16, 4), free, Pass(4, "random", overlap))  # type: ignore[arg-type]
        under_way = [int(((t > 0) & (t < 1)).sum()) for _, t in model.asked]
        assert max(under_way) == most


def test_the_most_certain_is_next() -> None:
    """The certainty that counts is what the model says when it is asked, not what it said first."""
    first = torch.randperm(16, generator=torch.Generator().manual_seed(0)).float()

    def log_var(t: Tensor) -> Tensor:
        done = (t == 0).sum(1, keepdim=True)
        return torch.where(done < 8, first, -first).expand_as(t)

    model = Known(torch.zeros(16, 4), log_var)
    free = torch.ones(3, 16, dtype=torch.bool)
    Sampler(model, [0, 1, 2]).draw(torch.zeros(3, 16, 4), free, Pass(1))  # type: ignore[arg-type]
    order = torch.stack([t for _, t in model.asked] + [torch.zeros(3, 16)]).diff(dim=0).argmin(2)
    ranks = first[order]
    assert torch.equal(ranks[:8], torch.arange(8.0)[:, None].expand(-1, 3))
    assert torch.equal(ranks[8:], torch.arange(15.0, 7.0, -1)[:, None].expand(-1, 3))


def test_random_orders_are_random() -> None:
    model = Known(torch.zeros(16, 4))
    n = 800
    free = torch.ones(n, 16, dtype=torch.bool)
    Sampler(model, range(n)).draw(torch.zeros(n, 16, 4), free, Pass(1, "random"))  # type: ignore[arg-type]
    order = torch.stack([t for _, t in model.asked] + [torch.zeros(n, 16)]).diff(dim=0).argmin(2)
    assert torch.equal(order.sort(0).values, torch.arange(16)[:, None].expand(-1, n))
    for place in (0, 7, 15):
        assert stats.chisquare(np.bincount(order[place].numpy(), minlength=16)).pvalue > 0.001


def test_a_step_is_eulers_without_fresh_noise_and_keeps_the_variance_with_it() -> None:
    random = torch.Generator().manual_seed(0)
    z, x, fresh = (torch.randn(4, 16, 500, generator=random) for _ in range(3))
    t, goal = torch.full((4, 16), 0.8), torch.full((4, 16), 0.3)
    velocity = (z - x) / 0.8
    torch.testing.assert_close(step(z, x, t, goal, fresh, 0.0), z + (0.3 - 0.8) * velocity)
    torch.testing.assert_close(step(z, x, t, goal, fresh, 1.0), 0.7 * x + 0.3 * fresh)
    torch.testing.assert_close(step(z, x, t, torch.zeros(4, 16), fresh, 0.5), x)
    truth = torch.lerp(x, z, 0.8)  # z as the noise of a true sample
    noise = (step(truth, x, t, goal, fresh, 0.5) - 0.7 * x) / 0.3
    torch.testing.assert_close(noise, math.sqrt(0.5) * z + math.sqrt(0.5) * fresh, rtol=1e-4, atol=1e-4)
    assert noise.var().item() == pytest.approx(1, abs=0.03)


def test_the_seed_decides_and_the_batch_does_not_matter() -> None:
    model, how = random_model(), Pass(2)
    free = torch.ones(5, 16, dtype=torch.bool)

    def run(seeds: list[int]) -> Tensor:
        n = len(seeds)
        sampler = Sampler(model, seeds)
        x = sampler.draw(torch.zeros(n, 16, 4), free[:n], how)
        return list(refine(sampler, x, free[:n], 3, 0.25, how))[-1]

    all_, again = run([1, 2, 3, 4, 5]), run([1, 2, 3, 4, 5])
    assert torch.equal(all_, again)
    torch.testing.assert_close(all_[[2, 4]], run([3, 5]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(all_[3:4], run([4]), atol=1e-4, rtol=1e-4)
    assert (run([6])[0] - all_).abs().mean(2).max(1).values.min() > 0.01


def iterate(model: Any, n: int, iterations: int, fraction: float, free: Tensor, **how: Any) -> list[Tensor]:
    """Which regions changed in each iteration, bool [N, R]."""
    torch.manual_seed(2)
    x = torch.randn(n, 16, 4)
    chain = [x, *refine(Sampler(model, range(n)), x, free, iterations, fraction, how.pop("way", Pass(1)), **how)]
    return [(a != b).any(2) for a, b in pairwise(chain)]


def test_ipr_draws_a_fraction_of_the_free_regions_uniformly() -> None:
    n = 600
    free = torch.ones(n, 16, dtype=torch.bool)
    free[:, :4] = False  # given
    changed = iterate(random_model(), n, 3, 0.25, free)
    for one in changed:
        assert (one.sum(1) == 3).all() and not one[:, :4].any()
        assert stats.chisquare(one[:, 4:].sum(0).numpy()).pvalue > 0.001
    both = (changed[0] & changed[1]).sum(1).float().mean().item()  # drawn anew each time: 3 · 3 / 12 in common
    assert both == pytest.approx(0.75, abs=0.12)


def test_fixed_regions_are_the_same_each_time_but_differ_between_samples() -> None:
    first, *others = iterate(random_model(), 20, 4, 0.25, torch.ones(20, 16, dtype=torch.bool), choice="fixed")
    assert all(torch.equal(first, one) for one in others) and len(first.unique(dim=0)) > 15


def test_a_fraction_of_one_draws_everything_again() -> None:
    for way in (Pass(2), Pass(2, overlap=1.0, level=0.5)):
        free = torch.ones(3, 16, dtype=torch.bool)
        assert all(one.all() for one in iterate(random_model(), 3, 2, 1.0, free, way=way))


def test_the_least_certain_are_drawn_again() -> None:
    scores = torch.arange(16.0)
    model = Known(torch.zeros(16, 4), lambda t: scores.expand_as(t))
    free = torch.ones(4, 16, dtype=torch.bool)
    free[:, 15] = False  # given, so never picked
    for one in iterate(model, 4, 1, 0.2, free, choice="uncertain"):
        assert one.nonzero()[:, 1].tolist() == [12, 13, 14] * 4


def test_regions_in_conflict_are_those_that_differ_by_more_than_is_expected() -> None:
    """Region 3 differs most, but there the model is unsure; 7 differs where it is sure."""
    log_var = torch.zeros(16)
    log_var[3], log_var[7] = 6.0, -6.0
    expected = torch.zeros(16, 4)
    x = expected.clone()[None]
    x[0, 3], x[0, 7], x[0, 9] = 2.0, 1.0, 0.5
    model = Known(expected, lambda t: log_var.expand_as(t))
    sampler = Sampler(model, [0])  # type: ignore[arg-type]
    free = torch.ones(1, 16, dtype=torch.bool)
    after = next(refine(sampler, x, free, 1, 1 / 16, Pass(2), "conflict"))
    assert (after != x).any(2).nonzero()[:, 1].tolist() == [7]
    assert sampler.evaluations == 3  # one look, two steps
    looked = model.asked[0][1]
    assert (looked == 0.5).all()


@pytest.mark.parametrize(("choice", "look"), [("uniform", 0), ("fixed", 0), ("uncertain", 1), ("conflict", 1)])
def test_refinement_counts_its_evaluations(choice: Any, look: int) -> None:
    model = random_model()
    calls, sampler = counted(model), Sampler(model, [0, 1])
    free = torch.ones(2, 16, dtype=torch.bool)
    for k, _ in enumerate(refine(sampler, torch.zeros(2, 16, 4), free, 5, 0.25, Pass(2), choice), 1):
        assert len(calls) == sampler.evaluations == k * (4 * 2 + look)


def refined(fraction: float, choice: Any = "uniform") -> Tensor:
    free = torch.ones(1, 16, dtype=torch.bool)
    return next(refine(Sampler(random_model(), [0]), torch.zeros(1, 16, 4), free, 1, fraction, Pass(1), choice))


def uneven() -> Tensor:
    chosen = torch.arange(32).view(2, 16) > 20
    return Sampler(random_model(), [0, 1]).draw(torch.zeros(2, 16, 4), chosen, Pass(1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Pass(0), "steps of 1 or more"),
        (lambda: Pass(2, overlap=1.5), "overlap in"),
        (lambda: Pass(2, level=0.0), "level in"),
        (lambda: Pass(2, "best"), "allowed are random, certain"),  # type: ignore[arg-type]
        (lambda: refined(0.0), r"fraction 0\.0"),
        (lambda: refined(0.5, "worst"), "choice 'worst': allowed are uniform"),
        (uneven, "0 to 11 regions to draw; give as many in each"),
    ],
)
def test_impossible_asks_are_refused_in_one_line(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(WinnowError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
