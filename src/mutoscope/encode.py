"""`mutoscope encode`: clips -> latents or tokens, captions -> embeddings, once, into a LatentStore.

Two phases, each with its model alone on the device: captions, then clips. The list of clips is written before the work
begins and fixes every clip's shard; workers take whole shards (`encode_shards.py`) and share nothing else, so that a
job may be killed at any moment, is resumed by the same command, and leaves the bytes that it would have left
undisturbed. Clips added to the data since are appended.

A clip's latents depend on the clip, the autoencoder, the kind of processor and torch's build, and on how many threads a
worker has; not on which worker, how many of them, where they are or what they did before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import torch
import xxhash

from mutoscope import encode_ray
from mutoscope.build import build_encoder
from mutoscope.contradictions import stored_once
from mutoscope.data.captions import variants
from mutoscope.data.dataset import Item, VideoDataset, content_hash, list_and_look
from mutoscope.data.flying_mnist import Split
from mutoscope.data.places import Place
from mutoscope.data.shards import Shards, StoreError, shard_writer
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
from mutoscope.encode_shards import Engine, Job, encode_clips, in_processes, in_this_process
from mutoscope.encoder import Encoder, describe
from mutoscope.errors import ConfigError, listed
from mutoscope.progress import Bars
from mutoscope.recipe import Data, Recipe
from mutoscope.types import NO_LABEL
from mutoscope.workers import worker_context


def encode(
    recipe: Recipe,
    out: str | Path,
    workers: int = 0,
    ray: str | None = None,
    progress: bool = True,
    trust_code: bool = False,
) -> LatentStore:
    """Encode the recipe's clips and captions into a store at `out`, from where an earlier call stopped.

    out: a folder, or a URL of an object store that fsspec knows.
    workers: processes that decode and encode clips, each with an autoencoder of its own; 0 works in this process.
    ray: address of a Ray cluster to work on, or "local" for one on this machine; `workers` are then its actors, and 0
    takes as many as it has GPUs or, without any, CPUs.

    Raises ValueError where the recipe has nothing to encode, another process writes to `out`, or there is no such
    cluster, StoreError where `out` holds another store or, after all else is done, naming the clips that could not be
    encoded.
    """
    if recipe.autoencoder is None:
        raise ValueError("recipe.autoencoder: none, the recipe trains on pixels; there is nothing to encode")
    if problems := list(stored_once(recipe.data)):
        raise ConfigError(*problems)
    recipe = recipe.model.complete(recipe)
    assert recipe.autoencoder is not None
    place = Place.of(out)
    if place.root.startswith("memory://") and (workers or ray):
        raise ValueError(f"{place}: is in this process's memory, where workers can't write")
    if workers and not ray:
        worker_context()
    with encode_ray.cluster(ray, workers) if ray else nullcontext():
        encoder = build_encoder(
            recipe, torch.device("cuda" if torch.cuda.is_available() else "cpu"), trust_code=trust_code
        )
        for shape in recipe.data.shapes(recipe.batch_size):
            encoder.spec.latent_shape(shape.frames, shape.height, shape.width)
        with Bars(progress) as bar, place.held(bar.say):
            manifest = _claim(place, describe(recipe, encoder))
            found = _list(recipe.data, bar)
            items = _plan(place, recipe.data, found, manifest, bar)
            _encode_captions(place, manifest, items, encoder, bar)
            scale = encoder.stats
            encoder.release()
            del encoder  # its parts are loaded again when their turn comes, by whoever needs them
            job = Job(place, manifest, recipe.data, recipe.autoencoder, recipe.first_frame, trust_code)
            work = list(zip(items, (item for _, item in found), strict=True))
            broken = encode_clips(job, work, _engine(job, workers, ray), bar)
            _finish(place, recipe, manifest, items, broken, scale, bar)
    return LatentStore(place)


def _engine(job: Job, workers: int, ray: str | None) -> Engine:
    if ray:
        return partial(encode_ray.on_ray, job, workers)
    return partial(in_processes, job, workers) if workers else partial(in_this_process, job)


def _finish(
    out: Place,
    recipe: Recipe,
    manifest: Manifest,
    items: list[StoredItem],
    broken: dict[str, str],
    scale: LatentStats | None,
    bar: Bars,
) -> None:
    """Leave out what is broken, and complete the manifest. scale: the checkpoint's own, where it has one."""
    if len(broken) > recipe.data.max_broken:
        raise StoreError(f"{out}: {len(broken)} of {len(items)} clips could not be encoded, "
                         f"data.max_broken={recipe.data.max_broken} may be:{listed(broken.values())}\n"
                         "All others are stored. Mend or remove these, and run the same again.")  # fmt: skip
    if broken:
        bar.say(f"{len(broken)} clips could not be encoded and are left out:{listed(broken.values())}")
        items = [item for item in items if item.key not in broken]
        write_items(out, items)
    if manifest.kind == "latents" and manifest.stats is None:
        shards = Shards(out / "video")
        first = [item.key for item in items if item.split == "train"][:STATS_CLIPS]
        stats = scale or LatentStats.fit(map(shards.read, first), manifest.spec.channels)
        write_manifest(out, replace(manifest, stats=stats))


# ---- what there is to do


def _claim(out: Place, asked: Manifest) -> Manifest:
    """The manifest of the store that is there, if it fits, or the new one's. Text may be added to a store without."""
    names = out.names()
    if "manifest.json" in names:
        manifest = read_manifest(out)
        check_manifest(out, manifest, asked)
        if manifest.text is None and asked.text is not None:
            write_manifest(out, replace(manifest, text=asked.text))
    elif strange := [name for name in names if not name.startswith(".")]:
        raise StoreError(f"{out}: holds other things ({', '.join(strange[:3])}) and no store; choose an empty folder")
    else:
        write_manifest(out, asked)
    return read_manifest(out)


def _list(data: Data, bar: Bars) -> list[tuple[Split, Item]]:
    """The items of all splits, in the order of training."""
    listing = list_and_look(data, partial(bar.start, "looking at clips"))
    datasets = {split: VideoDataset(data, split, 0, listing) for split in sorted({c.split for c in listing.clips})}
    for dataset in datasets.values():
        for line in dataset.report():
            bar.say(line)
    return [(split, item) for split, dataset in datasets.items() for item in dataset.items]


def _plan(out: Place, data: Data, found: list[tuple[Split, Item]], manifest: Manifest, bar: Bars) -> list[StoredItem]:
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


def _encode_captions(out: Place, manifest: Manifest, items: list[StoredItem], encoder: Encoder, bar: Bars) -> None:
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
            with shard_writer(out / "text", shard) as writer:
                for caption in batch:
                    cond = encoder.text([caption])
                    assert cond.text is not None and cond.text_mask is not None
                    writer.append(text_key(caption), cond.text[0, cond.text_mask[0]].to(encoder.dtype))
                    tell()
        if not captions:
            return
