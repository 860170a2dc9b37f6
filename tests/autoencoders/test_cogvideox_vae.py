"""CogVideoX's autoencoder against diffusers', and the latents of the image that image to video starts from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch

from mutoscope.autoencoders.cogvideox import (
    CogVideoXAutoencoder,
    autoencoder_spec,
    known_latents,
    load_cogvideox_autoencoder,
)
from mutoscope.checkpoints import open_checkpoint
from mutoscope.data.store import LatentStats
from mutoscope.encoder import Encoder
from mutoscope.randomness import Draw
from mutoscope.types import LatentSpec

T2V, I2V, LATER = "tiny://cogvideox-t2v", "tiny://cogvideox-i2v", "tiny://cogvideox-1.5-i2v"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def autoencoder(cache: None) -> CogVideoXAutoencoder:
    return load_cogvideox_autoencoder(T2V)


def video(frames: int, height: int = 32, width: int = 48, batch: int = 1) -> torch.Tensor:
    return 2 * torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(frames)) - 1


def test_the_spec_needs_no_weights(autoencoder: CogVideoXAutoencoder) -> None:
    assert autoencoder.spec == autoencoder_spec(T2V)
    full = LatentSpec(strides=(4, 8, 8), channels=16, first_frame_alone=True)
    assert autoencoder_spec("THUDM/CogVideoX-2b") == autoencoder_spec("zai-org/CogVideoX1.5-5B") == full
    assert not any(p.requires_grad for p in autoencoder.parameters())


@pytest.mark.parametrize("frames", [1, 9, 17])
def test_moments_and_pixels_are_diffusers(autoencoder: CogVideoXAutoencoder, frames: int) -> None:
    pipe = diffusers.CogVideoXPipeline.from_pretrained(open_checkpoint(T2V))
    clip = video(frames)
    with torch.no_grad():
        posterior = pipe.vae.encode(clip).latent_dist
        moments = autoencoder.encode(clip)
        assert torch.equal(moments, torch.cat([posterior.mean, posterior.logvar], 1))
        grid = autoencoder.spec.latent_shape(frames, 32, 48)
        assert moments.shape == (1, 8, *grid)

        # What the transformer learns, and back: diffusers multiplies by the scaling factor, and divides
        stats = LatentStats(mean=(0.0,) * 4, std=(1 / autoencoder.scaling_factor,) * 4)
        encoder = Encoder(autoencoder, stats=stats)
        latents = encoder.latents(moments)
        torch.testing.assert_close(latents, autoencoder.scaling_factor * posterior.mode())
        pixels = encoder.decode(latents)
        expected = pipe.decode_latents(latents.transpose(1, 2))
    assert pixels.shape == clip.shape
    torch.testing.assert_close(pixels, expected.clamp(-1, 1))


def test_numbers_of_frames_that_would_come_back_as_others_are_refused(autoencoder: CogVideoXAutoencoder) -> None:
    with torch.no_grad():
        assert autoencoder.vae.decode(autoencoder.vae.encode(video(5)).latent_dist.mode()).sample.shape[2] == 8
    for frames, nearest in ((5, "1 or 9"), (16, "9 or 17")):
        with pytest.raises(ValueError, match=rf"{frames} frames .* 8·n \+ 1 \(nearest: {nearest}\)"):
            autoencoder.encode(video(frames))
    with pytest.raises(ValueError, match="4 latents along time: a clip has an odd number"):
        autoencoder.decode(torch.zeros(1, 4, 4, 4, 6))


def test_slices_and_tiles_are_diffusers(autoencoder: CogVideoXAutoencoder) -> None:
    clip = video(9, 64, 96, batch=2)
    spared = load_cogvideox_autoencoder(T2V, slicing=True, tiling=True)
    theirs = diffusers.AutoencoderKLCogVideoX.from_pretrained(open_checkpoint(T2V), subfolder="vae")
    theirs.enable_tiling()
    with torch.no_grad():
        whole, tiled = autoencoder.encode(clip), spared.encode(clip)
        torch.testing.assert_close(tiled[:, :4], theirs.encode(clip).latent_dist.mode())
        assert not torch.equal(tiled, whole), "tiles see less around them"
        spared.vae.disable_tiling()
        torch.testing.assert_close(spared.encode(clip), whole)  # one clip after the other


def test_half_the_memory_gives_nearly_the_same(autoencoder: CogVideoXAutoencoder) -> None:
    halved = load_cogvideox_autoencoder(T2V, torch.bfloat16)
    with torch.no_grad():
        moments = halved.encode(video(9))
        assert moments.dtype == halved.decode(moments[:, :4]).dtype == torch.float32
        torch.testing.assert_close(moments, autoencoder.encode(video(9)), rtol=0.1, atol=0.1)


# ---------------------------------------------------------------- the image to start from


@pytest.mark.parametrize(("path", "factor"), [(I2V, 0.7), (LATER, 1 / 0.7)], ids=["1.0", "1.5"])
def test_an_image_is_scaled_as_the_pipeline_scales_it(path: str, factor: float) -> None:
    """In 1.5 the other way round: its authors trained so, and trainers that multiply show the model half the image."""
    autoencoder: Any = load_cogvideox_autoencoder(path)
    pipe = diffusers.CogVideoXImageToVideoPipeline.from_pretrained(open_checkpoint(path))
    image = video(1)
    with torch.no_grad():
        ours = autoencoder.image_latents(image)
        assert autoencoder.scaling_factor == 0.7
        torch.testing.assert_close(ours, factor * autoencoder.encode(image)[:, :4])
        frames = 3 if path == I2V else 4  # the pipeline has the latents that complete a patch among them
        _, theirs = pipe.prepare_latents(image[:, :, 0], 1, 4, 4 * frames - 3, 32, 48, torch.float32,
                                         torch.device("cpu"), torch.Generator().manual_seed(0))  # fmt: skip
        mean, logvar = autoencoder.encode(image).chunk(2, 1)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    drawn = factor * (mean + torch.exp(logvar / 2) * noise)
    torch.testing.assert_close(known_latents(drawn, frames).transpose(1, 2), theirs)


def test_an_image_is_noised_in_training_each_by_its_own_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """σ = exp(N(−3, ½)) on pixels in [-1, 1]."""
    autoencoder = load_cogvideox_autoencoder(I2V)
    seen = []

    def encode(image: torch.Tensor) -> torch.Tensor:
        seen.append(image)
        return torch.zeros(len(image), 8, 1, 2, 2)

    monkeypatch.setattr(autoencoder, "encode", encode)
    image = torch.zeros(400, 3, 1, 16, 16)
    latents = autoencoder.image_latents(image, Draw(0, "train", range(400)))
    logs = seen[0].flatten(1).std(1).log()
    assert logs.mean().item() == pytest.approx(-3.0, abs=0.08)
    assert logs.std().item() == pytest.approx(0.5, abs=0.06)
    assert latents.std().item() == pytest.approx(0.7, abs=0.05), "the posterior is drawn from"
    alone = autoencoder.image_latents(image[:1], Draw(0, "train", [7]))
    assert torch.equal(alone, latents[7:8])
    autoencoder.image_latents(image)
    assert torch.equal(seen[-1], image)
