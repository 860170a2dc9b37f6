"""For tests of `mutoscope encode`: clips, what a store consists of, and workers that die."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mutoscope.data import shards
from mutoscope.data.video import write_video
from mutoscope.encode_ray import _Actor
from mutoscope.encode_shards import Job, Shard, ShardEncoder, Told


def make_videos(folder: Path, names: list[str], frames: int = 4) -> str:
    for seed, name in enumerate(names):
        noise = np.random.default_rng(seed).integers(0, 256, (frames, 16, 16, 3), np.uint8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(folder / f"{name}.mp4", noise, fps=4)
        (folder / f"{name}.txt").write_text(f"video {name}")
    return str(folder)


def files_of(store: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*")) if p.name != ".lock" and p.is_file()
    }


class Dying(ShardEncoder):
    """Notes every clip that it encodes in STORE.encoded. Killed behind the fifth clip of shard 1 as many times as the
    file STORE.deaths has bytes."""

    def encode(self, shard: Shard, device: str) -> Iterator[Told]:
        shards.COMMIT_SECONDS = 0.0
        store = self.job.out.path
        deaths = store.with_suffix(".deaths")
        fatal = shard[0] * self.job.manifest.shard_items + 4
        places = {stored.key: stored.place for stored, _ in shard[1]}
        for told in super().encode(shard, device):
            with open(store.with_suffix(".encoded"), "a") as file:
                file.write(f"{told.key}\n")
            if shard[0] == 1 and places[told.key] >= fatal and (left := deaths.stat().st_size):
                os.truncate(deaths, left - 1)
                os.kill(os.getpid(), signal.SIGKILL)
            yield told


class DyingActor(_Actor):
    """`Dying` in a Ray cluster."""

    def __init__(self, job: Job, device: str, folder: str) -> None:
        super().__init__(job, device, folder)
        self.encoder = Dying(job, threads=1)


class Doomed(ShardEncoder):
    """Dies before it has encoded anything."""

    def encode(self, shard: Shard, device: str) -> Iterator[Told]:
        os._exit(7)


def set_deaths(store: Path, count: int) -> None:
    store.with_suffix(".deaths").write_bytes(b"x" * count)


def encoded(store: Path) -> list[str]:
    """The keys of the clips that were encoded, in the order in which they were."""
    return store.with_suffix(".encoded").read_text().split()


def deaths(store: Path) -> int:
    """How many are left."""
    return store.with_suffix(".deaths").stat().st_size
