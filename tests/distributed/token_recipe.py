"""A recipe over tokens for the tests beside it; --autoencoder.path names a run of minisora.vqvae_tiny."""

from __future__ import annotations

from dataclasses import replace

from mutoscope.loading import load_recipe
from mutoscope.models.gpt import GPT
from mutoscope.objectives.tokens import NextToken
from mutoscope.recipe import Autoencoder, Recipe, TokenSampler


def gpt() -> Recipe:
    """A GPT in seconds."""
    base = load_recipe("minisora.vqvae_tiny")
    return replace(
        base,
        data=replace(base.data, frames=16, short="loop"),  # more positions than codes, even in half of a batch
        autoencoder=Autoencoder(path="runs/vqvae", recipe="minisora.vqvae_tiny"),
        model=GPT(depth=2, width=32, heads=2),
        objective=NextToken(cond_dropout=0.0),
        sampler=TokenSampler(),
    )
