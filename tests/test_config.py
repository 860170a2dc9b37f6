"""Dataclasses to trees and back: every mistake is found, and told in the form that the documentation promises."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from mutoscope.config import Words, check, classes, field_docs, from_dict, read_words, to_dict
from mutoscope.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Net:
    """An open part: it has no fields of its own."""


@dataclass(frozen=True, kw_only=True)
class Conv(Net):
    width: int = 8
    """Hidden
    channels."""
    kernel: tuple[int, int] = (3, 3)
    undocumented: bool = False


@dataclass(frozen=True, kw_only=True)
class Even(Net):
    width: int = 2

    def __post_init__(self) -> None:
        if self.width % 2:
            raise ValueError(f"width={self.width} must be even")


@dataclass(frozen=True, kw_only=True)
class Optim:
    weight_decay: float = 0.0
    lr: float = 1e-4


@dataclass(frozen=True, kw_only=True)
class Linear:
    slope: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Cosine:
    cycles: int = 1


@dataclass(frozen=True, kw_only=True)
class Config:
    steps: int
    net: Net
    optim: Optim = field(default_factory=Optim)
    decay: Linear | Cosine | None = Linear()
    method: Literal["euler", "heun"] = "euler"
    fps: float | None = 8.0
    sizes: tuple[int, ...] = ()
    name: str | None = None
    flag: bool = False
    width: int | str = 1


CONFIG = Config(steps=5, net=Conv(width=4), decay=Cosine(cycles=2), sizes=(1, 2))
KNOWN = classes(CONFIG)
TREE = to_dict(CONFIG)


def problems(**changes: Any) -> list[str]:
    """What from_dict says about TREE with these changes."""
    with pytest.raises(ConfigError) as caught:
        from_dict(Config, {**TREE, **changes}, known=KNOWN)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return list(caught.value.problems)


def test_tree_is_plain_and_names_the_class_of_open_parts_only() -> None:
    assert TREE == {
        "steps": 5,
        "net": {"type": "test_config.py:Conv", "width": 4, "kernel": [3, 3], "undocumented": False},
        "optim": {"weight_decay": 0.0, "lr": 1e-4},
        "decay": {"type": "test_config.py:Cosine", "cycles": 2},
        "method": "euler",
        "fps": 8.0,
        "sizes": [1, 2],
        "name": None,
        "flag": False,
        "width": 1,
    }


def test_round_trip() -> None:
    again = from_dict(Config, TREE, known=KNOWN)
    assert again == CONFIG
    assert type(again.net) is Conv and again.sizes == (1, 2)


def test_none_is_written_as_a_word_where_the_format_has_no_null() -> None:
    config = from_dict(Config, {**TREE, "fps": "none", "decay": "none"}, known=KNOWN)
    assert config.fps is None and config.decay is None
    assert problems(steps="none") == ["recipe.steps: expected an integer, got 'none'"]


def test_an_integer_is_a_number_but_true_is_not_an_integer() -> None:
    config = from_dict(Config, {**TREE, "fps": 3}, known=KNOWN)
    assert config.fps == 3.0 and type(config.fps) is float
    assert problems(steps=True) == ["recipe.steps: expected an integer, got True"]
    assert problems(fps=False) == ['recipe.fps: expected a number or "none", got False']
    assert problems(flag=1) == ["recipe.flag: expected true or false, got 1"]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"optim": {"weight_decy": 1}}, "recipe.optim.weight_decy: no such field; did you mean weight_decay?"),
        ({"optim": {"lr": "abc"}}, "recipe.optim.lr: expected a number, got 'abc'"),
        ({"optim": {"lr": float("nan")}}, "recipe.optim.lr: expected a number, got nan"),
        ({"optim": {"momentum": 1}}, "recipe.optim.momentum: no such field; Optim has weight_decay, lr"),
        ({"optim": 3}, "recipe.optim: expected a table, got 3"),
        ({"optim": {"steps": 3}}, "recipe.optim.steps: no such field; did you mean recipe.steps?"),
        ({"lr": 3}, "recipe.lr: no such field; did you mean recipe.optim.lr?"),
        ({"steps": 5.5}, "recipe.steps: expected an integer, got 5.5"),
        ({"steps": {}}, "recipe.steps: expected an integer, got a table"),
        ({"method": "eulr"}, "recipe.method: expected one of 'euler', 'heun', got 'eulr'; did you mean euler?"),
        ({"sizes": 3}, "recipe.sizes: expected a list, got 3"),
        ({"sizes": [1, "x"]}, "recipe.sizes[1]: expected an integer, got 'x'"),
        ({"width": 1.5}, "recipe.width: expected an integer or a string, got 1.5"),
        ({"net": {"width": 3}}, "recipe.net.type: missing; expected module:Class, a Net"),
        ({"net": {"type": 3}}, "recipe.net.type: got 3; expected module:Class, a Net"),
        ({"net": {"type": "test_config.py:Conv", "kernel": [3]}}, "recipe.net.kernel: expected 2 values, got 1: [3]"),
        ({"decay": {"type": "linear"}}, "recipe.decay.type: expected module:Class, such as "
                                        "'mutoscope.models.dit:DiT', got 'linear'"),
    ],
)  # fmt: skip
def test_every_mistake_has_its_line(changes: dict[str, Any], line: str) -> None:
    assert problems(**changes) == [line]


def test_all_mistakes_are_told_together() -> None:
    lines = problems(steps="x", method="heun2", optim={"lr": None, "eps": 1})
    assert [line.partition(":")[0] for line in lines] == [
        "recipe.steps",
        "recipe.optim.eps",
        "recipe.optim.lr",
        "recipe.method",
    ]


def test_missing_fields_are_named_with_what_they_take() -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(Config, {})
    assert caught.value.problems == (
        "recipe.steps: missing; expected an integer",
        "recipe.net: missing; expected a table",
    )


def test_a_parts_own_check_is_told_under_its_path() -> None:
    with pytest.raises(ConfigError, match=r"^recipe\.net: width=3 must be even$"):
        from_dict(
            Config,
            {**TREE, "net": {"type": "test_config.py:Even", "width": 3}},
            known=KNOWN | {"test_config.py:Even": Even},
        )


def test_a_class_must_be_of_its_fields_kind() -> None:
    known = {**KNOWN, "mutoscope.x:Optim": Optim}
    with pytest.raises(ConfigError, match=r"recipe\.net\.type: there is no module 'mutoscope\.x'"):
        from_dict(Config, {**TREE, "net": {"type": "mutoscope.x:Optim"}}, known=known)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (Config(steps="5", net=Conv()), "recipe.steps: expected an integer, got '5'"),  # type: ignore[arg-type]
        (Config(steps=5, net=Conv(), name="none"), "recipe.name: 'none' would come back from a file as None"),
        (Config(steps=5, net=Conv(kernel=[3, 3])), "recipe.net.kernel: [3, 3] would come back from a file as (3, 3)"),  # type: ignore[arg-type]
        (Config(steps=5, net=Optim()), "recipe.net: expected Net, got Optim"),  # type: ignore[arg-type]
        (Config(steps=Optim(), net=Conv()), "recipe.steps: expected an integer, got Optim"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_check_finds_what_python_let_through(config: Config, line: str) -> None:
    check(CONFIG)
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert caught.value.problems == (line,)


def test_check_refuses_classes_that_no_file_could_bring_back() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Inside(Net):
        depth: int = 1

    with pytest.raises(ConfigError, match=r"recipe\.net: .*Inside is not at the top level of its file"):
        check(Config(steps=1, net=Inside()))


def test_unsupported_annotations_are_the_developers_mistake() -> None:
    @dataclass(frozen=True)
    class Bad:
        sizes: list[int]

    with pytest.raises(TypeError, match=r"Bad\.sizes: a config can't hold list\[int\]"):
        to_dict(Bad(sizes=[1]))


def test_docstrings_of_fields() -> None:
    assert field_docs(Conv) == {"width": "Hidden channels."}


@pytest.mark.parametrize(
    ("kind", "words", "value"),
    [
        (int, ("8",), 8),
        (float, ("1e-4",), 1e-4),
        (float, ("-1",), -1.0),
        (float, ("inf",), "inf"),  # left as text, for from_dict to refuse
        (int, ("1.5",), "1.5"),
        (str, ("8",), "8"),
        (bool, (), True),
        (bool, ("False",), False),
        (float | None, ("None",), "none"),
        (int | str, ("8",), 8),
        (int | str, ("x",), "x"),
        (Literal["a", 2], ("2",), 2),
        (tuple[float, float], ("0.9", "1"), [0.9, 1.0]),
        (tuple[float, float], ("0.9", "1", "2"), [0.9, 1.0, "2"]),
        (tuple[int, ...], ("3",), [3]),
        (tuple[int, ...], (), []),
        (int, (), []),
    ],
)
def test_words_typed_mean_what_the_annotation_says(kind: Any, words: tuple[str, ...], value: Any) -> None:
    read = read_words(kind, Words(words))
    assert read == value and type(read) is type(value)
