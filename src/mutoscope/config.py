"""Trees of frozen dataclasses to plain dicts and back, strictly.

A tree is what TOML and JSON can hold: dicts, lists, strings, numbers, booleans and None. Reading one checks every key
and value against the dataclasses' annotations and reports all mistakes together, each with its path.

A field may be a bool, int, float, str, Literal, tuple, a dataclass, or any of these ``| None``. A dataclass without
fields of its own (``ModelConfig``) is open: it stands for its subclasses, and so does a union of dataclasses; there,
the tree says which one under the key ``type``. For a field that may be None, the text ``"none"`` means None: TOML
and the command line have no other word for it.
"""

from __future__ import annotations

import ast
import inspect
import math
import sys
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mutoscope.errors import ConfigError, did_you_mean
from mutoscope.user_code import class_name, find_class

T = TypeVar("T")
Kind = Any
"""A field's annotation, resolved."""
NONE = "none"
"""None, in TOML and on the command line."""
TYPE = "type"
"""The key that holds the class of an open part."""


class Words(tuple[str, ...]):
    """A value as typed on the command line; the field's annotation decides what it means."""


# ---- what the annotations say


def kinds(cls: type) -> dict[str, Kind]:
    """The annotation of every field of a dataclass. Raises TypeError for one that files can't hold."""
    hints = get_type_hints(cls)
    found = {f.name: hints[f.name] for f in _fields(cls)}
    for name, kind in found.items():
        if not _is_supported(kind):
            raise TypeError(
                f"{cls.__qualname__}.{name}: a config can't hold {kind}; see mutoscope.config for what it can"
            )
    return found


def _is_supported(kind: Kind) -> bool:
    members, nullable = options(kind)
    if nullable or len(members) > 1:
        return all(_is_supported(m) for m in members)
    if get_origin(kind) is tuple:
        return bool(get_args(kind)) and all(_is_supported(k) for k in get_args(kind) if k is not Ellipsis)
    return kind in (bool, int, float, str) or get_origin(kind) is Literal or is_dataclass(kind)


def field_docs(cls: type) -> dict[str, str]:
    """The attribute docstrings of a dataclass and those that it extends, each on one line."""
    docs: dict[str, str] = {}
    for part in reversed(cls.__mro__):
        docs |= _module_docs(part.__module__).get(part.__qualname__, {}) if is_dataclass(part) else {}
    return docs


@cache
def _module_docs(module: str) -> dict[str, dict[str, str]]:
    """The attribute docstrings of the classes at a module's top level, by class."""
    try:
        body = ast.parse(inspect.getsource(sys.modules[module])).body
    except (KeyError, OSError, TypeError):  # made at a prompt: there is no source to read them from
        return {}
    docs: dict[str, dict[str, str]] = {c.name: {} for c in body if isinstance(c, ast.ClassDef)}
    for cls in (c for c in body if isinstance(c, ast.ClassDef)):
        for statement, after in zip(cls.body, cls.body[1:], strict=False):
            match statement, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    docs[cls.name][name] = " ".join(text.split())
    return docs


def options(kind: Kind) -> tuple[list[Kind], bool]:
    """The members of a union (or the kind alone) without None, and whether None is one of them."""
    members = list(get_args(kind)) if get_origin(kind) in (Union, UnionType) else [kind]
    return [m for m in members if m is not NoneType], NoneType in members


def parts(kind: Kind) -> tuple[type, ...]:
    """The dataclasses among the members of a kind."""
    return tuple(m for m in options(kind)[0] if _is_part(m))


def is_tagged(kind: Kind) -> bool:
    """Whether a part of this kind says its class: it is open, or one of several."""
    return len(parts(kind)) > 1 or any(not _fields(part) for part in parts(kind))


def _is_part(kind: Kind) -> bool:
    return is_dataclass(kind)


def describe(kind: Kind) -> str:
    """What a field of this kind takes, in words."""
    members, nullable = options(kind)
    if nullable or len(members) > 1:
        return " or ".join([*map(describe, members), *([f'"{NONE}"'] if nullable else [])])
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    if get_origin(kind) is tuple:
        items = get_args(kind)
        return "a list" if items[-1] is Ellipsis else f"a list of {len(items)}"
    if is_dataclass(kind):
        return "a table"
    return {bool: "true or false", int: "an integer", float: "a number", str: "a string"}[kind]


