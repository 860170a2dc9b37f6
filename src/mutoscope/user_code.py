"""Python code that a recipe names, and when it may be imported.

A class of a recipe's open parts is named in files as ``mutoscope.models.dit:DiT`` or, where it is the user's own,
``my_model.py:TinyConv``: the file that it stands in, which every run directory keeps a copy of. A file is data that
may come from anyone, so reading one imports nothing outside of the package unless the caller names the folder whose
code it trusts.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from types import ModuleType

from mutoscope.errors import ConfigError, did_you_mean

PACKAGE = __name__.partition(".")[0]


def load_file(path: Path) -> ModuleType:
    """The module in a Python file, imported once for each process under its absolute path as its name.

    Raises FileNotFoundError without the file, and whatever the file itself raises.
    """
    path = path.resolve()
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    name = str(path)
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before the body runs: dataclasses look their own module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def is_loaded(path: Path) -> bool:
    """Whether a Python file was imported already, by someone's word."""
    return str(path.resolve()) in sys.modules


def source_file(cls: type) -> Path | None:
    """The user's file that a class stands in, or None for a class of this package.

    Raises ConfigError for a class that no file could bring back: one made inside a function or at a prompt.
    """
    if "." in cls.__qualname__:
        raise ConfigError(f"{cls.__qualname__} is not at the top level of its file, so that no file could name it")
    if cls.__module__.partition(".")[0] == PACKAGE:
        return None
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    if file is None:
        raise ConfigError(f"{cls.__qualname__} stands in no file; put it in a .py file and import it from there")
    return Path(file).resolve()


def class_name(cls: type) -> str:
    """``mutoscope.module:Class``, or ``file.py:Class`` for a class of the user's. Raises as `source_file` does."""
    file = source_file(cls)
    return f"{cls.__module__ if file is None else file.name}:{cls.__qualname__}"


def find_class(name: str, base: type, code_dir: Path | None, known: Mapping[str, type]) -> type:
    """The dataclass under `base` that `class_name` gave this name.

    Classes in `known` are there already; others are looked up in this package, or in ``code_dir/file.py`` where the
    caller trusts that folder. Raises ConfigError for everything else.
    """
    if name in known and issubclass(known[name], base):
        return known[name]
    module_name, _, attribute = name.partition(":")
    if not attribute:
        raise ConfigError(f"expected module:Class, such as 'mutoscope.models.dit:DiT', got {name!r}")
    if module_name.endswith(".py"):
        if Path(module_name).name != module_name:
            raise ConfigError(f"{module_name!r} must lie beside the recipe: give the file's name without a folder")
        if code_dir is None:
            raise ConfigError(f"{name!r} is Python code beside the recipe, which is run only if you say --trust-code")
        module = load_file(code_dir / module_name)
    else:
        module = _package_module(module_name)
    found = getattr(module, attribute, None)
    if not (isinstance(found, type) and issubclass(found, base) and is_dataclass(found)):
        near = (k for k, v in vars(module).items() if isinstance(v, type) and issubclass(v, base) and v is not base)
        raise ConfigError(f"no {base.__name__} named {attribute!r} in {module_name}{did_you_mean(attribute, near)}")
    return found


def _package_module(name: str) -> ModuleType:
    if name.partition(".")[0] != PACKAGE:
        raise ConfigError(f"{name!r} is outside of {PACKAGE}; only its own modules and file.py:Class may be named")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there and lacks a library
        raise ConfigError(f"there is no module {name!r}") from None


def code_files(classes: Mapping[str, type]) -> list[Path]:
    """The user's files that these classes stand in, for a run directory to keep copies of.

    Raises ConfigError where two of them have the same name.
    """
    files = sorted({file for cls in classes.values() if (file := source_file(cls)) is not None})
    names = [file.name for file in files]
    if clash := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"two files are called {', '.join(sorted(clash))}; a run keeps both, so rename one")
    return files
