"""Fields set on the command line: ``--optim.lr 1e-4 --no-compile --text none``, read by the rules of the files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from mutoscope.config import Words, classes, from_dict, to_dict
from mutoscope.errors import ConfigError
from mutoscope.toml import merge

T = TypeVar("T")


def override(config: T, flags: Sequence[str]) -> T:
    """The config with the fields that `flags` name changed.

    A flag is a field's path, with - for _ if you like, and its value: ``--model.depth 8`` or ``--model.depth=8``;
    several values for a list; none for true. ``--no-compile`` is ``--compile false``. Raises ConfigError with a line
    for every flag that is wrong.
    """
    over: dict[str, Any] = {}
    for flag, words in _split(flags):
        *above, name = flag.removeprefix("--").replace("-", "_").split(".")
        part: Any = config
        table = over
        for step in above:
            part, table = getattr(part, step, None), table.setdefault(step, {})
            if not isinstance(table, dict):
                raise ConfigError(f"{flag}: {step} has a value already")
        if type(getattr(part, name.removeprefix("no_"), None)) is bool and not hasattr(part, name):
            if words:
                raise ConfigError(f"{flag}: takes no value, got {' '.join(words)}")
            name, words = name.removeprefix("no_"), ("false",)
        table[name] = Words(words)
    return from_dict(type(config), merge(to_dict(config), over), known=classes(config))


def _split(flags: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Flags with the words behind each; a word may start with one dash, as negative numbers do."""
    flag, words = "", list[str]()
    for word in flags:
        if word.startswith("--"):
            if flag:
                yield flag, tuple(words)
            flag, equals, value = word.partition("=")
            words = [value] if equals else []
        elif flag:
            words.append(word)
        else:
            raise ConfigError(f"unexpected {word!r}: fields are set as in --optim.lr 1e-4")
    if flag:
        yield flag, tuple(words)
