"""LatentStore: what an autoencoder and a text encoder made of a data set's clips, kept on disk to train from.

    STORE/manifest.json   which autoencoder, transform and text encoder; dtype; mean and standard deviation per channel
    STORE/items.jsonl     one line for each clip: id, key, place, split, captions, label, bucket, set
    STORE/video/          shards of moments or tokens, by the clip's key
    STORE/text/           shards of embeddings, by caption, each caption once
    STORE/image/          shards of first frames, uint8, by the clip's key, for models that start from an image

A clip's key is a hash of its content, the transform and the autoencoder's weights, and its place is fixed when the clip
is first seen: place // `shard_items` is its shard. So work is divided without a queue, a resumed job makes the same
bytes, and clips that are added later are appended. The order of items is that of VideoDataset, so that training from a
store sees the clips that training from files sees. No path is ever read from a store: its files have fixed names.

STORE is a folder here, or a URL that fsspec knows (`data/places.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from mutoscope.data.captions import Variants, choose
from mutoscope.data.places import Place
from mutoscope.data.shards import Shards, StoreError, seal, unseal
from mutoscope.recipe import Data
from mutoscope.types import Cond, LatentSpec

FORMAT = 2
STATS_CLIPS = 256
"""Clips that the statistics are taken over: the first of the train split."""

Kind = Literal["latents", "tokens"]


@dataclass(frozen=True, kw_only=True)
class LatentStats:
    """Mean and standard deviation of the latents, per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @staticmethod
    def fit(moments: Iterable[Tensor], channels: int) -> LatentStats:
        """Over clips' moments (channels or 2·channels, t, h, w).

        Where there is a posterior, its variance counts too: Var(z) = Var(E z) + E(Var z). A channel whose posterior
        has collapsed then has unit variance, and normalising does not blow its noise up. Sums are double precision and
        clip by clip, so that the same clips give the same bits. Raises ValueError if there are no clips.
        """
        count = 0
        first, second, posterior = (np.zeros(channels) for _ in range(3))
        for clip in moments:
            values = clip.double().reshape(len(clip), -1).numpy()
            mean, logvar = values[:channels], values[channels:]
            first += mean.sum(axis=1)
            second += np.square(mean).sum(axis=1)
            if len(logvar):
                posterior += np.exp(logvar).sum(axis=1)
            count += values.shape[1]
        if count == 0:
            raise ValueError("no train clips to take the latents' mean and standard deviation from")
        mean = first / count
        std = np.sqrt(np.maximum(second / count - np.square(mean), 0) + posterior / count)
        mean, std = mean.astype(np.float32), np.maximum(std, 1e-6).astype(np.float32)
        return LatentStats(mean=tuple(mean.tolist()), std=tuple(std.tolist()))


@dataclass(frozen=True, kw_only=True)
class Text:
    """Which text encoder's embeddings a store holds."""

    identity: str
    length: int
    """Positions that embeddings are padded to."""
    dim: int
    has_null: bool = False
    """Whether the embedding of "" is there for captions that are dropped."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a store holds and what made it."""

    kind: Kind
    """latents: moments, (c, t, h, w) per clip, or (2c, t, h, w) with log-variances. tokens: (t, h, w) per clip."""
    autoencoder_hash: str
    spec: LatentSpec
    transform: dict[str, Any]
    dtype: str
    """Of moments and embeddings, as torch names it; tokens are uint16, or uint32 above 65536 codes."""
    text: Text | None = None
    stats: LatentStats | None = None
    """None for tokens, and until the first encode is complete; never changed after."""
    shard_items: int = 64
    images: bool = False
    """Whether first frames are stored."""


@dataclass(frozen=True, kw_only=True)
class StoredItem:
    """What a store knows about a clip, without its moments."""

    id: str
    key: str
    """Hash of the clip's content and all that was done to it."""
    place: int
    """Which shard it goes to: number place // shard_items."""
    split: str
    captions: Variants
    """What it may be called (see `data/captions.py`)."""
    label: int
    bucket: int = 0
    """Which of the transform's shapes it has."""
    set: int = 0
    """Which of the data's sets of clips it is from."""


@dataclass(frozen=True, kw_only=True)
class StoredClip:
    """One clip as it is read."""

    id: str
    moments: Tensor
    """(c or 2c, t, h, w) in the store's dtype; or tokens, int64 (t, h, w)."""
    captions: Variants
    label: int
    image: UInt8[Tensor, "1 h w 3"] | None = None
    """The first frame, where the store has it."""


