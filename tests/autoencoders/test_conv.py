"""The autoencoders: the seed's numbers of parameters, shapes, causality, determinism, and honest configurations."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from mutoscope.autoencoders.causal import CausalConv
from mutoscope.autoencoders.conv import ConvAutoencoder, ConvAutoencoderModel
from mutoscope.autoencoders.networks import FromPatches, ToPatches, ToPixels, split_strides
from mutoscope.autoencoders.presets import PRESETS, preset
from mutoscope.types import ModelIO

# Parameters of (encoder, decoder) with 4 latent channels, counted in the seed's code; causal_s8t4's encoder is the
# seed's but for the convolutions that halve time, which are 4×3×3 here and 4×4×4 there.
SEED_PARAMETERS = {
    "encode111111_decode111111": (16, 15),
    "encode133111_decode111111": (112, 15),
    "encode133122_decode144122": (112, 1475),
    "encode133122_decode144122_tanh": (112, 1475),
    "encode133122_decode144122_tanh_vq": (112, 1475),
    "encode333222_decode444222_tanh": (328, 5411),
    "encode_decode_spatial4x": (1028, 1811),
    "encode_decode_spatial4x_a": (1028, 7907),
    "encode_decode_spatial4x_a_vq": (1028, 7907),
    "vae_spatial4x_a": (1608, 7907),
    "vae_spatial4x_a_vq": (1608, 7907),
    "encode_decode_spatial8x_a": (6244, 26403),
    "encode_decode_spatial16x_a": (25892, 98211),
    "s4t4": (3044, 7187),
    "s4t4_a": (3044, 28739),
    "s4t4_b": (6084, 104067),
    "s4t4_b_vq": (6084, 104067),
    "s4t4_c": (9668, 79971),
    "vae_s4t4_b": (9544, 104067),
    "vae_s4t4_b_vq": (9544, 104067),
    "s8_b": (6084, 104067),
    "s8t8_a": (18628, 93315),
    "s8t8_b": (64900, 292035),
    "s8t8_b_vq": (64900, 292035),
    "vae_s8t8_b": (71816, 292035),
    "s16t16_a": (77444, 343299),
    "causal_s8t4": (4337284 - 2 * 128 * 128 * 4 * (4 * 4 - 3 * 3), 2892803),
}


def build(config: ConvAutoencoder, frames: int = 16, size: int = 32) -> ConvAutoencoderModel:
    torch.manual_seed(0)
    return config.build(ModelIO(channels=3, grid=(frames, size, size)))


def clip(frames: int = 16, size: int = 32, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, frames, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_every_variant_of_the_seed_is_here():
    assert set(PRESETS) == set(SEED_PARAMETERS)


@pytest.mark.parametrize("name", SEED_PARAMETERS)
def test_presets_have_the_seeds_parameters_shapes_and_latents(name):
    config = preset(name)
    frames = 17 if config.network == "causal" else 16
    model = build(config, frames)
    assert (parameters(model.encoder), parameters(model.decoder)) == SEED_PARAMETERS[name]
    video = clip(frames)
    grid = model.spec.latent_shape(frames, 32, 32)
    assert model.spec.pixel_shape(*grid) == (frames, 32, 32)
    encoded = model.encode(video)
    if "vq" in name or name in ("s8_b", "causal_s8t4"):
        assert model.spec.vocab == 5120
        assert encoded.dtype == torch.int64
        assert encoded.shape == (2, *grid)
        latents = encoded
    else:
        assert model.spec.vocab is None
        assert encoded.shape == (2, 8 if "vae" in name else 4, *grid)
        latents = encoded[:, :4]
    decoded = model.decode(latents)
    assert decoded.shape == video.shape
    assert decoded.abs().max() <= 1


def test_unknown_preset_names_those_there_are():
    with pytest.raises(ValueError, match=r"s9_b.*s8_b"):
        preset("s9_b")


def test_the_readmes_command_really_quantises():
    """--network_variant s8_b --n_codes 5120 --embedding_dim 4: in the seed an Identity, whatever the flags."""
    model = build(preset("s8_b"))
    out = model(clip())
    assert out.quantized is not None
    assert out.quantized.codebook is not None
    vectors = out.quantized.latents.movedim(1, -1).flatten(0, -2)
    assert torch.cdist(vectors, model.quantizer.weight).amin(1).max() < 1e-3
    assert model.spec.strides == (4, 4, 4)


def test_seed_weights_give_the_seeds_output():
    """Layers and units are the seed's: its s4t4_b, written out, with the same weights, on pixels in [-0.5, 0.5]."""
    seed_encoder = nn.Sequential(nn.Conv3d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv3d(32, 4, 3, 2, 1))
    seed_decoder = nn.Sequential(
        nn.ConvTranspose3d(4, 32, 4, 2, 1), nn.LeakyReLU(), nn.Conv3d(32, 32, 3, 1, 1), nn.LeakyReLU(),
        nn.ConvTranspose3d(32, 32, 4, 2, 1), nn.LeakyReLU(), nn.Conv3d(32, 3, 3, 1, 1), nn.Tanh(),
    )  # fmt: skip
    model = build(preset("s4t4_b"))
    for seed, ours in ((seed_encoder, model.encoder), (seed_decoder, model.decoder)):
        for a, b in zip(seed.parameters(), ours.parameters(), strict=True):
            b.data.copy_(a.detach())
    video = clip()
    latents = seed_encoder(video / 2)
    torch.testing.assert_close(model.encode(video), latents, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model(video).video / 2, seed_decoder(latents), rtol=1e-4, atol=1e-6)


