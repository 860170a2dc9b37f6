"""Configs as TOML: written with every field explained, read with errors that say where.

The form is that of `mutoscope.config`'s trees, with ``"none"`` for None. A file may start from another: ``base``
names it, and the file then holds only what differs (see `mutoscope.recipe`).
"""

from __future__ import annotations

import re
import textwrap
import tomllib
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import tomlkit

from mutoscope.config import NONE, TYPE, Kind, field_docs, kinds, options, to_dict
from mutoscope.errors import ConfigError

BASE = "base"
"""The key that names the recipe that a file starts from."""


def dump_toml(config: Any, header: str = "") -> str:
    """A config as TOML: all of its fields, each under its docstring and its choices, below `header` as a comment."""
    blocks = [_comment(header)] if header else []
    blocks += _table(config, to_dict(config), "")
    return "\n\n".join(blocks) + "\n"


def _table(config: Any, tree: Mapping[str, Any], path: str) -> list[str]:
    """The blocks of a table: its plain values, then the tables within it, the order that TOML demands."""
    docs = field_docs(type(config))
    values = [f"{TYPE} = {_value(tree[TYPE])}"] if TYPE in tree else []
    tables: list[str] = []
    for name, kind in kinds(type(config)).items():
        part = getattr(config, name)
        if is_dataclass(part):
            tables += [_explained(docs.get(name, ""), f"[{path}{name}]"), *_table(part, tree[name], f"{path}{name}.")]
        else:
            values.append(_explained(docs.get(name, "") + _choices(kind), f"{name} = {_value(tree[name])}"))
    return values + tables


def _explained(comment: str, line: str) -> str:
    return f"{_comment(comment)}\n{line}" if comment else line


def _choices(kind: Kind) -> str:
    members, nullable = options(kind)
    listed = [str(_value(c)) for m in members if get_origin(m) is Literal for c in get_args(m)]
    return f"\n{' | '.join(listed + [_value(NONE)] * nullable)}" if listed else ""


def _comment(text: str) -> str:
    lines = [piece for line in text.splitlines() for piece in textwrap.wrap(line, 118) or [""]]
    return "\n".join(f"# {line}".rstrip() for line in lines)


def _value(value: Any) -> str:
    """A value on one line, parts of a list as inline tables; parts that are long, on a line each."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_value(v)}" for key, v in value.items()) + " }"
    if isinstance(value, list) and any(isinstance(v, Mapping) for v in value):
        return "[\n" + "".join(f"  {_value(v)},\n" for v in value) + "]"
    return tomlkit.item(NONE if value is None else value).as_string()


def read_toml(path: Path) -> dict[str, Any]:
    """The tree in a TOML file. Raises ConfigError with file and line where it isn't TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file in UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"\(at line (\d+), column (\d+)\)", str(error))
        where = f"{path}:{place[1]}:{place[2]}" if place else str(path)
        raise ConfigError(f"{where}: {str(error).partition(' (at ')[0]}") from None


def merge(tree: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A tree with another laid over it, key by key; a part that names another class replaces the whole part."""
    if TYPE in tree and over.get(TYPE, tree[TYPE]) != tree[TYPE]:
        return dict(over)
    both = {k: merge(tree[k], v) if _are_tables(tree.get(k), v) else v for k, v in over.items()}
    return {**tree, **both}


def _are_tables(a: Any, b: Any) -> bool:
    return isinstance(a, Mapping) and isinstance(b, Mapping)


def locate(problem: str, path: Path) -> str:
    """A problem ``recipe.optim.lr: ...`` with the file and, where it stands there, the line before it."""
    wanted = problem.partition(":")[0].partition(".")[2].partition("[")[0]
    table = ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if head := re.match(r"\s*\[\s*([^\[\]]+?)\s*\]", line):
            table = head[1] + "."
        key = re.match(r"\s*([\w.-]+)\s*=", line)
        if (head and table == wanted + ".") or (key and table + key[1] == wanted):
            return f"{path}:{number}: {problem}"
    return f"{path}: {problem}"