def _fields(cls: type) -> tuple[Field[Any], ...]:
    return fields(cls)


# ---- dataclass -> tree


def to_dict(config: Any) -> dict[str, Any]:
    """The tree of a dataclass. Raises ConfigError where a part isn't of its field's class, or no file could name it."""
    return _node(config, "recipe")


def _node(config: Any, path: str) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, kind in kinds(type(config)).items():
        value, here = getattr(config, name), f"{path}.{name}"
        if not is_dataclass(value):
            tree[name] = _plain(value)
        elif is_tagged(kind) and isinstance(value, parts(kind)):
            tree[name] = {TYPE: _name(type(value), here), **_node(value, here)}
        elif type(value) in parts(kind):
            tree[name] = _node(value, here)
        else:
            wanted = _names(parts(kind)) or describe(kind)
            raise ConfigError(f"{here}: expected {wanted}, got {type(value).__name__}")
    return tree


def _plain(value: Any) -> Any:
    if is_dataclass(value):  # in a list, a part is never open
        return _node(value, type(value).__name__)
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _name(cls: type, path: str) -> str:
    if TYPE in kinds(cls):
        raise ConfigError(f"{path}: a field of {cls.__name__} is called {TYPE!r}, which files need for the class")
    try:
        return class_name(cls)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _names(of: tuple[type, ...]) -> str:
    return " or ".join(cls.__name__ for cls in of)


def classes(config: Any) -> dict[str, type]:
    """The classes that the tree of a config names, by those names."""
    found: dict[str, type] = {}
    for name, kind in kinds(type(config)).items():
        value = getattr(config, name)
        if is_dataclass(value):
            found |= classes(value)
            if is_tagged(kind):
                found[class_name(type(value))] = type(value)
    return found


def check(config: Any) -> None:
    """That a file written from this config would bring back its equal. Raises ConfigError with every reason why not:
    dataclasses don't check what Python puts into them."""
    copy = from_dict(type(config), to_dict(config), known=classes(config))
    if problems := _differences(config, copy, "recipe"):
        raise ConfigError(*problems)


def _differences(a: Any, b: Any, path: str) -> list[str]:
    if is_dataclass(a) and type(a) is type(b):
        names = kinds(type(a))
        return [line for n in names for line in _differences(getattr(a, n), getattr(b, n), f"{path}.{n}")]
    return [] if a == b else [f"{path}: {a!r} would come back from a file as {b!r}"]


# ---- tree -> dataclass


def from_dict(
    cls: type[T],
    tree: Mapping[str, Any],
    *,
    code_dir: Path | None = None,
    known: Mapping[str, type] | None = None,
) -> T:
    """The dataclass that a tree describes.

    code_dir: a folder whose Python files the tree may name, and which are then imported; None refuses them.
    known: classes that the tree may name without looking anywhere (see `classes`).

    Raises ConfigError with a line for every mistake in the tree.
    """
    reader = _Reader(cls, code_dir, known or {})
    config = reader.node(cls, tree, "recipe")
    if reader.problems:
        raise ConfigError(*reader.problems)
    return config


