"""Clips as tensors: which frames of which file, at what size, and batches of them from worker processes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
import torch
import xxhash
from jaxtyping import Float, Int, Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mutoscope.data import flying_mnist as mnist
from mutoscope.data.flying_mnist import FLYING_MNIST, Split
from mutoscope.data.layouts import Clip, list_clips
from mutoscope.data.video import FrameIndex, VideoError, frame_index, frames_at, read_frames, resize
from mutoscope.randomness import seed_of
from mutoscope.recipe import Data
from mutoscope.types import NO_LABEL


@dataclass(frozen=True, kw_only=True)
class Item:
    """What one index of a data set stands for."""

    clip: Clip
    window: int | None = None
    """Which window of the clip, where each is an item of its own."""

    @property
    def id(self) -> str:
        """The clip's id, with "#3" behind it for its window 3."""
        return self.clip.id if self.window is None else f"{self.clip.id}#{self.window}"


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


@dataclass(frozen=True, kw_only=True)
class Clips:
    """A batch of training clips, before pixels become floats and captions embeddings."""

    ids: list[str]
    samples: list[int]
    video: UInt8[Tensor, "b t h w 3"]
    captions: list[str]
    labels: Int[Tensor, "b"]


class VideoDataset(Dataset[Sample]):
    """The clips of a split, each `data.frames` frames of `data.height` × `data.width`."""

    def __init__(self, data: Data, split: Split, seed: int) -> None:
        """Lists the clips; with window "all" it reads every file's timestamps too.

        Raises ValueError where the options contradict each other, the split is empty or a label is out of range;
        VideoError as `__getitem__` does.
        """
        if data.cache and data.window == "random":
            raise ValueError('data.cache keeps one window of each clip: with data.window="random" it would be the '
                             'same one for ever; set data.cache=false, or data.window to "first" or "all"')  # fmt: skip
        self.data, self.seed = data, seed
        clips = [c for c in list_clips(data.root, data.layout, data.val_fraction) if c.split == split]
        if not clips:
            raise ValueError(f"data.root={data.root}: no clips in {split} (data.val_fraction={data.val_fraction})")
        _check_labels(clips, data.num_labels)
        if data.window == "all":
            windows = {c.id: range(len(self._numbers(c)) // data.frames) for c in clips}
            self.items = [Item(clip=c, window=k) for c in clips for k in windows[c.id]]
        else:
            self.items = [Item(clip=c) for c in clips]
        self._cached: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The item at (index, sample); the sample's place in the stream decides a random window and nothing else.

        Raises VideoError, naming the file, where it can't be read or is shorter than a training clip.
        """
        index, sample = key
        item = self.items[index]
        video = self._cached.get(index)
        if video is None:
            video = self._read(item, sample)
            if self.data.cache:
                self._cached[index] = video
        label = NO_LABEL if item.clip.label is None else item.clip.label
        return Sample(
            id=item.id, sample=sample, video=video, caption=item.clip.captions.get("caption", ""), label=label
        )

    def _numbers(self, clip: Clip) -> Int64[np.ndarray, "n"]:
        """Numbers of the clip's frames after resampling."""
        numbers = frames_at(_index(clip), self.data.fps, clip.start, clip.end)
        if len(numbers) < self.data.frames:
            rate = "" if self.data.fps is None else f" at {self.data.fps:g} fps"
            raise VideoError(f"{clip.path}: too short: {len(numbers)} frames{rate}, data.frames is {self.data.frames}")
        return numbers

    def _read(self, item: Item, sample: int) -> UInt8[Tensor, "t h w 3"]:
        data, numbers = self.data, self._numbers(item.clip)
        first = 0
        if data.window == "random":
            first = seed_of(self.seed, "window", sample) % (len(numbers) - data.frames + 1)
        elif item.window is not None:
            first = item.window * data.frames
        frames = _frames(item.clip, numbers[first : first + data.frames])
        return torch.from_numpy(resize(frames, data.height, data.width, data.resize))


def collate(samples: Sequence[Sample]) -> Clips:
    """Samples joined along the batch."""
    return Clips(
        ids=[s.id for s in samples],
        samples=[s.sample for s in samples],
        video=torch.stack([s.video for s in samples]),
        captions=[s.caption for s in samples],
        labels=torch.tensor([s.label for s in samples]),
    )


def make_loader(dataset: VideoDataset, batches: Iterable[list[tuple[int, int]]], workers: int = 0) -> Iterator[Clips]:
    """The clips of these batches, in order and the same for any number of worker processes; 0 reads them here.

    Raises VideoError where a clip can't be read.
    """
    loader = DataLoader(
        _Quiet(dataset),
        batch_sampler=batches,
        collate_fn=_collate_or_error,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,  # A fork would copy locks of torch's and CUDA's threads.
        generator=torch.Generator(),  # Else the loader draws its workers' seed from the global one.
    )
    for clips in loader:
        if isinstance(clips, VideoError):
            raise clips
        yield clips


def to_pixels(video: UInt8[Tensor, "b t h w c"]) -> Float[Tensor, "b c t h w"]:
    """Clips at rest -> pixels in [-1, 1], float32."""
    return video.movedim(-1, 1).contiguous().float().div_(127.5).sub_(1)


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
            state = os.stat(clip.path)
            content = _file_hash(clip.path, state.st_mtime_ns, state.st_size)
        except OSError as error:
            raise VideoError(f"{clip.path}: {error.strerror}") from error
    return xxhash.xxh3_128_hexdigest(f"{content} {clip.start} {clip.end} {window}".encode())


@lru_cache(maxsize=64)
def _file_hash(path: str, mtime_ns: int, size: int) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


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
        return frame_index(clip.path)
    preset, _, _ = _drawn(clip)
    return FrameIndex(times=np.arange(preset.frames) / preset.fps, duration=preset.frames / preset.fps)


def _frames(clip: Clip, numbers: Int64[np.ndarray, "n"]) -> UInt8[np.ndarray, "n h w 3"]:
    if clip.path.startswith(FLYING_MNIST):
        return mnist.render(*_drawn(clip)).frames[numbers]
    return read_frames(clip.path, numbers)


class _Quiet(Dataset["Sample | VideoError"]):
    """Hands errors back as values: raised in a worker, torch would bury the text in a traceback."""

    def __init__(self, dataset: VideoDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> Sample | VideoError:
        try:
            return self.dataset[key]
        except VideoError as error:
            return error


def _collate_or_error(samples: list[Sample | VideoError]) -> Clips | VideoError:
    for sample in samples:
        if isinstance(sample, VideoError):
            return sample
    return collate([s for s in samples if isinstance(s, Sample)])
