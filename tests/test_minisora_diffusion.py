"""minisora's diffusion families, whole: they resume exactly, go on from frames that are given, learn from windows of
stored clips, and grow from short videos to long ones."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import FSQ, KL, make_recipe
from torch import Tensor, nn

from mutoscope.autoencoders.pretrained import load_autoencoder
from mutoscope.build import build_encoder, build_trainee, model_io
from mutoscope.contradictions import validate
from mutoscope.data.video import read_frames, write_video
from mutoscope.encode import encode
from mutoscope.encoder import Encoder, open_source
from mutoscope.errors import ConfigError
from mutoscope.evaluate import evaluate_run
from mutoscope.loading import load_recipe
from mutoscope.models.dit import DiT
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.pictures import save_png
from mutoscope.randomness import Draw
from mutoscope.recipe import Recipe, Sampler
from mutoscope.run import Run
from mutoscope.sample import conditions, encode_prefix, load_generator, sample_run, sample_videos
from mutoscope.training.loop import train
from mutoscope.training.signals import Stopped
from mutoscope.types import Batch, Loss
from mutoscope.weights import read_weights

FAMILIES = ["dit", "latte", "stdit", "stdit3"]
every_family = pytest.mark.parametrize("family", FAMILIES)


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(family: str, steps: int = 4) -> Recipe:
    recipe = load_recipe(f"minisora.{family}_tiny")
    return replace(recipe, steps=steps, batch_size=2, sample_every=0, validate_every=0, save_every=2, log_every=1)


@pytest.fixture(scope="module", params=FAMILIES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tiny(request.param), tmp_path_factory.mktemp("runs") / request.param)


@dataclass(frozen=True, kw_only=True)
class KilledAt(Diffusion):
    step: int = 0

    def loss(self, model: nn.Module, batch: Batch, draw: Draw) -> Loss:
        if batch.samples[0] == (self.step - 1) * len(batch.samples):
            os.kill(os.getpid(), signal.SIGTERM)
        return super().loss(model, batch, draw)


# ---------------------------------------------------------------- resuming


@every_family
def test_resumed_is_uninterrupted(family: str, tmp_path: Path) -> None:
    """Windows, given frames and learned variance included, bit for bit."""
    recipe = tiny(family)
    assert isinstance(recipe.objective, Diffusion)
    fields = {name: getattr(recipe.objective, name) for name in Diffusion.__dataclass_fields__}
    killed = replace(recipe, objective=KilledAt(**fields, step=3))
    with pytest.raises(Stopped):
        train(killed, tmp_path / "part")
    whole, part = train(replace(killed, objective=KilledAt(**fields)), tmp_path / "whole"), Run(tmp_path / "part")
    train(killed, tmp_path / "part")
    a, b = read_weights(whole.weights), read_weights(part.weights)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


# ---------------------------------------------------------------- given frames


def a_clip(path: Path, frames: int = 6) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 256, (frames, 16, 16, 3), dtype=np.uint8)
    write_video(path, pixels, 8, lossless=True)
    return read_frames(path, range(frames))


def test_videos_go_on_from_given_frames(run: Run, tmp_path: Path) -> None:
    """On pixels, what is given comes back as it was; what follows hangs on it, and on the seed."""
    clip, generator = a_clip(tmp_path / "clip.mp4"), load_generator(run.folder)
    prefix = encode_prefix(generator, tmp_path / "clip.mp4", None, 1)
    io = model_io(generator.recipe)
    assert prefix.shape == (1, 3, 1, 16, 16)
    drawn = list(sample_videos(generator, conditions(generator, 2, None, None, prefix), 2, seed=0))
    given = torch.from_numpy(clip[:1])
    assert all(len(video) == io.grid[0] and torch.equal(video[:1], given) for video in drawn)
    assert not torch.equal(drawn[0][1:], drawn[1][1:])
    free = next(sample_videos(generator, conditions(generator, 1, None, None), 1, seed=0))
    assert not torch.equal(free[:1], given)


def test_the_command_writes_videos_that_go_on(run: Run, tmp_path: Path) -> None:
    clip = a_clip(tmp_path / "clip.mp4")
    save_png(tmp_path / "first.png", clip[0])
    for options in ({"video": tmp_path / "clip.mp4", "known_frames": 1}, {"image": tmp_path / "first.png"}):
        [path] = sample_run(run.folder, out=tmp_path / "out.mp4", **options)  # type: ignore[arg-type]
        first = read_frames(path, [0])[0].astype(int)
        assert np.abs(first - clip[0].astype(int)).mean() < 60, "through a codec that loses colour"


def test_what_cannot_be_given_is_said(run: Run, tmp_path: Path) -> None:
    a_clip(tmp_path / "clip.mp4", frames=2)
    generator = load_generator(run.folder)
    frames = model_io(generator.recipe).grid[0]
    given = lambda video, image, known: encode_prefix(generator, video, image, known)
    with pytest.raises(ValueError, match=f"the model draws {frames} frames, and some must be left"):
        given(tmp_path / "clip.mp4", None, frames)
    if frames > 3:
        with pytest.raises(ValueError, match=r"known-frames 3: .* has 2, at the rate of the model's clips"):
            given(tmp_path / "clip.mp4", None, 3)
    with pytest.raises(ValueError, match="goes with --video"):
        given(tmp_path / "clip.mp4", None, None)
    with pytest.raises(ValueError, match="give one of the two"):
        given(tmp_path / "clip.mp4", tmp_path / "first.png", 1)
    with pytest.raises(ValueError, match="was not trained to go on"):
        recipe = replace(generator.recipe, objective=Diffusion())
        conditions(replace(generator, recipe=recipe), 1, None, None, torch.zeros(1, 3, 1, 16, 16))


@pytest.mark.parametrize("model", [KL, FSQ], ids=["latents", "tokens"])
def test_given_frames_become_whole_latents_or_tokens(model: object, tmp_path: Path) -> None:
    """Of an autoencoder that takes four frames together; what comes after the given frames is not looked at."""
    recipe = make_recipe(tmp_path, model)  # type: ignore[arg-type]
    recipe = replace(recipe, data=replace(recipe.data, frames=12), model=DiT(depth=2, width=16, heads=2),
                     objective=Diffusion(prefix_share=0.5), sampler=Sampler())  # fmt: skip
    encoder = build_encoder(recipe, torch.device("cpu"))
    if encoder.spec.vocab is None:
        encoder.fit_stats([torch.zeros(4, 16, 16, 3, dtype=torch.uint8)])
    from mutoscope.sample import Generator

    generator = Generator(recipe, nn.Linear(1, 1), encoder)
    clip = a_clip(tmp_path / "a.mp4", 12)
    write_video(tmp_path / "b.mp4", np.concatenate([clip[:8], 255 - clip[8:]]), 8, lossless=True)
    a, b = (encode_prefix(generator, tmp_path / name, None, 8) for name in ("a.mp4", "b.mp4"))
    assert torch.equal(a, b)
    assert a.shape == ((1, 2, 4, 4) if encoder.spec.vocab else (1, 4, 2, 4, 4))
    with pytest.raises(ValueError, match=r"frames=5 does not fit .* \(nearest: 4 or 8\)"):
        encode_prefix(generator, tmp_path / "a.mp4", None, 5)
    save_png(tmp_path / "first.png", clip[0])
    still = encode_prefix(generator, None, tmp_path / "first.png", None)
    assert still.shape[-3] == 1


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize("model", [KL, FSQ], ids=["latents", "tokens"])
def test_windows_are_random_stretches_of_stored_and_of_fresh_latents(model: object, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / "clips" / split).mkdir(parents=True)
        a_clip(tmp_path / "clips" / split / "0.mp4", 16)
    recipe = make_recipe(tmp_path, model)  # type: ignore[arg-type]
    data = replace(recipe.data, root=str(tmp_path / "clips"), frames=16, num_labels=0)
    recipe = replace(recipe, text=None, data=data)  # 4 latents along time
    encode(recipe, tmp_path / "store", progress=False)
    assert recipe.autoencoder is not None
    stored = replace(recipe, data=replace(recipe.data, latents=str(tmp_path / "store")))
    autoencoder = load_autoencoder(recipe.autoencoder)
    whole, windowed = Encoder(autoencoder), Encoder(autoencoder, window=2)
    batches = [[(0, n) for n in range(8)]]
    from_store = next(open_source(stored, whole, "train").loader(batches))
    windowed.stats = whole.stats
    from_files = next(open_source(recipe, windowed, "train").loader(batches))
    field = "tokens" if whole.spec.vocab else "latents"
    read = lambda encoder, clips, draw: getattr(encoder.batch(clips, draw), field)
    draw = lambda: Draw(0, "train", range(8))
    taken = read(windowed, from_store, draw())
    assert taken.shape[-3] == 2
    assert torch.equal(taken, read(windowed, from_files, draw())), "stored is on the fly"
    assert torch.equal(read(windowed, from_store, None), read(whole, from_store, None).narrow(-3, 0, 2)), "first"

    # Where each window begins
    all_of_it = torch.arange(32).reshape(8, 4, 1, 1)
    cut = windowed._windowed(all_of_it, draw())
    begins = [next(k for k in range(3) if torch.equal(cut[i], all_of_it[i].narrow(-3, k, 2))) for i in range(8)]
    assert len(set(begins)) > 1
    alone = windowed._windowed(all_of_it[5:6], Draw(0, "train", [5]))
    assert torch.equal(alone, cut[5:6]), "the sample alone decides"


def test_a_model_of_windows_fits_and_draws_windows(tmp_path: Path) -> None:
    recipe = tiny("latte")
    assert model_io(recipe).grid == (2, 16, 16)
    finished = train(recipe, tmp_path / "run")
    assert evaluate_run(finished.folder, num=2)["frechet_random_conv"] >= 0
    with pytest.raises(ValueError, match="latent_window=5: a clip has only 4 latents"):
        model_io(replace(recipe, data=replace(recipe.data, latent_window=5)))
    with pytest.raises(ConfigError, match="latent_window"):
        validate(replace(recipe, data=replace(recipe.data, latent_window=0)))


# ---------------------------------------------------------------- from short videos to long ones


@pytest.mark.parametrize("family", ["dit", "stdit3"])
def test_a_longer_model_goes_on_from_a_shorter_one(family: str, tmp_path: Path) -> None:
    """From 2 frames to 4 (as from 8 to 32): all weights are those of the shorter one, and training goes on."""
    recipe = tiny(family)
    patch = recipe.model.patch  # type: ignore[attr-defined]
    short = replace(recipe, data=replace(recipe.data, latent_window=2))
    first = train(replace(short, steps=2), tmp_path / "short")
    longer = replace(
        recipe,
        data=replace(recipe.data, latent_window=4),
        model=replace(recipe.model, base_frames=2 // patch[0]),  # type: ignore[call-arg]
        init_from=str(first.folder),
    )
    model, weights = build_trainee(longer), read_weights(first.weights)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert train(replace(longer, steps=2), tmp_path / "long").weights.exists()


def test_interpolated_positions_of_a_transformer() -> None:
    """Every fourth of 32 is one of the 8; joint attention likewise in its half of the channels."""
    for attention in ("factorised", "joint"):
        config = DiT(depth=2, width=16, heads=2, attention=attention)  # type: ignore[arg-type]
        io = model_io(load_recipe("minisora.dit_tiny"))
        short = config.build(replace(io, grid=(8, 4, 4)))
        long = replace(config, base_frames=8).build(replace(io, grid=(32, 4, 4)))
        pick: slice = slice(None, None, 4)
        before, after = short._positions((8, 2, 2)), long._positions((32, 2, 2))
        of_time = lambda pair: pair[0] if pair[1] is None else pair[1]
        a, b = of_time(before), of_time(after)
        assert isinstance(a, Tensor) and isinstance(b, Tensor)
        torch.testing.assert_close(b[pick], a)
        assert torch.equal(long._positions((8, 2, 2))[0], short._positions((8, 2, 2))[0]), "no longer, no change"