class _Reader:
    """Reads a tree to its end and collects what is wrong with it; what can't be read comes back as None."""

    def __init__(self, cls: type, code_dir: Path | None, known: Mapping[str, type]) -> None:
        self.top, self.code_dir, self.known = kinds(cls), code_dir, known
        self.problems: list[str] = []

    def fail(self, path: str, text: str) -> Any:
        self.problems.append(f"{path}: {text}")
        return None

    def value(self, kind: Kind, value: Any, path: str) -> Any:
        if isinstance(value, Words):
            value = read_words(kind, value)
        members, nullable = options(kind)
        if nullable and (value is None or value == NONE):
            return None
        if parts(kind) and isinstance(value, Mapping):
            return self.tagged(kind, value, path) if is_tagged(kind) else self.node(parts(kind)[0], value, path)
        for member in members:
            if get_origin(member) is tuple and isinstance(value, list):
                return self.items(get_args(member), value, path)
            if _fits(member, value):
                return float(value) if member is float else value
        allowed = [c for m in members if get_origin(m) is Literal for c in get_args(m)]
        hint = did_you_mean(str(value), map(str, allowed)) if isinstance(value, str) else ""
        got = "a table" if isinstance(value, Mapping) else repr(value)
        return self.fail(path, f"expected {describe(kind)}, got {got}{hint}")

    def items(self, item_kinds: tuple[Kind, ...], values: list[Any], path: str) -> tuple[Any, ...] | None:
        if item_kinds[-1] is Ellipsis:
            item_kinds = item_kinds[:1] * len(values)
        if len(values) != len(item_kinds):
            return self.fail(path, f"expected {len(item_kinds)} values, got {len(values)}: {values}")
        pairs = enumerate(zip(item_kinds, values, strict=True))
        return tuple(self.value(kind, value, f"{path}[{i}]") for i, (kind, value) in pairs)

    def tagged(self, kind: Kind, tree: Mapping[str, Any], path: str) -> Any:
        name = tree.get(TYPE)
        if isinstance(name, Words):
            name = read_words(str, name)
        if not isinstance(name, str):
            got = "missing" if name is None else f"got {name!r}"
            return self.fail(f"{path}.{TYPE}", f"{got}; expected module:Class, a {_names(parts(kind))}")
        reasons: list[str] = []
        for base in parts(kind):
            try:
                cls = find_class(name, base, self.code_dir, self.known)
            except (ConfigError, FileNotFoundError) as error:
                reasons.append(str(error))
            else:
                return self.node(cls, {k: v for k, v in tree.items() if k != TYPE}, path)
        return self.fail(f"{path}.{TYPE}", reasons[0])

    def node(self, cls: type[T], tree: Mapping[str, Any], path: str) -> T:
        before, known = len(self.problems), kinds(cls)
        for name in [n for n in tree if n not in known]:
            elsewhere = [f"{path}.{k}" for k, v in tree.items() if isinstance(v, Mapping) and name in v]
            elsewhere += ["recipe"] if name in self.top else []
            hint = f"; did you mean {' or '.join(f'{place}.{name}' for place in elsewhere)}?" if elsewhere else ""
            listed = f"; {cls.__name__} has {', '.join(known) or 'no fields'}"
            self.fail(f"{path}.{name}", f"no such field{hint or did_you_mean(name, known, listed)}")
        values: dict[str, Any] = {}
        for field in _fields(cls):
            kind = known[field.name]
            if field.name in tree:
                values[field.name] = self.value(kind, tree[field.name], f"{path}.{field.name}")
            elif field.default is MISSING and field.default_factory is MISSING:
                self.fail(f"{path}.{field.name}", f"missing; expected {describe(kind)}")
        if len(self.problems) == before:
            try:
                return cls(**values)
            except ValueError as error:  # from the config's own __post_init__
                self.fail(path, str(error))
        return None  # type: ignore[return-value]  # from_dict raises then


def _fits(kind: Kind, value: Any) -> bool:
    """Whether a plain value is one of a simple kind: true is no integer, an integer is a number."""
    if get_origin(kind) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(kind))
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind


def _read_part(cls: type, word: str) -> Any:
    """A part of a list, typed as name=value,name=value; any other text stays text."""
    pairs = [pair.partition("=") for pair in word.split(",")]
    if not all(equals for _, equals, _ in pairs):
        return word
    known = kinds(cls)
    return {name: read_words(known[name], (text,)) if name in known else text for name, _, text in pairs}


def read_words(kind: Kind, words: tuple[str, ...]) -> Any:
    """The plain value that words typed for a field mean; those that fit nothing stay text, for the reader to refuse."""
    members, nullable = options(kind)
    if nullable and len(words) == 1 and words[0].lower() == NONE:
        return NONE
    for member in members:
        if get_origin(member) is tuple:
            items = get_args(member)
            items = items[:1] * len(words) if items[-1] is Ellipsis else items
            return [read_words(k, (w,)) for k, w in zip(items, words, strict=False)] + list(words[len(items) :])
        if member is bool and not words:
            return True
        if len(words) != 1:
            continue
        value: Any = words[0]
        if _is_part(member):
            return _read_part(member, words[0])
        if get_origin(member) is Literal:
            value = next((choice for choice in get_args(member) if str(choice) == value), value)
        elif member is bool:
            value = {"true": True, "false": False}.get(value.lower(), value)
        elif member in (int, float):
            try:
                value = member(value)
            except ValueError:
                continue
        if _fits(member, value):
            return value
    return words[0] if len(words) == 1 else list(words)
