"""A causal encoder and decoder: no latent knows of a frame after it, and the first frame is encoded by itself.

After causal_s8t4 of minisora (Open-Sora-Plan's causal VQ-VAE, itself after VideoGPT), with two things put right that
let later frames leak into earlier ones: batch norm is a norm over the channels of each position (of as many
parameters), and time is upsampled by repetition and not by interpolation between neighbours. T = 1 + stride·(t − 1)
frames come back as T; the seed's decoder returned stride·t. Convolutions that halve time are 4×3×3 and not 4×4×4, which
has no centre in space.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mutoscope.autoencoders.networks import PIXEL_CHANNELS, Triple

_HEADS = 2


def causal_networks(
    *,
    strides: Triple,
    encoder_width: int,
    encoder_outputs: int,
    latent_channels: int,
    decoder_width: int,
    residual_layers: int,
) -> tuple[nn.Sequential, nn.Sequential]:
    """(encoder, decoder) for strides that are powers of two, height's and width's equal."""
    halvings_t, halvings_s = strides[0].bit_length() - 1, strides[1].bit_length() - 1

    encoder: list[nn.Module] = []
    for i in range(halvings_s):
        conv = nn.Conv3d(PIXEL_CHANNELS if i == 0 else encoder_width, encoder_width, (1, 4, 4), (1, 2, 2), (0, 1, 1))
        encoder.append(nn.Sequential(conv, nn.ReLU()))
    encoder += _stack(encoder_width, residual_layers)
    for _ in range(halvings_t):
        encoder.append(nn.Sequential(CausalConv(encoder_width, encoder_width, (4, 3, 3), stride=2), nn.ReLU()))
    encoder += _stack(encoder_width, residual_layers)
    encoder.append(nn.Conv3d(encoder_width, encoder_outputs, 1))

    decoder: list[nn.Module] = [nn.Conv3d(latent_channels, decoder_width, 1), *_stack(decoder_width, residual_layers)]
    for _ in range(halvings_t):
        decoder.append(nn.Sequential(RepeatLater(), CausalConv(decoder_width, decoder_width, (3, 3, 3)), nn.ReLU()))
    decoder += _stack(decoder_width, residual_layers)
    for i in range(halvings_s):
        last = i == halvings_s - 1
        conv = nn.Conv3d(decoder_width, PIXEL_CHANNELS if last else decoder_width, (1, 3, 3), padding=(0, 1, 1))
        decoder.append(nn.Sequential(nn.Upsample(scale_factor=(1, 2, 2)), conv, *([] if last else [nn.ReLU()])))
    return nn.Sequential(*encoder), nn.Sequential(*decoder)


def _stack(width: int, layers: int) -> list[nn.Module]:
    blocks: list[nn.Module] = [AttentionResidualBlock(width) for _ in range(layers)]
    return [*blocks, nn.Sequential(ChannelNorm(width), nn.ReLU())]


class CausalConv(nn.Conv3d):
    """A convolution that looks back in time only; before the first frame it sees that frame again."""

    def __init__(self, c_in: int, c_out: int, kernel: tuple[int, int, int], stride: int = 1, bias: bool = True) -> None:
        super().__init__(c_in, c_out, kernel, (stride, 1, 1), (0, kernel[1] // 2, kernel[2] // 2), bias=bias)

    def forward(self, input: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b d t2 h w"]:
        return super().forward(F.pad(input, (0, 0, 0, 0, self.kernel_size[0] - 1, 0), mode="replicate"))


class RepeatLater(nn.Module):
    """t -> 1 + 2(t − 1) frames: each but the first twice."""

    def forward(self, x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b c t2 h w"]:
        return torch.cat([x[:, :, :1], x[:, :, 1:].repeat_interleave(2, dim=2)], dim=2)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each position."""

    def forward(self, input: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b c t h w"]:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class AttentionResidualBlock(nn.Module):
    """VideoGPT's: a bottleneck of half the width, then axial attention (arXiv:2104.10157 §3.1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            ChannelNorm(width), nn.ReLU(), CausalConv(width, width // 2, (3, 3, 3), bias=False),
            ChannelNorm(width // 2), nn.ReLU(), nn.Conv3d(width // 2, width, 1, bias=False),
            ChannelNorm(width), nn.ReLU(), AxialAttention(width, _HEADS),
        )  # fmt: skip

    def forward(self, x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b c t h w"]:
        return x + self.layers(x)


class AxialAttention(nn.Module):
    """The sum of attention along width, height and (causal) time, each with projections of its own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width, bias=False) for _ in range(3))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b c t h w"]:
        x = x.movedim(1, -1)  # (b, t, h, w, c)
        total = torch.zeros_like(x)
        for axis, qkv, out in zip((3, 2, 1), self.qkv, self.out, strict=True):
            lines = x.movedim(axis, -2)  # (..., n, c), n positions along the axis
            q, k, v = qkv(lines).flatten(0, 2).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=axis == 1)
            y = out(y.transpose(1, 2).flatten(-2)).reshape(lines.shape)
            total = total + y.movedim(-2, axis)
        return total.movedim(-1, 1)
