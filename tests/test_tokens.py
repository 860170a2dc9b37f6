"""Tokens from clips to videos, by the commands that users type."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mutoscope.autoencoders.pretrained import load_autoencoder
from mutoscope.cli import main
from mutoscope.data.dataset import to_pixels, to_uint8
from mutoscope.data.flying_mnist import preset_named, render
from mutoscope.data.store import LatentStore
from mutoscope.data.video import probe, write_video
from mutoscope.estimate.step import estimate
from mutoscope.loading import load_recipe
from mutoscope.recipe import Autoencoder, TokenSampler
from mutoscope.run import Run
from mutoscope.sample import conditions, encode_prefix, load_generator, sample_videos
from mutoscope.training.loop import train
from mutoscope.types import Cond
from mutoscope.weights import read_weights


def test_the_whole_chain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, store, run = (str(tmp_path / name) for name in ("tokenizer", "store", "gpt"))
    main(["train", "quickstart.tokenizer_tiny", "--out", tokenizer])
    flags = ["quickstart.gpt_tiny", "--autoencoder.path", tokenizer]
    main(["encode", *flags, "--out", store])
    stored = LatentStore(store)
    assert stored.manifest.kind == "tokens" and stored.read(0).moments.shape == (2, 4, 4)
    main(["train", *flags, "--data.latents", store, "--out", run])
    losses = [line["val_loss"] for line in Run(Path(run)).metrics() if "val_loss" in line]
    assert losses[0] == pytest.approx(np.log(60), rel=1e-4) and losses[-1] < 0.8 * losses[0]  # 60 codes, at first alike
    assert {p.suffix for p in (Path(run) / "samples").iterdir()} == {".mp4", ".png"}
    main(["sample", run, "--label", "3", "--num", "2", "--guidance-scale", "1.5", "--out", str(tmp_path / "a.mp4")])
    assert probe(tmp_path / "a-1.mp4").frames == 4
    main(["evaluate", run, "--num", "4"])
    figures = json.loads((Path(run) / "evaluation.json").read_text())
    assert 0 <= figures["glyph_accuracy"] <= 1 and figures["frechet_random_conv"] > 0
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["sample", run, "--steps", "3"])
    assert "drawn one by one" in capsys.readouterr().err


def test_tokens_of_minisora_are_trained_on(tmp_path: Path) -> None:
    """A file as the seed's tokenize_videos.py writes: int64 (N, T, H, W)."""
    tokens = np.random.default_rng(0).integers(0, 64, (6, 2, 4, 4))
    np.save(tmp_path / "tokens.npy", tokens)
    main(["data", "import-npy", "minisora.gpt_tiny", "--file", str(tmp_path / "tokens.npy"),
          "--out", str(tmp_path / "store")])  # fmt: skip
    assert torch.equal(LatentStore(tmp_path / "store").read(3).moments.long(), torch.from_numpy(tokens[3]))


def test_resumed_equals_uninterrupted_with_windows_and_dropout(tmp_path: Path) -> None:
    recipe = replace(load_recipe("minisora.gpt_tiny"), steps=6, save_every=3, sample_every=0, validate_every=0)
    whole = train(recipe, tmp_path / "whole")
    train(replace(recipe, steps=3), tmp_path / "parts")
    parts = train(recipe, tmp_path / "parts")
    a, b = read_weights(whole.weights), read_weights(parts.weights)
    assert a.keys() == b.keys() and [name for name in a if not torch.equal(a[name], b[name])] == []


def test_a_video_hangs_on_its_seed_and_caption_alone(tmp_path: Path) -> None:
    """And the sampler takes the window of the objective: with a longer one, other tokens are drawn."""
    recipe = replace(load_recipe("minisora.gpt_tiny"), sample_every=0, validate_every=0)
    recipe = replace(recipe, sampler=TokenSampler(top_k=20, guidance_scale=2.0))
    generator = load_generator(train(recipe, tmp_path / "run").folder)
    generator.model.apply(_shaken)
    cond = generator.encoder.text(["a red 3 flies up", "a blue 7 flies down", "a red 3 flies up"])
    together = list(sample_videos(generator, cond, 3, seed=1))
    alone = next(sample_videos(generator, cond.rows(slice(1)), 1, seed=1))
    assert torch.equal(together[0], alone) and not torch.equal(together[0], together[2])
    other = Cond.stack([cond.rows(slice(1, 2)), cond.rows(slice(1, 3))])
    assert not torch.equal(next(sample_videos(generator, other, 3, seed=1)), together[0])
    wide = replace(generator, recipe=replace(recipe, objective=replace(recipe.objective, window=0)))
    assert not torch.equal(next(sample_videos(wide, cond, 3, seed=1)), together[0])


def test_a_given_video_is_continued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its first two frames, through the autoencoder, then what the model draws behind them."""
    run = tmp_path / "run"
    recipe = replace(load_recipe("quickstart.gpt_tiny"), steps=1, sample_every=0, validate_every=0)
    train(recipe, run)
    generator = load_generator(run)
    clip = render(preset_named("tiny"), "val", 0).frames
    write_video(tmp_path / "clip.mp4", clip, 4, lossless=True)
    prefix = encode_prefix(generator, tmp_path / "clip.mp4", None, 2)
    assert prefix.shape == (1, 1, 4, 4) and not prefix.is_floating_point()
    drawn = list(sample_videos(generator, conditions(generator, 3, None, None, prefix), 3, seed=0))
    known = to_uint8(generator.encoder.decode(prefix))[0]
    assert all(torch.equal(video[:2], known) for video in drawn)
    shown = generator.encoder.moments(to_pixels(torch.from_numpy(clip)[None]))
    assert (prefix[:, 0] == shown[:, 0]).float().mean() > 0.9  # the file has other colours, by rounding
    assert not torch.equal(drawn[0][2:], drawn[1][2:])
    main(["sample", str(run), "--video", str(tmp_path / "clip.mp4"), "--known-frames", "2",
          "--out", str(tmp_path / "a.mp4")])  # fmt: skip
    assert probe(tmp_path / "a.mp4").frames == 4
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["sample", str(run), "--video", str(tmp_path / "clip.mp4"), "--known-frames", "3"])
    assert "a multiple of 2" in capsys.readouterr().err


def _shaken(module: torch.nn.Module) -> None:
    if isinstance(module, torch.nn.Linear):
        torch.nn.init.normal_(module.weight, std=0.5, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
def test_compiled_blocks_are_not_compiled_for_each_length(tmp_path: Path) -> None:
    """Drawing goes on eagerly: 32 tokens are more lengths of the cache than may be compiled. (In a process of its own:
    the checks of shapes can't be compiled.)"""
    command = [sys.executable, "-m", "mutoscope", "train", "quickstart.gpt_tiny", "--steps", "1", "--compile",
               "--precision", "fp32", "--out", str(tmp_path / "run")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and Run(tmp_path / "run").weights.exists(), done.stderr


def test_an_untrained_autoencoder_is_always_the_same() -> None:
    config = Autoencoder(path="untrained://", recipe="quickstart.tokenizer_tiny")
    a, b = load_autoencoder(config).state_dict(), load_autoencoder(config).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_cost_of_the_full_size_is_known() -> None:
    cost = estimate(replace(load_recipe("minisora.gpt"), data=replace(load_recipe("minisora.gpt").data, latents="x")))
    assert (cost.tokens, cost.vocab, cost.latents) == (32_768, 5120, (4, 8, 64, 64))
    assert 60e6 < cost.trainable < 90e6 and cost.flops_forward > 2 * 32 * 512 * 57e6
