"""What the documents show is true: their commands run, and their code is code."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline

from mutoscope.checkpoints import open_checkpoint
from mutoscope.cli import main
from mutoscope.data.flying_mnist import make, preset_named
from mutoscope.data.video import probe, write_video
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


def test_the_commands_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of them but make and torchrun, on a folder of captioned clips, with few steps."""
    monkeypatch.chdir(tmp_path)
    make("made", preset_named("demo"), workers=1, train=40, val=1, progress=False)
    (tmp_path / "made" / "train").rename("clips")
    for label in Path("clips").glob("*.json"):
        label.unlink()
    lines = [line.split("#")[0].strip() for block in blocks("README.md", "") for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("mutoscope ")]
    assert len(commands) == 10
    few = ["--steps", "3", "--validate-every", "0", "--sample-every", "0"]
    for command in commands:
        words, _, out = command.partition(" > ")
        main(shlex.split(words)[1:] + (few if " train " in command else []))
        printed = capsys.readouterr().out
        if out:
            Path(out).write_text(printed)
    assert load_recipe("mine.toml") == load_recipe("minisora.dit")
    assert probe("out.mp4").frames == 8


def test_the_commands_of_the_guide_to_cogvideox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a folder of clips to every export, with the tiny twin in place of the 5b model."""
    monkeypatch.chdir(tmp_path)
    Path("dataset/videos").mkdir(parents=True)
    for i in range(4):
        frames = np.random.default_rng(i).integers(0, 256, (9, 32, 48, 3), np.uint8)
        write_video(Path(f"dataset/videos/{i:05d}.mp4"), frames, 8)
    Path("dataset/prompts.txt").write_text("".join(f"noise number {i}\n" for i in range(4)))
    Path("dataset/videos.txt").write_text("".join(f"videos/{i:05d}.mp4\n" for i in range(4)))
    shown = [block for block in blocks("docs/cogvideox.md", "") if block.startswith("{")]
    Path("val.jsonl").write_text(shown[0].replace('"frames": 49', '"frames": 9'))
    lines = [line.split("#")[0].strip() for block in blocks("docs/cogvideox.md", "") for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("mutoscope ")]
    assert len(commands) == 11
    few = ["--steps", "2", "--validate-every", "0", "--batch-size", "1"]
    for command in commands:
        words = shlex.split(command.replace("cogvideox.t2v_lora", "cogvideox.t2v_lora_tiny"))[1:]
        words = [word.replace("THUDM/CogVideoX-5b", "tiny://cogvideox-t2v") for word in words]
        if words[0] in ("encode", "train"):
            words += ["--data.cache", "false"] + (few if words[0] == "train" else [])
        if words[0] == "sample":
            words += ["--steps", "2"]
        main(words)
    assert len(list(Path("runs/shown/samples/00000002").glob("*.mp4"))) == 2
    assert Path("rabbit.mp4").exists() and Path("weaker.mp4").exists()
    assert Path("runs/lora/exports/comfyui/lora.safetensors").exists()
    pipe = CogVideoXPipeline.from_pretrained(open_checkpoint("tiny://cogvideox-t2v"))
    pipe.load_lora_weights("runs/lora/final")
    assert list(pipe.get_list_adapters()) == ["transformer"]


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "CONTRIBUTING.md",
        "docs/concepts.md",
        "docs/metrics.md",
        "docs/benchmarks.md",
        "docs/tokens.md",
        "docs/cluster.md",
    ],
)
def test_files_that_documents_name_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    links = [link for link in re.findall(r"\]\(([^)#:]+)\)", text) if not link.startswith("http")]
    paths = re.findall(r"`((?:src|docs|tests|benchmarks)/[\w/.-]+)`", text)
    missing = [p for p in links + paths if not ((ROOT / document).parent / p).exists() and not (ROOT / p).exists()]
    assert missing == []
