"""Batches of clips out of worker processes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import torch
from torch.utils.data import DataLoader, Dataset

from mutoscope.data.dataset import Clips, Item, Sample, VideoDataset, collate
from mutoscope.data.video import VideoError
from mutoscope.workers import keep_memory, worker_context

BLOCK = 16
"""Items that are pickled together: what two clips share is written once, and few are unpickled for one."""


def make_loader(dataset: VideoDataset, batches: Iterable[list[tuple[int, int]]], workers: int = 0) -> Iterator[Clips]:
    """The clips of these batches, in order and the same for any number of worker processes; 0 reads them here.

    Raises VideoError where many clips in a row can't be read (see `VideoDataset.read`).
    """
    loader = DataLoader(
        _Quiet(with_packed_items(dataset) if workers else dataset),
        batch_sampler=batches,
        collate_fn=_collate_or_error,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context=worker_context() if workers else None,
        worker_init_fn=keep_memory,
        generator=torch.Generator(),  # Else the loader draws its workers' seed from the global one.
    )
    for clips in loader:
        if isinstance(clips, VideoError):
            raise clips
        yield clips


def with_packed_items(dataset: VideoDataset) -> VideoDataset:
    """The same data set as worker processes get it."""
    packed = copy.copy(dataset)
    packed.items = PackedItems(dataset.items)
    return packed


class PackedItems(Sequence[Item]):
    """Items in pickled blocks: to send them to a process is to copy bytes, and there only what is asked for is
    unpickled. A data set of 100,000 clips else costs each worker a second and 100 MB."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._blocks = [pickle.dumps(list(items[n : n + BLOCK]), -1) for n in range(0, len(items), BLOCK)]
        self._count = len(items)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(self._count))]
        block, place = divmod(range(self._count)[index], BLOCK)
        item: Item = pickle.loads(self._blocks[block])[place]
        return item


class _Quiet(Dataset["Sample | VideoError"]):
    """Hands errors back as values: raised in a worker, torch would bury the text in a traceback."""

    def __init__(self, dataset: VideoDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> Sample | VideoError:
        try:
            return self.dataset.read(*key)
        except VideoError as error:
            return error


def _collate_or_error(samples: list[Sample | VideoError]) -> Clips | VideoError:
    for sample in samples:
        if isinstance(sample, VideoError):
            return sample
    return collate([s for s in samples if isinstance(s, Sample)])
