"""Random reads of latents from a LatentStore, checksum and all, against one .pt file per clip.

    python -m benchmarks.latent_store [--clips 3000] [--peer .]

One file per clip, read by ``torch.load(path, weights_only=True)``, is how finetrainers, among others, keeps precomputed
latents. That side is a line of PyTorch and stands here, so that no checkout is needed and --peer is accepted for the
sake of one form for all benchmarks. Both sides hold the same latents (4x16x32x32 in half precision, 131 KB) in the page
cache, with id, caption and label, and must give the same before anything is timed. Time is CPU time of one thread.

It also measures writing, and opening a store of 100,000 clips.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import compare, last_line, table, timing_row
from mutoscope.data.shards import ShardWriter
from mutoscope.data.store import LatentStats, LatentStore, Manifest, StoredClip, StoredItem, write_items, write_manifest
from mutoscope.types import LatentSpec

PEER = "one .pt file per clip (torch.load, weights_only=True)"
SHAPE = (4, 16, 32, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=3000)
    parser.add_argument("--peer", type=Path, help="not needed: the other side is PyTorch's own")
    clips = parser.parse_args().clips
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        latents = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(0)).half()
        seconds = write_store(Path(folder) / "store", clips, lambda place: latents[place % 64] + place)
        store = LatentStore(Path(folder) / "store")
        files = write_files(Path(folder) / "files", clips, lambda place: latents[place % 64] + place)
        theirs = lambda place: torch.load(files[place], weights_only=True)
        for place in range(clips):
            check_equal(store.read(place), theirs(place))

        order = np.random.default_rng(0).permutation(clips).tolist()
        pairs = compare(lambda: read_all(store.read, order), lambda: read_all(theirs, order))
        table(["", "ours ms", "peer ms", "ratio"], [timing_row(f"{clips} random reads", pairs)])
        best = min(mine for mine, _ in pairs)
        print(f"reading: {clips / best:,.0f} clips/s, each checked; writing: {clips / seconds:,.0f} clips/s, synced")

        print(f"opening a store of 100,000 clips: {opening_seconds(Path(folder) / 'large', 100_000):.2f} s")
    last_line("latent_store", PEER, pairs)


def opening_seconds(root: Path, clips: int) -> float:
    """CPU seconds that it takes to open a store, its files being in the page cache."""
    with mock.patch("os.fsync"):  # 1,563 shards of tiny records: no need to wait for the disk here
        write_store(root, clips, lambda place: torch.tensor([place]))
    start = time.process_time()
    store = LatentStore(root)
    seconds = time.process_time() - start
    assert store.read(clips - 1).moments.item() == clips - 1
    return seconds


def check_equal(ours: StoredClip, theirs: dict[str, Any]) -> None:
    """Both sides hand out the same latents and the same facts about them."""
    assert torch.equal(ours.moments, theirs["latents"]), f"{ours.id}: other latents"
    assert (ours.id, ours.caption, ours.label) == (theirs["id"], theirs["caption"], theirs["label"]), ours.id


def read_all(read: Callable[[int], object], order: list[int]) -> None:
    for place in order:
        read(place)


def write_store(root: Path, clips: int, make: Callable[[int], Tensor]) -> float:
    """A store of `clips` clips; returns the seconds that it took to write their latents."""
    root.mkdir()
    facts = map(facts_of, range(clips))
    items = [StoredItem(**about, key=f"{i:032x}", place=i, split="train") for i, about in enumerate(facts)]
    manifest = Manifest(
        kind="latents",
        autoencoder_hash="",
        spec=LatentSpec(strides=(1, 8, 8), channels=4),
        transform={},
        dtype="float16",
        stats=LatentStats(mean=(0.0,) * 4, std=(1.0,) * 4),
    )
    start = time.monotonic()
    for first in range(0, clips, manifest.shard_items):
        with ShardWriter(root / "video", first // manifest.shard_items) as writer:
            for item in items[first : first + manifest.shard_items]:
                writer.append(item.key, make(item.place))
    seconds = time.monotonic() - start
    write_items(root, items)
    write_manifest(root, manifest)
    return seconds


def facts_of(place: int) -> dict[str, Any]:
    """What is stored beside a clip's latents."""
    return {"id": f"{place:06d}", "caption": f"a red {place % 10} flies up", "label": place % 10}


def write_files(root: Path, clips: int, make: Callable[[int], Tensor]) -> list[Path]:
    """One .pt file for each clip."""
    root.mkdir()
    files = [root / f"{place:06d}.pt" for place in range(clips)]
    for place, file in enumerate(files):
        torch.save({"latents": make(place), **facts_of(place)}, file)
    return files


if __name__ == "__main__":
    main()