def transform_of(data: Data) -> dict[str, Any]:
    """What is done to a clip's pixels before the autoencoder sees them."""
    names = ("fps", "frame_interval", "skip_frames_start", "skip_frames_end", "resize", "window", "window_interval")
    shapes = [[shape.frames, shape.height, shape.width] for shape in data.shapes(1)]
    return {"shapes": shapes, "short": data.short} | {name: getattr(data, name) for name in names}


class LatentStore:
    """A complete store, opened for reading."""

    def __init__(self, root: str | Path | Place) -> None:
        """Reads manifest, items and indexes (about a second for 100,000 clips), no data.

        Raises FileNotFoundError where there is no store, StoreError where it is damaged or its encoding unfinished.
        """
        self.root = Place.of(root)
        self.manifest = read_manifest(self.root)
        self.items = read_items(self.root)
        self._video = Shards(self.root / "video")
        self._text = Shards(self.root / "text")
        self._image = Shards(self.root / "image") if self.manifest.images else None
        missing = [item.id for item in self.items if item.key not in self._video]
        if self._image is not None:
            missing += [item.id for item in self.items if item.key not in self._image]
        if self.manifest.text:
            captions = dict.fromkeys(all_captions(self.items, self.manifest.text.has_null))
            missing += [repr(c) for c in captions if text_key(c) not in self._text]
        if missing:
            raise StoreError(f"{self.root}: {len(missing)} clips or captions are not encoded yet (first: "
                             f"{missing[0]}): run the same `mutoscope encode` again to go on from there")  # fmt: skip
        if self.manifest.kind != "tokens" and self.manifest.stats is None:
            raise StoreError(f"{self.root}: has no statistics yet: run the same `mutoscope encode` again")

    def __len__(self) -> int:
        return len(self.items)

    def ids(self, split: str) -> list[str]:
        """The ids of a split's clips, in order."""
        return [item.id for item in self.items if item.split == split]

    def read(self, index: int) -> StoredClip:
        """Clip `index` of all. Raises StoreError, naming shard and key, where its bytes have changed."""
        item = self.items[index]
        moments = self._video.read(item.key)
        if self.manifest.kind == "tokens":
            moments = moments.long()
        image = None if self._image is None else self._image.read(item.key)
        return StoredClip(id=item.id, moments=moments, captions=item.captions, label=item.label, image=image)

    def text(self, caption: str) -> Tensor:
        """The caption's embeddings (l, d), without padding."""
        return self._text.read(text_key(caption))

    def cond(self, captions: Sequence[str]) -> Cond:
        """The captions' embeddings as a float32 Cond, padded; an empty Cond where the store holds no text."""
        about = self.manifest.text
        if about is None:
            return Cond()
        text = torch.zeros(len(captions), about.length, about.dim)
        mask = torch.zeros(len(captions), about.length, dtype=torch.bool)
        for row, caption in enumerate(captions):
            embedded = self.text(caption)
            text[row, : len(embedded)] = embedded.float()
            mask[row, : len(embedded)] = True
        null = self.text("").float().expand_as(text) if about.has_null else None
        return Cond(text=text, text_mask=mask, null_text=null)

    def check(self, asked: Manifest) -> None:
        """Raise StoreError, with both sides' values, unless the store was made the way that `asked` says."""
        check_manifest(self.root, self.manifest, asked)


@dataclass(frozen=True, kw_only=True)
class StoredClips:
    """A batch of clips as a store holds them."""

    ids: list[str]
    samples: list[int]
    moments: Tensor
    """(b, c or 2c, t, h, w), or tokens, int64 (b, t, h, w)."""
    captions: list[str]
    cond: Cond
    """The captions' embeddings, where the store has them."""
    labels: Int[Tensor, "b"]
    images: UInt8[Tensor, "b 1 h w 3"] | None = None
    """First frames, where the store has them."""


class StoredSplit(Dataset[tuple[int, StoredClip]]):
    """The clips of one split: the store's counterpart of VideoDataset."""

    def __init__(self, store: LatentStore, split: str, seed: int) -> None:
        """seed: of the choice among a clip's captions. Raises ValueError where the split is empty."""
        self.store, self.seed = store, seed
        self.places = [place for place, item in enumerate(store.items) if item.split == split]
        if not self.places:
            raise ValueError(f"{store.root}: no clips in {split}")

    def __len__(self) -> int:
        return len(self.places)

    @property
    def groups(self) -> list[int]:
        """The bucket of each item."""
        return [self.store.items[place].bucket for place in self.places]

    @property
    def sets(self) -> list[int]:
        """The set of clips that each item is from."""
        return [self.store.items[place].set for place in self.places]

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, StoredClip]:
        """The clip at (index, sample), with its place in the stream of samples before it."""
        index, sample = key
        return sample, self.store.read(self.places[index])

    def collate(self, clips: Sequence[tuple[int, StoredClip]]) -> StoredClips:
        """Clips joined along the batch, with their captions' embeddings."""
        images = [clip.image for _, clip in clips if clip.image is not None]
        captions = [choose(clip.captions, self.seed, sample) for sample, clip in clips]
        return StoredClips(
            ids=[clip.id for _, clip in clips],
            samples=[sample for sample, _ in clips],
            moments=torch.stack([clip.moments for _, clip in clips]),
            captions=captions,
            cond=self.store.cond(captions),
            labels=torch.tensor([clip.label for _, clip in clips]),
            images=torch.stack(images) if images else None,
        )


