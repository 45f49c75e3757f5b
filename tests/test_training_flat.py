"""Flat parameters are the model's own."""

import pytest
import torch
from torch import nn

from jobs.training.flat import Flat


def model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(2, 5, 3), nn.Flatten(), nn.Linear(5, 7, bias=False), nn.Linear(7, 1))


X = torch.linspace(-1, 1, 4 * 2 * 9).view(4, 2, 3, 3)


def test_steps_on_the_whole_are_steps_on_each() -> None:
    one, other = model(), model()
    one[0].to(memory_format=torch.channels_last)
    flat = Flat(list(one.parameters()))
    assert flat.whole.shape == (sum(p.numel() for p in other.parameters()),)
    ours = torch.optim.AdamW([flat.whole], 0.1, weight_decay=0.1)
    usual = torch.optim.AdamW(other.parameters(), 0.1, weight_decay=0.1)
    for _ in range(3):
        for net, optimiser in ((one, ours), (other, usual)):
            optimiser.zero_grad(set_to_none=False)
            for part in X.split(2):
                net(part).square().sum().backward()
            optimiser.step()
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            assert p.shape == q.shape and torch.allclose(p, q, atol=1e-6) and torch.allclose(p.grad, q.grad, rtol=1e-4)


def test_what_is_left_out_stays_as_it_is() -> None:
    net = model()
    before = net[3].weight.detach().clone()
    flat = Flat(list(net[0].parameters()))
    with torch.no_grad():
        flat.whole.fill_(2.0)
    assert (net[0].weight == 2).all() and (net[0].bias == 2).all() and torch.equal(net[3].weight, before)
    assert net[3].weight.grad is None


def test_released_parameters_keep_their_values_and_share_no_memory() -> None:
    net = model()
    flat = Flat(list(net.parameters()))
    values = [p.detach().clone() for p in net.parameters()]
    flat.release()
    with torch.no_grad():
        flat.whole.zero_()
    assert all(torch.equal(p, v) and p.grad is None for p, v in zip(net.parameters(), values, strict=True))


def test_a_parameter_that_was_moved_meanwhile_is_told() -> None:
    net = model()
    flat = Flat(list(net.parameters()))
    net[2].weight.data = net[2].weight.detach().clone()
    with pytest.raises(RuntimeError, match="a parameter was moved while it was trained"):
        flat.release()
