"""The JSON Schema agrees with the loader: what one takes the other takes, and so for what they refuse."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from mutoscope.config import from_dict
from mutoscope.contradictions import validate
from mutoscope.errors import ConfigError
from mutoscope.limits import LIMITS
from mutoscope.models.dit import DiT
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.recipe import Autoencoder, Data, Recipe, Sampler
from mutoscope.schema import json_schema
from mutoscope.toml import dump_toml

RECIPE = Recipe(
    data=Data(root="clips", frames=8, height=32, width=32),
    model=DiT(),
    objective=Diffusion(),
    sampler=Sampler(),
    steps=3,
    batch_size=2,
)
WITH_AUTOENCODER = replace(RECIPE, autoencoder=Autoencoder(path="runs/vae", recipe="minisora.vae"))


def changed(path: str, value: Any) -> dict[str, Any]:
    """The recipe's own TOML with one value changed; None takes it away."""
    tree = tomllib.loads(dump_toml(RECIPE))
    *above, name = path.split(".")
    table = tree
    for step in above:
        table = table[step]
    table[name] = value
    if value is None:
        del table[name]
    return tree


def schema_takes(tree: dict[str, Any]) -> bool:
    return Draft202012Validator(json_schema(RECIPE, LIMITS)).is_valid(tree)


def loader_takes(tree: dict[str, Any]) -> bool:
    try:
        validate(from_dict(Recipe, tree))
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("recipe", [RECIPE, WITH_AUTOENCODER])
def test_a_recipes_own_file_is_valid(recipe: Recipe) -> None:
    schema = json_schema(recipe, LIMITS)
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(tomllib.loads(dump_toml(recipe)))


@pytest.mark.parametrize(
    ("path", "value"),
    [("seed", 7), ("data.fps", 8), ("data.fps", "none"), ("sampler", "none"), ("optim.betas", [0.5, 0.5]),
     ("autoencoder", {"path": "a", "recipe": "b"}), ("model.attention", "joint"), ("model.depth", None)],
)  # fmt: skip
def test_both_take(path: str, value: Any) -> None:
    tree = changed(path, value)
    assert loader_takes(tree) and schema_takes(tree)


@pytest.mark.parametrize(
    ("path", "value"),
    [("optim.weight_decy", 0.1), ("stepz", 3), ("steps", 5.5), ("steps", "none"), ("steps", 0), ("optim.lr", 0.0),
     ("optim.betas", [0.9]), ("optim.betas", [0.9, 1.0]), ("sampler.method", "eulr"), ("data.fps", "fast"),
     ("data", "none"), ("model.type", "mutoscope.objectives.diffusion:Diffusion"), ("model.type", None),
     ("data.root", None), ("steps", None), ("model", None), ("autoencoder", {"path": "a", "recipes": "b"}),
     ("compile", 1)],
)  # fmt: skip
def test_both_refuse(path: str, value: Any) -> None:
    tree = changed(path, value)
    assert not loader_takes(tree) and not schema_takes(tree)


def test_a_file_with_a_base_may_be_empty_but_for_it() -> None:
    assert schema_takes({"base": "minisora.dit"})
    assert schema_takes({"base": "minisora.dit", "optim": {"lr": 1.0}, "model": {"depth": 4}})
    assert not schema_takes({"base": "minisora.dit", "optim": {"weight_decy": 1.0}})
    assert not schema_takes({})


def test_descriptions_and_defaults_are_this_recipes() -> None:
    properties = json_schema(replace(RECIPE, seed=9), LIMITS)["properties"]
    assert properties["seed"]["default"] == 9
    assert properties["optim"]["properties"]["lr"]["description"].startswith("Peak learning rate (of AdamW")
    assert properties["data"]["properties"]["resize"]["enum"] == ["crop", "random_crop", "pad", "squash"]
    assert properties["model"]["properties"]["type"] == {"const": "mutoscope.models.dit:DiT"}
