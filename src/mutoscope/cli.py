"""The command line. Each verb is a dataclass whose fields are its options and whose `run` calls what does the work.

Verbs import what they need when they run, so that ``mutoscope --help`` and ``mutoscope recipes`` do not wait for torch.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import tyro

from mutoscope import __version__
from mutoscope.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from mutoscope.recipe import Recipe

MISTAKES = (ValueError, FileNotFoundError)
"""What a user can put right: told in a line, without a traceback."""

_CONFIG = (tyro.conf.FlagCreatePairsOff,)


@dataclass(frozen=True)
class Recipes:
    """List what can be trained."""

    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        from mutoscope.recipes import list_recipes

        found = list_recipes()
        if self.json:
            print(json.dumps([asdict(info) for info in found], indent=2))
            return
        twins = {info.tiny for info in found}
        shown = [info for info in found if info.name not in twins]
        width = max((len(info.name) for info in shown), default=0)
        for info in shown:
            tiny = " (+ _tiny)" if info.tiny else ""
            print(f"{info.name:{width}}  {info.status:8}  {info.summary}{tiny}")


@dataclass(frozen=True, kw_only=True)
class OnRecipe:
    """What the verbs share that take a recipe, and the recipe's fields as options."""

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
    """A built-in name (see `mutoscope recipes`), file.py:function, a recipe.toml, or a run directory."""
    trust_code: bool = False
    """Import the Python files that a recipe.toml or a run directory names. They can do whatever you can."""

    def load(self, flags: Sequence[str]) -> Recipe:
        """The recipe with the fields that `flags` set, validated."""
        from mutoscope.overrides import override
        from mutoscope.recipe import load_recipe, validate

        for flag in flags:
            if hint := did_you_mean(flag, [f"--{f.name}".replace("_", "-") for f in fields(self)]):
                raise ConfigError(f"{flag}: no such option{hint}")
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


@dataclass(frozen=True, kw_only=True)
class Show(OnRecipe):
    """Print a recipe as TOML, every field explained: `mutoscope show X > mine.toml` makes it yours."""

    json_schema: bool = False
    """Print a JSON Schema of the TOML instead. Saved as recipe.schema.json, it gives completion in editors whose
    TOML files start with the line `#:schema ./recipe.schema.json`."""

    def run(self, flags: Sequence[str]) -> None:
        from mutoscope.limits import LIMITS
        from mutoscope.recipe import find_function
        from mutoscope.schema import json_schema
        from mutoscope.toml import dump_toml

        recipe = self.load(flags)
        if self.json_schema:
            print(json.dumps(json_schema(recipe, LIMITS), indent=2, ensure_ascii=False))
            return
        function = find_function(self.recipe, trust_code=self.trusts)
        print(dump_toml(recipe, header=_docstring(function)))


@dataclass(frozen=True, kw_only=True)
class Train(OnRecipe):
    """Train a recipe, from where an earlier run in the same directory stopped."""

    out: Path | None = None
    """The run directory; runs/NAME unless you say otherwise."""

    def run(self, flags: Sequence[str]) -> None:
        from mutoscope.training.loop import train
        from mutoscope.training.signals import Stopped

        here = Path(self.recipe)
        try:
            train(self.load(flags), self.out or (here if here.is_dir() else Path("runs") / self.name))
        except Stopped as stopped:
            _fail(str(stopped), stopped.exit_code)


VERBS: dict[str, type[Any]] = {
    "recipes": Recipes,
    "show": Show,
    "train": Train,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line. Exits 2 for a mistake of the user's, 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words or bool(os.environ.get("MUTOSCOPE_DEBUG"))
    try:
        _run([word for word in words if word != "--debug"])
    except MISTAKES as error:
        if debug:
            raise
        _fail(str(error), 2)
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
        known = ", ".join(VERBS)
        typed = " ".join(words[:2] if any(v.startswith(f"{words[0]} ") for v in VERBS) else words[:1])
        raise ConfigError(f"mutoscope {typed}: no such verb{did_you_mean(typed, VERBS, f'; there is {known}')}")
    print("usage: mutoscope VERB ...\n\nTrain, post-train and sample video generation models.\n")
    for verb, kind in VERBS.items():
        print(f"  {verb:{max(map(len, VERBS))}}  {_docstring(kind).splitlines()[0]}")
    print("\nmutoscope VERB --help tells a verb's options, mutoscope VERB RECIPE --help the recipe's fields as well.")
    print("--debug, or MUTOSCOPE_DEBUG=1, shows where an error came from.")


def _help_on_recipe(kind: type[OnRecipe], words: list[str], prog: str) -> None:
    """The verb's options, then the recipe's fields with its own values as defaults."""
    from mutoscope.recipe import load_recipe

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
    """Print every line of `text` to stderr, red on a terminal, and exit."""
    red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() and "NO_COLOR" not in os.environ else ("", "")
    print("\n".join(f"{red}{line}{plain}" for line in text.splitlines()), file=sys.stderr)
    sys.exit(code)
