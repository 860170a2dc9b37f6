"""The moving average of the weights, which is what gets sampled, validated and exported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mutoscope.sharded import local


class EMA:
    """avg ← d·avg + (1 − d)·weights after each optimizer step, in fp32.

    d warms up as (1 + n)/(10 + n), so that an average of few steps is not an average of the initial weights
    (as TensorFlow's ExponentialMovingAverage does with num_updates). Buffers and frozen weights are taken as they are.
    Of sharded weights each process averages its own part.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.averages = {name: p.detach().clone().float() for name, p in trained(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after optimizer step `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        params = [local(p.detach()).float() for p in trained(model).values()]
        torch._foreach_lerp_([local(average) for average in self.averages.values()], params, 1 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model carries the averages inside the block."""
        params = trained(model)  # once: after an error in a sharded model, others may stand in their place
        with torch.no_grad():
            kept = {name: p.detach().clone() for name, p in params.items()}
            _copy(self.averages, params)
        try:
            yield
        finally:
            with torch.no_grad():
                _copy(kept, params)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not frozen, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _copy(values: dict[str, Tensor], params: dict[str, nn.Parameter]) -> None:
    for name, p in params.items():
        local(p.detach()).copy_(local(values[name]))
