"""Latents and tokens in the ``.npy`` files that minisora's scripts write and read, to and from a LatentStore.

One array for a whole split: latents float32 (N, C, T, H, W), not normalised; tokens int64 (N, T, H, W). The files say
nothing of what made them, so that whoever imports one has to. Neither way holds more than one clip in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from mutoscope.data.places import Place
from mutoscope.data.shards import StoreError, shard_writer
from mutoscope.data.store import (
    STATS_CLIPS,
    LatentStats,
    LatentStore,
    Manifest,
    StoredItem,
    write_items,
    write_manifest,
)
from mutoscope.files import replacing
from mutoscope.types import NO_LABEL, LatentSpec


def import_npy(
    path: str | Path,
    root: str | Path | Place,
    *,
    spec: LatentSpec,
    autoencoder_hash: str,
    transform: dict[str, Any],
    split: str = "train",
    captions: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
) -> LatentStore:
    """Make a store at `root` of the latents (N, C, T, H, W) or tokens (N, T, H, W) in a ``.npy`` file.

    `spec`, `autoencoder_hash` and `transform` tell what made the file. Clips are named ``STEM/000000`` and on. Raises
    FileExistsError where there is a store already, ValueError where the array is not what `spec` says or holds a value
    out of range.
    """
    path, root = Path(path), Place.of(root)
    if "manifest.json" in root.names():
        raise FileExistsError(f"{root}: there is a store already; import into another folder")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path}: not an array that can be imported: {error}") from None
    _check_array(path, array, spec)
    for name, given in (("captions", captions), ("labels", labels)):
        if given is not None and len(given) != len(array):
            raise ValueError(f"{path}: {len(array)} clips but {len(given)} {name}")

    manifest = Manifest(
        kind="tokens" if spec.vocab else "latents",
        autoencoder_hash=autoencoder_hash,
        spec=spec,
        transform=transform,
        dtype="float32",
    )
    keys = _append_all(path, array, root, manifest)
    write_items(
        root,
        [
            StoredItem(
                id=f"{path.stem}/{place:06d}",
                key=key,
                place=place,
                split=split,
                captions=[(1.0, (captions[place],))] if captions else [],
                label=labels[place] if labels else NO_LABEL,
            )
            for place, key in enumerate(keys)
        ],
    )
    if not spec.vocab:
        first = (torch.from_numpy(_clip(path, array, place, None)) for place in range(min(len(array), STATS_CLIPS)))
        manifest = replace(manifest, stats=LatentStats.fit(first, spec.channels))
    write_manifest(root, manifest)
    return LatentStore(root)


def export_npy(store: LatentStore, path: str | Path, split: str = "train") -> None:
    """Write a split as ``.npy``: tokens int64 (N, T, H, W), or latents float32 (N, C, T, H, W), not normalised (where
    the store holds posteriors, their means). In the store's order. Raises ValueError where the split is empty or its
    clips differ in shape; whatever was at `path` is then untouched."""
    clips = _split(store, split)
    first = next(clips, None)
    if first is None:
        raise ValueError(f"{store.root}: no {split!r} clips (splits: {sorted({i.split for i in store.items})})")
    dtype = np.int64 if store.manifest.kind == "tokens" else np.float32
    shape = (len(store.ids(split)), *first.shape)
    with replacing(Path(path)) as aside:
        out = np.lib.format.open_memmap(aside, mode="w+", dtype=dtype, shape=shape)
        for row, clip in enumerate(_split(store, split)):
            if clip.shape != first.shape:
                raise ValueError(f"{store.root}: {store.ids(split)[row]} is {list(clip.shape)}, the clips before it "
                                 f"{list(first.shape)}: one array cannot hold both")  # fmt: skip
            out[row] = clip
        out.flush()


def token_dtype(vocab: int) -> torch.dtype:
    """The smallest dtype that a vocabulary's tokens are stored in."""
    return torch.uint16 if vocab <= 65536 else torch.uint32


def _append_all(path: Path, array: np.ndarray, root: Place, manifest: Manifest) -> list[str]:
    """Write the clips to the store's shards, where an import that was killed has not yet; returns their keys."""
    vocab = manifest.spec.vocab
    keys = []
    for start in range(0, len(array), manifest.shard_items):
        with shard_writer(root / "video", start // manifest.shard_items) as writer:
            present = list(writer.keys)
            for row in range(min(manifest.shard_items, len(array) - start)):
                clip = _clip(path, array, start + row, vocab)
                content = f"{start + row} {manifest.autoencoder_hash} ".encode() + clip.tobytes()
                key = xxhash.xxh3_128_hexdigest(content)
                if row >= len(present):
                    writer.append(key, torch.from_numpy(clip).to(token_dtype(vocab) if vocab else torch.float32))
                elif present[row] != key:
                    raise StoreError(f"{root}: holds the start of another import; remove it, or import elsewhere")
                keys.append(key)
    return keys


def _split(store: LatentStore, split: str) -> Iterator[np.ndarray]:
    for index, item in enumerate(store.items):
        if item.split == split:
            moments: Tensor = store.read(index).moments
            if store.manifest.kind != "tokens":
                moments = moments[: store.manifest.spec.channels].float()
            yield moments.numpy()


def _check_array(path: Path, array: np.ndarray, spec: LatentSpec) -> None:
    if spec.vocab:
        if array.ndim != 4 or array.dtype.kind not in "iu":
            raise ValueError(f"{path}: tokens must be integers (N, T, H, W), found {array.dtype} {list(array.shape)}")
    elif array.ndim != 5 or array.dtype.kind != "f" or array.shape[1] != spec.channels:
        raise ValueError(f"{path}: latents must be floats (N, {spec.channels}, T, H, W), found {array.dtype} "
                         f"{list(array.shape)}")  # fmt: skip
    if len(array) == 0:
        raise ValueError(f"{path}: no clips in it")


def _clip(path: Path, array: np.ndarray, place: int, vocab: int | None) -> np.ndarray:
    """One clip of the file as int64 tokens or float32 latents."""
    clip = np.array(array[place], np.int64 if vocab else np.float32)
    if vocab and (clip.min() < 0 or clip.max() >= vocab):
        raise ValueError(f"{path}: clip {place} holds tokens from {clip.min()} to {clip.max()}, "
                         f"the vocabulary is 0 to {vocab - 1}")  # fmt: skip
    if not vocab and not np.isfinite(clip).all():
        raise ValueError(f"{path}: clip {place} holds NaN or infinite latents")
    return clip
