"""Autoencoders of our own: three kinds of network around seven kinds of bottleneck, and the seed's names for them.

Inside, pixels lie in [-0.5, 0.5] as in minisora, so that the weights of its checkpoints and the weights of its
losses keep their meaning; outside they lie in [-1, 1] as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import prod
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mutoscope.autoencoders.bottlenecks import (
    EMAVectorQuantizer,
    FiniteScalarQuantizer,
    LookupFreeQuantizer,
    Quantized,
    VectorQuantizer,
    codebook_usage,
)
from mutoscope.autoencoders.causal import causal_networks
from mutoscope.autoencoders.networks import PIXEL_CHANNELS, conv_networks, patch_networks, split_strides
from mutoscope.recipe import ModelConfig
from mutoscope.types import LatentSpec, ModelIO

Bottleneck = Literal["none", "kl", "vq", "kl_vq", "ema_vq", "fsq", "lfq"]
LOGVAR_RANGE = (-30.0, 20.0)

# Which networks and bottlenecks read a field that not all of them read.
_READ_BY_NETWORK = {"kernel": ("conv",), "refine": ("conv",), "tanh": ("conv",), "residual_layers": ("conv", "causal")}
_READ_BY_BOTTLENECK = {
    "num_codes": ("vq", "kl_vq", "ema_vq"),
    "fsq_levels": ("fsq",),
    "ema_decay": ("ema_vq",),
    "restart_below": ("ema_vq",),
    "bounded": ("none",),
    "latent_noise": ("none",),
}


@dataclass(frozen=True, kw_only=True)
class ConvAutoencoder(ModelConfig):
    """An autoencoder for video. The defaults are minisora's s4t4_b; `preset` has its other variants."""

    network: Literal["conv", "patch", "causal"] = "conv"
    """conv: strided convolutions. patch: each patch of pixels by itself, through an MLP. causal: convolutions and axial
    attention that look back in time only, with the first frame encoded by itself."""
    strides: tuple[int, int, int] = (4, 4, 4)
    """Pixels per latent position along (T, H, W); powers of two, but for patch."""
    encoder_channels: tuple[int, ...] = (32,)
    """Hidden widths of the encoder. conv: one for each halving but the last. patch: any number. causal: one."""
    decoder_channels: tuple[int, ...] = (32, 32)
    """Hidden widths of the decoder. conv: one for each doubling, then a convolution to pixels; or one less, and the
    last doubling yields the pixels. patch: any number. causal: one."""
    kernel: int = 3
    """Size of the encoder's convolutions: 1 or 3 (along time 1 where time is not reduced). Of conv."""
    refine: Literal["none", "linear", "nonlinear"] = "nonlinear"
    """A convolution after each doubling of the decoder but the last: none, or one with or without an activation
    before it. Of conv."""
    residual_layers: int = 0
    """conv: residual layers on either side of the bottleneck. causal: residual attention blocks at each scale."""
    tanh: bool = True
    """End the decoder in a tanh (it reaches twice the range of pixels). Of conv."""
    latent_channels: int = 4
    """Channels of the latents: the length of a code's vector. lfq: the number of bits. fsq: one for each level."""
    bottleneck: Bottleneck = "none"
    """none; kl (variational); vq (codes by gradient); kl_vq (variational, then vq); ema_vq (codes by moving average);
    fsq (finite scalar); lfq (lookup-free)."""
    num_codes: int = 0
    """Number of codes of vq, kl_vq and ema_vq; of fsq and lfq it follows from their levels and bits."""
    fsq_levels: tuple[int, ...] = ()
    """Levels of each latent channel, of fsq; for instance 8, 5, 5, 5 for 1000 codes."""
    ema_decay: float = 0.99
    """Decay per optimizer step of the moving averages of ema_vq."""
    restart_below: float = 0.1
    """A code of ema_vq that is used less than this share of the average code is restarted; 0 never does."""
    bounded: bool = False
    """Bound the latents to (-1, 1) by a tanh. Of none."""
    latent_noise: float = 0.0
    """Standard deviation of noise added to the latents while training, which makes for a smooth decoder. Of none."""

    def __post_init__(self) -> None:
        self._check_read()
        self._check_numbers()
        self._check_bottleneck()
        if self.network == "patch":
            return
        if any(s & (s - 1) for s in self.strides):
            raise ValueError(f"model.strides={self.strides} must be powers of two for network={self.network!r}")
        if self.network == "causal":
            if self.strides[1] != self.strides[2] or self.strides[1] < 2:
                raise ValueError(f"model.strides={self.strides}: causal needs equal strides of 2 or more in space")
            self._check_widths("encoder_channels", (1,))
            self._check_widths("decoder_channels", (1,))
        else:
            if self.kernel not in (1, 3):
                raise ValueError(f"model.kernel={self.kernel}: allowed are 1 and 3")
            stages = len(split_strides(self.strides))
            self._check_widths("encoder_channels", (stages - 1,))
            self._check_widths("decoder_channels", (stages - 1, stages))
            if self.residual_layers and not self.encoder_channels:
                raise ValueError("model.residual_layers needs a hidden width; model.encoder_channels is empty")

    def _check_read(self) -> None:
        for chosen, readers in ((self.network, _READ_BY_NETWORK), (self.bottleneck, _READ_BY_BOTTLENECK)):
            for f in fields(self):
                if f.name in readers and chosen not in readers[f.name] and getattr(self, f.name) != f.default:
                    kind = "network" if readers is _READ_BY_NETWORK else "bottleneck"
                    raise ValueError(
                        f"model.{f.name}={getattr(self, f.name)!r} has no effect with model.{kind}={chosen!r}; "
                        f"it goes with {', '.join(readers[f.name])}"
                    )

    def _check_bottleneck(self) -> None:
        if self.bottleneck not in get_args(Bottleneck):
            raise ValueError(f"model.bottleneck={self.bottleneck!r}: allowed are {', '.join(get_args(Bottleneck))}")
        if self.bottleneck in _READ_BY_BOTTLENECK["num_codes"] and self.num_codes < 2:
            raise ValueError(f"model.bottleneck={self.bottleneck!r} needs model.num_codes of 2 or more")
        if self.bottleneck == "fsq" and (
            len(self.fsq_levels) != self.latent_channels or min(self.fsq_levels, default=0) < 2
        ):
            raise ValueError(
                f"model.fsq_levels={self.fsq_levels} must give 2 or more levels to each of "
                f"model.latent_channels={self.latent_channels}"
            )
        if self.bottleneck == "lfq" and self.latent_channels > 30:
            raise ValueError(f"model.latent_channels={self.latent_channels}: lfq allows up to 30 bits")

    def _check_numbers(self) -> None:
        widths = (*self.encoder_channels, *self.decoder_channels, self.latent_channels)
        for name, holds, allowed in (
            ("strides", min(self.strides) >= 1, "each 1 or more"),
            ("latent_channels", min(widths) >= 1, "1 or more, as are all widths"),
            ("residual_layers", self.residual_layers >= 0, "0 or more"),
            ("ema_decay", 0 < self.ema_decay < 1, "between 0 and 1"),
            ("restart_below", 0 <= self.restart_below < 1, "0 or more and below 1"),
            ("latent_noise", self.latent_noise >= 0, "0 or more"),
        ):
            if not holds:
                raise ValueError(f"model.{name}={getattr(self, name)}: must be {allowed}")

    def _check_widths(self, name: str, allowed: tuple[int, ...]) -> None:
        widths = getattr(self, name)
        if len(widths) not in allowed:
            raise ValueError(
                f"model.{name}={widths} has {len(widths)} widths; network={self.network!r} with "
                f"strides={self.strides} takes {' or '.join(map(str, allowed))}"
            )

    @property
    def variational(self) -> bool:
        """Whether the encoder yields a mean and a log-variance."""
        return self.bottleneck in ("kl", "kl_vq")

    @property
    def spec(self) -> LatentSpec:
        """How the latents lie over the pixels."""
        vocab = {
            "vq": self.num_codes,
            "kl_vq": self.num_codes,
            "ema_vq": self.num_codes,
            "fsq": prod(self.fsq_levels),
            "lfq": 2**self.latent_channels,
        }.get(self.bottleneck)
        return LatentSpec(
            strides=self.strides,
            channels=self.latent_channels,
            vocab=vocab,
            first_frame_alone=self.network == "causal",
        )

    def build(self, io: ModelIO) -> ConvAutoencoderModel:
        """The network. Raises ValueError where it does not fit the recipe's clips."""
        if io.channels != PIXEL_CHANNELS:
            raise ValueError(f"an autoencoder learns pixels, of 3 channels; this recipe gives it {io.channels}: unset "
                             "the recipe's autoencoder")  # fmt: skip
        self.spec.latent_shape(*io.grid)
        return ConvAutoencoderModel(self)


