"""The optimizer and the learning rate, which is a pure function of the optimizer step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mutoscope.recipe import Optim


def build_optimizers(model: nn.Module, optim: Optim) -> list[torch.optim.Optimizer]:
    """AdamW for all trainable parameters, or Muon for the blocks' matrices and AdamW for the rest.

    Weight decay spares tensors of fewer than two dimensions. Raises ValueError where nothing is trainable, or where
    Muon finds no matrices.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("the model has no trainable parameters")
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
    groups = [g for g in groups if g["params"]]
    optimizers: list[torch.optim.Optimizer] = []
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True))
    if matrices:
        muon = torch.optim.Muon(matrices.values(), lr=optim.muon_lr, weight_decay=optim.weight_decay)
        optimizers.append(muon)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


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
