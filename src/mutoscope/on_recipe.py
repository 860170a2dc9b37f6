"""What the verbs share that take a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from mutoscope.errors import ConfigError

if TYPE_CHECKING:
    from mutoscope.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class OnRecipe:
    """What the verbs share that take a recipe, and the recipe's fields as options."""

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
    """A built-in name (see `mutoscope recipes`), file.py:function, a recipe.toml, or a run directory."""
    trust_code: bool = False
    """Import the Python files that a recipe.toml or a run directory names. They can do whatever you can."""

    def load(self, flags: Sequence[str]) -> Recipe:
        """The recipe with the fields that `flags` set, validated."""
        from mutoscope import factory_flags
        from mutoscope.contradictions import validate
        from mutoscope.loading import load_recipe
        from mutoscope.overrides import override
        from mutoscope.recipe import Recipe

        if foreign := [*factory_flags.told(flags)]:
            raise ConfigError(*foreign)
        own, of_recipe = ([f"--{f.name}".replace("_", "-") for f in fields(cls)] for cls in (self, Recipe))
        for flag in flags:
            if (near := get_close_matches(flag, of_recipe + own, n=1)) and near[0] in own:
                raise ConfigError(f"{flag}: no such option; did you mean {near[0]}?")
        recipe = override(load_recipe(self.recipe, trust_code=self.trusts), flags)
        validate(recipe)
        return recipe

    @property
    def trusts(self) -> bool:
        """Naming a Python file is asking for it to be run."""
        return self.trust_code or ".py:" in self.recipe or self.recipe.endswith(".py")

    @property
    def name(self) -> str:
        """minisora.dit, the function of file.py:function, or the name of the TOML file or run directory."""
        path = Path(self.recipe)
        return path.name if path.is_dir() else path.name.rpartition(".py:")[2].removesuffix(".toml")
