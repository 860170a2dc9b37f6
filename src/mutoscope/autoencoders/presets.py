"""The network variants of minisora, by their names there.

Two names do here what the seed's README meant and its code did not. `s8_b` quantises: upstream its quantiser was an
Identity, so that --n_codes, --commitment_cost and --low_utilization_cost did nothing and no tokens could be made. (Its
strides are 4 × 4 × 4 there too, despite the 8.) And `vae_*_vq` can be tokenised: the codes are those of the posterior's
mean. Elsewhere the layers, and the numbers of their parameters, are the seed's.
"""

from __future__ import annotations

from dataclasses import replace

from mutoscope.autoencoders.conv import ConvAutoencoder

_CODES = 5120
_PIXELWISE = ConvAutoencoder(strides=(1, 1, 1), encoder_channels=(), decoder_channels=(), tanh=False, refine="none")
_SPATIAL2 = ConvAutoencoder(strides=(1, 2, 2), encoder_channels=(), decoder_channels=(16,), refine="linear")
_SPATIAL4 = ConvAutoencoder(strides=(1, 4, 4), encoder_channels=(16,), decoder_channels=(16, 16))
_S4T4_B = ConvAutoencoder()
_S8T8_B = ConvAutoencoder(strides=(8, 8, 8), encoder_channels=(32, 64), decoder_channels=(64, 32))

PRESETS: dict[str, ConvAutoencoder] = {
    "encode111111_decode111111": replace(_PIXELWISE, kernel=1),
    "encode133111_decode111111": _PIXELWISE,
    "encode133122_decode144122": replace(_SPATIAL2, tanh=False),
    "encode133122_decode144122_tanh": _SPATIAL2,
    "encode133122_decode144122_tanh_vq": replace(_SPATIAL2, bottleneck="vq", num_codes=_CODES),
    "encode333222_decode444222_tanh": replace(_SPATIAL2, strides=(2, 2, 2)),
    "encode_decode_spatial4x": replace(_SPATIAL4, decoder_channels=(16,), refine="none"),
    "encode_decode_spatial4x_a": replace(_SPATIAL4, refine="linear"),
    "encode_decode_spatial4x_a_vq": replace(_SPATIAL4, bottleneck="vq", num_codes=_CODES),
    "vae_spatial4x_a": replace(_SPATIAL4, bottleneck="kl"),
    "vae_spatial4x_a_vq": replace(_SPATIAL4, bottleneck="kl_vq", num_codes=_CODES),
    "encode_decode_spatial8x_a": ConvAutoencoder(
        strides=(1, 8, 8), encoder_channels=(16, 32), decoder_channels=(32, 16, 16), refine="linear"
    ),
    "encode_decode_spatial16x_a": ConvAutoencoder(
        strides=(1, 16, 16), encoder_channels=(16, 32, 64), decoder_channels=(64, 32, 16, 16), refine="linear"
    ),
    "s4t4": ConvAutoencoder(encoder_channels=(16,), decoder_channels=(16,), refine="none"),
    "s4t4_a": ConvAutoencoder(encoder_channels=(16,), decoder_channels=(16, 16)),
    "s4t4_b": _S4T4_B,
    "s4t4_b_vq": replace(_S4T4_B, bottleneck="vq", num_codes=_CODES),
    "s4t4_c": ConvAutoencoder(refine="none", residual_layers=1),
    "vae_s4t4_b": replace(_S4T4_B, bottleneck="kl"),
    "vae_s4t4_b_vq": replace(_S4T4_B, bottleneck="kl_vq", num_codes=_CODES),
    "s8_b": replace(_S4T4_B, bottleneck="vq", num_codes=_CODES),
    "s8t8_a": ConvAutoencoder(
        strides=(8, 8, 8), encoder_channels=(16, 32), decoder_channels=(32, 16, 16), refine="linear"
    ),
    "s8t8_b": _S8T8_B,
    "s8t8_b_vq": replace(_S8T8_B, bottleneck="vq", num_codes=_CODES),
    "vae_s8t8_b": replace(_S8T8_B, bottleneck="kl"),
    "s16t16_a": ConvAutoencoder(
        strides=(16, 16, 16), encoder_channels=(16, 32, 64), decoder_channels=(64, 32, 16, 16), refine="linear"
    ),
    "causal_s8t4": ConvAutoencoder(
        network="causal", strides=(4, 8, 8), encoder_channels=(128,), decoder_channels=(128,), residual_layers=2,
        bottleneck="ema_vq", num_codes=_CODES,
    ),
}  # fmt: skip


def preset(name: str) -> ConvAutoencoder:
    """The variant of that name, with 4 latent channels and, where it quantises, 5120 codes, as in the seed's README.
    Change what should differ with `dataclasses.replace`. Raises ValueError with the names there are."""
    if name not in PRESETS:
        raise ValueError(f"no autoencoder preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
