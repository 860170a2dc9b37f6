"""The shards of clips of a store, encoded by workers: what one does, and what becomes of a shard whose worker dies.

A worker is this process, a process on this machine, or an actor of a Ray cluster (`encode_ray.py`). Each takes whole
shards, shares nothing with the others, and is believed nothing: what is stored is read from the store. So a shard
whose worker has died is simply given out again, and its new worker goes on where the old one stopped.
"""

from __future__ import annotations

import socket
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass

import torch

from mutoscope.build import encoder_of
from mutoscope.data.dataset import Item, read_item, to_pixels
from mutoscope.data.npy import token_dtype
from mutoscope.data.places import Place
from mutoscope.data.shards import Shards, ShardWriter, StoreError, shard_writer
from mutoscope.data.store import Manifest, StoredItem, read_manifest
from mutoscope.data.video import VideoError
from mutoscope.encoder import Encoder
from mutoscope.errors import listed
from mutoscope.progress import Bars
from mutoscope.recipe import Autoencoder, Data
from mutoscope.supervise import Alive, Lost, slot, supervise
from mutoscope.workers import keep_memory

TRIES = 3
"""Workers that may die over a shard before it is given up."""

Work = list[tuple[StoredItem, Item]]
"""Clips to encode."""
Shard = tuple[int, Work]
"""A shard's number, and those of its clips that are to be encoded, in order."""


@dataclass(frozen=True)
class Told:
    """What has become of a clip."""

    key: str
    reason: str = ""
    """Why it could not be encoded; empty where it is stored."""


Tell = Callable[[Told], None]
Engine = Callable[[list[Shard], Tell], dict[int, str]]
"""Encodes shards and tells of every clip; returns the shards that lost their worker, and how."""


@dataclass(frozen=True)
class Job:
    """What a worker has to know."""

    out: Place
    manifest: Manifest
    data: Data
    autoencoder: Autoencoder
    first_frame: bool
    trust_code: bool


def encode_clips(job: Job, work: Work, engine: Engine, bar: Bars) -> dict[str, str]:
    """Encode what the store lacks; returns why each clip that could not be encoded could not, by key.

    Raises StoreError, after all else is done, naming the shards over which TRIES workers have died.
    """
    clips = {stored.key: (stored, item) for stored, item in work}
    broken: dict[str, str] = {}
    lost: dict[int, str] = {}
    shards = _shards(job, clips, broken)
    advance = bar.start("encoding clips", sum(len(clips) for _, clips in shards))
    told: set[str] = set()

    def tell(news: Told) -> None:
        if news.reason:
            broken[news.key] = news.reason
        if news.key not in told:  # A clip whose worker died before it was safe is told twice.
            told.add(news.key)
            advance()

    for attempt in range(TRIES):
        if not shards:
            return broken
        if attempt:
            bar.say(f"{len(shards)} shards lost their worker, and go to another:{listed(_named(shards, lost))}")
        lost = engine(shards, tell)
        shards = _shards(job, clips, broken)
    if shards:
        raise StoreError(f"{job.out}: {TRIES} workers have died over each of {len(shards)} shards:"
                         f"{listed(_named(shards, lost))}\nAll others are stored. If memory was short, take fewer "
                         "workers; if the clip crashes what reads it, remove it. Then run the same again.")  # fmt: skip
    return broken


