"""The recurrences of Mamba-1 and Mamba-2 against the loops that define them, and their gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mutoscope.models import selective_scan as module
from mutoscope.models.selective_scan import selective_scan, ssd, through_stateless

Scan = Callable[..., tuple[Tensor, Tensor]]


def reference_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """mamba_ssm's selective_scan_ref, from a state on: ours without its D, z and softplus."""
    y = []
    for i in range(u.shape[1]):
        h = torch.exp(dt[:, i, :, None] * A) * h + (dt[:, i] * u[:, i])[..., None] * B[:, i, None]
        y.append(torch.einsum("bds,bs->bd", h, C[:, i]))
    return torch.stack(y, 1), h


def reference_ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    y = []
    for i in range(x.shape[1]):
        into = torch.einsum("bh,bhp,bs->bhps", dt[:, i], x[:, i], B[:, i])
        h = torch.exp(dt[:, i] * A)[..., None, None] * h + into
        y.append(torch.einsum("bhps,bs->bhp", h, C[:, i]))
    return torch.stack(y, 1), h


def scan_inputs(n: int, dtype: torch.dtype = torch.float64, b: int = 2, d: int = 3, s: int = 4) -> list[Tensor]:
    g = torch.Generator().manual_seed(n)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    uniform = lambda *shape: torch.rand(*shape, generator=g, dtype=torch.float64)
    inputs = [normal(b, n, d), uniform(b, n, d), -3 * uniform(d, s) - 0.1, normal(b, n, s), normal(b, n, s)]
    return [x.to(dtype).requires_grad_() for x in [*inputs, normal(b, d, s)]]


def ssd_inputs(n: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(n)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    uniform = lambda *shape: torch.rand(*shape, generator=g, dtype=torch.float64)
    inputs = [normal(2, n, 3, 4), uniform(2, n, 3), -3 * uniform(3) - 0.1, normal(2, n, 5), normal(2, n, 5)]
    return [x.to(dtype).requires_grad_() for x in [*inputs, normal(2, 3, 4, 5)]]


def with_gradients(scan: Scan, inputs: list[Tensor]) -> list[Tensor]:
    """y, the last state, and the gradients of a function of both."""
    y, final = scan(*inputs)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y, final, *torch.autograd.grad((y * weight).sum() + final.square().sum(), inputs)]


@pytest.mark.parametrize("block", [1, 1 << 18])
@pytest.mark.parametrize("n", [1, 16, 37])
def test_scan_is_the_recurrence(n: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one block, and in blocks of 16 positions of which the last is short."""
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", block)
    for ours, theirs in zip(
        with_gradients(selective_scan, scan_inputs(n)), with_gradients(reference_scan, scan_inputs(n)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("n", [1, 37, 64, 130])
def test_ssd_is_the_recurrence(n: int) -> None:
    """One short block, a whole one, and two with a short one behind them."""
    for ours, theirs in zip(
        with_gradients(ssd, ssd_inputs(n)), with_gradients(reference_ssd, ssd_inputs(n)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-11)


def test_single_precision() -> None:
    for scan, reference, inputs in ((selective_scan, reference_scan, scan_inputs), (ssd, reference_ssd, ssd_inputs)):
        single = inputs(200, torch.float32)
        double = [x.detach().double().requires_grad_() for x in single]
        for got, exact in zip(with_gradients(scan, single), with_gradients(reference, double), strict=True):
            assert (got - exact).abs().max() < 1e-5 * exact.abs().max()


def test_gradients_by_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 1)
    assert torch.autograd.gradcheck(selective_scan, scan_inputs(18, b=1, d=2, s=2))
    monkeypatch.setattr(module, "SSD_BLOCK", 4)
    assert torch.autograd.gradcheck(ssd, ssd_inputs(6))


@pytest.mark.parametrize(("scan", "inputs"), [(selective_scan, scan_inputs), (ssd, ssd_inputs)])
def test_pieces_hand_their_state_on(scan: Scan, inputs: Callable[[int], list[Tensor]]) -> None:
    """Two pieces are the whole, gradients of what comes before the first state included."""

    def in_two(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
        first, state = scan(u[:, :13], dt[:, :13], A, B[:, :13], C[:, :13], initial)
        second, state = scan(u[:, 13:], dt[:, 13:], A, B[:, 13:], C[:, 13:], state)
        return torch.cat([first, second], 1), state

    for pieces, whole in zip(with_gradients(in_two, inputs(30)), with_gradients(scan, inputs(30)), strict=True):
        torch.testing.assert_close(pieces, whole, atol=1e-11, rtol=1e-11)


def test_a_scan_without_states_serves_as_one_with_them() -> None:
    """How mamba_ssm's kernel is called, which begins at zero and gives no gradient to its last state."""

    def stateless(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        y, final = selective_scan(u, dt, A, B, C, u.new_zeros(len(u), *A.shape))
        assert final.shape == (len(u), *A.shape)
        return y

    single = scan_inputs(30, torch.float32)
    double = [x.detach().double().requires_grad_() for x in single]
    found = with_gradients(lambda *inputs: through_stateless(stateless, *inputs), single)
    for got, exact in zip(found, with_gradients(reference_scan, double), strict=True):
        torch.testing.assert_close(got.double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("scan", "inputs"), [(selective_scan, scan_inputs), (ssd, ssd_inputs)])
def test_arithmetic_is_fp32_under_autocast(scan: Scan, inputs: Callable[..., list[Tensor]]) -> None:
    halves = [x.detach().bfloat16().requires_grad_() for x in inputs(40)]
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(scan, halves)
    plain = with_gradients(scan, [x.detach().float().requires_grad_() for x in halves])
    assert found[0].dtype == found[1].dtype == torch.float32
    torch.testing.assert_close(found[:2], plain[:2], atol=0, rtol=0)
    torch.testing.assert_close([g.float() for g in found[2:]], plain[2:], atol=0.05, rtol=0.01)


def test_the_scan_keeps_few_states() -> None:
    """For the backward pass: its inputs, and one state a block, not one a position."""
    inputs = scan_inputs(2048, torch.float32, b=1, d=64, s=16)
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        selective_scan(*inputs)
    states = 2048 * 64 * 16 * 4
    assert sum(kept.values()) - sum(x.nbytes for x in inputs) < states / 100