def test_eval_and_encode_are_deterministic_for_variational_ones():
    """The seed sampled the posterior in eval too."""
    for name in ("vae_s4t4_b", "vae_s4t4_b_vq"):
        model = build(preset(name)).eval()
        assert torch.equal(model(clip()).video, model(clip()).video)
        assert torch.equal(model.encode(clip()), model.encode(clip()))


def test_noise_draws_from_the_posterior():
    model = build(preset("vae_s4t4_b"))
    mean, logvar = model.encode(clip()).chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    expected = 2 * model.decoder(mean + (logvar / 2).exp() * noise)
    out = model(clip(), noise=noise)
    torch.testing.assert_close(out.video, expected)
    kl = -0.5 * (1 + logvar - mean**2 - logvar.exp()).flatten(1).mean(1)
    torch.testing.assert_close(out.kl, kl)
    assert not torch.allclose(out.video, model(clip()).video)


def test_logvar_is_clamped():
    model = build(preset("vae_s4t4_b"))
    with torch.no_grad():
        model.encoder[-1][-1].bias[4:] = torch.tensor([1e4, -1e4, 1e4, -1e4])
    logvar = model.encode(clip())[:, 4:]
    assert logvar.max() == 20
    assert logvar.min() == -30
    assert model(clip()).kl.isfinite().all()


def test_tokens_and_quantised_latents_decode_alike():
    model = build(preset("s4t4_b_vq")).eval()
    out = model(clip())
    assert torch.equal(model.encode(clip()), out.quantized.tokens)
    torch.testing.assert_close(model.decode(out.quantized.tokens), model.decode(out.quantized.latents))
    torch.testing.assert_close(model.decode(out.quantized.tokens), out.video.clamp(-1, 1))


def test_variational_codes_are_those_of_the_mean():
    """The seed passed the encoder's dict to vec_to_codes and could not tokenise vae_*_vq."""
    model = build(preset("vae_s4t4_b_vq"))
    mean = model.encoder(clip() / 2)[:, :4]
    assert torch.equal(model.encode(clip()), model.quantizer.encode(mean))


PATCH = ConvAutoencoder(
    network="patch", encoder_channels=(64,), decoder_channels=(64,), latent_channels=12, bounded=True, latent_noise=0.1
)


