"""Autoencoders of images, applied to a video frame by frame: Stable Diffusion's (arXiv:2112.10752 §3.1), as
stabilityai/sd-vae-ft-mse.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mutoscope.checkpoints import load_part, part_config
from mutoscope.data.store import LatentStats
from mutoscope.types import LatentSpec

FRAMES_AT_ONCE = 8
"""Frames that are encoded or decoded together."""


class ImageAutoencoder(nn.Module):
    """A pretrained autoencoder of images; satisfies `types.Autoencoder`."""

    spec: LatentSpec

    def __init__(self, vae: Any) -> None:
        """vae: diffusers' AutoencoderKL."""
        super().__init__()
        self.vae = vae
        self.spec = _spec(vae.config)

    def encode(self, video: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b d t y x"]:
        """Pixels in [-1, 1] -> moments, fp32: mean and log-variance along the channels, not scaled. Raises ValueError
        for a height or width that is no multiple of a latent's."""
        self.spec.latent_shape(*video.shape[2:])
        moments = []
        for frames in video.transpose(1, 2).flatten(0, 1).split(FRAMES_AT_ONCE):
            posterior = self.vae.encode(frames.to(self.vae.dtype)).latent_dist
            moments.append(torch.cat([posterior.mean, posterior.logvar], 1).float())
        return torch.cat(moments).unflatten(0, (len(video), -1)).transpose(1, 2)

    def decode(self, latents: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b 3 t y x"]:
        """Latents, not scaled -> pixels in about [-1, 1], fp32."""
        frames = latents.transpose(1, 2).flatten(0, 1).to(self.vae.dtype).split(FRAMES_AT_ONCE)
        decoded = torch.cat([self.vae.decode(part).sample.float() for part in frames])
        return decoded.unflatten(0, (len(latents), -1)).transpose(1, 2)


def load_image_autoencoder(path: str, dtype: torch.dtype = torch.float32, *, tiling: bool = False) -> ImageAutoencoder:
    """The autoencoder of a checkpoint, frozen, on the CPU. tiling: take large frames in overlapping tiles.

    Raises as `checkpoints.load_part`.
    """
    vae: Any = load_part(path, "vae", dtype).requires_grad_(False)
    if tiling:
        vae.enable_tiling()
    return ImageAutoencoder(vae)


def image_spec(path: str) -> LatentSpec:
    """The spec of a checkpoint's autoencoder, from its config.json alone."""
    return _spec(part_config(path, "vae"))


def image_stats(path: str) -> LatentStats:
    """A checkpoint's shift and scaling factor as the mean and standard deviation that its latents are normalised by."""
    config = part_config(path, "vae")
    channels = int(config["latent_channels"])
    shift, std = float(config["shift_factor"] or 0.0), 1 / float(config["scaling_factor"])
    return LatentStats(mean=(shift,) * channels, std=(std,) * channels)


def _spec(config: Any) -> LatentSpec:
    stride = 2 ** (len(config["block_out_channels"]) - 1)
    return LatentSpec(strides=(1, stride, stride), channels=config["latent_channels"])
