"""What optimizers do to one parameter: AdamW with state in 32, 8 or 4 bits, CAME, Prodigy.

A rule sees fp32 numbers only, a contiguous weight and its gradient. Where they come from, in which precision the
network holds them and where the state lies is `per_parameter.PerParameter`'s business.

Bytes of state for each number of a weight: AdamW 8, in 8 bits 2, in 4 bits 1; CAME 4; Prodigy 16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw as fused_adamw

from mutoscope.training.low_bit import Bits, Format

State = dict[str, Tensor]
"""All tensors, so that a checkpoint can hold them; "step", a scalar on the CPU, counts from 1."""
Group = dict[str, Any]
"""lr, betas, eps and weight_decay, which is decoupled (arXiv:1711.05101)."""

CHUNK = 1 << 22
"""Numbers that low-bit AdamW unpacks at a time, whole blocks of any format; each takes 30 bytes of scratch memory."""


@dataclass(frozen=True)
class Rule:
    """An optimizer, as seen by one parameter."""

    new_state: Callable[[Tensor], State]
    """The state, but for "step", of a weight (in the precision that it is kept in)."""
    update: Callable[[Tensor, Tensor, State, Group], None]
    """Take a step: (weight, changed in place; gradient, unchanged; state, changed in place; group)."""
    finish: Callable[[], None] | None = None
    """Called when all parameters have taken a step."""


# ---------------------------------------------------------------- AdamW


def adamw(bits: Literal[4, 8, 32], device: torch.device) -> Rule:
    """AdamW. In 32 bits the numbers are those of ``torch.optim.AdamW(fused=True)``."""
    if bits == 32:
        return Rule(new_state=lambda weight: _moments(weight, device), update=_adamw)
    first, second = Format(bits, signed=True, device=device), Format(bits, signed=False, device=device)

    def new_state(weight: Tensor) -> State:
        if not first.fits(weight.numel()):
            return _moments(weight, device)
        state: State = {}
        for name, form in (("exp_avg", first), ("exp_avg_sq", second)):
            state[name], state[f"{name}_scale"] = form.zeros(weight.numel())
        return state

    def update(w: Tensor, g: Tensor, state: State, group: Group) -> None:
        if "exp_avg_scale" not in state:
            return _adamw(w, g, state, group)
        beta1, beta2 = group["betas"]
        correction1, correction2 = _corrections(state, group)
        for some_w, some_g, part in _chunks(w, g, state, bits):
            m = first.decode(part["exp_avg"], part["exp_avg_scale"]).lerp_(some_g, 1 - beta1)
            v = second.decode(part["exp_avg_sq"], part["exp_avg_sq_scale"]).mul_(beta2)
            v.addcmul_(some_g, some_g, value=1 - beta2)
            for name, form, moment in (("exp_avg", first, m), ("exp_avg_sq", second, v)):
                codes, scale = form.encode(moment)
                part[name].copy_(codes)
                part[f"{name}_scale"].copy_(scale)
            some_w.mul_(1 - group["lr"] * group["weight_decay"])
            some_w.addcdiv_(m.div_(correction1), v.div_(correction2).sqrt_().add_(group["eps"]), value=-group["lr"])

    return Rule(new_state=new_state, update=update)


def _moments(weight: Tensor, device: torch.device) -> State:
    return {name: torch.zeros(weight.shape, device=device) for name in ("exp_avg", "exp_avg_sq")}


def _adamw(w: Tensor, g: Tensor, state: State, group: Group) -> None:
    # The kernel counts the step itself, on the weight's device
    step = (state["step"] - 1).to(w.device, non_blocking=True)
    fused_adamw([w], [g], [state["exp_avg"]], [state["exp_avg_sq"]], [], [step], fused=True, amsgrad=False,
                beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"],
                eps=group["eps"], maximize=False)  # fmt: skip


def _corrections(state: State, group: Group) -> tuple[Tensor, Tensor]:
    """1 − β^step: scalars on the CPU, which kernels of any device take as arguments."""
    step = state["step"].double()
    return 1 - group["betas"][0] ** step, 1 - group["betas"][1] ** step


def _chunks(w: Tensor, g: Tensor, state: State, bits: Bits) -> Iterator[tuple[Tensor, Tensor, State]]:
    """Views of CHUNK numbers of the weight and the gradient, and of what stands for those in the state."""
    w, g, size = w.view(-1), g.view(-1), len(state["exp_avg_scale"])
    for start in range(0, len(w), CHUNK):
        stop, block = min(start + CHUNK, len(w)), len(w) // size
        part = {}
        for name in ("exp_avg", "exp_avg_sq"):
            part[name] = state[name][start * bits // 8 : stop * bits // 8]
            part[f"{name}_scale"] = state[f"{name}_scale"][start // block : stop // block]
        yield w[start:stop], g[start:stop], part


# ---------------------------------------------------------------- CAME

CAME_BETA3 = 0.9999
"""Decay of the instability's mean; with the two floors and the clip below, the paper's and its authors' choice."""
_FLOOR_GRADIENT, _FLOOR_INSTABILITY, _CLIP = 1e-30, 1e-16, 1.0