@dataclass(frozen=True, kw_only=True)
class Reconstructed:
    """What the model returns while it is trained; a loss that its bottleneck does not have is None."""

    video: Float[Tensor, "b c t h w"]
    """The reconstruction; pixels in about [-1, 1], not clamped."""
    kl: Float[Tensor, "b"] | None = None
    """KL divergence of the posterior from N(0, 1), in nats, a mean over the latents (not a sum)."""
    low_utilization: Float[Tensor, ""] | None = None
    """See `VectorQuantizer.low_utilization`."""
    quantized: Quantized | None = None
    """The codes and the losses of the quantiser."""


class ConvAutoencoderModel(nn.Module):
    """The network of a `ConvAutoencoder`; an `Autoencoder` in the sense of types.py."""

    def __init__(self, config: ConvAutoencoder) -> None:
        super().__init__()
        self.config, self.spec = config, config.spec
        self.encoder, self.decoder = _networks(config)
        self.quantizer = _quantizer(config)

    @property
    def blocks(self) -> list[nn.Module]:
        """The two networks: the units of checkpointing and compilation. (Single layers would gain from neither.)"""
        return [self.encoder, self.decoder]

    def forward(
        self,
        video: Float[Tensor, "b 3 t h w"],
        noise: Float[Tensor, "b c t2 h2 w2"] | None = None,
        low_utilization: bool = False,
    ) -> Reconstructed:
        """Encode and decode.

        `noise` is N(0, 1) in the latents' shape: it draws from the posterior or is added to the latents, as the
        configuration has it. Without it the result is deterministic. `low_utilization` asks for that loss, of a
        codebook that is learned by gradient (vq, kl_vq).
        """
        mean, logvar = self._moments(video)
        z, kl, low = mean, None, None
        if logvar is not None:
            kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).mean(1)
            z = mean if noise is None else mean + (0.5 * logvar).exp() * noise
        elif noise is not None and self.config.latent_noise:
            z = mean + self.config.latent_noise * noise
        if low_utilization:
            assert isinstance(self.quantizer, VectorQuantizer)
            low = self.quantizer.low_utilization(z)
        quantized = None if self.quantizer is None else self.quantizer(z)
        latents = z if quantized is None else quantized.latents
        return Reconstructed(video=2 * self.decoder(latents), kl=kl, low_utilization=low, quantized=quantized)

    def _moments(self, video: Tensor) -> tuple[Tensor, Tensor | None]:
        self.spec.latent_shape(video.shape[2], video.shape[3], video.shape[4])  # raises where it does not fit
        x = video / 2
        if self.config.network == "conv":
            x = x.contiguous(memory_format=torch.channels_last_3d)  # the convolutions are faster so
        encoded = self.encoder(x)
        if self.config.variational:
            mean, logvar = encoded.chunk(2, dim=1)
            return mean, logvar.clamp(*LOGVAR_RANGE)
        return (encoded.tanh() if self.config.bounded else encoded), None

    def encode(self, video: Float[Tensor, "b 3 t h w"]) -> Tensor:
        """Pixels in [-1, 1] -> tokens, int64 (b, t, h, w), where `spec.vocab` is set; else the latents, with the
        posterior's log-variance behind its mean along the channels where it is variational. Deterministic."""
        mean, logvar = self._moments(video)
        if self.quantizer is not None:
            return self.quantizer.encode(mean)
        return mean if logvar is None else torch.cat([mean, logvar], dim=1)

    def decode(self, latents: Float[Tensor, "b c t h w"] | Int[Tensor, "b t h w"]) -> Float[Tensor, "b 3 t2 h2 w2"]:
        """Tokens, or latents as they are (quantised ones where there are codes) -> pixels in [-1, 1]."""
        if not latents.is_floating_point():
            if self.quantizer is None:
                raise ValueError(
                    f"tokens to decode, but this autoencoder has model.bottleneck={self.config.bottleneck!r}"
                )
            latents = self.quantizer.lookup(latents)
        return (2 * self.decoder(latents)).clamp(-1, 1)

    def after_step(self, all_reduce: Callable[[Tensor], Tensor], skipped: bool) -> None:
        """What a codebook does once per optimizer step."""
        if isinstance(self.quantizer, VectorQuantizer):
            self.quantizer.after_step(all_reduce, skipped)

    def after_epoch(self, epoch: int, reinit: bool) -> dict[str, float]:
        """What a codebook does at the end of an epoch; `reinit` replaces the codes that it never chose. Returns the
        epoch's usage and perplexity, where there is a codebook."""
        if not isinstance(self.quantizer, VectorQuantizer):
            return {}
        usage, perplexity = codebook_usage(self.quantizer.counts)
        self.quantizer.after_epoch(epoch, reinit)
        return {"epoch_codebook_usage": float(usage), "epoch_perplexity": float(perplexity)}


