"""Clips as tensors: which frames of which file, at what size, and batches of them from worker processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import numpy as np
import torch
import xxhash
from jaxtyping import Float, Int, Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from mutoscope.data import flying_mnist as mnist
from mutoscope.data.buckets import available_frames, choose_bucket, name_of
from mutoscope.data.captions import check_captions, choose, variants
from mutoscope.data.flying_mnist import FLYING_MNIST, Split
from mutoscope.data.index import ClipInfo, inspect
from mutoscope.data.media import Media
from mutoscope.data.sources.layouts import Clip, list_data, rare_collections
from mutoscope.data.video import FrameIndex, VideoError, frame_index, frames_at, read_frames, resize
from mutoscope.errors import listed
from mutoscope.randomness import seed_of
from mutoscope.recipe import Data
from mutoscope.types import NO_LABEL

MAX_SUBSTITUTES = 20
"""Broken clips in a row, for one sample, after which reading gives up."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """What one index of a data set stands for."""

    clip: Clip
    bucket: int = 0
    """Which of `Data.shapes` it is trained at."""
    window: int | None = None
    """Which window of the clip, where each is an item of its own."""

    @property
    def id(self) -> str:
        """The clip's id, with "#3" behind it for its window 3."""
        return self.clip.id if self.window is None else f"{self.clip.id}#{self.window}"


@dataclass(frozen=True, kw_only=True)
class Broken:
    """A clip that could not be read."""

    id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One training clip."""

    id: str
    sample: int
    """Its place in the endless stream of training samples."""
    video: UInt8[Tensor, "t h w 3"]
    caption: str
    """Empty where there is none."""
    label: int
    """Class index, or NO_LABEL."""
    broken: tuple[Broken, ...] = ()
    """Clips that this one stands in for."""


@dataclass(frozen=True, kw_only=True)
class Clips:
    """A batch of training clips, before pixels become floats and captions embeddings."""

    ids: list[str]
    samples: list[int]
    video: UInt8[Tensor, "b t h w 3"]
    captions: list[str]
    labels: Int[Tensor, "b"]
    broken: tuple[Broken, ...] = ()
    """Clips that could not be read, in whose place others of the same shape stand."""

    def pin_memory(self) -> Clips:
        """The same in page-locked memory, from which copies to a GPU go beside the computation."""
        return replace(self, video=self.video.pin_memory())


@dataclass(frozen=True)
class Listing:
    """All clips of a data set, of every split, and what a look at each has found."""

    clips: list[Clip]
    infos: list[ClipInfo | str]
    """A text says why the clip is broken."""


def list_and_look(data: Data, begin: Callable[[int], Callable[[], None]] = lambda total: lambda: None) -> Listing:
    """List the clips and look at the head and the timestamps of every file; what is found is remembered on disk
    (`data/index.py`).

    begin: called with the number of clips before they are looked at; what it returns is called for each.
    """
    with rare_collections():
        clips = list_data(data)
        return Listing(clips, inspect(clips, data.timeout, begin(len(clips))))


class VideoDataset(Dataset[Sample]):
    """The clips of a split, each at the shape of its bucket."""

    def __init__(self, data: Data, split: Split, seed: int, listing: Listing | None = None) -> None:
        """listing: of this data, where it is at hand already.

        Raises ValueError where the options contradict each other, the split is empty, a label is out of range, clips
        are too short for ``short="error"``, or more than `max_broken` are broken.
        """
        _check_options(data)
        self.data, self.seed, self.split = data, seed, split
        listing = listing or list_and_look(data)
        ours = [(clip, info) for clip, info in zip(listing.clips, listing.infos, strict=True) if clip.split == split]
        clips = [clip for clip, _ in ours]
        if not clips:
            raise ValueError(f"data.root={data.root}: no clips in {split} (data.val_fraction={data.val_fraction})")
        _check_labels(clips, data.num_labels)
        check_captions(clips, data)
        self.items: Sequence[Item]
        with rare_collections():
            self.items, self.broken, self.left_out = _sort_out(clips, data, [info for _, info in ours])
        if not self.items:
            raise ValueError(f"data.root={data.root}: no usable clip among the {len(clips)} of {split}; "
                             + listed([f"{b.id}: {b.reason}" for b in self.broken] + self.left_out))  # fmt: skip
        self.groups = [item.bucket for item in self.items]
        """The bucket of each item."""
        self._cached: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.items)

    @property
    def sets(self) -> list[int]:
        """The set of clips that each item is from."""
        return [item.clip.set for item in self.items]

    def report(self) -> list[str]:
        """Lines that say what became of the clips: how many at which shape, which were left out and why."""
        shapes = self.data.shapes(1)
        counts = Counter(self.groups)
        told = [f"{self.split}: " + ", ".join(f"{counts[b]} at {name_of(shapes[b])}" for b in sorted(counts))]
        if self.left_out:
            told.append(f"{self.split}: {len(self.left_out)} clips left out:" + listed(self.left_out))
        if self.broken:
            told.append(f"{self.split}: {len(self.broken)} clips are broken:" + listed(b.reason for b in self.broken))
        return told

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The item at (index, sample); the sample's place in the stream decides its window, crop, flip and caption.

        Raises VideoError, naming the file, where it can't be read.
        """
        index, sample = key
        item, augment = self.items[index], self.split == "train"
        video = self._cached.get(index)
        if video is None:
            video = read_item(item, self.data, self.seed, sample, augment)
            if self.data.cache:
                self._cached[index] = video
        if augment and _chance(self.seed, "flip", sample) < self.data.flip:
            video = video.flip(2)
        return Sample(
            id=item.id,
            sample=sample,
            video=video,
            caption=choose(variants(item.clip, self.data), self.seed, sample),
            label=NO_LABEL if item.clip.label is None else item.clip.label,
        )

    def read(self, index: int, sample: int) -> Sample:
        """`__getitem__`, or another item of the same bucket in the place of one that can't be read: which one is a
        function of the sample, so that the order stays the same wherever it is read.

        Raises VideoError where many in a row can't be.
        """
        broken: dict[int, Broken] = {}
        others: list[int] = []
        while len(broken) < MAX_SUBSTITUTES:
            try:
                return replace(self[index, sample], broken=tuple(broken.values()))
            except VideoError as error:
                broken[index] = Broken(id=self.items[index].id, reason=str(error))
                bucket = self.groups[index]
                others = [i for i in others or range(len(self)) if self.groups[i] == bucket and i not in broken]
                if not others:
                    break
                index = others[seed_of(self.seed, "substitute", sample, len(broken)) % len(others)]
        raise VideoError(f"{len(broken)} clips in a row can't be read:" + listed(b.reason for b in broken.values()))


