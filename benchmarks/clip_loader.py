"""Our whole loader, from files to batches of pixels, against those of cogvideox-factory and musubi-tuner.

    python -m benchmarks.clip_loader [--peer CHECKOUT_OF_COGVIDEOX_FACTORY] [--musubi CHECKOUT_OF_MUSUBI_TUNER]

Batches of 4 clips, each the whole of a file, by 2 workers. Ours is `VideoDataset` and `make_loader`, with the
conversion to floats in [-1, 1] that the training loop does afterwards (where there is a GPU, there: a row is without
it). cogvideox-factory's is its `VideoDatasetWithResizing`, once in a DataLoader with 2 workers (the headline) and once
with the `BucketSampler` as in its trainer, which decodes in the main process. musubi-tuner's is the video dataset of
its `cache_latents`, which works in 2 threads, with that script's conversion. All give the same pixels, which is checked
first.

Every side is measured when its workers run and its queues are full, and the next once they are full again, so that what
workers do ahead counts neither for nor against it. CPU seconds are those of all processes of a side.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import logging
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.harness import last_line, table
from benchmarks.painted import scene, write
from mutoscope.data.dataset import VideoDataset, to_pixels
from mutoscope.data.loader import make_loader
from mutoscope.recipe import Data

PEER = "a-r-r-o-w/cogvideox-factory"
MUSUBI = "kohya-ss/musubi-tuner"
WORKERS, BATCH, SIDE = 2, 4, 256
AHEAD = 2 * WORKERS
"""Batches that a DataLoader's workers make ahead."""
VIDEOS, NAMES = 16, 400
"""Different videos, and names of them: too many for our memory of the latest files' timestamps to be of use."""
BATCHES, REPEATS = 8, 5
FACTORY = "factory, 2 workers"

Batches = Iterator[Tensor]
"""(b, c, t, h, w), float32, in [-1, 1]."""


@dataclass(frozen=True)
class Case:
    """What the files are like. Their frames become frames × 256 × 256."""

    name: str
    frames: int
    height: int
    width: int


Make = Callable[[Path, Case], Batches]

SAME, RESIZED = Case("32x256x256", 32, 256, 256), Case("32x480x720 to 256x256", 32, 480, 720)
FOR_MUSUBI = Case("33x256x256", 33, 256, 256)
"""It takes 4n + 1 frames."""


