"""Next-token prediction: cross-entropy of each token given those before it, for every model over tokens alike.

Losses are in nats per token. The logits may come in bf16; their softmax is fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mutoscope.randomness import Draw
from mutoscope.recipe import ObjectiveConfig
from mutoscope.types import Batch, Cond, Loss


@dataclass(frozen=True, kw_only=True)
class NextToken(ObjectiveConfig):
    """Learn to tell the next token of a clip, in raster order (t, h, w)."""

    cond_dropout: float = 0.1
    """Share of samples that train without their condition, for classifier-free guidance."""
    window: int = 0
    """Positions of a training sample, from a random place of the clip; 0 takes all of them. For clips that are too
    long for a model's attention (minisora's block_size)."""
    only_last: bool = False
    """Count the last position of each window alone (minisora's only_predict_last)."""

    def __post_init__(self) -> None:
        if not 0 <= self.cond_dropout <= 1 or self.window < 0:
            raise ValueError(f"objective: cond_dropout={self.cond_dropout} must be from 0 to 1, "
                             f"window={self.window} at least 0")  # fmt: skip
        if self.only_last and not self.window:
            raise ValueError("objective.only_last counts the last position of a window: set objective.window")

    def loss(self, model: nn.Module, batch: Batch, draw: Draw) -> Loss:
        """Mean cross-entropy over the positions of one window per sample."""
        tokens = _tokens(batch)
        cond = batch.cond.dropped(draw.uniform() < self.cond_dropout)
        if not self.window or self.window >= tokens[0].numel():
            return _loss(self._nats(model, tokens, cond, None))
        return _loss(self._nats(model, tokens, cond, self._starts(draw.uniform(), tokens[0].numel())))

    def validation_loss(self, model: nn.Module, batch: Batch, draw: Draw) -> Loss:
        """The same over all positions, in windows end to end, with no condition dropped."""
        tokens = _tokens(batch)
        total = tokens[0].numel()
        if not self.window or self.window >= total:
            return _loss(self._nats(model, tokens, batch.cond, None))
        # Windows are of one length: the last one starts early, and what the one before it has counted is left out
        firsts = [min(first, total - self.window) for first in range(0, total, self.window)]
        nats = [self._nats(model, tokens, batch.cond, tokens.new_full((len(tokens),), first)) for first in firsts]
        if not self.only_last and total % self.window:
            nats[-1] = nats[-1][:, -(total % self.window) :]
        return _loss(torch.cat(nats, dim=1))

    def _starts(self, quantile: Float[Tensor, "b"], total: int) -> Int[Tensor, "b"]:
        """Where windows start. Those that would reach beyond an end of the clip are moved to it: so every position is
        seen about as often as any other, the first too, from which sampling starts."""
        start = (quantile * (total + self.window - 1)).long() - (self.window - 1)
        return start.clamp(0, total - self.window)

    def _nats(
        self, model: nn.Module, tokens: Int[Tensor, "b t h w"], cond: Cond, start: Int[Tensor, "b"] | None
    ) -> Float[Tensor, "b n"]:
        """−log p of each token of the window."""
        flat = tokens.flatten(1)
        if start is None:
            logits, targets = model(tokens, cond), flat
        else:
            logits = model(tokens, cond, start, self.window)
            targets = flat.gather(1, start[:, None] + torch.arange(self.window, device=flat.device))
        if self.only_last:
            logits, targets = logits[:, -1:], targets[:, -1:]
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view(targets.shape)


def _loss(nats: Float[Tensor, "b n"]) -> Loss:
    per_sample = nats.mean(1)
    return Loss(total=per_sample.mean(), per_sample=per_sample.detach(), parts={})


def _tokens(batch: Batch) -> Int[Tensor, "b t h w"]:
    if batch.tokens is None:
        raise ValueError("this objective learns tokens, and the batch holds none: the recipe needs an autoencoder with "
                         "codes (of vq, ema_vq, kl_vq, fsq or lfq)")  # fmt: skip
    return batch.tokens
