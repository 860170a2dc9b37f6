"""Flags set fields by the rules of the files, and their mistakes read the same."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mutoscope.errors import ConfigError
from mutoscope.models.dit import DiT
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.overrides import override
from mutoscope.recipe import Autoencoder, Data, Optim, Recipe, Sampler

RECIPE = Recipe(
    data=Data(root="clips", frames=8, height=32, width=32),
    model=DiT(),
    objective=Diffusion(),
    sampler=Sampler(),
    steps=3,
    batch_size=2,
    compile=True,
)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", RECIPE),
        ("--steps 5 --batch-size=7", replace(RECIPE, steps=5, batch_size=7)),
        ("--batch_size 7", replace(RECIPE, batch_size=7)),
        ("--no-compile", replace(RECIPE, compile=False)),
        ("--activation-checkpointing", replace(RECIPE, activation_checkpointing=True)),
        ("--compile false", replace(RECIPE, compile=False)),
        ("--data.cache", replace(RECIPE, data=replace(RECIPE.data, cache=True))),
        ("--data.no-cache", RECIPE),
        ("--optim.betas 0.5 1e-1 --optim.lr 2", replace(RECIPE, optim=Optim(lr=2.0, betas=(0.5, 0.1)))),
        ("--model.depth 8 --model.patch 1 1 1", replace(RECIPE, model=DiT(depth=8, patch=(1, 1, 1)))),
        ("--sampler none", replace(RECIPE, sampler=None)),
        ("--seed -1", replace(RECIPE, seed=-1)),
        ("--steps 4 --steps 5", replace(RECIPE, steps=5)),
        ("--autoencoder.path a --autoencoder.recipe b", replace(RECIPE, autoencoder=Autoencoder(path="a", recipe="b"))),
    ],
)
def test_flags(flags: str, expected: Recipe) -> None:
    assert override(RECIPE, flags.split()) == expected


def test_a_value_may_hold_spaces_and_signs() -> None:
    assert override(RECIPE, ["--data.root=--my clips=1"]).data.root == "--my clips=1"
    assert override(RECIPE, ["--data.root", "my clips"]).data.root == "my clips"


@pytest.mark.parametrize(
    ("flags", "lines"),
    [
        ("--optim.weight_decy 0.1", ["recipe.optim.weight_decy: no such field; did you mean weight_decay?"]),
        ("--optim.weight-decy 0.1", ["recipe.optim.weight_decy: no such field; did you mean weight_decay?"]),
        ("--lr 1", ["recipe.lr: no such field; did you mean recipe.optim.lr?"]),
        ("--depth 1", ["recipe.depth: no such field; did you mean recipe.model.depth?"]),
        ("--optim.lr abc", ["recipe.optim.lr: expected a number, got 'abc'"]),
        ("--optim.lr", ["recipe.optim.lr: expected a number, got []"]),
        ("--steps 1 2", ["recipe.steps: expected an integer, got ['1', '2']"]),
        ("--steps 1.5 --compile maybe", ["recipe.steps: expected an integer, got '1.5'",
                                         "recipe.compile: expected true or false, got 'maybe'"]),
        ("--sampler.method eulr", ["recipe.sampler.method: expected one of 'euler', 'heun', 'ddim', "
                                   "'dpmpp_2m', 'ancestral', got 'eulr'; did you mean euler?"]),
        ("--model.depth 7", ["recipe.model: model.depth=7 must be even: factorised blocks come in pairs"]),
        ("--optim.betas 0.9", ["recipe.optim.betas: expected 2 values, got 1: [0.9]"]),
        ("--no-compile 3", ["--no-compile: takes no value, got 3"]),
        ("--no-steps", ["recipe.no_steps: no such field; did you mean steps?"]),
        ("5", ["unexpected '5': fields are set as in --optim.lr 1e-4"]),
        ("--steps.x 5", ["recipe.steps: expected an integer, got a table"]),
        ("--steps 5 --steps.x 5", ["--steps.x: steps has a value already"]),
        ("--autoencoder.path a", ["recipe.autoencoder.recipe: missing; expected a string or \"none\""]),
        ("--model.type os:system", ["recipe.model.type: 'os' is outside of mutoscope; "
                                    "only its own modules and file.py:Class may be named"]),
    ],
)  # fmt: skip
def test_mistakes_read_as_in_files(flags: str, lines: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        override(RECIPE, flags.split())
    assert list(caught.value.problems) == lines
