"""Recipes by name, from Python files, TOML files and run directories."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mutoscope.config import classes, from_dict, to_dict
from mutoscope.errors import ConfigError, did_you_mean
from mutoscope.recipe import Recipe
from mutoscope.recipes import list_recipes, returns_recipe
from mutoscope.toml import BASE, locate, merge, read_toml
from mutoscope.user_code import is_loaded, load_file

RECIPE_FILE = "recipe.toml"
"""The fully resolved recipe in a run directory."""


def load_recipe(ref: str, *, trust_code: bool = False) -> Recipe:
    """The recipe that `ref` names.

    ref: a built-in name (``minisora.dit``), ``file.py:function``, a ``recipe.toml``, or a run directory.
    trust_code: whether Python files may be imported: the one that `ref` names, and those that a TOML file or a run
        directory names and that lie beside it. Files that this process has imported already need no such word.

    Raises ConfigError for what is wrong with the reference or inside the recipe, FileNotFoundError for a missing file.
    """
    if (function := find_function(ref, trust_code=trust_code)) is None:
        path = Path(ref)
        return load_toml(path / RECIPE_FILE if path.is_dir() else path, trust_code=trust_code)
    recipe = function()
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"{ref} returns {type(recipe).__name__}, not a Recipe")
    return recipe


def find_function(ref: str, *, trust_code: bool = False) -> Callable[[], Any] | None:
    """The function behind a built-in name or ``file.py:function``; None for a file or folder.

    Raises as `load_recipe`.
    """
    modules = {info.name: info.module for info in list_recipes()}
    if ref in modules:
        function: Callable[[], Any] = getattr(importlib.import_module(modules[ref]), ref.partition(".")[2])
        return function
    file, dot_py, name = ref.partition(".py")
    if dot_py and (not name or name.startswith(":")):
        return _file_function(Path(f"{file}.py"), name[1:], trust_code)
    if ref.endswith(".toml") or Path(ref).is_dir():
        return None
    hint = did_you_mean(ref, list(modules), "; `mutoscope recipes` lists them")
    raise ConfigError(f"{ref}: no such recipe, file or run directory{hint}")


def _file_function(path: Path, name: str, trust_code: bool) -> Callable[[], Any]:
    if not (trust_code or is_loaded(path)):
        raise ConfigError(f"{path}:{name} is Python code, which is run only if you say so: --trust-code")
    module = load_file(path)
    functions = {k: f for k, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__}
    makers = [
        k for k, f in functions.items() if returns_recipe(inspect.formatannotation(f.__annotations__.get("return")))
    ]
    if name not in functions:
        listed = ", ".join(f"{path}:{k}" for k in makers) or "no function annotated `-> Recipe`"
        raise ConfigError(
            f"{path}{name and f':{name}'}: no such function{did_you_mean(name, makers, f'; there is {listed}')}"
        )
    return functions[name]


def load_toml(
    path: Path,
    *,
    trust_code: bool = False,
    known: Mapping[str, type] | None = None,
    below: tuple[Path, ...] = (),
) -> Recipe:
    """The recipe in a TOML file, laid over its ``base`` where it names one: a reference as `load_recipe` takes,
    whose path is relative to the file.

    known: classes of the user's that the file may name because they are here already (see `config.classes`).
    below: the files whose base this one is, which it may not start from in turn.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    chain = (*below, path.resolve())
    if chain[-1] in below:
        raise ConfigError(f"{below[-1]}: base goes round in a circle: {' -> '.join(p.name for p in chain)}")
    tree, known = read_toml(path), dict(known or {})
    if BASE in tree:
        base = _load_base(tree.pop(BASE), path, trust_code, chain)
        tree, known = merge(to_dict(base), tree), known | classes(base)
    try:
        return from_dict(Recipe, tree, code_dir=path.parent if trust_code else None, known=known)
    except ConfigError as error:
        raise ConfigError(*(locate(problem, path) for problem in error.problems)) from None


def _load_base(ref: Any, path: Path, trust_code: bool, chain: tuple[Path, ...]) -> Recipe:
    if not isinstance(ref, str):
        raise ConfigError(f"{path}: base: expected the name of a recipe, got {ref!r}")
    beside = path.parent / ref
    if ref.endswith(".toml"):
        return load_toml(beside, trust_code=trust_code, below=chain)
    is_path = ".py" in ref or beside.is_dir()
    try:
        return load_recipe(str(beside) if is_path else ref, trust_code=trust_code)
    except ConfigError as error:
        raise ConfigError(*(f"{path}: base: {problem}" for problem in error.problems)) from None
