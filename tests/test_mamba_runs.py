"""Mamba from clips to videos, by the commands that users type."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mutoscope.cli import main
from mutoscope.data.video import probe
from mutoscope.estimate.step import estimate
from mutoscope.loading import load_recipe
from mutoscope.run import Run
from mutoscope.sample import load_generator, sample_videos
from mutoscope.training.loop import train
from mutoscope.types import NO_LABEL
from mutoscope.weights import read_weights


@pytest.mark.parametrize("name", ["quickstart.mamba_tiny", "quickstart.mamba2_tiny"])
def test_it_learns_and_writes_videos(name: str, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    main(["train", name, "--out", run])
    losses = [line["val_loss"] for line in Run(Path(run)).metrics() if "val_loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    main(["sample", run, "--label", "3", "--out", str(tmp_path / "a.mp4")])
    assert probe(tmp_path / "a.mp4").frames == 4


@pytest.mark.parametrize("version", [1, 2])
def test_resumed_equals_uninterrupted(version: int, tmp_path: Path) -> None:
    """In chunks and with recomputed blocks."""
    recipe = replace(load_recipe("minisora.mamba_tiny"), steps=4, save_every=2, sample_every=0, validate_every=0)
    model = replace(recipe.model, version=version, head_dim=64 if version == 1 else 16)
    recipe = replace(recipe, model=model, activation_checkpointing=True)
    whole = train(recipe, tmp_path / "whole")
    train(replace(recipe, steps=2), tmp_path / "parts")
    parts = train(recipe, tmp_path / "parts")
    a, b = read_weights(whole.weights), read_weights(parts.weights)
    assert a.keys() == b.keys() and [name for name in a if not torch.equal(a[name], b[name])] == []


def test_a_video_hangs_on_its_seed_and_label_alone(tmp_path: Path) -> None:
    recipe = replace(load_recipe("quickstart.mamba2_tiny"), steps=2, sample_every=0, validate_every=0)
    generator = load_generator(train(recipe, tmp_path / "run").folder)
    torch.nn.init.normal_(generator.model.head.weight, generator=torch.Generator().manual_seed(0))
    cond = replace(generator.encoder.text([""] * 3), label=torch.tensor([3, NO_LABEL, 3]))
    together = list(sample_videos(generator, cond, 3, seed=1))
    assert torch.equal(together[0], next(sample_videos(generator, cond.rows(slice(1)), 1, seed=1)))
    assert not torch.equal(together[0], together[2])


@pytest.mark.slow
def test_the_cost_of_the_full_size_is_known() -> None:
    """The scan is one operator to the estimate, whatever its length."""
    recipe = load_recipe("minisora.mamba")
    cost = estimate(replace(recipe, data=replace(recipe.data, latents="x")))
    assert cost.tokens == 32_768 and 450e6 < cost.trainable < 500e6  # a quarter looks at captions
