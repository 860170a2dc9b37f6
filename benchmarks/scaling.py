"""Weak scaling of a DiT step from one process to two, a core each: a process has as much to do either way.

    python -m benchmarks.scaling

A step is the loop's: forward and backward pass, averaging of the gradients, clipping, AdamW. Weak scaling is the time
of one process alone over that of two together. Where a core is slower while the other one is idle, as on some shared
hosts, that flatters; so the two cores also run two processes that know nothing of each other, and efficiency is their
time over that of the two that train together: what talking costs.

All four processes wait side by side and take turns, so that a machine whose speed drifts is as slow for all; each round
gives a ratio. A turn is two steps, of which the second counts: on virtual machines, memory that was idle for seconds is
slow at first touch.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from statistics import median

import torch

from benchmarks.harness import last_line, table
from mutoscope.loading import load_recipe
from mutoscope.models.dit import DiT
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.randomness import Draw
from mutoscope.recipe import Parallel
from mutoscope.training.engine import Engine
from mutoscope.training.state import build_state
from mutoscope.types import Batch, Cond, ModelIO

MODEL = DiT(depth=8, width=384, heads=6)
BATCH, CHANNELS, GRID = 4, 4, (4, 16, 16)
WARM_UP, ROUNDS = 1, 9


def main() -> None:
    if len(sys.argv) > 1:
        return worker(sys.argv[1], int(sys.argv[2]))
    rows = []
    pairs: dict[str, list[tuple[float, float]]] = {}
    for strategy in ("ddp", "fsdp2"):
        strangers, pair = start(strategy, 1) + start(strategy, 1, core=1), start(strategy, 2)
        sides = (strangers[:1], strangers, pair)
        rounds = [[turn(side) for side in sides] for _ in range(WARM_UP + ROUNDS)][WARM_UP:]
        for process in strangers + pair:
            process.communicate()
        pairs[strategy] = [(together, apart) for _, apart, together in rounds]
        ratios = (median(alone / together for alone, _, together in rounds),
                  median(apart / together for _, apart, together in rounds))  # fmt: skip
        seconds = [median(side) for side in zip(*rounds, strict=True)]
        rows.append([strategy, *(f"{second:.3f}" for second in seconds), *(f"{ratio:.2f}" for ratio in ratios)])
    table(["seconds of a step; strategy", "one", "two strangers", "two together", "weak scaling", "efficiency"], rows)
    last_line("scaling", "2 processes that do not talk, ddp", pairs["ddp"])


def start(strategy: str, world: int, core: int = 0) -> list[subprocess.Popen[str]]:
    """The processes of a run, on this core and those after it. They take a step for each line that they read."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.scaling", strategy, str(core + rank)],
            env=os.environ | where | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )
        for rank in range(world)
    ]  # fmt: skip


def turn(processes: list[subprocess.Popen[str]]) -> float:
    """Two steps of all of them: seconds of the second, of the slowest."""
    step(processes)
    return step(processes)


def step(processes: list[subprocess.Popen[str]]) -> float:
    """Seconds of a step of all of them, of the slowest."""
    for process in processes:
        assert process.stdin
        process.stdin.write("step\n")
    lines = []
    for process in processes:
        assert process.stdout
        lines.append(process.stdout.readline())
    if not all(lines):
        sys.exit("a process failed")
    return max(map(float, lines))


def worker(strategy: str, core: int) -> None:
    """One of the processes: prints the times of each step."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[core % len(cores)]})
    torch.set_num_threads(1)
    recipe = replace(load_recipe("minisora.dit_tiny"), parallel=Parallel(strategy=strategy))  # type: ignore[arg-type]
    engine = Engine.start(recipe.parallel)
    torch.manual_seed(0)
    state = build_state(MODEL.build(ModelIO(channels=CHANNELS, grid=GRID)), recipe, engine)
    objective = Diffusion()
    for number, _ in enumerate(sys.stdin):
        samples = [(number * engine.world + engine.rank) * BATCH + i for i in range(BATCH)]
        draw = Draw(0, "train", samples)
        batch = Batch(ids=[str(i) for i in samples], samples=samples, cond=Cond(), latents=draw.normal(CHANNELS, *GRID))
        engine.barrier()
        began = time.perf_counter()
        with state.micro_step(last=True):
            state.backward(objective.loss(state.trainee, batch, draw).total)
        state.take_step(recipe.optim, recipe.steps)
        print(time.perf_counter() - began, flush=True)
    engine.stop()


if __name__ == "__main__":
    main()
