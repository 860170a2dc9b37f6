"""Several runs in one set of gloo processes, since to start a process takes longer than to train.

`play` starts the processes; run as a program, this file is one of them. Each run is a command line of `mutoscope` for
the first so many processes, which meet at a port of their own. What each process draws at random for its training
samples goes to OUT/drawn-RANK.json.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch


def case(world: int, out: Path, recipe: str, *flags: str) -> dict[str, Any]:
    """A run of `mutoscope train` by so many processes."""
    quiet = () if "--sample-every" in flags else ("--sample-every", "0")
    argv = ["train", recipe, "--out", str(out), *quiet, *flags]
    return {"world": world, "out": str(out), "argv": argv}


def play(folder: Path, cases: list[dict[str, Any]], timeout: float = 280) -> None:
    """Run the cases one after the other. What the processes say goes to FOLDER/said-RANK.txt."""
    cases = [one | {"port": _free_port()} for one in cases]
    (folder / "cases.json").write_text(json.dumps(cases))
    logs = [folder / f"said-{rank}.txt" for rank in range(max(one["world"] for one in cases))]
    processes = []
    for rank, log in enumerate(logs):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, __file__, str(folder / "cases.json")]
        with open(log, "w") as file:
            processes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
    give_up = time.monotonic() + timeout
    try:  # one that failed leaves the others waiting
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            assert time.monotonic() < give_up, "\n".join(log.read_text()[-2000:] for log in logs)
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0] * len(codes), "\n".join(log.read_text()[-2000:] for log in logs)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


def main() -> None:
    """Be one of the processes."""
    warnings.filterwarnings("error")  # first: our own exceptions from it come with the imports
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")  # dynamo looks
    from measured import measured

    from mutoscope.cli import main as mutoscope
    from mutoscope.training import loop

    def run(one: dict[str, Any]) -> None:
        print("case", *one["argv"], flush=True)
        os.environ |= {"WORLD_SIZE": str(one["world"]), "MASTER_ADDR": "localhost", "MASTER_PORT": str(one["port"])}
        if one["world"] == 1 and not {"ddp", "fsdp2", "deepspeed"} & set(one["argv"]):
            del os.environ["WORLD_SIZE"]
        drawn: list[Any] = []
        loop.Draw = _recording(drawn)  # type: ignore[misc, assignment]
        with measured(Path(one["out"]), rank) if one.get("measured") else nullcontext():
            mutoscope(one["argv"])
        Path(one["out"], f"drawn-{rank}.json").write_text(json.dumps(drawn))

    rank, cases = int(os.environ["RANK"]), json.loads(Path(sys.argv[1]).read_text())
    apart = any("deepspeed" in one["argv"] for one in cases)
    if apart:
        warnings.filterwarnings("ignore")  # of its own there are many
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed  # noqa: F401  (once, and not in each case; so with those below)
        from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel  # noqa: F401
        from peft import LoraConfig  # noqa: F401
        from transformers import T5EncoderModel  # noqa: F401
    for one in cases:
        if rank < one["world"]:
            _in_a_child(run, one) if apart else run(one)


def _in_a_child(run: Callable[[dict[str, Any]], None], one: dict[str, Any]) -> None:
    """Run a case in a process of its own, since DeepSpeed keeps process groups in global variables."""
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        code = 1
        try:
            run(one)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if code := os.waitstatus_to_exitcode(status):
        sys.exit(code)


def _recording(drawn: list[Any]) -> type:
    from mutoscope.randomness import Draw

    class Recording(Draw):
        """Writes down (sample, number) of what is drawn for training: one number of noise, or a time."""

        def __init__(self, seed: int, name: str, samples: Any, device: torch.device) -> None:
            super().__init__(seed, name, samples, device)
            self.recorded = list(samples) if name == "train" else []

        def normal(self, *shape: int) -> torch.Tensor:
            return self._noted(super().normal(*shape))

        def uniform(self, *shape: int) -> torch.Tensor:
            return self._noted(super().uniform(*shape))

        def _noted(self, values: torch.Tensor) -> torch.Tensor:
            firsts = values.flatten(1)[:, 0] if values.ndim > 1 else values
            drawn.extend([sample, value] for sample, value in zip(self.recorded, firsts.tolist(), strict=False))
            return values

    return Recording


if __name__ == "__main__":
    main()
