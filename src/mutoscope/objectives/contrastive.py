"""Contrastive learning: each video is to tell its caption from those of all others, and the other way round
(symmetric InfoNCE: CLIP, arXiv:2103.00020 figure 3).

A sample's negatives are all other samples of the same micro-step, those of other processes among them: with W processes
of batch_size b there are W·b − 1, and the gradient is that of one process with all W·b. Other micro-steps give no
negatives: `accumulate` averages gradients of smaller comparisons, and does not stand in for a larger batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mutoscope.metrics.retrieval import recall
from mutoscope.models.clip import MAX_SCALE, ClipModel
from mutoscope.randomness import Draw
from mutoscope.recipe import ObjectiveConfig
from mutoscope.sharded import local
from mutoscope.types import Batch, Loss


@dataclass(frozen=True, kw_only=True)
class Contrastive(ObjectiveConfig):
    """Learn which caption belongs to which video."""

    def loss(self, model: nn.Module, batch: Batch, draw: Draw) -> Loss:
        """Mean of the cross-entropies of caption given video and of video given caption, in nats. Nothing is drawn."""
        if batch.latents is None:
            raise ValueError("this objective compares videos, in pixels or latents, and the batch holds tokens; take "
                             "an autoencoder without codes, or none")  # fmt: skip
        video, text, scale = model(batch.latents, batch.cond)
        width = video.shape[1]
        everyone = batch.gather(torch.cat([video, text], dim=1))
        with torch.autocast(video.device.type, enabled=False):  # a softmax over cosines times 100 wants fp32
            to_texts = scale * video @ everyone[:, width:].T
            to_videos = scale * text @ everyone[:, :width].T
        own = torch.arange(len(video), device=video.device)
        per_sample = torch.stack([F.cross_entropy(x, own, reduction="none") for x in (to_texts, to_videos)]).mean(0)
        return Loss(
            total=per_sample.mean(),
            per_sample=per_sample.detach(),
            parts={
                "accuracy": (to_videos.detach().argmax(1) == own).float().mean(),
                "temperature": 1 / scale.detach().squeeze(0),
            },
            rows=torch.cat([scale * video, text], dim=1).detach(),
        )

    def over_all(self, rows: Float[Tensor, "n d"]) -> dict[str, Tensor]:
        """The loss of all these samples in one batch, and how often each finds its partner among them."""
        videos, texts = rows.chunk(2, dim=1)
        logits = videos @ texts.T
        own = torch.arange(len(rows), device=rows.device)
        return {"loss": (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2} | recall(logits)

    def after_step(self, model: nn.Module, all_reduce: Callable[[Tensor], Tensor], skipped: bool = False) -> None:
        """Take a temperature that fell below 0.01 back to it, from where it can rise again. (Of DeepSpeed's weights
        these are copies: there, one that has fallen so far stays at 0.01.)"""
        assert isinstance(model, ClipModel)
        with torch.no_grad():
            local(model.log_scale).clamp_(max=math.log(MAX_SCALE))
