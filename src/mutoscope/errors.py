"""What a user's mistake looks like: lines that say where, what was found, what is allowed, what was meant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class ConfigError(ValueError):
    """Everything that is wrong with a recipe, one line for each mistake."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """``"; did you mean X?"`` with the nearest of the known words, or `otherwise` when none is near."""
    near: Sequence[str] = get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else otherwise


def listed(faults: Iterable[str]) -> str:
    """The first ten, a line each, and how many more there are."""
    lines = list(faults)
    more = [f"... and {len(lines) - 10} more"] if len(lines) > 10 else []
    return "".join(f"\n  {line}" for line in lines[:10] + more)
