"""What the documents show is true: their commands run, and their code is code."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mutoscope.cli import main
from mutoscope.data.flying_mnist import make, preset_named
from mutoscope.data.video import probe
from mutoscope.loading import load_recipe
from mutoscope.randomness import Draw
from mutoscope.recipe import TokenSampler
from mutoscope.samplers.tokens import sample_tokens
from mutoscope.types import Cond, ModelIO

ROOT = Path(__file__).parent.parent


def blocks(document: str, language: str) -> list[str]:
    """The fenced code blocks of a document in a language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)
    return [code for name, code in fenced if name == language]


def test_the_model_of_add_a_model_trains_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [code] = blocks("docs/add-a-model.md", "python")
    Path("my_model.py").write_text(code)
    lines = [line for block in blocks("docs/add-a-model.md", "") for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("mutoscope")]
    assert len(commands) == 2
    for command in commands:
        subprocess.run([sys.executable, "-m", *command.split()], check=True)
    assert Path("out.mp4").exists()
    with pytest.raises(SystemExit) as refused:
        main(["sample", "runs/tiny"])
    assert refused.value.code == 2


def test_the_model_of_tokens_is_a_token_model() -> None:
    """It is drawn from with a cache as without, and names its codes alone."""
    [code] = blocks("docs/tokens.md", "python")
    made: dict[str, Any] = {"__name__": "bigram"}
    exec(code, made)
    torch.manual_seed(0)
    model = made["Bigram"]().build(ModelIO(channels=3, grid=(2, 2, 3), vocab=7))
    tokens = sample_tokens(model, TokenSampler(temperature=0), Cond(), (2, 2, 3), Draw(0, "sample", [0, 1]))
    assert torch.equal(model(tokens, Cond()).argmax(-1), tokens.flatten(1))


def test_the_commands_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them but make and torchrun, on a folder of captioned clips, with few steps."""
    monkeypatch.chdir(tmp_path)
    make("made", preset_named("demo"), workers=1, train=40, val=1, progress=False)
    (tmp_path / "made" / "train").rename("clips")
    for label in Path("clips").glob("*.json"):
        label.unlink()
    lines = [line.split("#")[0].strip() for block in blocks("README.md", "") for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("mutoscope ")]
    assert len(commands) == 8
    few = ["--steps", "3", "--validate-every", "0", "--sample-every", "0"]
    for command in commands:
        words, _, out = command.partition(" > ")
        arguments = shlex.split(words) + (few if " train " in command else [])
        done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)
        if out:
            Path(out).write_text(done.stdout)
    assert load_recipe("mine.toml") == load_recipe("minisora.dit")
    assert probe("out.mp4").frames == 8


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", "docs/concepts.md", "docs/metrics.md", "docs/tokens.md"]
)
def test_files_that_documents_name_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    links = [link for link in re.findall(r"\]\(([^)#:]+)\)", text) if not link.startswith("http")]
    paths = re.findall(r"`((?:src|docs|tests|benchmarks)/[\w/.-]+)`", text)
    missing = [p for p in links + paths if not ((ROOT / document).parent / p).exists() and not (ROOT / p).exists()]
    assert missing == []
