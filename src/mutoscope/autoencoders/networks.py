"""Encoders and decoders by convolution, and by patch.

Each function returns (encoder, decoder): sequences of stages, which are the units of checkpointing and sharding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

Triple = tuple[int, int, int]
PIXEL_CHANNELS = 3


def split_strides(strides: Triple) -> list[Triple]:
    """Triple that are powers of two, as stages of 2 or 1, from pixels to latents: an axis with fewer factors of two
    is reduced by the last stages. At least one stage."""
    factors = [stride.bit_length() - 1 for stride in strides]
    stages = max(1, *factors)
    return [_triple(2 if stages - i <= f else 1 for f in factors) for i in range(stages)]


def conv_networks(
    *,
    strides: Triple,
    kernel: int,
    encoder_channels: Sequence[int],
    encoder_outputs: int,
    latent_channels: int,
    decoder_channels: Sequence[int],
    refine: Literal["none", "linear", "nonlinear"],
    residual_layers: int,
    tanh: bool,
) -> tuple[nn.Sequential, nn.Sequential]:
    """The family of minisora's video_vae_components.py: strided convolutions down, transposed ones up.

    `encoder_outputs` is the width that the encoder ends in; the other arguments are `ConvAutoencoder`'s fields. Layers
    are in the seed's order, so that its weights can be copied over one by one.
    """
    stages = split_strides(strides)
    kernels = (kernel if strides[0] > 1 else 1, kernel, kernel)

    encoder: list[nn.Module] = []
    for i, ((c_in, c_out), stride) in enumerate(
        zip(pairwise([PIXEL_CHANNELS, *encoder_channels, encoder_outputs]), stages, strict=True)
    ):
        conv = nn.Conv3d(c_in, c_out, kernels, stride, padding=_same(kernels))
        encoder.append(nn.Sequential(nn.ReLU(), conv) if i else nn.Sequential(conv))
    for _ in range(residual_layers):
        encoder.append(nn.Sequential(nn.ReLU(), _Residual(encoder_outputs, encoder_channels[0])))

    decoder: list[nn.Module] = [_Residual(latent_channels, encoder_channels[0]) for _ in range(residual_layers)]
    around = _triple(3 if stride > 1 else 1 for stride in strides)
    to_pixels = len(decoder_channels) == len(stages)  # by a convolution of its own; else the last stage yields pixels
    widths = [latent_channels, *decoder_channels, *([] if to_pixels else [PIXEL_CHANNELS])]
    for i, ((c_in, c_out), stride) in enumerate(zip(pairwise(widths), reversed(stages), strict=True)):
        layers: list[nn.Module] = [nn.LeakyReLU()] if i else []
        layers.append(_upsample(c_in, c_out, stride, around))
        if refine != "none" and i < len(stages) - 1:
            layers += [nn.LeakyReLU()] if refine == "nonlinear" else []
            layers.append(nn.Conv3d(c_out, c_out, around, padding=_same(around)))
        decoder.append(nn.Sequential(*layers))
    end: list[nn.Module] = []
    if to_pixels:
        end += [] if refine == "linear" else [nn.LeakyReLU()]
        end.append(_to_pixels(widths[-1], around))
    end += [nn.Tanh()] if tanh else []
    if end:
        decoder.append(nn.Sequential(*end))
    return nn.Sequential(*encoder), nn.Sequential(*decoder)


def _upsample(c_in: int, c_out: int, stride: Triple, around: Triple) -> nn.Module:
    if max(stride) == 1:
        return nn.Conv3d(c_in, c_out, around, padding=_same(around))
    kernel = _triple(4 if s > 1 else a for s, a in zip(stride, around, strict=True))
    return nn.ConvTranspose3d(c_in, c_out, kernel, stride, padding=_triple((k - 1) // 2 for k in kernel))


def _same(kernel: Triple) -> Triple:
    return _triple(k // 2 for k in kernel)


def _triple(values: Iterable[int]) -> Triple:
    t, h, w = values
    return t, h, w


def _to_pixels(c_in: int, kernel: Triple) -> nn.Conv3d:
    fold = ToPixels if kernel[0] > 1 else nn.Conv3d
    return fold(c_in, PIXEL_CHANNELS, kernel, padding=_same(kernel))


class ToPixels(nn.Conv3d):
    """A 3×3×3 convolution to few channels, at twice to three times the speed.

    Three output channels leave most of a vector unit idle. So the three taps along time are made output channels of
    a 1×3×3 convolution, and its outputs are added up one frame apart. The same sums in another order.
    """

    def forward(self, input: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b d t h w"]:
        folded = self.weight.permute(2, 0, 1, 3, 4).flatten(0, 1)[:, :, None]  # (3·d, c, 1, 3, 3)
        before, out, after = F.conv3d(input, folded, padding=(0, 1, 1)).chunk(3, dim=1)
        assert self.bias is not None
        out = out + self.bias[:, None, None, None]
        out[:, :, 1:] += before[:, :, :-1]
        out[:, :, :-1] += after[:, :, 1:]
        return out


class _Residual(nn.Module):
    """x + conv1(relu(conv3(relu(x)))), without biases: the seed's ResidualLayer."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(), nn.Conv3d(channels, width, 3, padding=1, bias=False),
            nn.ReLU(), nn.Conv3d(width, channels, 1, bias=False),
        )  # fmt: skip

    def forward(self, x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b c t h w"]:
        return x + self.layers(x)


def patch_networks(
    *,
    strides: Triple,
    encoder_channels: Sequence[int],
    encoder_outputs: int,
    latent_channels: int,
    decoder_channels: Sequence[int],
) -> tuple[nn.Sequential, nn.Sequential]:
    """Every patch of strides[0] × strides[1] × strides[2] pixels by itself, through an MLP each way.

    A patch's latents then depend on nothing beside it: the same background has the same latents everywhere, which a
    small generator learns at once.
    """
    pixels = PIXEL_CHANNELS * strides[0] * strides[1] * strides[2]
    encoder = nn.Sequential(ToPatches(strides), *_mlp([pixels, *encoder_channels, encoder_outputs]), _ChannelsFirst())
    decoder = nn.Sequential(_ChannelsLast(), *_mlp([latent_channels, *decoder_channels, pixels]), FromPatches(strides))
    return encoder, decoder


def _mlp(widths: Sequence[int]) -> list[nn.Module]:
    return [
        nn.Sequential(*([nn.GELU()] if i else []), nn.Linear(c_in, c_out))
        for i, (c_in, c_out) in enumerate(pairwise(widths))
    ]


class ToPatches(nn.Module):
    """(b, c, t·p, h·q, w·r) -> (b, t, h, w, c·p·q·r)."""

    def __init__(self, patch: Triple) -> None:
        super().__init__()
        self.patch = patch

    def forward(self, x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b t2 h2 w2 d"]:
        for axis, size in zip((2, 4, 6), self.patch, strict=True):
            x = x.unflatten(axis, (-1, size))
        return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


class FromPatches(nn.Module):
    """(b, t, h, w, c·p·q·r) -> (b, c, t·p, h·q, w·r): the inverse of `ToPatches`."""

    def __init__(self, patch: Triple) -> None:
        super().__init__()
        self.patch = patch

    def forward(self, x: Float[Tensor, "b t h w d"]) -> Float[Tensor, "b c t2 h2 w2"]:
        x = x.unflatten(4, (-1, *self.patch)).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return x.flatten(6).flatten(4, 5).flatten(2, 3)


class _ChannelsFirst(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 1)


class _ChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1)
