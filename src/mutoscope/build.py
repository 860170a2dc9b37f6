"""From a recipe to its parts: shapes that follow from one another are worked out here, once, for training, sampling
and estimates alike."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from mutoscope.autoencoders.pretrained import load_autoencoder
from mutoscope.data.store import LatentStats
from mutoscope.encoder import Encoder
from mutoscope.recipe import Autoencoder, Recipe, load_recipe
from mutoscope.types import PIXELS, LatentSpec, ModelIO


def build_encoder(
    recipe: Recipe, device: torch.device, stats: LatentStats | None = None, trust_code: bool = False
) -> Encoder:
    """The recipe's autoencoder and text encoder, loaded; `trust_code` as in `load_recipe`, for the autoencoder's run.

    Raises FileNotFoundError, with the command that makes it, where the autoencoder's run is not there.
    """
    autoencoder = load_autoencoder(recipe.autoencoder, trust_code=trust_code) if recipe.autoencoder else None
    text = recipe.text.build() if recipe.text else None
    dtype = recipe.autoencoder.dtype if recipe.autoencoder else "fp32"
    return Encoder(autoencoder, stats=stats, text=text, dtype=dtype, device=device)


def latent_spec(autoencoder: Autoencoder | None) -> LatentSpec:
    """The spec of an autoencoder without its weights: by the recipe of its run, or by the one that would make it."""
    if autoencoder is None:
        return PIXELS
    made = Path(autoencoder.path) / "recipe.toml"
    recipe = load_recipe(str(made) if made.exists() else autoencoder.recipe)
    with torch.device("meta"):
        spec = recipe.model.build(model_io(recipe)).spec
    assert isinstance(spec, LatentSpec)
    return spec


def model_io(recipe: Recipe, spec: LatentSpec | None = None) -> ModelIO:
    """What the recipe's model has to fit. `spec` is its autoencoder's, where that is loaded already.

    Raises ValueError where the clips' size does not fit the autoencoder.
    """
    spec = spec or latent_spec(recipe.autoencoder)
    data = recipe.data
    return ModelIO(
        channels=spec.channels,
        grid=spec.latent_shape(data.frames, data.height, data.width),
        more_grids=tuple(spec.latent_shape(b.frames, b.height, b.width) for b in data.buckets),
        vocab=spec.vocab,
        text_dim=recipe.text.dim if recipe.text else None,
        num_labels=data.num_labels,
    )


def build_model(recipe: Recipe, spec: LatentSpec | None = None) -> nn.Module:
    """The recipe's network, with fresh weights that hang on the recipe's seed alone."""
    torch.manual_seed(recipe.seed)
    return recipe.model.build(model_io(recipe, spec))
