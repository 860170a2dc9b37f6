"""Reconstruction: what an autoencoder learns, with the seed's (minisora's) losses in the seed's units.

    total = reconstruction + kl_loss_weight·kl + codebook + commitment_cost·commitment
            + low_utilization_cost·low_utilization + entropy_weight·entropy

where each term is there if the bottleneck has it. The reconstruction's squared error is of pixels in [-0.5, 0.5], as
the seed has them: a quarter of what it is in [-1, 1]. So the weights of the other terms mean what they mean there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mutoscope.autoencoders.bottlenecks import codebook_usage
from mutoscope.autoencoders.conv import ConvAutoencoder, ConvAutoencoderModel, Reconstructed
from mutoscope.metrics.reconstruction import SSIM_WINDOW, ssim
from mutoscope.randomness import Draw
from mutoscope.recipe import ObjectiveConfig
from mutoscope.types import Batch, Loss


@dataclass(frozen=True, kw_only=True)
class Reconstruction(ObjectiveConfig):
    """Learn to encode and decode. A term that the autoencoder's bottleneck lacks weighs nothing."""

    kl_loss_weight: float = 1.0
    """Weight of the KL divergence, which is a mean over the latents (of kl, kl_vq). For a weight of the usual sum over
    latents beside a mean over pixels, multiply by the number of latents per clip."""
    commitment_cost: float = 0.25
    """Weight that pulls the encoder's outputs to their codes (of vq, kl_vq, ema_vq, lfq)."""
    low_utilization_cost: float = 0.0
    """Weight that pulls every code to the encoder's output nearest to it (of vq, kl_vq), so that none is idle."""
    reinit_every_n_epochs: int = 0
    """Every so many epochs, codes that the epoch never chose replace themselves by copies of those that it did (of vq,
    kl_vq); 0 never."""
    entropy_weight: float = 0.1
    """Weight of E[H(code|z)] − H(E[code]) (of lfq), the latter over a micro-batch."""

    def __post_init__(self) -> None:
        weights = (
            "kl_loss_weight",
            "commitment_cost",
            "low_utilization_cost",
            "reinit_every_n_epochs",
            "entropy_weight",
        )
        for name in weights:
            if not getattr(self, name) >= 0:
                raise ValueError(f"objective.{name}={getattr(self, name)}: must be 0 or more")

    def loss(self, model: nn.Module, batch: Batch, draw: Draw) -> Loss:
        """The terms above; those of codes that are summed over a batch (low utilisation, entropy) over this one."""
        video = _video(batch)
        config = self._config(model)
        grid = config.spec.latent_shape(video.shape[2], video.shape[3], video.shape[4])
        noise = draw.normal(config.latent_channels, *grid)
        out = model(video, noise=noise, low_utilization=self.low_utilization_cost > 0)
        return self._loss(video, out)

    def validation_loss(self, model: nn.Module, batch: Batch, draw: Draw) -> Loss:
        """The same with nothing random: the posterior's mean, no noise on the latents. SSIM is among the parts, but for
        frames smaller than its window."""
        video = _video(batch)
        self._config(model)
        out = model(video)
        loss = self._loss(video, out)
        if min(video.shape[-2:]) < SSIM_WINDOW:
            return loss
        return replace(loss, parts=loss.parts | {"ssim": ssim(out.video.float(), video).mean()})

    def _config(self, model: nn.Module) -> ConvAutoencoder:
        """The model's configuration. Raises ValueError where a field of this objective would do nothing."""
        module = getattr(model, "module", model)  # DDP wraps the model
        if not isinstance(module, ConvAutoencoderModel):
            raise ValueError(f"the reconstruction objective trains a ConvAutoencoder, not a {type(module).__name__}")
        if module.config.bottleneck not in ("vq", "kl_vq"):
            for name in ("low_utilization_cost", "reinit_every_n_epochs"):
                if getattr(self, name):
                    raise ValueError(
                        f"objective.{name}={getattr(self, name)} needs a codebook that is learned by gradient "
                        f"(model.bottleneck vq or kl_vq), not model.bottleneck={module.config.bottleneck!r}"
                    )
        return module.config

    def _loss(self, video: Tensor, out: Reconstructed) -> Loss:
        error = (out.video.float() - video).square().flatten(1).mean(1)
        parts = {"reconstruction": error / 4}
        total = error / 4
        if out.kl is not None:
            parts["kl"] = out.kl
            total = total + self.kl_loss_weight * out.kl
        if out.low_utilization is not None:
            parts["low_utilization"] = out.low_utilization
            total = total + self.low_utilization_cost * out.low_utilization
        if (codes := out.quantized) is not None:
            if codes.codebook is not None:
                total = total + codes.codebook  # of the same value as the commitment, with another gradient
            if codes.commitment is not None:
                parts["commitment"] = codes.commitment
                total = total + self.commitment_cost * codes.commitment
            if codes.entropy is not None:
                parts["entropy"] = codes.entropy
                total = total + self.entropy_weight * codes.entropy
            if codes.counts is not None:
                parts["codebook_usage"], parts["perplexity"] = codebook_usage(codes.counts)
        parts["psnr"] = -10 * torch.log10(error.detach() / 4)
        return Loss(
            total=total.mean(),
            per_sample=total.detach(),
            parts={name: value.detach().mean() for name, value in parts.items()},
        )

    def after_step(self, model: nn.Module, all_reduce: Callable[[Tensor], Tensor], skipped: bool = False) -> None:
        """Update the statistics of a codebook, and the codebook itself if it is one of moving averages."""
        assert isinstance(model, ConvAutoencoderModel)
        model.after_step(all_reduce, skipped)

    def after_epoch(self, model: nn.Module, epoch: int, all_reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Usage and perplexity of the codes over the whole epoch and all processes; reinitialise if it is time."""
        assert isinstance(model, ConvAutoencoderModel)
        every = self.reinit_every_n_epochs
        return model.after_epoch(epoch, reinit=every > 0 and (epoch + 1) % every == 0)


def _video(batch: Batch) -> Tensor:
    if batch.video is None:
        raise ValueError("reconstruction learns from pixels; this batch holds latents or tokens (unset data.latents)")
    return batch.video
