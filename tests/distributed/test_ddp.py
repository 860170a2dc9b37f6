"""Two gloo processes on the CPU: they train what one process with the joined batch trains, and resume as exactly."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mutoscope.run import Run
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
