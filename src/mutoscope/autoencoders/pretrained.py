"""Autoencoders that are trained already."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from mutoscope.autoencoders.cogvideox import autoencoder_spec, load_cogvideox_autoencoder, scaling_stats
from mutoscope.autoencoders.images import image_spec, image_stats, load_image_autoencoder
from mutoscope.checkpoints import part_config
from mutoscope.data.store import LatentStats
from mutoscope.loading import load_recipe
from mutoscope.recipe import Autoencoder, Recipe
from mutoscope.types import DTYPES, LatentSpec, ModelIO
from mutoscope.weights import load_strict, read_weights

UNTRAINED = "untrained://"
"""The path of an autoencoder that nobody has trained."""


def is_of_images(path: str) -> bool:
    """Whether a checkpoint's autoencoder is one of images, for frames by themselves. Raises as `part_config`."""
    return bool(part_config(path, "vae")["_class_name"] == "AutoencoderKL")


def pretrained_spec(path: str) -> LatentSpec:
    """The spec of a checkpoint's autoencoder, from its config.json alone. Raises as `part_config`."""
    return image_spec(path) if is_of_images(path) else autoencoder_spec(path)


def pretrained_stats(path: str) -> LatentStats:
    """What a checkpoint's latents are normalised by: its own scaling factor. Raises as `part_config`."""
    return image_stats(path) if is_of_images(path) else scaling_stats(path)


def load_autoencoder(config: Autoencoder, *, trust_code: bool = False) -> nn.Module:
    """The autoencoder of a finished run or of a checkpoint, on the CPU, its weights loaded strictly.

    trust_code: whether the run's own copies of Python files may be imported.

    Raises FileNotFoundError, with the command that makes it, where there is no finished run; ValueError where its
    weights are damaged or do not fit, or the run trained something else.
    """
    if config.recipe is None:
        load = load_image_autoencoder if is_of_images(config.path) else load_cogvideox_autoencoder
        return load(config.path, DTYPES[config.dtype], tiling=config.tiling)
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
