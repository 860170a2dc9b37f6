"""Two gloo processes on the CPU: they train what one process with the joined batch trains, and resume as exactly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mutoscope.data.video import write_video
from mutoscope.run import Run
from mutoscope.sample import sample_cogvideox
from mutoscope.weights import read_weights

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
FLAGS = ["--steps", "12", "--save-every", "3", "--sample-every", "0", "--validate-every", "6", "--log-every", "1"]


PER_SAMPLE = {
    "minisora.vqvae_tiny": ["--objective.low-utilization-cost", "0", "--objective.reinit-every-n-epochs", "0"],
    "minisora.gpt_tiny": ["--model.dropout", "0"],
}
"""Without what is over a batch, and so another for another batch: the use of codes, and which numbers are dropped."""


SLOW_MAMBA = pytest.param("minisora.mamba_tiny", marks=pytest.mark.slow)  # in chunks, which are recomputed


def train(recipe: str, out: Path, batch_size: int, processes: int = 2) -> None:
    launcher = TORCHRUN if processes == 2 else [sys.executable]
    command = [*launcher, "-m", "mutoscope", "train", recipe, *FLAGS]
    command += ["--batch-size", str(batch_size), "--out", str(out)]
    command += PER_SAMPLE.get(recipe, [])
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("recipe", ["minisora.dit_tiny", "minisora.vqvae_tiny", "minisora.gpt_tiny", SLOW_MAMBA])
def test_two_processes_equal_one_with_the_joined_batch(tmp_path: Path, recipe: str) -> None:
    train(recipe, tmp_path / "two", batch_size=4)
    train(recipe, tmp_path / "one", batch_size=8, processes=1)
    two, one = read_weights(Run(tmp_path / "two").weights), read_weights(Run(tmp_path / "one").weights)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")
    losses = [[line["val_loss"] for line in Run(tmp_path / n).metrics() if "val_loss" in line] for n in ("two", "one")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    train("minisora.dit_tiny", tmp_path / "whole", batch_size=4)
    part = tmp_path / "part"
    command = [*TORCHRUN, "-m", "mutoscope", "train", "minisora.dit_tiny", *FLAGS]
    command += ["--batch-size", "4", "--out", str(part)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and max([line["step"] for line in Run(part).metrics()] or [0]) < 5:
        time.sleep(0.005)
    os.killpg(process.pid, 9)
    process.wait()
    subprocess.run(["pkill", "-9", "-f", f"--out {part}"], check=False)  # torchrun's workers lead groups of their own
    assert not Run(part).weights.exists()
    train("minisora.dit_tiny", part, batch_size=4)
    whole, resumed = read_weights(Run(tmp_path / "whole").weights), read_weights(Run(part).weights)
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_validation_videos_on_two_processes_are_those_of_sample(tmp_path: Path) -> None:
    """Rows of a validation file are divided over the processes, an odd number of them, and none waits for another: bit
    for bit what `mutoscope sample` draws from the finished run."""
    make_clips(tmp_path / "clips")
    prompts = ["a red 3", "a blue 5", "a green 7"]
    rows = [json.dumps({"prompt": prompt, "seed": seed, "steps": 2}) for seed, prompt in enumerate(prompts)]
    (tmp_path / "val.jsonl").write_text("\n".join(rows))
    out = tmp_path / "run"
    command = [*TORCHRUN, "-m", "mutoscope", "train", "cogvideox.t2v_lora_tiny", "--data.root", str(tmp_path / "clips")]
    command += ["--validation-file", str(tmp_path / "val.jsonl"), "--steps", "2", "--sample-every", "2", "--batch-size"]
    command += ["1", "--validate-every", "0", "--lora.alpha", "8", "--out", str(out)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = [f"{row}-{prompt.replace(' ', '-')}" for row, prompt in enumerate(prompts)]
    for step in ("00000000", "00000002"):
        files = sorted(p.name for p in (Run(out).samples / step).iterdir())
        assert files == sorted(f"{name}{suffix}" for name in names for suffix in (".json", ".mp4"))
    for seed, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        wishes = {"prompt": prompt, "seed": seed, "steps": 2}
        [drawn] = sample_cogvideox(str(out), out=tmp_path / f"{name}.mp4", wishes=wishes)
        assert drawn.read_bytes() == (Run(out).samples / "00000002" / f"{name}.mp4").read_bytes()
        assert drawn.read_bytes() != (Run(out).samples / "00000000" / f"{name}.mp4").read_bytes()


def make_clips(folder: Path) -> None:
    """Five clips with captions."""
    folder.mkdir()
    for i in range(5):
        frames = np.random.default_rng(i).integers(0, 256, (9, 32, 48, 3), np.uint8)
        write_video(folder / f"{i}.mp4", frames, 8)
        (folder / f"{i}.txt").write_text(f"noise number {i}")
