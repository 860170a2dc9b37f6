"""Encoder: one path, so that what is stored is what would have been made on the fly."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import FSQ, KL, make_recipe

from mutoscope.autoencoders.conv import ConvAutoencoder
from mutoscope.autoencoders.pretrained import load_autoencoder
from mutoscope.data.store import LatentStats
from mutoscope.encode import encode
from mutoscope.encoder import Encoder, open_source
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.randomness import Draw
from mutoscope.recipe import Data, Recipe
from mutoscope.types import ModelIO

pytestmark = pytest.mark.usefixtures("one_thread")


def build_encoder(recipe: Recipe) -> Encoder:
    assert recipe.autoencoder is not None and recipe.text is not None
    autoencoder = load_autoencoder(recipe.autoencoder)
    return Encoder(autoencoder, text=recipe.text.build(), dtype=recipe.autoencoder.dtype)


@pytest.mark.parametrize("model", [KL, FSQ], ids=["moments", "tokens"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_stored_is_on_the_fly_bit_for_bit(tmp_path: Path, model: ConvAutoencoder, dtype: str) -> None:
    recipe = make_recipe(tmp_path, model)
    assert recipe.autoencoder is not None
    recipe = replace(recipe, autoencoder=replace(recipe.autoencoder, dtype=dtype))
    encode(recipe, tmp_path / "store", progress=False)
    live, stored = build_encoder(recipe), build_encoder(recipe)
    batches = [[(3, 100), (0, 101), (3, 102)], [(47, 7)]]  # of one size and another
    from_files = open_source(recipe, live, "train").loader(batches)
    from_store = open_source(
        replace(recipe, data=replace(recipe.data, latents=str(tmp_path / "store"))), stored, "train"
    )
    assert live.stats == stored.stats and (live.stats is None) == (model is FSQ)
    for a, b in zip(from_files, from_store.loader(batches), strict=True):
        ours, theirs = (e.batch(c, Draw(0, "train", c.samples)) for e, c in ((live, a), (stored, b)))
        assert ours.ids == theirs.ids and ours.samples == theirs.samples
        for name in ("latents", "tokens", "video"):
            x, y = getattr(ours, name), getattr(theirs, name)
            assert (x is None) == (y is None) and (x is None or (torch.equal(x, y) and x.dtype == y.dtype))
        for name in ("text", "text_mask", "label"):
            assert torch.equal(getattr(ours.cond, name), getattr(theirs.cond, name))
    if model is KL:  # one clip in two places of the stream: one posterior, two draws
        twice = next(from_store.loader(batches))
        assert torch.equal(twice.moments[0], twice.moments[2])
        latents = stored.batch(twice, Draw(0, "train", twice.samples)).latents
        assert latents is not None and not torch.equal(latents[0], latents[2])


def test_a_clip_is_encoded_alike_in_any_company(tmp_path: Path) -> None:
    encoder = build_encoder(make_recipe(tmp_path))
    video = torch.rand(5, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    together = encoder.moments(video)
    assert all(torch.equal(encoder.moments(video[i : i + 1]), together[i : i + 1]) for i in range(5))


def test_latents_are_normalised_and_decode_undoes_it(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    encoder = build_encoder(recipe)
    source = open_source(recipe, encoder, "train")
    clips = next(source.loader([[(i, i) for i in range(48)]]))
    latents = encoder.batch(clips, Draw(0, "train", clips.samples)).latents
    assert latents is not None and latents.dtype == torch.float32
    by_channel = latents.movedim(1, 0).flatten(1)
    assert by_channel.mean(1).abs().max() < 0.1 and (by_channel.std(1) - 1).abs().max() < 0.1
    video = torch.rand(2, 3, 4, 16, 16) * 2 - 1
    moments = encoder.moments(video)
    assert encoder.autoencoder is not None
    expected = encoder.autoencoder.decode(moments[:, :4]).clamp(-1, 1)  # type: ignore[operator]
    assert torch.allclose(encoder.decode(encoder.latents(moments)), expected, atol=1e-5)
    with pytest.raises(ValueError, match="mean and standard deviation are not known"):
        build_encoder(recipe).latents(moments)


def test_a_draw_is_from_the_posterior() -> None:
    class Wide(torch.nn.Module):
        spec = replace(KL.build(ModelIO(channels=3, grid=(4, 16, 16))).spec, channels=1)  # type: ignore[type-var]

    encoder = Encoder(Wide(), stats=LatentStats(mean=(1.0,), std=(2.0,)))
    moments = torch.cat([torch.full((1, 1, 10, 50, 50), 5.0), torch.full((1, 1, 10, 50, 50), math.log(36.0))], dim=1)
    drawn = encoder.latents(moments, Draw(0, "train", [3]))
    assert drawn.mean().item() == pytest.approx((5 - 1) / 2, abs=0.1)
    assert drawn.std().item() == pytest.approx(6 / 2, abs=0.1)
    assert torch.equal(encoder.latents(moments), torch.full((1, 1, 10, 50, 50), 2.0))


def test_without_an_autoencoder_all_is_pixels() -> None:
    data = Data(root="flying-mnist://tiny", frames=4, height=16, width=16)
    recipe = Recipe(data=data, model=KL, objective=Diffusion(), steps=1, batch_size=4)
    encoder = Encoder()
    source = open_source(recipe, encoder, "val")
    clips = next(source.loader([[(0, 0), (1, 1)]]))
    batch = encoder.batch(clips)
    assert batch.video is not None and batch.latents is batch.video and batch.cond.text is None
    assert batch.video.shape == (2, 3, 4, 16, 16) and -1 <= batch.video.min() < batch.video.max() <= 1
    assert torch.equal(encoder.decode(batch.video), batch.video)
    assert torch.equal(source.videos([0, 1]), clips.video)


@pytest.mark.parametrize("model", [KL, FSQ], ids=["moments", "tokens"])
def test_a_store_shows_its_clips_through_the_autoencoder(tmp_path: Path, model: ConvAutoencoder) -> None:
    recipe = make_recipe(tmp_path, model)
    encode(recipe, tmp_path / "store", progress=False)
    recipe = replace(recipe, data=replace(recipe.data, latents=str(tmp_path / "store")))
    videos = open_source(recipe, build_encoder(recipe), "val").videos(range(3))
    assert videos.shape == (3, 4, 16, 16, 3) and videos.dtype == torch.uint8
