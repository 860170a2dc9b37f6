"""Validation files in training on two processes, on the CPU with gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from mutoscope.data.video import write_video
from mutoscope.run import Run
from mutoscope.sample_cogvideox import sample_cogvideox

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


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
