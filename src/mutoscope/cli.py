"""The command line: finds the verb, reads its options, and tells mistakes in a line."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

import tyro

from mutoscope import __version__
from mutoscope.errors import ConfigError, did_you_mean
from mutoscope.on_recipe import OnRecipe
from mutoscope.training.signals import Stopped
from mutoscope.verbs import VERBS

MISTAKES = (ValueError, FileNotFoundError, FileExistsError)
"""What a user can put right: told in a line, without a traceback."""

_CONFIG = (tyro.conf.FlagCreatePairsOff,)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line. Exits 2 for a mistake of the user's, 128 + the signal's number when stopped by one."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words or bool(os.environ.get("MUTOSCOPE_DEBUG"))
    try:
        _run([word for word in words if word != "--debug"])
        sys.stdout.flush()  # inside the try: a closed pipe may show only here
    except MISTAKES as error:
        if debug:
            raise
        _fail(str(error), 2)
    except Stopped as stopped:
        _fail(str(stopped), stopped.exit_code)
    except KeyboardInterrupt:
        if debug:
            raise
        _fail("interrupted", 130)
    except BrokenPipeError:  # `mutoscope show X | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _run(words: list[str]) -> None:
    verb = next((v for n in (3, 2, 1) if (v := " ".join(words[:n])) in VERBS), None)
    if verb is None:
        return _help(words)
    kind, rest, prog = VERBS[verb], words[len(verb.split()) :], f"mutoscope {verb}"
    on_recipe = issubclass(kind, OnRecipe)
    if on_recipe and rest and not rest[0].startswith("-") and {"-h", "--help"} & set(rest):
        _help_on_recipe(kind, rest, prog)
    elif on_recipe:
        action, flags = tyro.cli(kind, prog=prog, args=rest, config=_CONFIG, return_unknown_args=True)
        action.run(flags)
    else:
        tyro.cli(kind, prog=prog, args=rest, config=_CONFIG).run()


def _help(words: list[str]) -> None:
    """Print what there is; raise ConfigError for a verb that there isn't."""
    if words and words[0] == "--version":
        return print(__version__)
    if words and words[0] not in ("-h", "--help"):
        longer = [v for v in VERBS if v.startswith(f"{words[0]} ")]
        typed, known = " ".join(words[: 2 if longer else 1]), ", ".join(longer or VERBS)
        listed = f"; there is {known}"
        hint = listed if longer and len(words) == 1 else did_you_mean(typed, VERBS, listed)
        raise ConfigError(f"mutoscope {typed}: no such verb{hint}")
    print("usage: mutoscope VERB ...\n\nTrain, post-train and sample video generation models.\n")
    for verb, kind in VERBS.items():
        print(f"  {verb:{max(map(len, VERBS))}}  {_docstring(kind).splitlines()[0]}")
    print("\nmutoscope VERB --help tells a verb's options, mutoscope VERB RECIPE --help the recipe's fields as well.")
    print("--debug, or MUTOSCOPE_DEBUG=1, shows where an error came from.")


def _help_on_recipe(kind: type[OnRecipe], words: list[str], prog: str) -> None:
    """The verb's options, then the recipe's fields with its own values as defaults."""
    from mutoscope.loading import load_recipe

    verb = kind(recipe=words[0], trust_code="--trust-code" in words)
    recipe = load_recipe(verb.recipe, trust_code=verb.trusts)
    with suppress(SystemExit):
        tyro.cli(kind, prog=prog, args=["--help"], config=_CONFIG)
    tyro.cli(
        type(recipe), default=recipe, prog=f"{prog} {words[0]}", args=["--help"], config=(tyro.conf.AvoidSubcommands,)
    )


def _docstring(thing: object) -> str:
    return inspect.getdoc(thing) or ""


def _fail(text: str, code: int) -> NoReturn:
    """Print every line of `text` to stderr, red on a terminal and, of one process of several, with its rank; exit."""
    rank = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() and "NO_COLOR" not in os.environ else ("", "")
    print("\n".join(f"{red}{rank}{line}{plain}" for line in text.splitlines()), file=sys.stderr)
    sys.exit(code)
