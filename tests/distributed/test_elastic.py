"""A process that is killed, and one that stands still."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from mutoscope.run import Run
from mutoscope.weights import read_weights

FLAGS = ["--steps", "12", "--save-every", "3", "--sample-every", "0", "--validate-every", "0", "--log-every", "1"]


@contextmanager
def torchrun(out: Path, *flags: str, restarts: int = 0) -> Iterator[subprocess.Popen[str]]:
    """Two processes that train in `out`, under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), "-m", "mutoscope", "train", "minisora.dit_tiny", *FLAGS, *flags]
    command += ["--batch-size", "4", "--out", str(out)]
    with open(out.with_suffix(".txt"), "w") as said:
        process = subprocess.Popen(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=said, start_new_session=True, text=True
        )
    try:
        yield process
    finally:
        for worker in workers(process):
            os.kill(worker, signal.SIGKILL)
        process.kill()
        process.wait()


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The processes that torchrun has started, by rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    found = [int(pid) for pid in children.read_text().split()] if children.exists() else []
    ranks = {}
    for pid in found:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks |= {int(v.removeprefix(b"RANK=")): pid for v in variables if v.startswith(b"RANK=")}
    return [ranks[rank] for rank in sorted(ranks)]


def wait_for(step: int, out: Path, process: subprocess.Popen[str]) -> None:
    while max([line["step"] for line in Run(out).metrics()] or [0]) < step:
        assert process.poll() is None, out.with_suffix(".txt").read_text()
        time.sleep(0.005)


def test_one_killed_process_and_all_go_on_from_the_checkpoint(tmp_path: Path) -> None:
    """torchrun starts the processes anew, which end in the weights of a run that nobody disturbed."""
    for name, restarts in (("whole", 0), ("killed", 1)):
        with torchrun(tmp_path / name, "--parallel.strategy", "fsdp2", restarts=restarts) as process:
            if restarts:
                wait_for(7, tmp_path / name, process)
                os.kill(workers(process)[1], signal.SIGKILL)
            assert process.wait(timeout=300) == 0, (tmp_path / f"{name}.txt").read_text()
    assert "resuming from" in (tmp_path / "killed.txt").read_text()
    whole, killed = (read_weights(Run(tmp_path / name).weights) for name in ("whole", "killed"))
    assert [name for name in whole if not torch.equal(whole[name], killed[name])] == []


@pytest.mark.slow
def test_a_stall_tells_where_all_stand(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with torchrun(out, "--steps", "100000", "--save-every", "100000", "--parallel.stall", "2") as process:
        wait_for(3, out, process)
        os.kill(workers(process)[1], signal.SIGSTOP)
        said, give_up = "", time.monotonic() + 120
        while "where the processes stand" not in said:
            assert time.monotonic() < give_up, said
            time.sleep(0.2)
            said = out.with_suffix(".txt").read_text()
    told = said[said.index("where the processes stand") :].splitlines()
    assert "rank 0 of 2" in told[1] and "after step" in told[1]
    assert "rank 1 of 2" in told[2] and "after step" in told[2]
    traced = (out / "stalls" / "rank-0.txt").read_text()
    assert "in backward" in traced or "in all_reduce" in traced  # wherever it needs the other first