def read_item(item: Item, data: Data, seed: int, sample: int, augment: bool) -> UInt8[Tensor, "t h w 3"]:
    """The frames of an item, at its bucket's shape. seed, sample: decide a random window and, with `augment`, a random
    place to crop. Raises VideoError, naming the file, where it can't be read."""
    clip, shape = item.clip, data.shapes(1)[item.bucket]
    numbers = frames_at(_index(clip), data.fps, clip.start, clip.end)
    numbers = numbers[data.skip_frames_start : len(numbers) - data.skip_frames_end]
    if not len(numbers):
        raise VideoError(f"{clip.path}: no frames are left of it")
    span = _span(shape.frames, data)
    first = 0
    if data.window == "random" and len(numbers) > span:
        first = seed_of(seed, "window", sample) % (len(numbers) - span + 1)
    elif item.window is not None:
        first = item.window * _window_interval(shape.frames, data)
    wanted = first + data.frame_interval * np.arange(shape.frames)
    if wanted[-1] >= len(numbers):
        if data.short not in ("loop", "pad"):
            raise VideoError(f"{clip.path}: too short: the file has changed since the clips were listed")
        wanted = wanted % len(numbers) if data.short == "loop" else np.minimum(wanted, len(numbers) - 1)
    frames = _frames(clip, numbers[wanted], data.timeout)
    if data.resize != "random_crop":
        return torch.from_numpy(resize(frames, shape.height, shape.width, data.resize))
    place = (_chance(seed, "crop down", sample), _chance(seed, "crop right", sample)) if augment else (0.5, 0.5)
    return torch.from_numpy(resize(frames, shape.height, shape.width, "crop", place))


def _chance(seed: int, purpose: str, sample: int) -> float:
    return seed_of(seed, purpose, sample) / 2**63


def collate(samples: Sequence[Sample]) -> Clips:
    """Samples joined along the batch."""
    return Clips(
        ids=[s.id for s in samples],
        samples=[s.sample for s in samples],
        video=torch.stack([s.video for s in samples]),
        captions=[s.caption for s in samples],
        labels=torch.tensor([s.label for s in samples]),
        broken=tuple(b for s in samples for b in s.broken),
    )


def to_pixels(video: UInt8[Tensor, "b t h w c"]) -> Float[Tensor, "b c t h w"]:
    """Clips at rest -> pixels in [-1, 1], float32. They stay where they lie, channels last, as convolutions like it."""
    return video.float().div_(127.5).sub_(1).movedim(-1, 1)


def to_uint8(video: Float[Tensor, "b c t h w"]) -> UInt8[Tensor, "b t h w c"]:
    """Pixels -> clips at rest, clamped to what they can hold; undoes `to_pixels` exactly."""
    return video.movedim(1, -1).float().add(1).mul_(127.5).round_().clamp_(0, 255).byte().contiguous()