@dataclass
class Side:
    """Batches that are made by some processes."""

    name: str
    batches: Batches
    processes: list[int]

    def __post_init__(self) -> None:
        self.first = next(self.batches)
        self.settle()

    def cpu(self) -> float:
        """CPU seconds so far of this process and the side's workers."""
        ticks = 0
        for pid in self.processes:
            ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
        return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")

    def settle(self) -> None:
        """Wait until nothing is made ahead any more."""
        before = -1.0
        while self.cpu() - before > 0.02:
            before = self.cpu()
            time.sleep(0.3)

    def measure(self) -> tuple[float, float]:
        """CPU seconds and seconds for a clip."""
        cpu, start = self.cpu(), time.perf_counter()
        for batch in islice(self.batches, BATCHES):
            assert len(batch) == BATCH
        seconds = time.perf_counter() - start
        self.settle()
        return (self.cpu() - cpu) / (BATCHES * BATCH), seconds / ((BATCHES - AHEAD) * BATCH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, help=f"a checkout of {PEER}")
    parser.add_argument("--musubi", type=Path, help=f"a checkout of {MUSUBI}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    peers: dict[Case, list[tuple[str, Make]]] = {SAME: [], RESIZED: []}
    if arguments.peer is not None:
        make = functools.partial(factory_batches, factory_dataset(arguments.peer))
        peers[RESIZED] = [(FACTORY, make)]
        peers[SAME] = [(FACTORY, make), ("factory, its sampler", functools.partial(make, bucket_sampler=True))]
    if arguments.musubi is not None:
        peers[FOR_MUSUBI] = [("musubi, 2 threads", functools.partial(musubi_batches, arguments.musubi))]
    rows, headline = [], []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        for case, theirs in peers.items():
            root = make_files(Path(folder) / case.name.replace(" ", "_"), case)
            for name, pairs, cells in compare(root, case, theirs):
                rows.append([f"{case.name}: {name}", *cells])
                headline = headline or (pairs if name == FACTORY else [])
    table(["", "CPU ms a clip", "ratio", "clips a second", "ratio"], rows)
    last_line("clip_loader", PEER, headline)


def compare(
    root: Path, case: Case, peers: list[tuple[str, Make]]
) -> Iterator[tuple[str, list[tuple[float, float]], list[str]]]:
    """Each side's name, (ours, its) CPU seconds of each repeat, and its cells of the table; ours is the first."""
    as_bytes = functools.partial(our_batches, floats=False)
    makers = [("ours", our_batches), *peers, ("ours, left as bytes", as_bytes)]
    sides = [start(name, make, root, case) for name, make in makers]
    ours = sides[0]
    for side in sides[1:-1]:
        check_equal(ours.first, side.first, case, f"{case.name}: {side.name}")
    taken = [{side.name: side.measure() for side in sides} for _ in range(REPEATS)]
    for side in sides:
        pairs = [(t["ours"][0], t[side.name][0]) for t in taken]
        cells = []
        for which, scale in ((0, 1e3), (1, -1)):
            value = median(t[side.name][which] for t in taken)
            ratio = median(t[side.name][which] / t["ours"][which] for t in taken)
            cells += [f"{value * scale:.1f}" if scale > 0 else f"{1 / value:.0f}", f"{ratio:.2f}x"]
        yield side.name, pairs, cells


def start(name: str, make: Make, root: Path, case: Case) -> Side:
    """A side with its workers running."""
    before = {process.pid for process in multiprocessing.active_children()}
    batches = make(root, case)
    first = next(batches)
    workers = [p.pid for p in multiprocessing.active_children() if p.pid is not None and p.pid not in before]
    return Side(name, (b for part in ([first], batches) for b in part), workers)


def check_equal(ours: Tensor, theirs: Tensor, case: Case, what: str) -> None:
    """The same clips; where they were resized, ours in whole numbers of 0 to 255, which rounds by up to 1."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, (what, ours.shape, theirs.shape)
    allowed = 1e-6 if case.height == SIDE else 1 / 127.5
    difference = (ours - theirs).abs().max().item()
    assert difference <= allowed, f"{what}: pixels differ by {127.5 * difference:.2f} of 255"


def make_files(root: Path, case: Case) -> Path:
    """A folder of videos with captions, in the forms that the sides read."""
    root.mkdir()
    names = [f"{n:03d}.mp4" for n in range(NAMES)]
    for n, name in enumerate(names):
        if n < VIDEOS:
            write(root / name, scene(case.frames, case.height, case.width, n), 250)
        else:
            os.link(root / names[n % VIDEOS], root / name)
        (root / name).with_suffix(".txt").write_text(f"video {n}")
    (root / "videos.txt").write_text("\n".join(names))
    (root / "prompts.txt").write_text("\n".join(f"video {n}" for n in range(NAMES)))
    return root


# ---- the sides: each gives batches in the order of the files, more than are measured


def our_batches(root: Path, case: Case, floats: bool = True) -> Batches:
    data = Data(
        root=str(root), layout="line_paired", val_fraction=0,
        frames=case.frames, height=SIDE, width=SIDE, resize="squash",
    )  # fmt: skip
    places = cycle(range(NAMES))
    batches = ([(next(places), n * BATCH + k) for k in range(BATCH)] for n in count())
    for clips in make_loader(VideoDataset(data, "train", seed=0), batches, WORKERS):
        yield to_pixels(clips.video) if floats else clips.video


def factory_dataset(checkout: Path) -> Any:
    """cogvideox-factory's module of datasets."""
    folder = checkout / "training" / "cogvideox"
    if not (folder / "dataset.py").is_file():
        raise SystemExit(f"--peer {checkout}: not a checkout of {PEER} (no training/cogvideox/dataset.py in it)")
    # PyPI's torchvision is for CUDA; beside a torch for CPUs its import fails, for want of these two.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return imported(folder, "dataset", "--peer")


def factory_batches(module: Any, root: Path, case: Case, bucket_sampler: bool = False) -> Batches:
    dataset = module.VideoDatasetWithResizing(
        str(root), caption_column="prompts.txt", video_column="videos.txt",
        frame_buckets=[case.frames], height_buckets=[SIDE], width_buckets=[SIDE],
    )  # fmt: skip
    join = lambda items: torch.stack([item["video"] for item in items])
    if bucket_sampler:  # As in training/cogvideox/cogvideox_text_to_video_lora.py, whose collate_fn unpacks as well.
        sampler = module.BucketSampler(dataset, batch_size=BATCH, shuffle=False)
        unpack = lambda batches: join(batches[0])
        yield from as_ours(DataLoader(dataset, 1, sampler=sampler, collate_fn=unpack, num_workers=WORKERS))
    else:
        yield from as_ours(DataLoader(dataset, BATCH, collate_fn=join, num_workers=WORKERS))


def as_ours(batches: Any) -> Batches:
    """(b, t, c, h, w), as cogvideox-factory has them, as (b, c, t, h, w)."""
    return (batch.transpose(1, 2) for batch in batches)


def musubi_batches(checkout: Path, root: Path, case: Case) -> Batches:
    if not (checkout / "src" / "musubi_tuner").is_dir():
        raise SystemExit(f"--musubi {checkout}: not a checkout of {MUSUBI} (no src/musubi_tuner in it)")
    module = imported(checkout / "src", "musubi_tuner.dataset.image_video_dataset", "--musubi")
    logging.disable(logging.INFO)
    dataset = module.VideoDataset(
        (SIDE, SIDE), ".txt", BATCH, 1, False, False, target_frames=[case.frames], video_directory=str(root),
        architecture=module.ARCHITECTURE_HUNYUAN_VIDEO,
    )  # fmt: skip
    for _, items in dataset.retrieve_latent_cache_batches(WORKERS):
        # As in encode_and_save_batch of musubi_tuner/cache_latents.py.
        contents = torch.stack([torch.from_numpy(item.content) for item in items])
        yield contents.permute(0, 4, 1, 2, 3).contiguous().to(torch.float32) / 127.5 - 1.0


def imported(folder: Path, module: str, option: str) -> Any:
    """A module of a checkout."""
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise SystemExit(f"{option}: it needs {error.name}: pip install {error.name}") from None


if __name__ == "__main__":
    main()