def test_patch_latents_depend_on_their_patch_alone():
    model = build(PATCH)
    video = clip()
    changed = video.clone()
    changed[:, :, 4:8, 8:12, 28:32] = 0.5
    before, after = model.encode(video), model.encode(changed)
    differs = (before != after).any(1)
    assert differs[:, 1, 2, 7].all()
    assert differs.sum() == 2
    decoded, redecoded = model.decode(before), model.decode(after)
    rest = torch.ones_like(decoded, dtype=torch.bool)
    rest[:, :, 4:8, 8:12, 28:32] = False
    assert torch.equal(decoded[rest], redecoded[rest])
    flat = model.encode(torch.full_like(video, -1.0))
    assert torch.equal(flat, flat[:, :, :1, :1, :1].expand_as(flat))
    assert before.abs().max() < 1


def test_patches_round_trip():
    video = clip()
    assert torch.equal(FromPatches((4, 2, 8))(ToPatches((4, 2, 8))(video)), video)


def test_latent_noise_is_added_in_training_only_as_given():
    model = build(PATCH)
    latents = model.encode(clip())
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(clip(), noise=noise).video, 2 * model.decoder(latents + 0.1 * noise))
    torch.testing.assert_close(model(clip()).video, 2 * model.decoder(latents))


def small_causal(**changes) -> ConvAutoencoderModel:
    config = replace(
        preset("causal_s8t4"), encoder_channels=(8,), decoder_channels=(8,), bottleneck="none", num_codes=0
    )
    return build(replace(config, **changes), frames=13)


def test_causal_latents_know_of_no_later_frame():
    model = small_causal()
    video = clip(13)
    latents = model.encode(video)
    assert latents.shape[2] == 4
    for frame in range(13):
        changed = video.clone()
        changed[:, :, frame] += 0.5
        moved = (model.encode(changed) != latents).flatten(3).any(3).any(1).any(0).tolist()
        first = 0 if frame == 0 else 1 + (frame - 1) // 4  # the latent that this frame belongs to
        assert not any(moved[:first]), frame
        assert moved[first], frame


def test_causal_latents_leak_nothing_in_training_either():
    """Batch norm, which the seed has, mixes the statistics of all frames while training."""
    model = small_causal().train()
    video = clip(13)
    changed = video.clone()
    changed[:, :, 5:] = 0
    assert torch.equal(model.encode(video)[:, :, :2], model.encode(changed)[:, :, :2])


