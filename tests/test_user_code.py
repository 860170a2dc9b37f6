"""Code that a recipe names is imported only when someone said so."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mutoscope.errors import ConfigError
from mutoscope.recipe import ModelConfig
from mutoscope.types import LatentSpec
from mutoscope.user_code import class_name, code_files, find_class, load_file, source_file

MODEL = """
from __future__ import annotations
from dataclasses import dataclass
from mutoscope.recipe import ModelConfig

@dataclass(frozen=True, kw_only=True)
class TinyConv(ModelConfig):
    width: int = 32
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_model.py"
    path.write_text(MODEL)
    return path


def test_a_users_class_is_named_by_its_file_and_found_again(file: Path) -> None:
    cls = load_file(file).TinyConv
    assert class_name(cls) == "my_model.py:TinyConv"
    assert source_file(cls) == file.resolve()
    assert find_class("my_model.py:TinyConv", ModelConfig, file.parent, {}) is cls
    assert cls().width == 32


def test_a_class_of_ours_is_named_by_its_module() -> None:
    assert class_name(ModelConfig) == "mutoscope.recipe:ModelConfig"
    assert source_file(ModelConfig) is None
    assert code_files({"x": ModelConfig}) == []


def test_nothing_runs_unless_its_folder_is_trusted(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise RuntimeError('ran')")
    with pytest.raises(ConfigError, match=r"Python code beside the recipe.*--trust-code"):
        find_class("evil.py:Net", ModelConfig, None, {})
    with pytest.raises(RuntimeError, match="ran"):
        find_class("evil.py:Net", ModelConfig, tmp_path, {})
    assert str(tmp_path / "evil.py") not in sys.modules


@pytest.mark.parametrize(
    "name", ["os:system", "subprocess:Popen", "mutoscopes.evil:Net", "../evil.py:Net", "/x/evil.py:Net"]
)
def test_nothing_outside_of_the_package_and_the_folder_is_ever_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise RuntimeError('ran')")
    for code_dir in (None, tmp_path / "run"):
        with pytest.raises(ConfigError, match=r"outside of mutoscope|beside the recipe"):
            find_class(name, ModelConfig, code_dir, {})


@pytest.mark.parametrize("name", ["mutoscope.cli:main", "mutoscope.types:LatentSpec", "mutoscope.recipe:Data"])
def test_only_dataclasses_of_the_wanted_kind_are_found(name: str) -> None:
    with pytest.raises(ConfigError, match="no ModelConfig named"):
        find_class(name, ModelConfig, None, {name: LatentSpec})


def test_near_names_are_suggested() -> None:
    with pytest.raises(ConfigError, match=r"no ModelConfig named 'Dit' in mutoscope\.models\.dit; did you mean DiT\?"):
        find_class("mutoscope.models.dit:Dit", ModelConfig, None, {})


def test_a_file_is_imported_once_and_not_confused_with_its_namesake(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "my_model.py").write_text(MODEL)
    a, b = (load_file(tmp_path / folder / "my_model.py") for folder in ("a", "b"))
    assert a is not b
    assert load_file(tmp_path / "a" / ".." / "a" / "my_model.py") is a
    with pytest.raises(ConfigError, match=r"two files are called my_model\.py"):
        code_files({"a": a.TinyConv, "b": b.TinyConv})
    assert code_files({"a": a.TinyConv}) == [tmp_path / "a" / "my_model.py"]


def test_a_class_made_at_a_prompt_has_no_file() -> None:
    namespace: dict[str, type] = {"__name__": "nowhere"}
    exec("class Net: pass", namespace)
    with pytest.raises(ConfigError, match=r"Net stands in no file; put it in a \.py file"):
        class_name(namespace["Net"])


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file: .*none\.py"):
        load_file(tmp_path / "none.py")
