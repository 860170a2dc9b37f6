"""CogVideoX's 3D causal autoencoder (arXiv:2408.06072 §2.1): clips <-> latents of 4 × 8 × 8 pixels, the first frame
alone; and the latents of the image that image to video starts from.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mutoscope.checkpoints import load_part, part_config
from mutoscope.data.store import LatentStats
from mutoscope.randomness import Draw
from mutoscope.types import LatentSpec

FRAME_STEP = 8
"""Latents after the first are decoded in pairs: other numbers of frames than 8·n + 1 would come back as another."""
IMAGE_NOISE = (-3.0, 0.5)
"""Mean and standard deviation of the logarithm of the noise that an image is given in training."""


class CogVideoXAutoencoder(nn.Module):
    """A pretrained CogVideoX autoencoder; satisfies `types.Autoencoder`."""

    spec: LatentSpec
    scaling_factor: float
    """Latents times this are those that the transformer learns: their mean counts as 0, their standard deviation as
    1 / scaling_factor."""
    image_scaling_factor: float
    """The same for the latents of an image to start from: `scaling_factor`, but for CogVideoX 1.5 one over it (the
    autoencoder's `invert_scale_latents`)."""

    def __init__(self, vae: Any) -> None:
        """vae: diffusers' AutoencoderKLCogVideoX."""
        super().__init__()
        self.vae = vae
        self.spec = _spec(vae.config)
        self.scaling_factor = float(vae.config.scaling_factor)
        self.image_scaling_factor = 1 / self.scaling_factor if vae.config.invert_scale_latents else self.scaling_factor

    def encode(self, video: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b d u y x"]:
        """Pixels in [-1, 1] -> moments, fp32: mean and log-variance along the channels, not scaled.

        Raises ValueError naming the nearest number of frames that is taken: 8·n + 1.
        """
        if (video.shape[2] - 1) % FRAME_STEP:
            below = (video.shape[2] - 1) // FRAME_STEP * FRAME_STEP + 1
            raise ValueError(f"{video.shape[2]} frames do not fit CogVideoX's autoencoder: it takes 8·n + 1 "
                             f"(nearest: {below} or {below + FRAME_STEP})")  # fmt: skip
        posterior = self.vae.encode(video.to(self.vae.dtype)).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], 1).float()

    def decode(self, latents: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b 3 u y x"]:
        """Latents, not scaled -> pixels in about [-1, 1], fp32. Raises ValueError for an even number of latents along
        time, which no clip has."""
        if latents.shape[2] % 2 == 0:
            raise ValueError(f"{latents.shape[2]} latents along time: a clip has an odd number; cut off those that "
                             "objective.temporal_patch has put in front")  # fmt: skip
        return self.vae.decode(latents.to(self.vae.dtype)).sample.float()

    def image_latents(self, image: Float[Tensor, "b 3 1 h w"], draw: Draw | None = None) -> Float[Tensor, "b c 1 y x"]:
        """The latents of images in [-1, 1] to start from, scaled as the transformer takes them, fp32.

        draw: in training, for the noise on the pixels, σ = exp(N(−3, ½)) for each image, and for the posterior. Without
            it there is no noise, and the posterior's mean is taken.
        """
        if draw is not None:
            mean, std = IMAGE_NOISE
            sigma = torch.exp(mean + std * draw.normal()).to(image)[:, None, None, None, None]
            image = image + sigma * draw.normal(*image.shape[1:]).to(image)
        latents, logvar = self.encode(image).chunk(2, 1)
        if draw is not None:
            latents = latents + torch.exp(logvar / 2) * draw.normal(*latents.shape[1:]).to(latents)
        return self.image_scaling_factor * latents


def known_latents(image: Float[Tensor, "b c 1 h w"], frames: int) -> Float[Tensor, "b c t h w"]:
    """The latents of an image as `Cond.known` of a video of t = `frames` latents: zero but for the first."""
    return torch.nn.functional.pad(image, (0, 0, 0, 0, 0, frames - 1))


def autoencoder_spec(path: str) -> LatentSpec:
    """The spec of a checkpoint's autoencoder, from its config.json alone. Raises as `checkpoints.part_config`."""
    return _spec(part_config(path, "vae"))


def scaling_stats(path: str) -> LatentStats:
    """A checkpoint's scaling factor as the mean and standard deviation that its latents are normalised by."""
    config = part_config(path, "vae")
    channels = int(config["latent_channels"])
    return LatentStats(mean=(0.0,) * channels, std=(1 / float(config["scaling_factor"]),) * channels)


def load_cogvideox_autoencoder(
    path: str, dtype: torch.dtype = torch.float32, *, slicing: bool = False, tiling: bool = False
) -> CogVideoXAutoencoder:
    """The autoencoder of a checkpoint, frozen, on the CPU.

    slicing: take the clips of a batch one at a time. tiling: take large frames in overlapping tiles, whose seams are
    blended: less memory, and not quite the same latents and pixels.

    Raises as `checkpoints.load_part`.
    """
    vae: Any = load_part(path, "vae", dtype).requires_grad_(False)
    if slicing:
        vae.enable_slicing()
    if tiling:
        vae.enable_tiling()
    return CogVideoXAutoencoder(vae)


def _spec(config: Any) -> LatentSpec:
    spatial = 2 ** (len(config["block_out_channels"]) - 1)
    return LatentSpec(
        strides=(int(config["temporal_compression_ratio"]), spatial, spatial),
        channels=config["latent_channels"],
        first_frame_alone=True,
    )