def content_hash(clip: Clip, window: int | None = None) -> str:
    """Hash (xxh3, 32 hexadecimal digits) of what a clip's pixels are made from, for keys of caches.

    Covers the file's bytes (of a clip drawn in memory: all that decides it), the part of the file, and the window.
    Raises VideoError where the file can't be read.
    """
    if clip.path.startswith(FLYING_MNIST):
        preset, split, index = _drawn(clip)
        content = f"{mnist.VERSION} {sorted(asdict(preset).items())} {split} {index}"
    else:
        try:
            content = _media_hash(clip.media, clip.media.version())
        except OSError as error:
            raise VideoError(f"{clip.path}: {error.strerror or error}") from error
    return xxhash.xxh3_128_hexdigest(f"{content} {clip.start} {clip.end} {window}".encode())


@lru_cache(maxsize=64)
def _media_hash(media: Media, version: tuple[int, int]) -> str:
    digest = xxhash.xxh3_128()
    with media.opened() as source, open(source, "rb") if isinstance(source, str) else nullcontext(source) as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _check_options(data: Data) -> None:
    """What `contradictions.validate` says of a recipe, for those who come without one."""
    if data.cache and (data.window == "random" or data.resize == "random_crop"):
        raise ValueError('data.cache keeps one window and crop of each clip: with window="random" or '
                         'resize="random_crop" they would be the same for ever; set data.cache=false')  # fmt: skip


def _span(frames: int, data: Data) -> int:
    """Frames of the (resampled) clip from the first to the last of a training clip."""
    return (frames - 1) * data.frame_interval + 1


def _window_interval(frames: int, data: Data) -> int:
    return data.window_interval or frames * data.frame_interval


def _sort_out(
    clips: list[Clip], data: Data, infos: Sequence[ClipInfo | str]
) -> tuple[list[Item], list[Broken], list[str]]:
    """The items that clips make, those that are broken, and why others are left out.

    Raises ValueError where clips are too short and may not be, or more are broken than may be.
    """
    items, broken, short = [], [], []
    shapes = data.shapes(1)

    @lru_cache  # Most clips are of a few sizes.
    def bucket_of(frames: int, height: int, width: int) -> int | str:
        return choose_bucket(frames, height, width, shapes, data.short)

    for clip, info in zip(clips, infos, strict=True):
        if isinstance(info, str):
            broken.append(Broken(id=clip.id, reason=info))
            continue
        frames = available_frames(info, data)
        bucket = bucket_of(frames, info.height, info.width)
        if isinstance(bucket, str):
            short.append(f"{clip.path}: {bucket}")
        elif data.window == "all":
            wanted = shapes[bucket].frames
            room = info.count(data.fps) - data.skip_frames_start - data.skip_frames_end - _span(wanted, data)
            windows = max(0, room) // _window_interval(wanted, data) + 1
            items += [Item(clip=clip, bucket=bucket, window=k) for k in range(windows)]
        else:
            items.append(Item(clip=clip, bucket=bucket))
    if len(broken) > data.max_broken:
        raise ValueError(
            f"data.root={data.root}: {len(broken)} of {len(clips)} clips are broken, data.max_broken={data.max_broken} "
            "may be; `mutoscope data check` lists them all:" + listed(b.reason for b in broken)
        )
    if short and data.short == "error":
        rate = "" if data.fps is None else f" at {data.fps:g} fps"
        raise ValueError(
            f"data.root={data.root}: {len(short)} of {len(clips)} clips are too short{rate}; set data.short to loop, "
            "pad or drop, or ask for fewer frames:" + listed(short)
        )
    return items, broken, short


def _check_labels(clips: list[Clip], num_labels: int) -> None:
    wrong = [c for c in clips if num_labels and c.label is not None and c.label >= num_labels]
    if wrong:
        raise ValueError(
            f"{wrong[0].path}: label {wrong[0].label}, but data.num_labels={num_labels} allows 0 to {num_labels - 1} "
            f"({len(wrong)} such clips; the highest label is {max(c.label or 0 for c in wrong)})"
        )


def _drawn(clip: Clip) -> tuple[mnist.Preset, Split, int]:
    name, split, index = clip.path.removeprefix(FLYING_MNIST).split("/")
    return mnist.preset_named(name), "train" if split == "train" else "val", int(index)


def _index(clip: Clip) -> FrameIndex:
    if not clip.path.startswith(FLYING_MNIST):
        return frame_index(clip.media)
    preset, _, _ = _drawn(clip)
    return FrameIndex(times=np.arange(preset.frames) / preset.fps, duration=preset.frames / preset.fps)


def _frames(clip: Clip, numbers: Int64[np.ndarray, "n"], timeout: float) -> UInt8[np.ndarray, "n h w 3"]:
    if clip.path.startswith(FLYING_MNIST):
        return mnist.render(*_drawn(clip)).frames[numbers]
    return read_frames(clip.media, numbers, timeout)
