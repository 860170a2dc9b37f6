"""The recurrences of Mamba, over whole sequences: each begins at a state and ends at one, so that a sequence can be
computed piece by piece.

    selective_scan  Mamba-1 (arXiv:2312.00752 §3): a decay for each channel and number of the state. A loop over
                    positions, forwards and backwards, that keeps one state in a few dozen positions.
    ssd             Mamba-2 (arXiv:2405.21060 §6): one decay for each head, so that all is matrix products.

Both compute in fp32, or in fp64 where they get that. On CUDA they are mamba_ssm's kernels where that is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

BLOCK_ELEMENTS = 1 << 18
"""Numbers of state that the scan works on at a time, of all positions of a block: what a core's cache holds."""
SSD_BLOCK = 64
"""Positions of a block of `ssd`. Work grows with it, and the loop over blocks shrinks."""
_SSD_KERNEL = find_spec("mamba_ssm") is not None
_SCAN_KERNEL = _SSD_KERNEL and find_spec("selective_scan_cuda") is not None  # newer builds leave it out unless asked


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or as it is in fp64."""
    return x if x.dtype == torch.float64 else x.float()


def selective_scan(
    u: Float[Tensor, "b n d"],
    dt: Float[Tensor, "b n d"],
    A: Float[Tensor, "d s"],
    B: Float[Tensor, "b n s"],
    C: Float[Tensor, "b n s"],
    initial: Float[Tensor, "b d s"],
) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b d s"]]:
    """h_i = exp(dt_i·A)·h_{i−1} + dt_i·u_i·B_i from h_{−1} = `initial` -> (y_i = h_i·C_i, the last h).

    dt is positive and A negative. Both results have gradients, to all of the arguments. Source: mamba_ssm's
    `selective_scan_ref` (without D, z and softplus, which are no part of the recurrence).
    """
    with torch.autocast(u.device.type, enabled=False):
        u, dt, A, B, C, initial = (at_least_fp32(x) for x in (u, dt, A, B, C, initial))
        if u.is_cuda and _SCAN_KERNEL:
            return through_stateless(_kernel, u, dt, A, B, C, initial)
        y, final, _ = _scan(u, dt, A, B, C, initial)
    return y, final


# ---------------------------------------------------------------- our scan: one operator, opaque to the compiler


@torch.library.custom_op(
    "mutoscope::selective_scan",
    mutates_args=(),
    schema="(Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor initial) -> (Tensor, Tensor, Tensor)",
)
def _scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(y, final state, the states (blocks, b, d, s) that blocks begin at)."""
    y, (blocks, size) = torch.empty_like(u), _blocks(u, A)
    starts = initial.new_empty(blocks, *initial.shape)
    state = initial
    for i in range(blocks):
        starts[i] = state
        here = slice(i * size, (i + 1) * size)
        _, states = _states(u[:, here], dt[:, here], A, B[:, here], state)
        y[:, here] = (states[1:] @ _first(C[:, here]).unsqueeze(-1)).squeeze(-1).transpose(0, 1)
        state = states[-1]
    return y, state.clone(), starts


