"""How long a checkpoint holds up training: ours, hashed and synced, against ``torch.save`` of the same state.

    python -m benchmarks.checkpoint_stall [--mib 768]

The state is what AdamW keeps: a weight and two moments, in tensors as a transformer has them. Training is held up for
as long as `Saver.save` takes to return; a second column says how long it takes until the checkpoint is on the disk, and
a line how much slower work on the CPU is in the meantime. Both sides alternate, and the first save of each, to new
memory, does not count. Before each, all of the state is written to, as by the step before a checkpoint: on virtual
machines, memory that was idle for seconds is slow at first touch. ``torch.save`` neither hashes nor syncs; with fsync
it takes longer.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.harness import last_line, table
from mutoscope.training.engine import Engine
from mutoscope.training.saver import Saver

REPEATS = 5
SIDE = 1024
"""Of the matrices: 4 MiB each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=768, help="size of the state")
    mib = parser.parse_args().mib
    torch.set_num_threads(1)
    names = [f"blocks.{i}.weight" for i in range(mib // 12)]
    weights = {name: torch.randn(SIDE, SIDE) for name in names}
    moments = {n: {k: torch.randn(SIDE, SIDE) for k in ("exp_avg", "exp_avg_sq")} for n in names}
    tree = {"model": weights, "optimizer": moments}
    a = torch.randn(512, 512)

    def work() -> float:
        """Seconds of some products."""
        start = time.perf_counter()
        for _ in range(8):
            a @ a
        return time.perf_counter() - start

    def take_step() -> None:
        """Touch all of the state."""
        for tensor in (*weights.values(), *(x for both in moments.values() for x in both.values())):
            tensor.mul_(0.999)

    pairs, durable, synced, slower = [], [], [], []
    engine = Engine(rank=0, world=1, device=torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder, Saver(Path(folder), engine, 2, 0) as saver:
        for step in range(REPEATS + 1):
            alone = min(work() for _ in range(3))
            take_step()
            start = time.perf_counter()
            saver.save(step, tree, {})
            stall = time.perf_counter() - start
            beside = work()
            saver.wait()
            whole = time.perf_counter() - start
            take_step()
            start = time.perf_counter()
            with open(Path(folder) / "plain.pt", "wb") as file:
                torch.save(tree, file)
                plain = time.perf_counter() - start
                file.flush()
                os.fsync(file.fileno())
            if step:
                pairs.append((stall, plain))
                durable.append(whole)
                synced.append(time.perf_counter() - start)
                slower.append(beside / alone)
    middle = lambda values: sorted(values)[len(values) // 2]
    table(
        [f"{mib} MiB", "held up s", "on the disk after s"],
        [
            ["Saver (hashed, synced)", f"{middle([p[0] for p in pairs]):.3f}", f"{middle(durable):.3f}"],
            ["torch.save", f"{middle([p[1] for p in pairs]):.3f}", ""],
            ["torch.save and fsync", f"{middle(synced):.3f}", f"{middle(synced):.3f}"],
        ],
    )
    print(f"work beside the writing thread takes {middle(slower):.2f} times as long")
    last_line("checkpoint_stall", "torch.save", pairs)


if __name__ == "__main__":
    main()
