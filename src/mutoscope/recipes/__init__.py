"""The built-in recipes: every function annotated ``-> Recipe`` in this folder. Nothing is registered anywhere.

A family is a file, or a folder of files where one would be too long.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class RecipeInfo:
    """A built-in recipe, as its source describes it."""

    name: str
    """``family.name``: function `name` of ``mutoscope/recipes/family.py``, or of a file in the folder ``family``."""
    module: str
    """The module that holds the function."""
    summary: str
    """The first line of its docstring."""
    status: str
    """verified or untested: the first word after ``Status:`` in its docstring; untested where it says nothing."""
    tiny: str | None
    """The name of its twin that trains anywhere in seconds."""


def list_recipes() -> list[RecipeInfo]:
    """Every function annotated ``-> Recipe`` of this package, sorted by name.

    Reads their source and imports none: that would take torch, and seconds.
    """
    found: dict[str, tuple[str, str]] = {}
    here = Path(__file__).parent
    for file in here.rglob("[!_]*.py"):
        path = file.relative_to(here).with_suffix("").parts
        body = ast.parse(file.read_text(encoding="utf-8")).body
        functions = [f for f in body if isinstance(f, ast.FunctionDef) and not f.name.startswith("_")]
        makers = [f for f in functions if f.returns is not None and returns_recipe(ast.unparse(f.returns))]
        module = ".".join((__name__, *path))
        found |= {f"{path[0]}.{f.name}": (module, ast.get_docstring(f) or "") for f in makers}
    return [
        RecipeInfo(
            name=name,
            module=module,
            summary=next(iter(doc.splitlines()), ""),
            status=status[1] if (status := re.search(r"^Status:\s*(\w+)", doc, re.MULTILINE)) else "untested",
            tiny=f"{name}_tiny" if f"{name}_tiny" in found else None,
        )
        for name, (module, doc) in sorted(found.items())
    ]


def returns_recipe(annotation: str) -> bool:
    """Whether a return annotation, as source, is Recipe."""
    return annotation.strip("'\"").rpartition(".")[2] == "Recipe"
