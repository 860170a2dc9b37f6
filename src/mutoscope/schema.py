"""A JSON Schema of a recipe's TOML: gives editors completion, tooltips and red squiggles.

Taplo ("Even Better TOML") reads it from a first line ``#:schema ./recipe.schema.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin

from mutoscope.config import NONE, TYPE, Kind, field_docs, is_tagged, kinds, options, parts, to_dict
from mutoscope.limits import Limits
from mutoscope.toml import BASE

_SIMPLE = {bool: "boolean", int: "integer", float: "number", str: "string"}


def json_schema(config: Any, limits: Mapping[str, Limits]) -> dict[str, Any]:
    """The schema (draft 2020-12) of files that give this config, or another with the same classes in its open parts.

    limits: what numbers may be, by the path of their field, in JSON Schema's own keywords.

    Defaults are this config's values. A file with ``base`` may leave everything out; one without must say what has
    no default.
    """
    whole = _table(config, to_dict(config), "", limits)
    whole["properties"][BASE] = {"type": "string", "description": "The recipe that this file starts from."}
    whole["if"] = {"required": [BASE]}
    whole["else"] = _required(config)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": type(config).__name__, **whole}


def _table(config: Any, tree: Mapping[str, Any], path: str, limits: Mapping[str, Limits]) -> dict[str, Any]:
    docs = field_docs(type(config))
    properties: dict[str, Any] = {}
    for name, kind in kinds(type(config)).items():
        value, here = getattr(config, name), f"{path}{name}"
        if is_dataclass(value):
            schema = _table(value, tree[name], f"{here}.", limits)
            if is_tagged(kind):
                schema["properties"] = {TYPE: {"const": tree[name][TYPE]}, **schema["properties"]}
            schema = _or_none(schema, kind)
        else:
            schema = {**_or_none(_value(kind, here, limits), kind), "default": _default(tree[name])}
        properties[name] = {"description": docs[name], **schema} if name in docs else schema
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _or_none(schema: dict[str, Any], kind: Kind) -> dict[str, Any]:
    return {"anyOf": [schema, {"const": NONE}]} if options(kind)[1] else schema


def _value(kind: Kind, path: str, limits: Mapping[str, Limits]) -> dict[str, Any]:
    """The schema of a value that isn't None."""
    members = options(kind)[0]
    if len(members) > 1:
        return {"anyOf": [_value(m, path, limits) for m in members]}
    member = members[0]
    if get_origin(member) is Literal:
        return {"enum": list(get_args(member))}
    if get_origin(member) is tuple:
        items = get_args(member)
        if items[-1] is Ellipsis:
            return {"type": "array", "items": _value(items[0], path, limits)}
        exact = {"minItems": len(items), "maxItems": len(items)}
        return {"type": "array", "prefixItems": [_value(k, path, limits) for k in items], "items": False, **exact}
    if parts(member):
        return _absent(member, path, limits)
    return {"type": _SIMPLE[member], **limits.get(path, {})}


def _absent(cls: type, path: str, limits: Mapping[str, Limits]) -> dict[str, Any]:
    """The schema of a part that the config has not: its fields where they are known, anything where it is open."""
    if not fields(cls):
        return {"type": "object", "properties": {TYPE: {"type": "string"}}, "required": [TYPE]}
    docs = field_docs(cls)
    values = {name: _or_none(_value(kind, f"{path}.{name}", limits), kind) for name, kind in kinds(cls).items()}
    properties = {name: {"description": docs.get(name, ""), **schema} for name, schema in values.items()}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _default(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _default(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_default(v) for v in value]
    return NONE if value is None else value


def _required(config: Any) -> dict[str, Any]:
    """What a file must say where it starts from no other."""
    names = [f.name for f in fields(config) if f.default is MISSING and f.default_factory is MISSING]
    inner: dict[str, Any] = {}
    for name, kind in kinds(type(config)).items():
        if is_dataclass(part := getattr(config, name)):
            inner[name] = _required(part)
            if is_tagged(kind):
                inner[name]["required"].append(TYPE)
    return {"required": names, "properties": inner}
