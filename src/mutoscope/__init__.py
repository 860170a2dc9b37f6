"""Mutoscope trains, post-trains and samples video generation models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mutoscope.contradictions import validate
    from mutoscope.errors import ConfigError
    from mutoscope.loading import load_recipe
    from mutoscope.recipe import (
        Autoencoder,
        Bucket,
        ClipSet,
        Data,
        Lora,
        ModelConfig,
        ObjectiveConfig,
        Optim,
        Parallel,
        Recipe,
        Sampler,
        TextConfig,
        TokenSampler,
    )
    from mutoscope.recipes import list_recipes
    from mutoscope.training.loop import train

__version__ = "0.1.0"

__all__ = [
    "Autoencoder",
    "Bucket",
    "ClipSet",
    "ConfigError",
    "Data",
    "Lora",
    "ModelConfig",
    "ObjectiveConfig",
    "Optim",
    "Parallel",
    "Recipe",
    "Sampler",
    "TextConfig",
    "TokenSampler",
    "list_recipes",
    "load_recipe",
    "train",
    "validate",
]

_ELSEWHERE = {
    "ConfigError": "errors",
    "list_recipes": "recipes",
    "load_recipe": "loading",
    "train": "training.loop",
    "validate": "contradictions",
}


def __getattr__(name: str) -> object:
    """The public names, imported at their first use: `import mutoscope` does not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{_ELSEWHERE.get(name, 'recipe')}"), name)
    globals()[name] = value
    return value
