"""Weak scaling of a DiT step from one process to two, a core each: a process has as much to do either way.

    python -m benchmarks.scaling

A step is the loop's: forward and backward pass, averaging of the gradients, clipping, AdamW. Efficiency is the time of
one process alone over that of two together. Runs alternate; a run's time is the median of its steps. On a machine that
does anything else, wall times mislead: the columns of CPU seconds are there for that.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from statistics import median

import torch

from benchmarks.harness import table
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
STEPS, WARM_UP, REPEATS = 5, 2, 3


def main() -> None:
    if len(sys.argv) > 1:
        return worker(sys.argv[1])
    results: dict[str, list[tuple[float, float]]] = {"ddp": [], "fsdp2": []}
    rows = []
    for strategy, pairs in results.items():
        for _ in range(REPEATS):
            one, two = measure(strategy, 1), measure(strategy, 2)
            pairs.append((one["wall"] / two["wall"], one["cpu"] / two["cpu"]))
        rows.append([strategy, f"{one['wall']:.3f}", f"{two['wall']:.3f}", f"{one['cpu']:.3f}", f"{two['cpu']:.3f}",
                     f"{median(p[0] for p in pairs):.2f}", f"{median(p[1] for p in pairs):.2f}"])  # fmt: skip
    header = ["strategy", "wall of 1", "of 2", "CPU of 1", "of 2", "efficiency", "by CPU time"]
    table([f"seconds of a step; {name}" if name == "strategy" else name for name in header], rows)
    walls = sorted(wall for wall, _ in results["ddp"])
    print(f"scaling: {median(walls):.2f} efficiency of 2 processes vs 1 (median of {REPEATS}, min {walls[0]:.2f}, "
          f"max {walls[-1]:.2f})")  # fmt: skip


def measure(strategy: str, world: int) -> dict[str, float]:
    """Median seconds of a step, by wall clock and in CPU time of one process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.scaling", strategy],
            env=os.environ | where | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"{strategy}, {world} processes: failed")
    found: dict[str, float] = json.loads(said[0])
    return found


def worker(strategy: str) -> None:
    """One of the processes: prints its times."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["RANK"]) % len(cores)]})
    torch.set_num_threads(1)
    recipe = replace(load_recipe("minisora.dit_tiny"), parallel=Parallel(strategy=strategy))  # type: ignore[arg-type]
    engine = Engine.start(recipe.parallel)
    torch.manual_seed(0)
    state = build_state(MODEL.build(ModelIO(channels=CHANNELS, grid=GRID)), recipe, engine)
    objective, walls, cpus = Diffusion(), [], []
    for step in range(WARM_UP + STEPS):
        samples = [(step * engine.world + engine.rank) * BATCH + i for i in range(BATCH)]
        draw = Draw(0, "train", samples)
        batch = Batch(ids=[str(i) for i in samples], samples=samples, cond=Cond(), latents=draw.normal(CHANNELS, *GRID))
        engine.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        with state.micro_step(last=True):
            state.backward(objective.loss(state.trainee, batch, draw).total)
        state.take_step(recipe.optim, recipe.steps)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    engine.stop()
    print(json.dumps({"wall": median(walls[WARM_UP:]), "cpu": median(cpus[WARM_UP:])}))


if __name__ == "__main__":
    main()
