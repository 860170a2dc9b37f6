"""How long it takes to list and look at 100,000 clips, how long a run on them takes to start, and in how much memory.

    python -m benchmarks.listing [--clips 100000] [--peer .]

A table (CSV) names as many files, with captions; they are links to a few hundred videos of 16x64x64, in the page cache.
The first look opens every file, and finds its frames' times and its size; what it finds is remembered (here in a folder
that is deleted afterwards). A later run lists the clips and looks only whether the files have changed: its start is
timed up to the first batch out of two worker processes. There is nothing to compare with; --peer is accepted for the
sake of one form for all benchmarks.

Each phase is a process of its own. Its start, mostly the import of torch, is told separately.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

from benchmarks.harness import table
from benchmarks.painted import scene, write
from mutoscope.data.buckets import Plan, make_pools
from mutoscope.data.dataset import VideoDataset, list_and_look
from mutoscope.data.index import inspect
from mutoscope.data.loader import make_loader
from mutoscope.data.sources.layouts import list_data
from mutoscope.recipe import Data
from mutoscope.workers import worker_context

VIDEOS, WORKERS, BATCH, PER_FOLDER = 250, 2, 4, 1000
FRAMES, SIDE = 16, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=100_000)
    parser.add_argument("--peer", type=Path, help="not needed: there is none")
    parser.add_argument("--phase", nargs=2, help=argparse.SUPPRESS)  # What this script starts as a process.
    arguments = parser.parse_args()
    if arguments.phase:
        phase, root = arguments.phase
        print(json.dumps({"first": first_look, "start": start}[phase](Path(root), time.perf_counter())))
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "clips"
        make_files(root, arguments.clips)
        first = run("first", root)
        assert first["clips"] == arguments.clips and not first["broken"], first
        again = run("start", root)
        rows = [
            ["first look: listing", *cells(first, "listing")],
            ["first look: opening every file", *cells(first, "looking")],
            ["start: both splits listed and checked", *cells(again, "datasets")],
            ["start: until the first batch", *cells(again, "batch")],
            ["start: import of torch and the rest", f"{again['import']:.2f}", ""],
        ]
    table([f"{arguments.clips:,} clips", "seconds", "peak MiB"], rows)
    print(
        f"listing: first look {first['listing'][0] + first['looking'][0]:.1f} s in {first['looking'][1]:.0f} MiB, "
        f"start-up {again['batch'][0]:.2f} s in {again['batch'][1]:.0f} MiB ({arguments.clips:,} clips; no peer)"
    )


def cells(found: dict[str, list[float]], what: str) -> list[str]:
    seconds, memory = found[what]
    return [f"{seconds:.2f}", f"{memory:.0f}"]


def run(phase: str, root: Path) -> dict[str, list[float]]:
    """What a phase measured."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(root.parent / "cache")}
    command = [sys.executable, "-m", "benchmarks.listing", "--phase", phase, str(root)]
    begun = time.time()
    job = subprocess.run(command, capture_output=True, env=environment, text=True)
    if job.returncode:
        raise SystemExit(f"it failed:\n{job.stderr}")
    found = json.loads(job.stdout.splitlines()[-1])
    found["import"] = found.pop("began") - begun
    return found


def first_look(root: Path, began: float) -> dict[str, object]:
    """Seconds and MiB of listing, and of looking at every file."""
    clips = list_data(data_of(root))
    listed = time.perf_counter()
    listing = [listed - began, peak()]
    infos = inspect(clips)
    looking = [time.perf_counter() - listed, peak()]
    broken = [info for info in infos if isinstance(info, str)]
    return {"clips": len(infos), "broken": broken[:10], "listing": listing, "looking": looking, "began": now(began)}


def start(root: Path, began: float) -> dict[str, object]:
    """Seconds and MiB until the data sets are there, and until the first batch is, as in a training run."""
    data = data_of(root)
    worker_context()
    listing = list_and_look(data)
    train, val = (VideoDataset(data, split, 0, listing) for split in ("train", "val"))
    assert train.items and val.items
    datasets = [time.perf_counter() - began, peak()]
    plan = Plan(pools=make_pools(train.groups, train.sets, data, BATCH), seed=0)
    for clips in islice(make_loader(train, plan.batches([0]), WORKERS), 1):
        assert clips.video.shape == (BATCH, FRAMES, SIDE, SIDE, 3)
        batch = [time.perf_counter() - began, peak()]
    return {"datasets": datasets, "batch": batch, "began": now(began)}


def now(moment: float) -> float:
    """A moment of this process's clock as one of the machine's."""
    return time.time() - (time.perf_counter() - moment)


def peak() -> float:
    """The most MiB that this process had so far; not ru_maxrss, in which there is what its parent had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def data_of(root: Path) -> Data:
    return Data(root=str(root), layout="table", frames=FRAMES, height=SIDE, width=SIDE)


def make_files(root: Path, clips: int) -> None:
    """A table of clips in folders of a thousand."""
    for folder in range(-(-clips // PER_FOLDER)):
        (root / f"{folder:03d}").mkdir(parents=True)
    names = [f"{n // PER_FOLDER:03d}/{n:06d}.mp4" for n in range(clips)]
    for n, name in enumerate(names):
        if n < VIDEOS:
            write(root / name, scene(FRAMES, SIDE, SIDE, n), 250)
        else:
            os.link(root / names[n % VIDEOS], root / name)
    with open(root / "clips.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["video", "caption"])
        rows.writerows([name, f"a patch moves before a wall, number {n}"] for n, name in enumerate(names))


if __name__ == "__main__":
    main()
