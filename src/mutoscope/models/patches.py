"""How transformers over video cut it into patches, and what they are told of each frame."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mutoscope.types import NO_LABEL, Cond

Grid = tuple[int, int, int]
"""(t, h, w)"""


def grid_of(latents: Grid, patch: Grid) -> Grid:
    """Latents along t, h and w -> tokens. Raises ValueError where the patch does not divide them."""
    for axis, size, part in zip("thw", latents, patch, strict=True):
        if size % part:
            raise ValueError(f"model.patch {patch} does not divide the latent grid {latents} along {axis}")
    t, h, w = (size // part for size, part in zip(latents, patch, strict=True))
    return t, h, w


def patchify(x: Float[Tensor, "b c t h w"], patch: Grid) -> Float[Tensor, "b u n p"]:
    """Videos -> patches by frame of tokens, each with its channels outermost and its columns innermost."""
    t, h, w = (size // part for size, part in zip(x.shape[2:], patch, strict=True))
    (pt, ph, pw), channels = patch, x.shape[1]
    x = x.reshape(len(x), channels, t, pt, h, ph, w, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return x.reshape(len(x), t, h * w, channels * math.prod(patch))


def unpatchify(x: Float[Tensor, "b u n p"], grid: Grid, patch: Grid) -> Float[Tensor, "b c t h w"]:
    """The inverse of `patchify`; `grid` is of tokens."""
    (t, h, w), (pt, ph, pw) = grid, patch
    x = x.reshape(len(x), t, h, w, -1, pt, ph, pw).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return x.reshape(len(x), -1, t * pt, h * ph, w * pw)


def token_times(time: Float[Tensor, "b"] | Float[Tensor, "b t"], patch: Grid) -> Float[Tensor, "b f"]:
    """The times that frames of tokens are at: (b, 1) where a video is at one time. A token that covers several frames
    is at the noisiest of their times."""
    return time[:, None] if time.ndim == 1 else time.unflatten(1, (-1, patch[0])).amax(-1)


def label_rows(cond: Cond, table: nn.Embedding, batch: int) -> Float[Tensor, "b d"]:
    """The labels' embeddings; the table's last row stands for "no label"."""
    device = table.weight.device
    label = cond.label if cond.label is not None else torch.full((batch,), NO_LABEL, device=device)
    return table(torch.where(label == NO_LABEL, table.num_embeddings - 1, label))
