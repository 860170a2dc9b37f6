"""Shapes follow from one another: an autoencoder's run, or the recipe that would make it, tells the model's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mutoscope.build import build_encoder, build_model, latent_spec, model_io
from mutoscope.loading import load_recipe
from mutoscope.recipe import Autoencoder
from mutoscope.training.loop import train


def test_shapes_of_an_autoencoder_that_is_not_trained_yet() -> None:
    recipe = load_recipe("minisora.dit")
    io = model_io(recipe)
    assert (io.channels, io.grid, io.vocab, io.num_labels) == (4, (8, 64, 64), None, 0)
    assert io.text_dim == recipe.text.dim


def test_the_run_counts_more_than_the_recipe_that_is_said_to_make_it(tmp_path: Path) -> None:
    run = train(replace(load_recipe("minisora.vae_tiny"), steps=1, sample_every=0), tmp_path / "vae")
    named = Autoencoder(path=str(run.folder), recipe="minisora.vqvae")
    assert latent_spec(named).vocab is None
    assert latent_spec(replace(named, path="nowhere")).vocab == 5120


def test_a_missing_autoencoder_is_answered_with_the_command_that_makes_it() -> None:
    with pytest.raises(FileNotFoundError, match=r"mutoscope train minisora\.vae --out runs/vae"):
        build_encoder(load_recipe("minisora.dit"), torch.device("cpu"))


def test_a_clip_that_does_not_fit_the_autoencoder_is_refused() -> None:
    recipe = load_recipe("minisora.dit")
    with pytest.raises(ValueError, match=r"height=250 does not fit .* \(nearest: 248 or 252\)"):
        model_io(replace(recipe, data=replace(recipe.data, height=250)))


def test_weights_hang_on_the_seed_alone() -> None:
    recipe = load_recipe("minisora.dit_tiny")
    first = build_model(recipe).state_dict()
    torch.manual_seed(1234)
    second = build_model(recipe).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    other = build_model(replace(recipe, seed=1)).state_dict()
    assert not torch.equal(first["embed.weight"], other["embed.weight"])
