"""`mutoscope encode`: clips -> latents or tokens, captions -> embeddings, once, into a LatentStore.

Two phases, each with its model alone on the device: captions, then clips. The list of clips is written before the work
begins and fixes every clip's shard; processes take whole shards and share nothing else, so that a job may be killed at
any moment, is resumed by the same command, and leaves the bytes that it would have left undisturbed (on the same
hardware, with the same number of workers). Clips added to the data since are appended.
"""

from __future__ import annotations

import fcntl
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from multiprocessing import connection
from pathlib import Path

import torch
import xxhash

from mutoscope.build import build_encoder, encoder_of
from mutoscope.contradictions import stored_once
from mutoscope.data.captions import variants
from mutoscope.data.dataset import Item, VideoDataset, content_hash, list_and_look, read_item, to_pixels
from mutoscope.data.flying_mnist import Split
from mutoscope.data.npy import token_dtype
from mutoscope.data.shards import Shards, ShardWriter, StoreError
from mutoscope.data.store import (
    STATS_CLIPS,
    LatentStats,
    LatentStore,
    Manifest,
    StoredItem,
    all_captions,
    check_manifest,
    read_items,
    read_manifest,
    text_key,
    write_items,
    write_manifest,
)
from mutoscope.data.video import VideoError
from mutoscope.encoder import Encoder, describe
from mutoscope.errors import ConfigError, listed
from mutoscope.progress import Bars
from mutoscope.recipe import Autoencoder, Data, Recipe
from mutoscope.types import NO_LABEL
from mutoscope.workers import follow_parent, keep_memory, worker_context

Work = list[tuple[StoredItem, Item]]
"""Clips to encode."""


@dataclass(frozen=True)
class Failure:
    """A clip that could not be encoded."""

    key: str
    reason: str


Tell = Callable[[Failure | None], None]
"""Called for every clip: with None when it is stored."""


def encode(recipe: Recipe, out: Path, workers: int = 0, progress: bool = True, trust_code: bool = False) -> LatentStore:
    """Encode the recipe's clips and captions into a store at `out`, from where an earlier call stopped.

    workers: processes that decode and encode clips, each with an autoencoder of its own; 0 works in this process.

    Raises ValueError where the recipe has nothing to encode, StoreError where `out` holds another store or another
    process writes it, or, after all else is done, naming the clips that could not be encoded.
    """
    if recipe.autoencoder is None:
        raise ValueError("recipe.autoencoder: none, the recipe trains on pixels; there is nothing to encode")
    if problems := list(stored_once(recipe.data)):
        raise ConfigError(*problems)
    recipe = recipe.model.complete(recipe)
    assert recipe.autoencoder is not None
    if workers:
        worker_context()
    encoder = build_encoder(recipe, torch.device("cuda" if torch.cuda.is_available() else "cpu"), trust_code=trust_code)
    for shape in recipe.data.shapes(recipe.batch_size):
        encoder.spec.latent_shape(shape.frames, shape.height, shape.width)
    with _locked(out), Bars(progress) as bar:
        manifest = _claim(out, describe(recipe, encoder))
        found = _list(recipe.data, bar)
        items = _plan(out, recipe.data, found, manifest, bar)
        _encode_captions(out, manifest, items, encoder, bar)
        scale = encoder.stats
        encoder.release()
        del encoder  # its parts are loaded again when their turn comes, by whoever needs them
        job = Job(out, recipe.data, recipe.autoencoder, recipe.first_frame, trust_code)
        broken = _encode_clips(job, manifest, list(zip(items, (i for _, i in found), strict=True)), workers, bar)
        if broken:
            if len(broken) > recipe.data.max_broken:
                raise StoreError(f"{out}: {len(broken)} of {len(items)} clips could not be encoded, "
                                 f"data.max_broken={recipe.data.max_broken} may be:{listed(broken.values())}\n"
                                 "All others are stored. Mend or remove these, and run the same again.")  # fmt: skip
            bar.say(f"{len(broken)} clips could not be encoded and are left out:{listed(broken.values())}")
            items = [item for item in items if item.key not in broken]
            write_items(out, items)
        if manifest.kind == "latents" and manifest.stats is None:
            shards = Shards(out / "video")
            first = [item.key for item in items if item.split == "train"][:STATS_CLIPS]
            stats = scale or LatentStats.fit(map(shards.read, first), manifest.spec.channels)
            write_manifest(out, replace(manifest, stats=stats))
    return LatentStore(out)