def _states(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Of one block: the decays (n, b, d, s), and the states (n + 1, b, d, s) from `start` on."""
    dt = _first(dt)
    decays = (dt[..., None] * A).exp_()
    states = torch.empty(len(dt) + 1, *start.shape, dtype=start.dtype, device=start.device)
    states[0] = start
    torch.mul((dt * _first(u))[..., None], _first(B)[:, :, None], out=states[1:])
    rows = states.unbind()
    for i, decay in enumerate(decays.unbind()):
        rows[i + 1].addcmul_(decay, rows[i])
    return decays, states


@torch.library.custom_op(
    "mutoscope::selective_scan_backward",
    mutates_args=(),
    schema="(Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor starts, Tensor dy, Tensor dfinal) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _scan_backward(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor, dy: Tensor, dfinal: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt, A, B, C and the initial state. With g_i = ∂L/∂h_i = dy_i·C_i + exp(dt_{i+1}·A)·g_{i+1}, the
    gradient of the decay is g_i·h_{i−1}, and that of dt_i·u_i·B_i is g_i."""
    du, ddt, dA, dB, dC = (torch.empty_like(x) for x in (u, dt, A, B, C))
    dA.zero_()
    blocks, size = _blocks(u, A)
    carried = dfinal.clone()
    for i in reversed(range(blocks)):
        here = slice(i * size, (i + 1) * size)
        decays, states = _states(u[:, here], dt[:, here], A, B[:, here], starts[i])
        u_i, dt_i, B_i, C_i, dy_i = (_first(x[:, here]) for x in (u, dt, B, C, dy))
        g = dy_i[..., None] * C_i[:, :, None]
        rows, decay_rows = g.unbind(), decays.unbind()
        rows[-1].add_(carried)
        for j in range(len(rows) - 2, -1, -1):
            rows[j].addcmul_(decay_rows[j + 1], rows[j + 1])
        carried = decay_rows[0] * rows[0]

        dC[:, here] = (dy_i.unsqueeze(-2) @ states[1:]).squeeze(-2).transpose(0, 1)
        exponent = decays.mul_(g).mul_(states[:-1])  # the gradient of dt·A
        along = (g @ B_i.unsqueeze(-1)).squeeze(-1)  # of dt·u
        du[:, here] = (along * dt_i).transpose(0, 1)
        dB[:, here] = ((dt_i * u_i).unsqueeze(-2) @ g).squeeze(-2).transpose(0, 1)
        ddt[:, here] = (along * u_i + torch.mul(exponent, A, out=g).sum(-1)).transpose(0, 1)
        dA += exponent.mul_(dt_i[..., None]).sum((0, 1))
    return du, ddt, dA, dB, dC, carried


def _first(x: Tensor) -> Tensor:
    """(b, n, d) -> (n, b, d): the positions first, so that what a step touches lies together."""
    return x.transpose(0, 1).contiguous()


def _blocks(u: Tensor, A: Tensor) -> tuple[int, int]:
    """(blocks of a sequence, positions of each)."""
    b, n, _ = u.shape
    size = min(n, max(16, BLOCK_ELEMENTS // (b * A.numel())))
    return -(-n // size), size


@_scan.register_fake
def _(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    blocks, _size = _blocks(u, A)
    return torch.empty_like(u), torch.empty_like(initial), initial.new_empty(blocks, *initial.shape)


@_scan_backward.register_fake
def _(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor, dy: Tensor, dfinal: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    e = torch.empty_like
    return e(u), e(dt), e(A), e(B), e(C), e(dfinal)


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5], output[2])
    ctx.mark_non_differentiable(output[2])


def _gradients(ctx: torch.autograd.function.FunctionCtx, dy: Tensor, dfinal: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    u, dt, A, B, C, starts = ctx.saved_tensors  # type: ignore[attr-defined]
    gradients: tuple[Tensor, ...] = _scan_backward(u, dt, A, B, C, starts, dy, dfinal)
    return gradients


_scan.register_autograd(_gradients, setup_context=_keep)


# ---------------------------------------------------------------- mamba_ssm's kernels


def _kernel(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """y of mamba_ssm's kernel, which wants positions last."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    last = lambda x: x.transpose(1, 2).contiguous()
    y: Tensor = selective_scan_fn(last(u), last(dt), A, last(B), last(C))
    return y.transpose(1, 2)


def through_stateless(
    scan: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor],
    u: Float[Tensor, "b n d"],
    dt: Float[Tensor, "b n d"],
    A: Float[Tensor, "d s"],
    B: Float[Tensor, "b n s"],
    C: Float[Tensor, "b n s"],
    initial: Float[Tensor, "b d s"],
) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b d s"]]:
    """`selective_scan` by a scan that begins at zero and whose last state has no gradient, as mamba_ssm's.

    s positions before the others put the initial state in, one number of each channel's after the other: B is a unit
    vector, and dt so small that nothing decays (exp(2⁻⁴⁰·A) is 1 in fp32), while u makes up for it exactly. s positions
    behind them, of dt = 0, read the last state: C is a unit vector.
    """
    b, n, d = u.shape
    size, tiny = A.shape[1], 2.0**-40
    units = torch.eye(size, dtype=u.dtype, device=u.device).expand(b, -1, -1)
    nothing, none = torch.zeros_like(units), u.new_zeros(b, size, d)
    y = scan(
        torch.cat([initial.transpose(1, 2) / tiny, u, none], dim=1),
        torch.cat([torch.full_like(none, tiny), dt, none], dim=1),
        A,
        torch.cat([units, B, nothing], dim=1),
        torch.cat([nothing, C, units], dim=1),
    )
    return y[:, size : size + n], y[:, size + n :].transpose(1, 2)


# ---------------------------------------------------------------- Mamba-2


def ssd(
    x: Float[Tensor, "b n h p"],
    dt: Float[Tensor, "b n h"],
    A: Float[Tensor, "h"],
    B: Float[Tensor, "b n s"],
    C: Float[Tensor, "b n s"],
    initial: Float[Tensor, "b h p s"],
) -> tuple[Float[Tensor, "b n h p"], Float[Tensor, "b h p s"]]:
    """h_i = exp(dt_i·A)·h_{i−1} + dt_i·x_i⊗B_i from h_{−1} = `initial` -> (y_i = h_i·C_i, the last h), for each head.

    Within blocks of positions as attention with decays, between them as a recurrence of states (state space duality).
    Source: arXiv:2405.21060 listing 1, with one group of B and C for all heads.
    """
    with torch.autocast(x.device.type, enabled=False):
        x, dt, A, B, C, initial = (at_least_fp32(v) for v in (x, dt, A, B, C, initial))
        if x.is_cuda and _SSD_KERNEL:
            from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

            one_group = lambda v: v.unsqueeze(2).contiguous()
            y, final = mamba_chunk_scan_combined(
                x.contiguous(), dt.contiguous(), A, one_group(B), one_group(C), chunk_size=256,
                initial_states=initial.contiguous(), return_final_states=True,
            )  # fmt: skip
            return y, final
        return _ssd(x, dt, A, B, C, initial)


def _ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    n = x.shape[1]
    size = min(n, SSD_BLOCK)
    # Where dt = 0 nothing decays and nothing comes in: padding leaves the last state as it is
    padding = -n % size
    heads_first = lambda v: v.unflatten(1, (-1, size)).movedim(3, 2)
    pad = lambda v: F.pad(v, [0, 0] * (v.ndim - 2) + [0, padding]) if padding else v
    inputs = heads_first(pad(x * dt[..., None]))  # (b, c, h, q, p)
    decay = heads_first(pad(dt * A)).cumsum(-1)  # (b, c, h, q): logarithms, from the block's start on
    B, C = (pad(v).unflatten(1, (-1, size)).unsqueeze(2) for v in (B, C))  # (b, c, 1, q, s)

    # 1. Within a block: position i sees j ≤ i by C_i·B_j, decayed from j to i
    later = torch.ones(size, size, dtype=torch.bool, device=x.device).triu(1)
    between = (decay[..., :, None] - decay[..., None, :]).masked_fill(later, -torch.inf).exp()
    y = (C @ B.transpose(-1, -2) * between) @ inputs  # (b, c, h, q, p)

    # 2. From block to block: what a block adds to the state, decayed to its end
    added = (inputs * (decay[..., -1:] - decay).exp()[..., None]).transpose(-1, -2) @ B  # (b, c, h, p, s)
    kept = decay[..., -1].exp()[..., None, None]
    states = [initial]
    for i in range(added.shape[1]):
        states.append(added[:, i] + kept[:, i] * states[-1])

    # 3. What a block's positions see of the state that it begins at
    seen = C @ torch.stack(states[:-1], dim=1).transpose(-1, -2)  # (b, c, h, q, p)
    y = y + seen * decay.exp()[..., None]
    return y.movedim(2, 3).flatten(1, 2)[:, :n], states[-1]
