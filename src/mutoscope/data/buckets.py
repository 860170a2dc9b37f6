"""Which shape each clip is trained at, and which process trains on which clip and when.

Training reads an endless stream of samples. Each bucket of clips (one shape, one batch size) has a stream of its own:
its place ``n`` is a clip of the order of epoch ``n // size``, a pure function of the seed. An optimizer step takes the
next clips of one bucket, so that all processes work on equal shapes and all micro-batches weigh alike: of the bucket
that is furthest behind. So no process keeps a state, nothing is left out at the end of an epoch, and a run resumes, on
any number of processes, from one integer for each bucket.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int64

from mutoscope.data.index import ClipInfo
from mutoscope.randomness import seed_of
from mutoscope.recipe import Bucket, Data

# ---- a clip's bucket


def available_frames(info: ClipInfo, data: Data) -> int:
    """The most frames that a clip can give to one training clip."""
    kept = info.count(data.fps) - data.skip_frames_start - data.skip_frames_end
    return max(0, math.ceil(kept / data.frame_interval))


def choose_bucket(frames: int, height: int, width: int, buckets: Sequence[Bucket], short: str = "error") -> int | str:
    """The bucket for a clip of so many available frames and this size, or the reason why there is none.

    Of the buckets that ask for no more frames than there are, the one that keeps most of the clip: frames × what the
    change of aspect ratio leaves of the picture; at a tie the largest that does not magnify the clip, else the
    smallest. A bucket of one frame is for images, where there are others. A clip that is too short for all goes, where
    `short` is loop or pad, to a bucket of the fewest frames.
    """
    if frames < 1:
        return "too short: no frames are left of it"
    moving = [i for i, b in enumerate(buckets) if b.frames > 1]
    suited = moving if moving and frames > 1 else range(len(buckets))
    fitting = [i for i in suited if buckets[i].frames <= frames]
    if not fitting:
        fewest = min(buckets[i].frames for i in suited)
        if short in ("error", "drop"):
            return f"too short: {frames} frames, {fewest} are needed"
        fitting = [i for i in suited if buckets[i].frames == fewest]

    def merit(i: int) -> tuple[float, float]:
        bucket = buckets[i]
        stretch = (bucket.width / bucket.height) / (width / height)
        area = bucket.height * bucket.width / (height * width)
        return round(bucket.frames * min(stretch, 1 / stretch), 6), area if area <= 1 else 1 / area - 1

    return max(fitting, key=merit)


# ---- the order


@dataclass(frozen=True)
class Part:
    """The items of one bucket that come from one set of clips."""

    items: Int64[np.ndarray, "n"]
    """Indices into the data."""
    draws: int
    """Samples of each epoch that come from here; over the epochs, all items alike."""


@dataclass(frozen=True)
class Pool:
    """All that is trained at one shape."""

    name: str
    """FRAMESxHEIGHTxWIDTH."""
    batch_size: int
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        """Samples of an epoch."""
        return sum(part.draws for part in self.parts)


def make_pools(groups: Sequence[int], sets: Sequence[int], data: Data, batch_size: int) -> tuple[Pool, ...]:
    """The pools of a data set whose i-th item lies in bucket ``groups[i]`` and comes from set ``sets[i]``.

    A set's items are drawn `repeats` times an epoch each; where sets have weights, so often that the sets' shares of
    an epoch are as the weights, the epoch being as long as if they had none.
    """
    group, origin = np.asarray(groups), np.asarray(sets)
    counts = [int((origin == k).sum()) for k in range(len(data.sets))]
    often = [float(s.repeats) for s in data.sets]
    if data.weight is not None:  # then all sets have one
        whole = sum(n * r for n, r in zip(counts, often, strict=True))
        weights = [float(s.weight or 0) if n else 0.0 for s, n in zip(data.sets, counts, strict=True)]
        often = [w / sum(weights) * whole / max(n, 1) for w, n in zip(weights, counts, strict=True)]
    pools = []
    for b, bucket in enumerate(data.shapes(batch_size)):
        parts = []
        for k, times in enumerate(often):
            items = np.flatnonzero((group == b) & (origin == k)).astype(np.int64)
            if len(items):
                parts.append(Part(items, max(1, round(times * len(items)))))
        if parts:
            pools.append(Pool(name_of(bucket), bucket.batch_size, tuple(parts)))
    return tuple(pools)


def name_of(bucket: Bucket) -> str:
    """FRAMESxHEIGHTxWIDTH."""
    return f"{bucket.frames}x{bucket.height}x{bucket.width}"


@lru_cache(maxsize=64)
def epoch_order(seed: int, epoch: int, size: int) -> Int64[np.ndarray, "size"]:
    """The permutation of range(size) in which an epoch goes through the data (read-only)."""
    # Sorted by the raw words of a counter-based generator: NumPy promises those, and not those of `permutation`.
    words = np.random.Philox(key=seed_of(seed, "order", epoch)).random_raw(size)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False
    return order


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Who trains on what. `consumed` is, throughout, how many samples all processes have taken from each pool.

    Each micro-step of all processes takes the next ``world · batch_size`` samples of a pool, and each optimizer step
    `accumulate` micro-steps. So an optimizer step sees the same samples however they are divided: two micro-steps of b
    samples see together what one of 2b sees, two processes what one with the joined batch sees.
    """

    pools: tuple[Pool, ...]
    seed: int
    """Of the order."""
    accumulate: int = 1
    """Micro-steps of an optimizer step."""
    rank: int = 0
    """Of this process."""
    world: int = 1
    """Processes."""

    def __post_init__(self) -> None:
        """Raises ValueError where a number is out of range."""
        if not self.pools:
            raise ValueError("no clips to train on")
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank={self.rank} must be in [0, world={self.world})")
        if min(self.accumulate, *(pool.batch_size for pool in self.pools)) < 1:
            raise ValueError("batch_size and accumulate must be at least 1")

    @property
    def epoch(self) -> int:
        """Samples of an epoch."""
        return sum(pool.size for pool in self.pools)

    def next_pool(self, consumed: Sequence[int]) -> int:
        """The pool of the next optimizer step: the one whose share of its epoch would be the smallest after it."""
        return min(
            range(len(self.pools)), key=lambda b: (consumed[b] + self.step_samples(b)) / self.pools[b].size
        )  # fmt: skip

    def step_samples(self, pool: int) -> int:
        """Samples of an optimizer step."""
        return self.pools[pool].batch_size * self.accumulate * self.world

    def after(self, consumed: Sequence[int]) -> tuple[int, ...]:
        """What is consumed after the next optimizer step."""
        pool = self.next_pool(consumed)
        return tuple(n + self.step_samples(b) * (b == pool) for b, n in enumerate(consumed))

    def batches(self, consumed: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        """The micro-batches of this process from here on, without end: lists of (index into the data, sample).

        The sample is its place in the stream of all samples of the run, of which its random numbers are a function.
        """
        while True:
            pool = self.next_pool(consumed)
            size, ahead = self.pools[pool].batch_size, sum(consumed) - consumed[pool]
            for micro in range(self.accumulate):
                first = consumed[pool] + (micro * self.world + self.rank) * size
                yield [(self.item(pool, n), ahead + n) for n in range(first, first + size)]
            consumed = self.after(consumed)

    def item(self, pool: int, place: int) -> int:
        """Index into the data of the sample at this place of a pool's stream."""
        size = self.pools[pool].size
        epoch, place = divmod(place, size)
        slot = int(epoch_order(seed_of(self.seed, self.pools[pool].name), epoch, size)[place])
        for k, part in enumerate(self.pools[pool].parts):
            if slot < part.draws:
                # The part goes round its items in an order of its own, and each epoch takes up where the last one left
                turn, at = divmod(epoch * part.draws + slot, len(part.items))
                order = epoch_order(seed_of(self.seed, self.pools[pool].name, k), turn, len(part.items))
                return int(part.items[order[at]])
            slot -= part.draws
        raise AssertionError("a slot beyond the epoch")


def iterate_once(
    groups: Sequence[int], batch_size: int, rank: int = 0, world: int = 1
) -> Iterator[list[tuple[int, int]]]:
    """Every item once, for validation and encoding: lists of (index, index), each of one of the `groups`, which say for
    each item what shape it has. Batches go round the processes; some are short, and some processes get one fewer, but
    none goes without where there are enough items."""
    if not groups or batch_size < 1:
        raise ValueError(f"{len(groups)} items and batch_size={batch_size} must be at least 1")
    if not 0 <= rank < world:
        raise ValueError(f"rank={rank} must be in [0, world={world})")
    whole = _chunks(groups, batch_size)
    while len(whole) < min(world, len(groups)):
        batch_size = max(1, batch_size // 2)
        whole = _chunks(groups, batch_size)
    yield from whole[rank::world]


def _chunks(groups: Sequence[int], batch_size: int) -> list[list[tuple[int, int]]]:
    found = []
    for group in sorted(set(groups)):
        members = [(i, i) for i, g in enumerate(groups) if g == group]
        found += [members[i : i + batch_size] for i in range(0, len(members), batch_size)]
    return found