def came(device: torch.device) -> Rule:
    """CAME (arXiv:2307.02047, algorithm 2): the second moment as a row and a column, as in Adafactor, and steps that
    are small where the first moment disagrees with the gradient. The group's eps plays no part."""

    def new_state(weight: Tensor) -> State:
        shape = weight.shape
        state = {"exp_avg": torch.zeros(shape, device=device)}
        if len(shape) < 2:
            return state | {"exp_avg_sq": torch.zeros(shape, device=device)}
        for name in ("exp_avg_sq", "exp_avg_res"):
            state[f"{name}_row"] = torch.zeros(shape[:-1], device=device)
            state[f"{name}_col"] = torch.zeros(shape[:-2] + shape[-1:], device=device)
        return state

    def update(w: Tensor, g: Tensor, state: State, group: Group) -> None:
        beta1, beta2 = group["betas"]
        squares = g.square().add_(_FLOOR_GRADIENT)
        if w.ndim < 2:
            change = state["exp_avg_sq"].lerp_(squares, 1 - beta2).rsqrt()
        else:
            change = _rsqrt_factored(state, "exp_avg_sq", squares, beta2)
        change.mul_(g)
        change.div_((change.norm() / math.sqrt(change.numel()) / _CLIP).clamp_(min=1.0))
        mean = state["exp_avg"].lerp_(change, 1 - beta1)
        w.mul_(1 - group["lr"] * group["weight_decay"])
        if w.ndim < 2:
            w.sub_(mean, alpha=group["lr"])
        else:
            instability = change.sub_(mean).square_().add_(_FLOOR_INSTABILITY)
            confidence = _rsqrt_factored(state, "exp_avg_res", instability, CAME_BETA3)
            w.addcmul_(confidence, mean, value=-group["lr"])

    return Rule(new_state=new_state, update=update)


def _rsqrt_factored(state: State, name: str, values: Tensor, beta: float) -> Tensor:
    """1/√ of the decaying mean of `values`, which is kept as the means of its rows and columns."""
    row = state[f"{name}_row"].lerp_(values.mean(-1), 1 - beta)
    column = state[f"{name}_col"].lerp_(values.mean(-2), 1 - beta)
    return (row / row.mean(-1, keepdim=True)).rsqrt_().unsqueeze(-1) * column.rsqrt().unsqueeze(-2)


# ---------------------------------------------------------------- Prodigy

PRODIGY_D0 = 1e-6
"""Where the estimate of the learning rate starts, from below."""


def prodigy(device: torch.device) -> Rule:
    """Prodigy (arXiv:2306.06101, algorithm 4): AdamW that estimates its own learning rate, d, from how far the weights
    have come, and never lowers the estimate. `Group`'s lr multiplies it and should be about 1.

    As its authors advise for diffusion models: bias correction, and a warm-up or decay of lr leaves d alone
    (their use_bias_correction and safeguard_warmup). β₃ = √β₂. The sums over all parameters stay on the device.
    """
    d = torch.full((), PRODIGY_D0, dtype=torch.float64, device=device)
    numerator, gain, size = (torch.zeros_like(d) for _ in range(3))
    beta3 = 0.0

    def new_state(weight: Tensor) -> State:
        state = {name: torch.zeros(weight.shape, device=device) for name in ("exp_avg", "exp_avg_sq", "s")}
        start = weight.detach().to(device, copy=True, memory_format=torch.contiguous_format)
        return state | {"p0": start, "d": d, "numerator": numerator}  # the last two are everyone's

    def update(w: Tensor, g: Tensor, state: State, group: Group) -> None:
        nonlocal beta3
        beta1, beta2 = group["betas"]
        beta3 = math.sqrt(beta2)
        correction1, correction2 = _corrections(state, group)
        rate = d * (group["lr"] * correction2.sqrt() / correction1).to(d.device, non_blocking=True)
        # 1. What tells of d: have the weights come far along the gradients?
        gain.add_(d / PRODIGY_D0 * rate * (g * (state["p0"].float() - w)).sum())
        s = state["s"].mul_(beta3).add_(g * (d / PRODIGY_D0 * d))
        size.add_(s.abs().sum())
        # 2. AdamW's step at that rate
        m = state["exp_avg"].mul_(beta1).add_(g * (d * (1 - beta1)))
        v = state["exp_avg_sq"].mul_(beta2).add_(g.square() * (d * d * (1 - beta2)))
        change = m.div(v.sqrt().add_(d * group["eps"])).add_(w, alpha=group["weight_decay"])
        w.sub_(change.mul_(rate))  # at once: the first steps are so small that fp32 would lose much of two

    def finish() -> None:
        numerator.mul_(beta3).add_(gain)
        d.copy_(torch.where(size > 0, torch.maximum(d, numerator / size), d))
        gain.zero_()
        size.zero_()

    return Rule(new_state=new_state, update=update, finish=finish)