# ---- what there is to do


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, however it ends
        except BlockingIOError:
            raise StoreError(f"{out}: another process is encoding into it") from None
        yield


def _claim(out: Path, asked: Manifest) -> Manifest:
    """The manifest of the store that is there, if it fits, or the new one's. Text may be added to a store without."""
    if (out / "manifest.json").exists():
        manifest = read_manifest(out)
        check_manifest(out, manifest, asked)
        if manifest.text is None and asked.text is not None:
            manifest = replace(manifest, text=asked.text)
            write_manifest(out, manifest)
        return manifest
    if strange := sorted(p.name for p in out.iterdir() if not p.name.startswith(".")):
        raise StoreError(f"{out}: holds other things ({', '.join(strange[:3])}) and no store; choose an empty folder")
    write_manifest(out, asked)
    return asked


def _list(data: Data, bar: Bars) -> list[tuple[Split, Item]]:
    """The items of all splits, in the order of training."""
    listing = list_and_look(data, partial(bar.start, "looking at clips"))
    datasets = {split: VideoDataset(data, split, 0, listing) for split in sorted({c.split for c in listing.clips})}
    for dataset in datasets.values():
        for line in dataset.report():
            bar.say(line)
    return [(split, item) for split, dataset in datasets.items() for item in dataset.items]


def _plan(out: Path, data: Data, found: list[tuple[Split, Item]], manifest: Manifest, bar: Bars) -> list[StoredItem]:
    """The store's list of clips brought up to date: clips that it knows keep their places, new ones come behind."""
    made_by = f"{manifest.autoencoder_hash} {manifest.dtype} {sorted(manifest.transform.items())}"
    tell = bar.start("reading clips", len(found))

    def key_of(item: Item) -> str:
        try:
            content = content_hash(item.clip, item.window)
        except VideoError as error:  # told when its turn comes
            content = f"unreadable {item.id} {error}"
        tell()
        return xxhash.xxh3_128_hexdigest(f"{content} {made_by}".encode())

    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(key_of, (item for _, item in found)))
    places = {item.key: item.place for item in read_items(out)}
    following = count(max(places.values(), default=-1) + 1)
    items = [
        StoredItem(
            id=item.id,
            key=key,
            place=places[key] if key in places else places.setdefault(key, next(following)),
            split=split,
            captions=variants(item.clip, data),
            label=NO_LABEL if item.clip.label is None else item.clip.label,
            bucket=item.bucket,
            set=item.clip.set,
        )
        for (split, item), key in zip(found, keys, strict=True)
    ]
    write_items(out, items)
    return items


# ---- captions


def _captions_of(manifest: Manifest, items: list[StoredItem]) -> Iterable[str]:
    """Each once, in the order of the clips."""
    return dict.fromkeys(all_captions(items, manifest.text is not None and manifest.text.has_null))


def _encode_captions(out: Path, manifest: Manifest, items: list[StoredItem], encoder: Encoder, bar: Bars) -> None:
    """Append the embeddings of the captions that the store lacks, in the order of the clips."""
    present = Shards(out / "text")
    captions = [c for c in _captions_of(manifest, items) if text_key(c) not in present]
    if manifest.text is None or not captions:
        return
    if encoder.embed is None:
        raise StoreError(f"{out}: holds text by {manifest.text.identity}; the recipe has no text encoder to add "
                         f"{len(captions)} captions with")  # fmt: skip
    filled = Counter(record.shard for record in present.records.values())
    tell = bar.start("encoding captions", len(captions))
    for shard in count():
        room = max(0, manifest.shard_items - filled[shard])
        batch, captions = captions[:room], captions[room:]
        if batch:
            with ShardWriter(out / "text", shard) as writer:
                for caption in batch:
                    cond = encoder.text([caption])
                    assert cond.text is not None and cond.text_mask is not None
                    writer.append(text_key(caption), cond.text[0, cond.text_mask[0]].to(encoder.dtype))
                    tell()
        if not captions:
            return


# ---- clips


