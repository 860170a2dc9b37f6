"""TOML: every value survives, every field is explained, every mistake has its place."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mutoscope.config import from_dict
from mutoscope.errors import ConfigError
from mutoscope.models.dit import DiT
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.recipe import Autoencoder, Data, Optim, Recipe
from mutoscope.toml import dump_toml, locate, merge, read_toml


def recipe(root: str = "clips", lr: float = 1e-4, wandb: str | None = None, seed: int = 0) -> Recipe:
    data = Data(root=root, frames=8, height=32, width=32)
    return Recipe(
        data=data, model=DiT(), objective=Diffusion(), optim=Optim(lr=lr), steps=3, batch_size=2, wandb=wandb, seed=seed
    )


@settings(max_examples=40, deadline=None)
@given(
    root=st.text(st.characters(codec="utf-8")),
    lr=st.floats(allow_nan=False, allow_infinity=False),
    wandb=st.none() | st.text(st.characters(codec="utf-8")).filter(lambda text: text != "none"),
    seed=st.integers(),
)
def test_any_value_survives(root: str, lr: float, wandb: str | None, seed: int) -> None:
    config = recipe(root, lr, wandb, seed)
    assert from_dict(Recipe, tomllib.loads(dump_toml(config))) == config


def test_parts_that_are_absent_and_parts_that_are_there() -> None:
    config = recipe()
    assert tomllib.loads(dump_toml(config))["autoencoder"] == "none"
    with_one = replace(config, autoencoder=Autoencoder(path="runs/vae", recipe="minisora.vae"))
    assert from_dict(Recipe, tomllib.loads(dump_toml(with_one))) == with_one


def test_every_field_stands_under_its_docstring_and_choices() -> None:
    text = dump_toml(recipe(), header="One line.\n\nStatus: untested")
    assert text.startswith("# One line.\n#\n# Status: untested\n\n")
    assert "# Steps of linear warm-up.\nwarmup_steps = 0\n" in text
    resize = "# How another aspect ratio is met: scale and cut the centre (or anywhere), scale and pad with black, "
    assert resize + 'or squash.\n# "crop" | "random_crop" | "pad" | "squash"\nresize = "crop"\n' in text
    assert '# The network.\n[model]\n\ntype = "mutoscope.models.dit:DiT"\n' in text
    uncommented = [
        line
        for before, line in zip(text.splitlines(), text.splitlines()[1:], strict=False)
        if line and not line.startswith(("#", "type =")) and not before.startswith("#")
    ]
    assert uncommented == []


def test_a_file_that_is_not_toml_is_told_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("steps = 3\nbatch_size == 2\n")
    with pytest.raises(ConfigError, match=rf"^{file}:2:13: Invalid value$"):
        read_toml(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"mine\.toml: not a text file in UTF-8"):
        read_toml(file)


def test_merge_goes_into_tables_and_replaces_a_part_of_another_class() -> None:
    tree = {"steps": 1, "optim": {"lr": 1, "eps": 2}, "model": {"type": "a:A", "depth": 3}, "text": {"type": "b:B"}}
    over = {"optim": {"lr": 5}, "model": {"type": "a:C", "width": 4}, "text": "none"}
    assert merge(tree, over) == {
        "steps": 1,
        "optim": {"lr": 5, "eps": 2},
        "model": {"type": "a:C", "width": 4},
        "text": "none",
    }
    assert merge(tree, {"model": {"type": "a:A", "width": 4}})["model"] == {"type": "a:A", "depth": 3, "width": 4}
    assert tree["optim"] == {"lr": 1, "eps": 2}


@pytest.mark.parametrize(
    ("problem", "line"),
    [("recipe.lr: x", 1), ("recipe.optim.lr: x", 4), ("recipe.optim.betas[1]: x", 5), ("recipe.optim: x", 3),
     ("recipe.model.depth: x", 6), ("recipe.steps: missing", None)],
)  # fmt: skip
def test_a_mistake_is_found_in_its_file(tmp_path: Path, problem: str, line: int | None) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("lr = 1\n\n[optim]\nlr = 2\n  betas = [1, 2] # lr = 3\nmodel.depth = 3\n[ model ]\ndepth=1\n")
    if problem.startswith("recipe.model"):
        line = 8
    assert locate(problem, file) == (f"{file}: {problem}" if line is None else f"{file}:{line}: {problem}")
