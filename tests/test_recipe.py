"""Recipes by reference, `base` and its errors, and what is refused before anything starts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from mutoscope.config import classes
from mutoscope.contradictions import validate
from mutoscope.errors import ConfigError
from mutoscope.loading import load_recipe, load_toml
from mutoscope.models.dit import DiT
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.recipe import Autoencoder, Data, ModelConfig, Optim, Recipe, Sampler
from mutoscope.toml import dump_toml

RECIPE = Recipe(
    data=Data(root="clips", frames=8, height=32, width=32),
    model=DiT(),
    objective=Diffusion(),
    sampler=Sampler(),
    steps=3,
    batch_size=2,
)


@dataclass(frozen=True, kw_only=True)
class Net(ModelConfig):
    width: int = 1


MY_MODEL = '''
from __future__ import annotations
from dataclasses import dataclass
from mutoscope.recipe import Data, ModelConfig, Recipe
from mutoscope.objectives.diffusion import Diffusion

@dataclass(frozen=True, kw_only=True)
class TinyConv(ModelConfig):
    width: int = 32

def tiny() -> Recipe:
    """A 3D convolution."""
    return Recipe(data=Data(root="clips", frames=8, height=32, width=32), model=TinyConv(), objective=Diffusion(),
                  steps=3, batch_size=2)

def wrong() -> Recipe:
    return 3
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a whole recipe in whole.toml and a model of the user's in my_model.py."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "whole.toml").write_text(dump_toml(RECIPE))
    (tmp_path / "my_model.py").write_text(MY_MODEL)
    return tmp_path


def refused(ref: str, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(ref, **options)
    return str(caught.value)


class TestReferences:
    def test_a_file_and_a_run_directory(self, folder: Path) -> None:
        assert load_recipe("whole.toml") == RECIPE
        run = folder / "runs" / "one"
        run.mkdir(parents=True)
        (run / "recipe.toml").write_text(dump_toml(RECIPE))
        assert load_recipe(str(run)) == RECIPE
        with pytest.raises(FileNotFoundError, match=r"no such file: .*recipe\.toml"):
            load_recipe(str(folder))

    def test_a_function_in_a_file(self, folder: Path) -> None:
        recipe = load_recipe("my_model.py:tiny", trust_code=True)
        validate(recipe)
        assert type(recipe.model).__name__ == "TinyConv"
        assert load_recipe("my_model.py:tiny") == recipe  # imported already, by someone's word
        assert refused("my_model.py:wrong", trust_code=True) == "my_model.py:wrong returns int, not a Recipe"
        listed = "; there is my_model.py:tiny, my_model.py:wrong"
        assert refused("my_model.py:tyni", trust_code=True) == f"my_model.py:tyni: no such function{listed}"
        assert refused("my_model.py:tiny2", trust_code=True).endswith("no such function; did you mean tiny?")
        assert refused("my_model.py", trust_code=True) == f"my_model.py: no such function{listed}"
        with pytest.raises(FileNotFoundError, match=r"no such file: .*no\.py"):
            load_recipe("no.py:tiny", trust_code=True)

    def test_a_function_is_not_run_unasked(self, folder: Path) -> None:
        (folder / "evil.py").write_text("raise RuntimeError('ran')")
        assert "--trust-code" in refused("evil.py:f")
        (folder / "mine.toml").write_text('base = "evil.py:f"')
        assert "--trust-code" in refused("mine.toml")

    def test_unknown_names(self, folder: Path) -> None:
        hint = "no such recipe, file or run directory; `mutoscope recipes` lists them"
        assert refused("zzz") == f"zzz: {hint}"
        with pytest.raises(FileNotFoundError, match=r"no such file: none\.toml"):
            load_recipe("none.toml")

    def test_a_run_of_the_users_model_is_loaded_only_with_trust(self, folder: Path) -> None:
        recipe = load_recipe("my_model.py:tiny", trust_code=True)
        run = folder / "run"
        run.mkdir()
        (run / "recipe.toml").write_text(dump_toml(recipe))
        (run / "my_model.py").write_text(
            MY_MODEL.replace("width: int = 32", "width: int = 32\n    trusted: bool = True")
        )
        assert refused("run").startswith("run/recipe.toml:")
        assert "recipe.model.type: 'my_model.py:TinyConv' is Python code" in refused("run")
        assert load_toml(Path("run/recipe.toml"), known=classes(recipe)) == recipe
        model = load_recipe("run", trust_code=True).model
        assert model.trusted  # type: ignore[attr-defined]  # the run's copy, not the file it was made from


class TestBase:
    def test_only_what_differs(self, folder: Path) -> None:
        (folder / "sub").mkdir()
        (folder / "sub" / "child.toml").write_text('base = "../whole.toml"\nsteps = 9\n[optim]\nlr = 0.5\n')
        (folder / "sub" / "grandchild.toml").write_text('base = "child.toml"\nsampler = "none"\n[optim]\neps = 0.25\n')
        child = replace(RECIPE, steps=9, optim=Optim(lr=0.5))
        assert load_recipe("sub/child.toml") == child
        assert load_recipe("sub/grandchild.toml") == replace(child, sampler=None, optim=Optim(lr=0.5, eps=0.25))

    def test_another_class_starts_from_its_own_defaults(self, folder: Path) -> None:
        (folder / "child.toml").write_text('base = "whole.toml"\n[model]\ntype = "my_model.py:TinyConv"\n')
        model = load_recipe("child.toml", trust_code=True).model
        assert type(model).__name__ == "TinyConv" and model.width == 32  # type: ignore[attr-defined]

    def test_a_function_of_a_trusted_file(self, folder: Path) -> None:
        (folder / "child.toml").write_text('base = "my_model.py:tiny"\n[model]\nwidth = 3\n')
        assert load_recipe("child.toml", trust_code=True).model.width == 3  # type: ignore[attr-defined]

    def test_circles_and_missing_files(self, folder: Path) -> None:
        (folder / "a.toml").write_text('base = "b.toml"')
        (folder / "b.toml").write_text('base = "a.toml"')
        assert refused("a.toml").endswith("base goes round in a circle: a.toml -> b.toml -> a.toml")
        (folder / "self.toml").write_text('base = "self.toml"')
        assert "circle: self.toml -> self.toml" in refused("self.toml")
        (folder / "a.toml").write_text('base = "gone.toml"')
        with pytest.raises(FileNotFoundError, match=r"no such file: gone\.toml"):
            load_recipe("a.toml")
        (folder / "a.toml").write_text("base = 3")
        assert refused("a.toml") == "a.toml: base: expected the name of a recipe, got 3"
        (folder / "a.toml").write_text('base = "zzz"')
        assert refused("a.toml").startswith("a.toml: base: zzz: no such recipe")

    def test_mistakes_have_file_and_line(self, folder: Path) -> None:
        (folder / "child.toml").write_text(
            'base = "whole.toml"\nsteps = "many"\n\n[optim]\nlr = 0.1\nweight_decy = 0.1\n[data]\nseed = 3\n'
        )
        assert refused("child.toml").splitlines() == [
            "child.toml:8: recipe.data.seed: no such field; did you mean recipe.seed?",
            "child.toml:6: recipe.optim.weight_decy: no such field; did you mean weight_decay?",
            "child.toml:2: recipe.steps: expected an integer, got 'many'",
        ]
        (folder / "bad.toml").write_text("steps = = 3")
        assert refused("bad.toml") == "bad.toml:1:9: Invalid value"


def with_data(**changes: Any) -> Recipe:
    return replace(RECIPE, data=replace(RECIPE.data, **changes))


def with_latents(**changes: Any) -> Recipe:
    autoencoder = Autoencoder(path="runs/vae", recipe="minisora.vae")
    return replace(with_data(latents="latents", **changes), autoencoder=autoencoder)


class TestValidate:
    @pytest.mark.parametrize(
        "recipe",
        [
            RECIPE,
            with_data(root="flying-mnist://tiny"),
            with_data(root="flying-mnist://tiny", layout="flying_mnist"),
            with_data(window="random"),
            with_data(cache=True, window="all"),
            with_latents(window="all"),
            replace(RECIPE, sampler=Sampler(method="ddim", eta=1.0)),
            replace(RECIPE, optim=Optim(schedule="cosine", final_lr=0.1)),
            replace(RECIPE, validate_every=0, sample_every=0, ema=0.999),
        ],
    )
    def test_good(self, recipe: Recipe) -> None:
        validate(recipe)

    @pytest.mark.parametrize(
        ("recipe", "line"),
        [
            (replace(RECIPE, optim=Optim(lr=0.0)), "optim.lr: must be above 0, got 0.0"),
            (
                replace(RECIPE, optim=Optim(betas=(0.9, 1.0))),
                "optim.betas: must be at least 0 and below 1, got (0.9, 1.0)",
            ),
            (
                replace(RECIPE, optim=Optim(schedule="cosine", final_lr=2.0)),
                "optim.final_lr: must be at least 0 and at most 1",
            ),
            (replace(RECIPE, ema=1.0), "ema: must be at least 0 and below 1, got 1.0"),
            (replace(RECIPE, accumulate=0), "accumulate: must be at least 1, got 0"),
            (replace(RECIPE, steps=0), "steps: must be at least 1, got 0"),
            (replace(RECIPE, batch_size=-1), "batch_size: must be at least 1, got -1"),
            (replace(RECIPE, save_every=0), "save_every: must be at least 1, got 0"),
            (replace(RECIPE, sampler=Sampler(steps=0)), "sampler.steps: must be at least 1, got 0"),
            (with_data(val_fraction=1.0), "data.val_fraction: must be at least 0 and below 1, got 1.0"),
            (with_data(fps=0.0), "data.fps: must be above 0, got 0.0"),
            (with_data(frames=0), "data.frames: must be at least 1, got 0"),
            (with_data(root=""), "data.root: empty"),
            (
                with_data(root="flying-mnist://tiny", layout="split_folders"),
                "data.layout: flying-mnist://tiny is of layout",
            ),
            (
                with_data(layout="flying_mnist"),
                "data.root: layout flying_mnist wants flying-mnist://PRESET, got 'clips'",
            ),
            (with_data(cache=True, window="random"), "data.cache: random windows and crops are new each time"),
            (with_data(latents="latents"), "data.latents: latents are an autoencoder's"),
            (with_latents(window="random"), "data.window: random takes other frames each time"),
            (with_latents(cache=True), "data.cache: stored latents are memory-mapped already"),
            (replace(RECIPE, sampler=Sampler(eta=0.5)), "sampler.eta: ddim and dpmpp_2m have it, not euler"),
            (replace(RECIPE, optim=Optim(final_lr=0.1)), "optim.final_lr: a constant schedule has no end"),
        ],
    )
    def test_bad(self, recipe: Recipe, line: str) -> None:
        with pytest.raises(ConfigError) as caught:
            validate(recipe)
        assert [problem[: len(line) + 7] for problem in caught.value.problems] == [f"recipe.{line}"]

    def test_types_that_python_let_through(self) -> None:
        validate(replace(RECIPE, model=Net()))
        with pytest.raises(ConfigError, match=r"^recipe\.model\.width: expected an integer, got '64'$"):
            validate(replace(RECIPE, model=Net(width="64")))  # type: ignore[arg-type]

    def test_everything_at_once(self) -> None:
        with pytest.raises(ConfigError) as caught:
            validate(replace(RECIPE, steps=0, ema=2.0, optim=Optim(lr=-1.0)))
        assert len(caught.value.problems) == 3