@dataclass(frozen=True)
class Job:
    """What a worker process has to know."""

    out: Path
    data: Data
    autoencoder: Autoencoder
    first_frame: bool
    trust_code: bool


def _encode_clips(job: Job, manifest: Manifest, work: Work, workers: int, bar: Bars) -> dict[str, str]:
    """Encode what the store lacks; returns why each clip that could not be encoded could not, by key."""
    present = Shards(job.out / "video")
    shards: dict[int, Work] = {}
    missing = {stored.key: (stored, item) for stored, item in work if stored.key not in present}
    for stored, item in sorted(missing.values(), key=lambda pair: pair[0].place):
        shards.setdefault(stored.place // manifest.shard_items, []).append((stored, item))
    broken: dict[str, str] = {}
    advance = bar.start("encoding clips", len(missing))

    def tell(failure: Failure | None) -> None:
        if failure is not None:
            broken[failure.key] = failure.reason
        advance()

    if shards and workers:
        _in_processes(job, list(shards.items()), min(workers, len(shards)), tell)
    elif shards:
        encode_shards(job, shards.items(), "cuda" if torch.cuda.is_available() else "cpu", tell)
    return broken


def encode_shards(job: Job, shards: Iterable[tuple[int, Work]], device: str, tell: Tell) -> None:
    """Decode, encode and append the clips of some shards. Only this process may write them meanwhile."""
    encoder = encoder_of(job.autoencoder, torch.device(device), trust_code=job.trust_code)
    stored_as = token_dtype(encoder.spec.vocab) if encoder.spec.vocab else encoder.dtype
    for shard, work in shards:
        with ShardWriter(job.out / "video", shard) as writer, _images(job, shard) as images:
            for stored, item in work:
                try:
                    video = read_item(item, job.data, 0, 0, augment=False)
                except VideoError as error:
                    tell(Failure(stored.key, str(error)))
                    continue
                moments = encoder.moments(to_pixels(video[None].to(encoder.device)))[0]
                if moments.is_floating_point() and not moments.isfinite().all():
                    reason = (f"{item.id}: its latents are not finite in {job.autoencoder.dtype}; "
                              "set autoencoder.dtype to fp32, or look at the clip")  # fmt: skip
                    tell(Failure(stored.key, reason))
                    continue
                if images is not None and stored.key not in images.keys:  # a kill may have come between the two
                    images.append(stored.key, video[:1])
                writer.append(stored.key, moments.to(stored_as))
                tell(None)


def _images(job: Job, shard: int) -> AbstractContextManager[ShardWriter | None]:
    return ShardWriter(job.out / "image", shard) if job.first_frame else nullcontext()


def _in_processes(job: Job, shards: list[tuple[int, Work]], workers: int, tell: Tell) -> None:
    """`encode_shards` in spawned processes, every one on its share of the shards."""
    context = worker_context()
    threads = max(1, torch.get_num_threads() // workers)
    processes = {}
    try:
        for rank in range(workers):
            ours, theirs = context.Pipe(duplex=False)
            device = f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
            process = context.Process(target=_work, args=(job, shards[rank::workers], device, threads, theirs))
            process.start()
            theirs.close()
            processes[ours] = process
        open_pipes = list(processes)
        while open_pipes:
            for pipe in connection.wait(open_pipes):
                assert isinstance(pipe, connection.Connection)
                try:
                    message = pipe.recv()
                except EOFError:
                    open_pipes.remove(pipe)
                    processes[pipe].join()
                    if code := processes[pipe].exitcode:
                        raise RuntimeError(f"a worker process ended with exit code {code}"
                                           + (" (killed; out of memory?)" if code == -9 else "")) from None  # fmt: skip
                    continue
                if isinstance(message, Exception):
                    raise message
                tell(message)
    finally:
        for process in processes.values():
            process.terminate()
            process.join()


def _work(job: Job, shards: list[tuple[int, Work]], device: str, threads: int, pipe: connection.Connection) -> None:
    """The life of a worker process."""
    follow_parent()
    keep_memory()
    torch.set_num_threads(threads)
    try:
        encode_shards(job, shards, device, pipe.send)
    except Exception as error:
        error.add_note(traceback.format_exc())
        pipe.send(error)
