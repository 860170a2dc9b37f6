"""Autoencoders that are trained already."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from mutoscope.autoencoders.cogvideox import load_cogvideox_autoencoder
from mutoscope.loading import load_recipe
from mutoscope.recipe import Autoencoder, Recipe
from mutoscope.types import DTYPES, ModelIO
from mutoscope.weights import load_strict, read_weights

UNTRAINED = "untrained://"
"""The path of an autoencoder that nobody has trained."""


def load_autoencoder(config: Autoencoder, *, trust_code: bool = False) -> nn.Module:
    """The autoencoder of a finished run or of a checkpoint, on the CPU, its weights loaded strictly.

    trust_code: whether the run's own copies of Python files may be imported.

    Raises FileNotFoundError, with the command that makes it, where there is no finished run; ValueError where its
    weights are damaged or do not fit, or the run trained something else.
    """
    if config.recipe is None:
        return load_cogvideox_autoencoder(config.path, DTYPES[config.dtype], tiling=config.tiling)
    if config.path == UNTRAINED:
        recipe = load_recipe(config.recipe)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            return _built(recipe)
    folder = Path(config.path)
    weights = folder / "final" / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"autoencoder.path={config.path}: no finished run there; make it with: "
                                f"mutoscope train {config.recipe} --out {config.path}")  # fmt: skip
    recipe = load_recipe(str(folder), trust_code=trust_code)
    with torch.random.fork_rng(devices=[]):  # the fresh weights are thrown away; so should be what they draw
        model = _built(recipe)
    if not all(hasattr(model, name) for name in ("spec", "encode", "decode")):
        raise ValueError(f"autoencoder.path={config.path}: this run trained a {type(model).__name__}, "
                         "which is no autoencoder: it has no spec, encode and decode")  # fmt: skip
    load_strict(model, read_weights(weights), source=str(weights))
    return model


def _built(recipe: Recipe) -> nn.Module:
    grid = (recipe.data.frames, recipe.data.height, recipe.data.width)
    return recipe.model.build(ModelIO(channels=3, grid=grid))