def test_causal_decoder_shows_no_frame_a_later_latent():
    model = small_causal()
    latents = torch.randn(1, 4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    video = model.decode(latents)
    assert video.shape == (1, 3, 13, 32, 32)  # the seed's came back as stride·t = 16 frames
    for position in range(4):
        changed = latents.clone()
        changed[:, :, position] += 1
        moved = (model.decode(changed) != video).flatten(3).any(3).any(1)[0].tolist()
        first = 0 if position == 0 else 1 + 4 * (position - 1)
        assert not any(moved[:first]), position
        assert moved[first], position


def test_causal_takes_a_single_image():
    model = small_causal()
    image = clip(1)
    assert model.encode(image).shape[2:] == (1, 4, 4)
    assert model.decode(model.encode(image)).shape == image.shape
    video = torch.cat([image, clip(12)], dim=2)
    torch.testing.assert_close(model.encode(video)[:, :, :1], model.encode(image))


def test_causal_encoder_gets_the_reconstructions_gradient_through_its_codebook():
    """The seed's Codebook handed the decoder the bare code vectors: nothing reached the encoder."""
    model = small_causal(bottleneck="ema_vq", num_codes=16)
    model(clip(13)).video.square().mean().backward()
    assert model.encoder[0][0].weight.grad.abs().max() > 0


def test_causal_conv_at_stride_one_looks_back_only():
    conv = CausalConv(1, 1, (3, 1, 1), bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([1.0, 10.0, 100.0]).reshape(1, 1, 3, 1, 1))
    out = conv(torch.tensor([1.0, 2.0, 3.0]).reshape(1, 1, 3, 1, 1)).flatten()
    assert out.tolist() == [111, 211, 321]


@pytest.mark.parametrize("batch", [1, 2])
def test_to_pixels_is_the_convolution_that_it_stands_for(batch):
    conv = ToPixels(8, 3, 3, padding=1).double()
    x = torch.randn(batch, 8, 5, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = nn.functional.conv3d(x, conv.weight, conv.bias, padding=1)
    torch.testing.assert_close(conv(x), expected)
    inputs = [x, conv.weight, conv.bias]
    for a, b in zip(
        torch.autograd.grad(conv(x).pow(3).sum(), inputs),
        torch.autograd.grad(expected.pow(3).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    assert conv(x[:, :, :1]).shape == (batch, 3, 1, 6, 7)


def test_uneven_strides_are_halved_last_where_there_are_fewer():
    assert split_strides((4, 8, 8)) == [(1, 2, 2), (2, 2, 2), (2, 2, 2)]
    assert split_strides((1, 1, 1)) == [(1, 1, 1)]
    model = build(ConvAutoencoder(strides=(2, 8, 8), encoder_channels=(8, 8), decoder_channels=(8, 8, 8)))
    assert model.encode(clip()).shape == (2, 4, 8, 4, 4)
    assert model.decode(model.encode(clip())).shape == clip().shape


def test_blocks_hold_all_parameters_of_the_networks():
    for name in ("s4t4_b", "s4t4_c", "causal_s8t4"):
        model = build(preset(name), 17 if "causal" in name else 16)
        assert sum(map(parameters, model.blocks)) == parameters(model.encoder) + parameters(model.decoder)


def test_fsq_and_lfq_derive_their_vocabulary():
    fsq = ConvAutoencoder(bottleneck="fsq", latent_channels=3, fsq_levels=(8, 6, 5))
    lfq = ConvAutoencoder(bottleneck="lfq", latent_channels=9)
    assert fsq.spec.vocab == 240
    assert lfq.spec.vocab == 512
    for config in (fsq, lfq):
        model = build(config)
        tokens = model.encode(clip())
        assert 0 <= tokens.min() <= tokens.max() < config.spec.vocab
        assert model.decode(tokens).shape == clip().shape


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"strides": (3, 4, 4)}, "powers of two"),
        ({"strides": (0, 4, 4)}, "strides"),
        ({"encoder_channels": (32, 64)}, "takes 1"),
        ({"decoder_channels": ()}, "takes 1 or 2"),
        ({"num_codes": 512}, "num_codes=512 has no effect with model.bottleneck='none'"),
        ({"bottleneck": "vq"}, "needs model.num_codes"),
        ({"bottleneck": "fsq", "fsq_levels": (8, 8)}, "latent_channels=4"),
        ({"bottleneck": "kl", "latent_noise": 0.1}, "latent_noise=0.1 has no effect"),
        ({"bottleneck": "vq", "num_codes": 8, "ema_decay": 0.9}, "ema_decay=0.9 has no effect"),
        ({"bottleneck": "ema_vq", "num_codes": 8, "ema_decay": 1.5}, "ema_decay"),
        ({"network": "patch", "kernel": 1}, "kernel=1 has no effect with model.network='patch'"),
        ({"kernel": 5}, "allowed are 1 and 3"),
        ({"network": "causal", "decoder_channels": (32,), "strides": (4, 8, 4)}, "equal strides"),
        ({"network": "causal"}, "decoder_channels"),
        ({"latent_channels": 0}, "latent_channels=0"),
    ],
)
def test_what_cannot_be_is_said(changes, says):
    with pytest.raises(ValueError, match=says.replace("(", r"\(")):
        ConvAutoencoder(**changes)


def test_clips_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"height=30.*nearest: 28 or 32"):
        preset("s4t4_b").build(ModelIO(channels=3, grid=(16, 30, 32)))
    with pytest.raises(ValueError, match="4·n \\+ 1"):
        build(preset("causal_s8t4"), frames=16)
    with pytest.raises(ValueError, match="3 channels"):
        preset("s4t4_b").build(ModelIO(channels=4, grid=(16, 32, 32)))
    with pytest.raises(ValueError, match="frames=15"):
        build(preset("s4t4_b")).encode(clip(15))
    with pytest.raises(ValueError, match="bottleneck='none'"):
        build(preset("s4t4_b")).decode(torch.zeros(1, 4, 8, 8, dtype=torch.int64))
