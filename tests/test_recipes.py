"""Every built-in recipe is whole: it loads, validates, survives TOML, and says what its docstring has to say."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from mutoscope.cli import main
from mutoscope.contradictions import validate
from mutoscope.limits import LIMITS
from mutoscope.loading import find_function, load_recipe
from mutoscope.recipes import RecipeInfo, list_recipes
from mutoscope.schema import json_schema
from mutoscope.toml import dump_toml

INFOS = list_recipes()
NAMES = [info.name for info in INFOS]


def test_there_are_some_and_their_names_are_unique() -> None:
    assert len(NAMES) == len(set(NAMES)) > 0


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    validate(recipe)
    (tmp_path / "recipe.toml").write_text(dump_toml(recipe, header=find_function(name).__doc__ or ""))
    assert load_recipe(str(tmp_path / "recipe.toml")) == recipe
    (tmp_path / "child.toml").write_text(f'base = "{name}"\nseed = 77\n')
    assert load_recipe(str(tmp_path / "child.toml")).seed == 77


@pytest.mark.parametrize("name", NAMES)
def test_schema(name: str) -> None:
    recipe = load_recipe(name)
    check = Draft202012Validator(json_schema(recipe, LIMITS))
    tree = tomllib.loads(dump_toml(recipe))
    check.validate(tree)
    tree["optim"]["weight_decy"] = 0.1
    assert not check.is_valid(tree)


@pytest.mark.parametrize("name", NAMES)
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", name, "--help"])
    assert stopped.value.code == 0
    assert "--optim.lr" in capsys.readouterr().out


@pytest.mark.parametrize("info", INFOS, ids=NAMES)
def test_docstring(info: RecipeInfo) -> None:
    doc = find_function(info.name).__doc__ or ""
    assert info.summary.endswith(".") and len(info.summary) <= 100
    assert info.status in ("verified", "untested")
    for part in ("Source:", "Command:", "Status:"):
        assert part in doc
