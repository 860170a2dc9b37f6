"""What can be said of published checkpoints without their files, so that shapes, parameters and memory are known before
a download and without a network; and the tiny twins of each, which `tiny_checkpoints` makes.

Sources: the config.json files of the checkpoints as diffusers writes them, and the defaults of diffusers' classes.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]
"""What a part's config.json holds."""

DEFAULTS: dict[str, Config] = {
    "transformer": {
        "_class_name": "CogVideoXTransformer3DModel",
        "num_attention_heads": 30,
        "attention_head_dim": 64,
        "in_channels": 16,
        "out_channels": 16,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "time_embed_dim": 512,
        "ofs_embed_dim": None,
        "text_embed_dim": 4096,
        "num_layers": 30,
        "dropout": 0.0,
        "attention_bias": True,
        "sample_width": 90,
        "sample_height": 60,
        "sample_frames": 49,
        "patch_size": 2,
        "patch_size_t": None,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": 226,
        "activation_fn": "gelu-approximate",
        "timestep_activation_fn": "silu",
        "norm_elementwise_affine": True,
        "norm_eps": 1e-5,
        "spatial_interpolation_scale": 1.875,
        "temporal_interpolation_scale": 1.0,
        "use_rotary_positional_embeddings": False,
        "use_learned_positional_embeddings": False,
        "patch_bias": True,
    },
    "vae": {
        "_class_name": "AutoencoderKLCogVideoX",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["CogVideoXDownBlock3D"] * 4,
        "up_block_types": ["CogVideoXUpBlock3D"] * 4,
        "block_out_channels": [128, 256, 256, 512],
        "latent_channels": 16,
        "layers_per_block": 3,
        "act_fn": "silu",
        "norm_eps": 1e-6,
        "norm_num_groups": 32,
        "temporal_compression_ratio": 4,
        "sample_height": 480,
        "sample_width": 720,
        "scaling_factor": 1.15258426,
        "invert_scale_latents": False,
    },
    "text_encoder": {},
    "scheduler": {
        "_class_name": "CogVideoXDDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "trained_betas": None,
        "clip_sample": True,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
        "rescale_betas_zero_snr": False,
        "snr_shift_scale": 3.0,
    },
    "tokenizer": {},
}
"""What a key means that a config.json does not have: files of older versions lack some. By part."""

IMAGE_VAE: Config = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "mid_block_add_attention": True,
}
"""The same for the autoencoder of images, by diffusers' defaults."""

_TRAINED = {
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
"""Of the scheduler, what all checkpoints share."""

_T5_XXL: Config = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
    "vocab_size": 32128,
}
_T5_TOKENIZER: Config = {"tokenizer_class": "T5Tokenizer"}
_T5_TINY: Config = _T5_XXL | {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 384}


def _checkpoint(
    transformer: Config,
    vae: Config,
    snr_shift_scale: float,
    text_encoder: Config = _T5_XXL,
    tokenizer: Config = _T5_TOKENIZER,
) -> dict[str, Config]:
    return {
        "transformer": DEFAULTS["transformer"] | transformer,
        "vae": DEFAULTS["vae"] | vae,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "scheduler": DEFAULTS["scheduler"] | _TRAINED | {"snr_shift_scale": snr_shift_scale},
    }


_5B: Config = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
_1_5: Config = {"patch_size_t": 2, "patch_bias": False, "sample_frames": 81, "sample_height": 300, "sample_width": 300}
_VAE_5B: Config = {"scaling_factor": 0.7}
_VAE_1_5: Config = {"scaling_factor": 0.7, "invert_scale_latents": True}

_PUBLISHED = {
    "CogVideoX-2b": _checkpoint({}, {}, 3.0),
    "CogVideoX-5b": _checkpoint(_5B, _VAE_5B, 1.0),
    "CogVideoX-5b-I2V": _checkpoint(
        _5B | {"in_channels": 32, "use_learned_positional_embeddings": True}, _VAE_5B, 1.0
    ),
    "CogVideoX1.5-5B": _checkpoint(_5B | _1_5, _VAE_1_5, 1.0),
    "CogVideoX1.5-5B-I2V": _checkpoint(_5B | _1_5 | {"in_channels": 32, "ofs_embed_dim": 512}, _VAE_1_5, 1.0),
}  # fmt: skip

_SD_VAE: Config = IMAGE_VAE | {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
}

KNOWN_IMAGE_VAES: dict[str, Config] = {
    f"stabilityai/sd-vae-ft-{name}": _SD_VAE | {"sample_size": 256} for name in ("mse", "ema")
}
"""The configurations of published autoencoders of images, by Hub id."""

KNOWN: dict[str, dict[str, Config]] = {
    f"{owner}/{name}": parts for owner in ("THUDM", "zai-org") for name, parts in _PUBLISHED.items()
}
"""The configurations of published checkpoints, by Hub id and part."""

_NANO: Config = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 64,
    "text_embed_dim": 32,
    "num_layers": 2,
    "sample_width": 6,
    "sample_height": 4,
    "sample_frames": 9,
    "max_text_seq_length": 32,
}
_VAE_NANO: Config = {
    "block_out_channels": [8, 8, 8, 8],
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "sample_height": 96,  # with the width, for tiles that begin at whole latents
    "sample_width": 80,
}


def _tiny(transformer: Config, vae: Config, snr_shift_scale: float) -> dict[str, Config]:
    tokenizer = {"tokenizer_class": "ByT5Tokenizer"}  # bytes: it has no vocabulary that a file would have to hold
    return _checkpoint(_NANO | transformer, _VAE_NANO | vae, snr_shift_scale, _T5_TINY, tokenizer)


_ROTARY: Config = {"use_rotary_positional_embeddings": True}
_TWO_FRAMES: Config = {"patch_size_t": 2, "patch_bias": False, "sample_height": 16, "sample_width": 16}

TINY: dict[str, dict[str, Config]] = {
    "cogvideox-2b": _tiny({}, {}, 3.0),
    "cogvideox-t2v": _tiny(_ROTARY, _VAE_5B, 1.0),
    "cogvideox-i2v": _tiny(_ROTARY | {"in_channels": 8, "use_learned_positional_embeddings": True}, _VAE_5B, 1.0),
    "cogvideox-1.5-t2v": _tiny(_ROTARY | _TWO_FRAMES, _VAE_1_5, 1.0),
    "cogvideox-1.5-i2v": _tiny(_ROTARY | _TWO_FRAMES | {"in_channels": 8, "ofs_embed_dim": 64}, _VAE_1_5, 1.0),
}  # fmt: skip
"""The configurations behind tiny://NAME: every kind of CogVideoX there is, for clips of 9 × 32 × 48, of 88 k parameters
or a few more in the transformer, 65 k in the autoencoder and 40 k in the text encoder."""

TINY_IMAGE_VAE: Config = IMAGE_VAE | {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [8, 8, 8, 8],
    "norm_num_groups": 2,
}
"""The configuration behind tiny://sd-vae, Stable Diffusion's autoencoder but for its widths: 8 × 8 pixels a latent."""
