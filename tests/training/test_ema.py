"""The moving average against its formula, and weights that come back untouched."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mutoscope.training.ema import EMA


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).to(dtype)


def shake(net: nn.Module) -> None:
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p))


def test_average_against_its_formula() -> None:
    net = model()
    ema = EMA(net, decay=0.7)
    expected = {name: p.detach().double() for name, p in net.named_parameters()}
    for step in range(1, 30):
        shake(net)
        ema.update(net, step)
        decay = min(0.7, (1 + step) / (10 + step))
        for name, p in net.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach().double()
        for name, average in ema.averages.items():
            torch.testing.assert_close(average.double(), expected[name], atol=1e-5, rtol=1e-5)
    assert (1 + 29) / (10 + 29) > 0.7 > (1 + 1) / (10 + 1)  # both the warm-up and the decay itself were seen


def test_a_long_average_forgets_the_initial_weights_at_once() -> None:
    net = model()
    ema = EMA(net, decay=0.9999)
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(1.0)
    for step in range(1, 100):
        ema.update(net, step)
    assert all((average - 1).abs().max() < 1e-6 for average in ema.averages.values())


def test_the_average_is_kept_in_fp32_of_bf16_weights() -> None:
    """In bf16, 0.999·1 + 0.001·2 would be 1 for ever."""
    net = model(torch.bfloat16)
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(1.0)
    ema = EMA(net, decay=0.999)
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(2.0)
    ema.update(net, step=100_000)
    assert all(a.dtype == torch.float32 for a in ema.averages.values())
    for average in ema.averages.values():
        torch.testing.assert_close(average, torch.full_like(average, 1.001))


def test_the_average_is_not_the_weights_themselves() -> None:
    net = model()
    ema = EMA(net, decay=0.9)
    before = copy.deepcopy(ema.averages)
    shake(net)
    assert all(torch.equal(ema.averages[name], before[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applied_carries_the_averages_and_restores_every_bit(dtype: torch.dtype) -> None:
    net = model(dtype)
    ema = EMA(net, decay=0.5)
    shake(net)
    ema.update(net, 1)
    weights = copy.deepcopy(net.state_dict())
    averages = copy.deepcopy(ema.averages)
    pointers = [p.data_ptr() for p in net.parameters()]
    with ema.applied(net):
        for name, p in net.named_parameters():
            assert torch.equal(p, averages[name].to(dtype)) and not torch.equal(p, weights[name])
        assert torch.equal(net.state_dict()["1.running_mean"], weights["1.running_mean"])  # buffers are as they are
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(value, averages[name]) for name, value in ema.averages.items())
    assert [p.data_ptr() for p in net.parameters()] == pointers  # the optimizer holds these very tensors


def test_applied_restores_after_an_exception() -> None:
    net = model()
    ema = EMA(net, decay=0.5)
    shake(net)
    weights = copy.deepcopy(net.state_dict())
    with pytest.raises(KeyboardInterrupt), ema.applied(net):
        raise KeyboardInterrupt
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())


def test_averaging_leaves_gradients_alone() -> None:
    net = model()
    ema = EMA(net, decay=0.5)
    net(torch.randn(5, 3)).sum().backward()
    gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    ema.update(net, 1)
    with ema.applied(net):
        pass
    assert not any(a.requires_grad for a in ema.averages.values())
    assert all(torch.equal(g, p.grad) for g, p in zip(gradients, net.parameters(), strict=True) if p.grad is not None)
