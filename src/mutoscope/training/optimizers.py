"""The optimizer, the norm of its gradients, and the learning rate, which is a pure function of the optimizer step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from mutoscope.recipe import Optim
from mutoscope.sharded import is_sharded, local, sum_over_parts
from mutoscope.training.copies import Copies
from mutoscope.training.per_parameter import PerParameter
from mutoscope.training.update_rules import Rule, adamw, came, prodigy
from mutoscope.types import DTYPES

SHARDED = ("adamw",)
"""Optimizers of weights that are held in parts. The others' state is of blocks, rows and columns, or sums of whole
weights, and would be another for each number of processes. torch's Muon runs on parts, but its steps, products in bf16,
come out 10 to 30 % away from those of whole matrices."""


def cast_trained(model: nn.Module, weights: str) -> None:
    """Keep the weights that are trained in "fp32" or "bf16", in place; buffers and frozen weights stay as they are."""
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(DTYPES[weights])


def build_optimizers(
    model: nn.Module, optim: Optim, seed: int = 0, copies: Copies | None = None
) -> list[torch.optim.Optimizer]:
    """The optimizer of all trainable parameters; for Muon two, its own of the blocks' matrices and AdamW of the rest.

    Weight decay spares tensors of fewer than two dimensions. seed: of stochastic rounding. copies: as in
    `offload.place`.

    Raises ValueError where nothing is trainable, where weights that are trained are neither fp32 nor bf16, where there
    are no bf16 weights to round, where Muon finds no matrices or finds them in bf16, where gradients are to be
    released on several processes, and where sharded weights are for an optimizer that has to see them whole.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    _check(params, optim)
    matrices: dict[str, Tensor] = {}
    if optim.name == "muon":
        matrices = {n: p for n, p in params.items() if p.ndim == 2 and n.startswith("blocks.")}
        if not matrices:
            raise ValueError("optim.name = muon, but the model has no matrices in its blocks; use adamw")
    rest = {n: p for n, p in params.items() if n not in matrices}
    groups = [
        {"params": [p for p in rest.values() if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in rest.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [g | {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps} for g in groups if g["params"]]
    optimizers: list[torch.optim.Optimizer] = []
    if groups:
        optimizers.append(_optimizer(groups, optim, seed, copies))
    if matrices:
        muon = torch.optim.Muon(matrices.values(), lr=optim.muon_lr, weight_decay=optim.weight_decay)
        optimizers.append(muon)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def _check(params: dict[str, nn.Parameter], optim: Optim) -> None:
    if not params:
        raise ValueError("the model has no trainable parameters")
    dtypes = {p.dtype for p in params.values()}
    if odd := dtypes - {torch.float32, torch.bfloat16}:
        raise ValueError(f"weights that are trained must be fp32 or bf16, this model has {', '.join(map(str, odd))}")
    if optim.stochastic_rounding and torch.bfloat16 not in dtypes:
        raise ValueError("optim.stochastic_rounding: the weights that are trained are fp32, there is nothing to round; "
                         "set it to false, or weights = bf16")  # fmt: skip
    if optim.name == "muon" and torch.bfloat16 in dtypes:
        raise ValueError("optim.name = muon trains fp32 weights, these are bf16; set weights = fp32, or use adamw")
    if is_sharded(params) and optim.name not in SHARDED:
        raise ValueError(f"optim.name = {optim.name}: looks at whole weights, and these are held in parts; with "
                         f"parallel.strategy = fsdp2, take {' or '.join(SHARDED)}")  # fmt: skip
    if optim.release_gradients and dist.is_initialized():
        raise ValueError("optim.release_gradients: DDP averages gradients over the processes before a step can be "
                         "taken; run one process, or set release_gradients = false")  # fmt: skip


def _optimizer(groups: list[dict[str, Any]], optim: Optim, seed: int, copies: Copies | None) -> torch.optim.Optimizer:
    params = [p for group in groups for p in group["params"]]
    device = torch.device("cpu") if optim.offload else params[0].device
    match optim.name:
        case "adamw" | "muon":
            moved = optim.offload or optim.release_gradients
            if not moved and all(p.dtype == torch.float32 for p in params):
                return torch.optim.AdamW(groups, fused=True)
            rule: Rule = adamw(32, device)
        case "adamw8bit":
            rule = adamw(8, device)
        case "adamw4bit":
            rule = adamw(4, device)
        case "came":
            rule = came(device)
        case "prodigy":
            rule = prodigy(device)
    optimizer = PerParameter(
        groups, rule, stochastic=optim.stochastic_rounding, offload=optim.offload, seed=seed, copies=copies
    )
    if optim.release_gradients:
        optimizer.release()
    return optimizer


def gradient_norms(optimizers: Sequence[torch.optim.Optimizer]) -> dict[nn.Parameter, Float[Tensor, ""]]:
    """The norm of each parameter's gradient, fp32, of those that have one: wherever it lies, and also where the step
    has been taken already."""
    gradients = dict(_gradients(optimizers))
    norms: dict[nn.Parameter, Tensor] = {}
    if gradients:
        of_parts = torch._foreach_norm([local(g) for g in gradients.values()], 2, torch.float32)
        of_whole = of_parts
        if is_sharded({"": next(iter(gradients))}):  # all of them alike, and so by one message
            of_whole = sum_over_parts(torch.stack(of_parts).square(), next(iter(gradients))).sqrt().unbind()
        norms = dict(zip(gradients, of_whole, strict=True))
    for optimizer in optimizers:
        norms |= optimizer.released if isinstance(optimizer, PerParameter) else {}
    return norms


def clip_gradients(
    optimizers: Sequence[torch.optim.Optimizer], norms: dict[nn.Parameter, Float[Tensor, ""]], limit: float
) -> Float[Tensor, ""]:
    """Scale all gradients down together where their norm is above `limit` (0: never), as `nn.utils.clip_grad_norm_`
    does, and return the norm before that, taken of `gradient_norms`."""
    norm = torch.linalg.vector_norm(torch.stack(list(norms.values())))
    gradients = [local(g) for _, g in _gradients(optimizers)]
    if limit and gradients:
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, scale)
    return norm


def _gradients(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[tuple[nn.Parameter, Tensor]]:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                gradient = optimizer.gradient(p) if isinstance(optimizer, PerParameter) else p.grad
                if gradient is not None:
                    yield p, gradient


def set_learning_rates(optimizers: list[torch.optim.Optimizer], optim: Optim, step: int, steps: int) -> float:
    """Set every group's rate for optimizer step `step` (counted from 0) and return the first's."""
    scale = lr_scale(optim, step, steps)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale
    return optimizers[0].param_groups[0]["lr"]


def lr_scale(optim: Optim, step: int, steps: int) -> float:
    """The learning rate at step `step` of `steps`, as a fraction of its peak."""
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    done = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    match optim.schedule:
        case "constant":
            return 1.0
        case "linear":
            shape = 1 - done
        case "cosine":
            shape = 0.5 * (1 + math.cos(math.pi * done))
    return optim.final_lr + (1 - optim.final_lr) * shape