def all_captions(items: Iterable[StoredItem], has_null: bool) -> Iterator[str]:
    """Every caption that a clip may get, with repeats; the empty one for a clip that has none, and with `has_null`."""
    if has_null:
        yield ""
    for item in items:
        yield from [caption for _, group in item.captions for caption in group] or [""]


def check_manifest(root: Place, stored: Manifest, asked: Manifest) -> None:
    """See `LatentStore.check`. Text is compared where both sides have some."""
    ours, theirs = _made_by(stored), _made_by(asked)
    if not (stored.text and asked.text):
        ours["text"] = theirs["text"] = None
    faults = [
        f"{name}: {ours.get(name)} in the store, {theirs.get(name)} asked for"
        for name in ours | theirs
        if ours.get(name) != theirs.get(name)
    ]
    if faults:
        raise StoreError(f"{root}: this store was made otherwise:\n  " + "\n  ".join(faults)
                         + "\nEncode into another folder, or ask for what the store holds.")  # fmt: skip


def _made_by(manifest: Manifest) -> dict[str, Any]:
    text = manifest.text.identity if manifest.text else None
    made_by = {"autoencoder's weights": manifest.autoencoder_hash, "autoencoder": manifest.spec}
    made_by |= {"dtype": manifest.dtype, "text": text, "first frames": manifest.images}
    return made_by | manifest.transform


def text_key(caption: str) -> str:
    """The key of a caption's embeddings."""
    return xxhash.xxh3_128_hexdigest(caption.encode(errors="surrogatepass"))


def read_manifest(root: str | Path | Place) -> Manifest:
    """Raises FileNotFoundError, or StoreError where it is damaged or of another format."""
    root = Place.of(root)
    path = f"{root}/manifest.json"
    try:
        content = root.read("manifest.json")
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{root}: no latent store here (no manifest.json); make one with `mutoscope encode`"
        ) from None
    try:
        fields = json.loads(content)
        digest = fields.pop("xxh3")
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise StoreError(f"{path}: damaged, not a manifest: {error}") from None
    if digest != _manifest_digest(fields):
        raise StoreError(f"{path}: damaged, or edited by hand: its checksum does not match")
    if fields.pop("format") != FORMAT:
        raise StoreError(f"{path}: made by another version of mutoscope (this one reads format {FORMAT})")
    spec = fields.pop("spec")
    return Manifest(
        spec=LatentSpec(**spec | {"strides": tuple(spec["strides"])}),
        text=Text(**text) if (text := fields.pop("text")) else None,
        stats=LatentStats(**{k: tuple(v) for k, v in stats.items()}) if (stats := fields.pop("stats")) else None,
        **fields,
    )


def write_manifest(root: str | Path | Place, manifest: Manifest) -> None:
    """Replaces the store's manifest, all or nothing."""
    fields = json.loads(json.dumps({"format": FORMAT} | asdict(manifest)))
    fields["xxh3"] = _manifest_digest(fields)
    Place.of(root).write("manifest.json", f"{json.dumps(fields, indent=2)}\n".encode())


def _manifest_digest(fields: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(fields, sort_keys=True).encode())


def read_items(root: str | Path | Place) -> list[StoredItem]:
    """The store's clips in order; none before the first plan. Raises StoreError where a line is damaged."""
    path = f"{root}/items.jsonl"
    try:
        *lines, rest = Place.of(root).read("items.jsonl").split(b"\n")
    except FileNotFoundError:
        return []
    if rest:
        raise StoreError(f"{path}: damaged: its last line has no end")
    return [
        StoredItem(**fields | {"captions": [(weight, tuple(group)) for weight, group in fields["captions"]]})
        for fields in unseal(lines, path)
    ]


def write_items(root: str | Path | Place, items: Sequence[StoredItem]) -> None:
    """Replaces the store's list of clips, all or nothing."""
    Place.of(root).write("items.jsonl", b"".join(seal(asdict(item)) for item in items))