def _networks(config: ConvAutoencoder) -> tuple[nn.Sequential, nn.Sequential]:
    encoder_outputs = config.latent_channels * (2 if config.variational else 1)
    match config.network:
        case "conv":
            return conv_networks(
                strides=config.strides,
                kernel=config.kernel,
                encoder_channels=config.encoder_channels,
                encoder_outputs=encoder_outputs,
                latent_channels=config.latent_channels,
                decoder_channels=config.decoder_channels,
                refine=config.refine,
                residual_layers=config.residual_layers,
                tanh=config.tanh,
            )
        case "patch":
            return patch_networks(
                strides=config.strides,
                encoder_channels=config.encoder_channels,
                encoder_outputs=encoder_outputs,
                latent_channels=config.latent_channels,
                decoder_channels=config.decoder_channels,
            )
        case "causal":
            return causal_networks(
                strides=config.strides,
                encoder_width=config.encoder_channels[0],
                encoder_outputs=encoder_outputs,
                latent_channels=config.latent_channels,
                decoder_width=config.decoder_channels[0],
                residual_layers=config.residual_layers,
            )


def _quantizer(
    config: ConvAutoencoder,
) -> VectorQuantizer | FiniteScalarQuantizer | LookupFreeQuantizer | None:
    match config.bottleneck:
        case "vq" | "kl_vq":
            return VectorQuantizer(config.num_codes, config.latent_channels)
        case "ema_vq":
            return EMAVectorQuantizer(config.num_codes, config.latent_channels, config.ema_decay, config.restart_below)
        case "fsq":
            return FiniteScalarQuantizer(config.fsq_levels)
        case "lfq":
            return LookupFreeQuantizer(config.latent_channels)
        case _:
            return None
