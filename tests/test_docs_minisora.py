"""docs/minisora.md names recipes and flags that there are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mutoscope.autoencoders.presets import PRESETS
from mutoscope.config import to_dict
from mutoscope.loading import load_recipe
from mutoscope.recipe import Sampler, TokenSampler
from mutoscope.recipes import list_recipes

PAGE = (Path(__file__).parent.parent / "docs" / "minisora.md").read_text()
OURS = [line.split("|")[2:] for line in PAGE.splitlines() if line.startswith("| ")]
"""The columns of the tables that are about us."""


def paths(tree: dict[str, Any], above: str = "") -> set[str]:
    found: set[str] = set()
    for name, value in tree.items():
        found.add(above + name)
        found |= paths(value, f"{above}{name}.") if isinstance(value, dict) else set()
    return found


def test_the_recipes_exist() -> None:
    names = {info.name for info in list_recipes()}
    told = set(re.findall(r"\b(?:minisora|quickstart)\.[a-z_0-9]+", "".join(PAGE.split("minisora.md"))))
    assert told and told <= names
    assert {name for name in names if name.startswith("minisora.") and not name.endswith("_tiny")} - told <= {
        "minisora.stdit3"  # the seed has none
    }


def test_the_flags_exist() -> None:
    recipes = [load_recipe(info.name) for info in list_recipes()]
    fields = set().union(*(paths(to_dict(recipe)) for recipe in recipes))
    fields |= {f"sampler.{name}" for kind in (Sampler, TokenSampler) for name in kind.__dataclass_fields__}
    fields |= {f"model.context.{name}" for name in ("type", "stride", "recent", "tokens")}
    told = {
        flag.replace("-", "_") for cells in OURS for cell in cells for flag in re.findall(r"--([a-z][a-z.-]+)", cell)
    }
    verbs = {"out", "file", "video", "known_frames", "nproc_per_node"}
    assert told - fields - verbs == set()


def test_the_number_of_presets() -> None:
    assert f"all {len(PRESETS)}" in PAGE