def _shards(job: Job, clips: dict[str, tuple[StoredItem, Item]], broken: dict[str, str]) -> list[Shard]:
    """What is missing in the store, by shard. Of a clip, a kill may have left latents and no first frame."""
    present = set(Shards(job.out / "video"))
    if job.first_frame:
        present &= set(Shards(job.out / "image"))
    missing = [pair for key, pair in clips.items() if key not in present and key not in broken]
    shards: dict[int, Work] = {}
    for stored, item in sorted(missing, key=lambda pair: pair[0].place):
        shards.setdefault(stored.place // job.manifest.shard_items, []).append((stored, item))
    return list(shards.items())


def _named(shards: list[Shard], lost: dict[int, str]) -> Iterator[str]:
    for shard, work in shards:
        yield f"shard {shard:05d}, first clip that is not stored: {work[0][1].id}: {lost.get(shard, 'not begun')}"


# ---- one worker


class ShardEncoder:
    """Decodes, encodes and appends clips. The autoencoder is loaded for the first shard, and kept."""

    def __init__(self, job: Job, threads: int = 0) -> None:
        """threads: of torch, in a process of its own; 0 leaves them as they are."""
        self.job, self.threads = job, threads
        self._encoder: Encoder | None = None

    def encode(self, shard: Shard, device: str) -> Iterator[Told]:
        """Tells of each clip of a shard. Only this worker may write the shard meanwhile.

        Raises StoreError where this machine does not see the store.
        """
        job = self.job
        encoder = self._encoder or self._load(device)
        stored_as = token_dtype(encoder.spec.vocab) if encoder.spec.vocab else encoder.dtype
        number, work = shard
        with shard_writer(job.out / "video", number) as writer, _images(job, number) as images:
            for stored, item in work:
                try:
                    video = read_item(item, job.data, 0, 0, augment=False)
                except VideoError as error:
                    yield Told(stored.key, str(error))
                    continue
                moments = encoder.moments(to_pixels(video[None].to(encoder.device)))[0]
                if moments.is_floating_point() and not moments.isfinite().all():
                    reason = (f"{item.id}: its latents are not finite in {job.autoencoder.dtype}; "
                              "set autoencoder.dtype to fp32, or look at the clip")  # fmt: skip
                    yield Told(stored.key, reason)
                    continue
                if images is not None and stored.key not in images.keys:
                    images.append(stored.key, video[:1])
                if stored.key not in writer.keys:
                    writer.append(stored.key, moments.to(stored_as))
                yield Told(stored.key)

    def _load(self, device: str) -> Encoder:
        job = self.job
        try:
            seen = read_manifest(job.out) == job.manifest
        except FileNotFoundError:
            seen = False
        if not seen:
            raise StoreError(f"{job.out}: {socket.gethostname()} does not see the store there; all machines need one "
                             "folder that they share, at the same path, or a URL (s3://...)")  # fmt: skip
        if self.threads:
            torch.set_num_threads(self.threads)
            keep_memory()
        self._encoder = encoder_of(job.autoencoder, torch.device(device), trust_code=job.trust_code)
        return self._encoder

    def __call__(self, shard: Shard, alive: Alive) -> Exception | None:
        """The work of a process of `supervise`."""
        gpus = torch.cuda.device_count()
        try:
            for told in self.encode(shard, f"cuda:{slot() % gpus}" if gpus else "cpu"):
                alive(told)
        except Exception as error:
            error.add_note(traceback.format_exc())
            return error
        return None


def _images(job: Job, shard: int) -> AbstractContextManager[ShardWriter | None]:
    return shard_writer(job.out / "image", shard) if job.first_frame else nullcontext()


# ---- engines


def in_this_process(job: Job, shards: Iterable[Shard], tell: Tell) -> dict[int, str]:
    """An Engine, given the job, without workers."""
    encoder = ShardEncoder(job)
    for shard in shards:
        for told in encoder.encode(shard, "cuda" if torch.cuda.is_available() else "cpu"):
            tell(told)
    return {}


def in_processes(job: Job, workers: int, shards: list[Shard], tell: Tell) -> dict[int, str]:
    """An Engine, given the job and the number of processes. Each has its share of this process's threads."""
    work = ShardEncoder(job, threads=max(1, torch.get_num_threads() // workers))
    lost: dict[int, str] = {}
    in_vain = 0

    def heard(told: Told) -> None:
        nonlocal in_vain
        in_vain = 0
        tell(told)

    with closing(supervise(work, shards, min(workers, len(shards)), float("inf"), on_news=heard)) as results:
        for (number, _), result in results:
            if isinstance(result, Exception):
                raise result
            if isinstance(result, Lost):
                lost[number] = result.reason
                in_vain += 1
            if in_vain == TRIES * workers:  # It is not the clips: the autoencoder does not fit into memory, say.
                break
    return lost
