"""The order of the data: which process trains on which clip and when, as a pure function of (seed, samples consumed).

Training reads an endless stream of samples. Sample n is the clip at place ``n % size`` of the order of epoch
``n // size``, whoever asks: no process keeps a state, and a run resumes from one integer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int64

from mutoscope.randomness import seed_of


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, size: int) -> Int64[np.ndarray, "size"]:
    """The permutation of range(size) in which an epoch goes through the data (read-only)."""
    # Sorted by the raw words of a counter-based generator: NumPy promises those, and not those of `permutation`.
    words = np.random.Philox(key=seed_of(seed, "order", epoch)).random_raw(size)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False
    return order


@dataclass(frozen=True, kw_only=True)
class Batches:
    """The micro-batches of one process, without end: lists of (index into the data, place in the stream).

    Each micro-step of all processes takes the next ``world · batch_size`` samples of the stream. So an optimizer step
    of any number of micro-steps takes consecutive samples, however they are divided: two micro-steps of b samples see
    together what one of 2b sees, two processes what one with the joined batch sees. A batch may straddle two epochs,
    so that no clip is left out.
    """

    size: int
    """Items of the data set."""
    batch_size: int
    """Samples of a micro-batch."""
    seed: int
    """Of the order."""
    rank: int = 0
    """Of this process."""
    world: int = 1
    """Processes."""
    start: int = 0
    """Samples that all processes together have consumed before; any number of processes goes on from there."""

    def __post_init__(self) -> None:
        """Raises ValueError where a number is out of range."""
        _check(self.size, self.batch_size, self.rank, self.world)
        if self.start < 0:
            raise ValueError(f"start={self.start} must be at least 0")

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """From `start` on; each call begins anew."""
        first = self.start + self.rank * self.batch_size
        while True:
            yield [(self.item(n), n) for n in range(first, first + self.batch_size)]
            first += self.world * self.batch_size

    def item(self, sample: int) -> int:
        """Index into the data of the sample at this place in the stream."""
        epoch, place = divmod(sample, self.size)
        return int(epoch_order(self.seed, epoch, self.size)[place])


def iterate_once(size: int, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[list[tuple[int, int]]]:
    """Every item once and in order, for validation and encoding: lists of (index, index). Batches go round the
    processes; the last batch may be short, and some processes get one fewer."""
    _check(size, batch_size, rank, world)
    for first in range(rank * batch_size, size, world * batch_size):
        yield [(i, i) for i in range(first, min(first + batch_size, size))]


def _check(size: int, batch_size: int, rank: int, world: int) -> None:
    if size < 1 or batch_size < 1:
        raise ValueError(f"size={size} and batch_size={batch_size} must be at least 1")
    if not 0 <= rank < world:
        raise ValueError(f"rank={rank} must be in [0, world={world})")
