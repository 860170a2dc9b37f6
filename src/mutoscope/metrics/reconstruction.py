"""How well an autoencoder gives back what it was given: PSNR, SSIM, and how much of its codebook it uses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from mutoscope.autoencoders.bottlenecks import codebook_usage
from mutoscope.types import Autoencoder

SSIM_WINDOW = 11
"""Side of the window in pixels; smaller frames have no SSIM."""


def psnr(reconstruction: Float[Tensor, "b c t h w"], original: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b"]:
    """Peak signal-to-noise ratio of each clip in dB, of pixels in [-1, 1]; infinite where they are equal.

    From the squared error over the whole clip, as video codecs report it; not a mean of the frames' ratios, which one
    perfect frame makes infinite.
    """
    error = (reconstruction.double() - original.double()).square().flatten(1).mean(1)
    return (10 * torch.log10(4 / error)).float()


def ssim(reconstruction: Float[Tensor, "b c t h w"], original: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b"]:
    """Structural similarity of each clip, a mean over its frames (Wang et al. 2004: Gaussian window of 11 pixels,
    σ = 1.5, at every pixel, with borders mirrored), of pixels in [-1, 1].

    Measured on [0, 1]: its term for luminance is one of ratios, which have no meaning about a zero at mid-grey.
    Raises ValueError for frames that the window does not fit in.
    """
    height, width = original.shape[3:]
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(f"ssim needs frames of {SSIM_WINDOW} pixels or more either way, got {height}x{width}")
    frames = [(video.float() + 1).div(2).transpose(1, 2).flatten(0, 1) for video in (reconstruction, original)]
    by_frame = structural_similarity_index_measure(frames[0], frames[1], data_range=1.0, reduction="none")
    return cast(Tensor, by_frame).reshape(len(original), -1).mean(1)


class CodebookUsage:
    """How often each code is chosen, over as many batches as are given to it."""

    def __init__(self, vocab: int) -> None:
        self.counts = torch.zeros(vocab, dtype=torch.int64)

    def update(self, tokens: Int[Tensor, "..."]) -> None:
        """Count these tokens as well."""
        self.counts += torch.bincount(tokens.flatten().cpu(), minlength=len(self.counts))

    def compute(self) -> dict[str, float]:
        """codebook_usage: share of the codes that were chosen at all. perplexity: exp of the choice's entropy, between
        1 and the number of codes."""
        usage, perplexity = codebook_usage(self.counts)
        return {"codebook_usage": float(usage), "perplexity": float(perplexity)}


@torch.no_grad()
def reconstruct_metrics(model: nn.Module, clips: Iterable[Tensor]) -> dict[str, float]:
    """PSNR and SSIM, means over all clips, and the codebook's usage and perplexity where there are codes.

    model: an `Autoencoder` (see types.py). clips: batches (b, c, t, h, w) of pixels in [-1, 1],
    on the model's device. What is measured
    is what is stored and sampled: tokens or the posterior's mean, decoded; nothing is random. Raises ValueError
    without clips.
    """
    was_training = model.training
    model.eval()
    autoencoder = cast(Autoencoder, model)
    spec = autoencoder.spec
    usage = CodebookUsage(spec.vocab) if spec.vocab else None
    psnrs, ssims = [], []
    for clip in clips:
        encoded = autoencoder.encode(clip)
        if usage is not None:
            usage.update(encoded)
        reconstruction = autoencoder.decode(encoded if usage is not None else encoded[:, : spec.channels])
        psnrs.append(psnr(reconstruction, clip).cpu())
        ssims.append(ssim(reconstruction, clip).cpu())
    model.train(was_training)
    if not psnrs:
        raise ValueError("there are no clips to measure the reconstruction of")
    means = {"psnr": float(torch.cat(psnrs).mean()), "ssim": float(torch.cat(ssims).mean())}
    return means | (usage.compute() if usage is not None else {})
