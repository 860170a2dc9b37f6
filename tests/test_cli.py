"""The command line: what it hands on, what it prints, and how it says no."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock, create_autospec

import pytest

import mutoscope
from mutoscope.cli import main
from mutoscope.loading import load_recipe
from mutoscope.models.dit import DiT
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.recipe import Data, Optim, Recipe, Sampler
from mutoscope.toml import dump_toml
from mutoscope.training.signals import Stopped
from mutoscope.verbs import VERBS

RECIPE = Recipe(
    data=Data(root="clips", frames=8, height=32, width=32),
    model=DiT(),
    objective=Diffusion(),
    sampler=Sampler(),
    steps=3,
    batch_size=2,
)

MY_MODEL = '''
from dataclasses import dataclass
from torch import nn
from mutoscope.recipe import Data, ModelConfig, Recipe
from mutoscope.objectives.diffusion import Diffusion

@dataclass(frozen=True, kw_only=True)
class TinyConv(ModelConfig):
    width: int = 32
    """Hidden channels."""

    def build(self, io):
        return TinyConvNet(io.channels, self.width)

class TinyConvNet(nn.Module):
    def __init__(self, channels, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv3d(channels, width, 1), nn.Conv3d(width, channels, 1))

    def forward(self, x, t, cond):
        return self.layers(x)

def tiny() -> Recipe:
    """A 3D convolution."""
    return Recipe(data=Data(root="clips", frames=8, height=32, width=32), model=TinyConv(), objective=Diffusion(),
                  steps=3, batch_size=2)
'''


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with mine.toml, my_model.py and a run directory `run`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MUTOSCOPE_DEBUG", raising=False)
    Path("mine.toml").write_text(dump_toml(RECIPE))
    Path("my_model.py").write_text(MY_MODEL)
    Path("run").mkdir()
    Path("run/recipe.toml").write_text(dump_toml(RECIPE))
    return tmp_path


def replaced(monkeypatch: pytest.MonkeyPatch, function: str) -> Mock:
    """A function replaced by a mock that takes the same arguments."""
    module = __import__(function.rpartition(".")[0], fromlist=["_"])
    mock: Mock = create_autospec(getattr(module, function.rpartition(".")[2]))
    monkeypatch.setattr(function, mock)
    return mock


def call(argv: str) -> None:
    main(argv.split())


def refused(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    """What the command says on stderr, with nothing on stdout."""
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == code
    out, err = capsys.readouterr()
    assert out == ""
    return err


class TestShow:
    def test_what_it_prints_is_a_whole_recipe(self, capsys: pytest.CaptureFixture[str]) -> None:
        main(["show", "mine.toml", "--optim.lr", "0.5", "--compile"])
        Path("shown.toml").write_text(capsys.readouterr().out)
        assert load_recipe("shown.toml") == replace(RECIPE, optim=Optim(lr=0.5), compile=True)

    def test_its_cost_stands_below_as_comments(self, capsys: pytest.CaptureFixture[str]) -> None:
        main(["show", "my_model.py:tiny", "--model.width", "7"])
        last = capsys.readouterr().out.rpartition("\n\n")[2]
        assert all(line.startswith("# ") for line in last.splitlines())
        assert str((3 + 1) * 7 + (7 + 1) * 3) in last  # parameters

    def test_shapes_that_do_not_fit_are_told_before_anything_is_printed(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert "model.patch" in refused(capsys, "show", "mine.toml", "--model.patch", "3", "2", "2")

    def test_the_recipes_docstring_comes_first(self, capsys: pytest.CaptureFixture[str]) -> None:
        main(["show", "my_model.py:tiny"])
        text = capsys.readouterr().out
        assert text.startswith("# A 3D convolution.\n\n")
        assert tomllib.loads(text)["model"] == {"type": "my_model.py:TinyConv", "width": 32}

    def test_json_schema(self, capsys: pytest.CaptureFixture[str]) -> None:
        main(["show", "my_model.py:tiny", "--json-schema", "--model.width", "7"])
        schema = json.loads(capsys.readouterr().out)
        width = {"description": "Hidden channels.", "type": "integer", "default": 7}
        assert schema["properties"]["model"]["properties"]["width"] == width


class TestTrain:
    @pytest.mark.parametrize(
        ("ref", "out"),
        [("mine.toml", "runs/mine"), ("my_model.py:tiny", "runs/tiny"), ("run", "run"), ("./run/", "run")],
    )
    def test_the_run_directory_is_named_after_the_recipe(
        self, monkeypatch: pytest.MonkeyPatch, ref: str, out: str
    ) -> None:
        train = replaced(monkeypatch, "mutoscope.training.loop.train")
        main(["train", ref])
        assert train.call_args.args[1] == Path(out)

    def test_overrides_and_own_options_mix(self, monkeypatch: pytest.MonkeyPatch) -> None:
        train = replaced(monkeypatch, "mutoscope.training.loop.train")
        main(["train", "mine.toml", "--optim.betas", "0.5", "0.25", "--out", "there", "--steps=9", "--sampler", "none"])
        recipe, out = train.call_args.args
        assert out == Path("there")
        assert recipe == replace(RECIPE, optim=Optim(betas=(0.5, 0.25)), steps=9, sampler=None)

    def test_a_bad_recipe_does_not_start(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        train = replaced(monkeypatch, "mutoscope.training.loop.train")
        said = refused(capsys, "train", "mine.toml", "--optim.lr", "0", "--steps", "0")
        assert said == "recipe.steps: must be at least 1, got 0\nrecipe.optim.lr: must be above 0, got 0.0\n"
        train.assert_not_called()

    def test_a_run_of_the_users_code_asks_for_trust(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        train = replaced(monkeypatch, "mutoscope.training.loop.train")
        Path("run/recipe.toml").write_text(dump_toml(load_recipe("my_model.py:tiny", trust_code=True)))
        Path("run/my_model.py").write_text(MY_MODEL)
        assert "recipe.model.type: 'my_model.py:TinyConv' is Python code" in refused(capsys, "train", "run")
        main(["train", "run", "--trust-code"])
        assert train.call_args.args[0].model.width == 32


class TestVerbs:
    def test_recipes(self, capsys: pytest.CaptureFixture[str]) -> None:
        main(["recipes", "--json"])
        listed = json.loads(capsys.readouterr().out)
        assert listed and all(list(item) == ["name", "summary", "status", "tiny"] for item in listed)
        main(["recipes"])
        lines = capsys.readouterr().out.splitlines()
        tiny = {item["tiny"] for item in listed}
        assert [line.split()[0] for line in lines] == [item["name"] for item in listed if item["name"] not in tiny]

    def test_encode(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        encode = replaced(monkeypatch, "mutoscope.encode.encode")
        main(["encode", "mine.toml", "--workers", "3", "--data.fps", "4"])
        assert encode.call_args.args == (replace(RECIPE, data=replace(RECIPE.data, fps=4.0)), "runs/mine.latents")
        assert encode.call_args.kwargs == {"workers": 3, "ray": None, "trust_code": False}
        assert "mutoscope train mine.toml --data.latents runs/mine.latents" in capsys.readouterr().out
        main(["encode", "mine.toml", "--ray", "auto", "--out", "s3://bucket/store"])
        assert encode.call_args.args == (RECIPE, "s3://bucket/store")
        assert encode.call_args.kwargs == {"workers": 0, "ray": "auto", "trust_code": False}
        assert "mutoscope train mine.toml --data.latents s3://bucket/store" in capsys.readouterr().out

    def test_sample(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        sample_run = replaced(monkeypatch, "mutoscope.sample.sample_run")
        sample_run.return_value = [Path("a-0.mp4"), Path("a-1.mp4")]
        call("sample run --label 3 --num 2 --out a.mp4 --seed 5 --steps 7 --guidance-scale 2.5 --trust-code")
        assert capsys.readouterr().out == "a-0.mp4\na-1.mp4\n"
        assert sample_run.call_args.args == (Path("run"),)
        given = {k: v for k, v in sample_run.call_args.kwargs.items() if k != "on_videos"}
        assert given == {"label": 3, "prompt": None, "num": 2, "out": Path("a.mp4"), "seed": 5, "steps": 7,
                         "guidance_scale": 2.5, "trust_code": True, "video": None, "image": None,
                         "known_frames": None, "context": None}  # fmt: skip

    def test_evaluate(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        evaluate_run = replaced(monkeypatch, "mutoscope.evaluate.evaluate_run")
        evaluate_run.return_value = {"psnr": 31.25}
        main(["evaluate", "run", "--num", "3"])
        assert capsys.readouterr().out.split() == ["psnr", "31.25"]
        assert evaluate_run.call_args.args == (Path("run"),)
        assert evaluate_run.call_args.kwargs["num"] == 3

    def test_data_make(self, capsys: pytest.CaptureFixture[str]) -> None:
        call("data make flying-mnist clips --preset tiny --train 2 --val 1 --workers 1")
        assert capsys.readouterr().out == "3 clips written to clips\n"
        assert len(list(Path("clips").rglob("*.mp4"))) == 3

    def test_demo(self, monkeypatch: pytest.MonkeyPatch) -> None:
        demo = replaced(monkeypatch, "mutoscope.demo.demo")
        main(["demo", "--out", "there"])
        demo.assert_called_once_with(Path("there"))

    @pytest.mark.parametrize("verb", VERBS)
    def test_help_of_every_verb(self, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stopped:
            main([*verb.split(), "--help"])
        assert stopped.value.code == 0
        assert f"usage: mutoscope {verb}" in capsys.readouterr().out

    def test_help_with_a_recipe_lists_its_fields(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stopped:
            main(["train", "my_model.py:tiny", "--help"])
        assert stopped.value.code == 0
        text = capsys.readouterr().out
        assert "--out" in text and "--model.width INT" in text and "Hidden channels. (default: 32)" in text

    def test_overview(self, capsys: pytest.CaptureFixture[str]) -> None:
        for argv in ([], ["--help"]):
            main(argv)
            text = capsys.readouterr().out
            assert all(f"  {verb}  " in text for verb in VERBS)
        main(["--version"])
        assert capsys.readouterr().out == f"{mutoscope.__version__}\n"


class TestMistakes:
    @pytest.mark.parametrize(
        ("argv", "said"),
        [
            ("train mine.toml --optim.weight_decy 0.1",
             "recipe.optim.weight_decy: no such field; did you mean weight_decay?"),
            ("train mine.toml --lr 0.1", "recipe.lr: no such field; did you mean recipe.optim.lr?"),
            ("train mine.toml --otu x", "--otu: no such option; did you mean --out?"),
            ("show mine.toml --json-schma", "--json-schma: no such option; did you mean --json-schema?"),
            ("train mine.toml extra", "unexpected 'extra': fields are set as in --optim.lr 1e-4"),
            ("train mime.toml", "no such file: mime.toml"),
            ("trian mine.toml", "mutoscope trian: no such verb; did you mean train?"),
            ("data", "mutoscope data: no such verb; there is data make flying-mnist, data check, data stats, "
             "data clip, data cuts, data import-npy, data export-npy"),
            ("show nothing.here",
             "nothing.here: no such recipe, file or run directory; `mutoscope recipes` lists them"),
        ],
    )  # fmt: skip
    def test_one_line_and_exit_2(self, argv: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert refused(capsys, *argv.split()) == said + "\n"

    def test_a_typo_in_a_file(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("typo.toml").write_text('base = "mine.toml"\n[optim]\nweight_decy = 0.1\n')
        said = "typo.toml:3: recipe.optim.weight_decy: no such field; did you mean weight_decay?\n"
        assert refused(capsys, "train", "typo.toml") == said

    @pytest.mark.parametrize("argv", ["train", "sample", "sample run --lable 3", "recipes --jsn", "sample run --num x"])
    def test_the_verbs_own_options(self, argv: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert argv.split()[0] in refused(capsys, *argv.split())

    def test_debug_shows_where(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(FileNotFoundError):
            main(["--debug", "show", "none.toml"])
        monkeypatch.setenv("MUTOSCOPE_DEBUG", "1")
        with pytest.raises(FileNotFoundError):
            main(["show", "none.toml"])

    @pytest.mark.parametrize(
        ("error", "code"), [(KeyboardInterrupt(), 130), (Stopped(15, "stopped at step 3"), 143), (ValueError("bad"), 2)]
    )
    def test_exit_codes(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int
    ) -> None:
        replaced(monkeypatch, "mutoscope.training.loop.train").side_effect = error
        assert refused(capsys, "train", "mine.toml", code=code).strip() == (str(error) or "interrupted")

    def test_what_is_no_mistake_of_the_users_keeps_its_traceback(self, monkeypatch: pytest.MonkeyPatch) -> None:
        replaced(monkeypatch, "mutoscope.training.loop.train").side_effect = RuntimeError("ours")
        with pytest.raises(RuntimeError, match="ours"):
            main(["train", "mine.toml"])


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("argv", [["--help"], ["recipes"], ["train", "--bad-flag"]])
def test_what_needs_no_torch_does_not_wait_for_it(argv: list[str]) -> None:
    done = run(
        "import sys\nfrom mutoscope.cli import main\n"
        f"try: main({argv})\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr


def test_a_closed_pipe_is_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "mutoscope", "recipes"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=60, env=buffered)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_public_names() -> None:
    done = run(
        "import sys, mutoscope\nassert 'torch' not in sys.modules\n"
        "for name in mutoscope.__all__: assert callable(getattr(mutoscope, name)), name\n"
        "from mutoscope import Recipe, train\nassert mutoscope.Recipe is Recipe\n"
        "try: mutoscope.trian\nexcept AttributeError as error: assert 'trian' in str(error)\nelse: sys.exit(1)"
    )
    assert done.returncode == 0, done.stderr
