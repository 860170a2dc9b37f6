"""Buckets for the clips at hand: few shapes that a model can take, chosen so that least of the clips is wasted.

What a clip gives to a bucket is the share of it that is used: the bucket's frames over the clip's, times what the
change of aspect ratio leaves of the picture. The candidates are the shapes that would suit some clip best, its frames
rounded down and its aspect ratio at the given area rounded to what the model takes. Buckets are added one by one,
each time the one that raises the clips' mean share most, as long as it does; then single buckets are exchanged as long
as that helps (k-medoids, by PAM: Kaufman & Rousseeuw 1990).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from mutoscope.data.buckets import choose_bucket
from mutoscope.recipe import Bucket
from mutoscope.types import LatentSpec

MIN_GAIN = 0.005
"""The rise of the mean share that one more bucket has to be worth."""
CANDIDATES = 32
"""Numbers of frames, and sizes, that are tried at most."""
ASPECT_STEP = 0.02
"""Clips whose aspect ratios differ by less are taken for the same."""

Shape = tuple[int, int, int]
"""Frames, height, width."""


@dataclass(frozen=True, kw_only=True)
class Allowed:
    """Which shapes there may be."""

    spec: LatentSpec
    """Of the autoencoder."""
    patch: Shape = (1, 1, 1)
    """Latent positions that make one token of the model."""
    max_frames: int
    area: int
    """Height × width in pixels to come near to."""

    def frames(self) -> list[int]:
        """All numbers of frames up to the highest, ascending. Raises ValueError where there is none."""
        found = []
        t = self.patch[0]
        while (frames := self.spec.pixel_shape(t, 1, 1)[0]) <= self.max_frames:
            found.append(frames)
            t += self.patch[0]
        if not found:
            raise ValueError(f"max_frames={self.max_frames}: the model takes no fewer than {frames} frames")
        return found

    def size(self, aspect: float) -> tuple[int, int]:
        """The (height, width) nearest to an aspect ratio (width / height) and the area."""
        unit_h, unit_w = (s * p for s, p in zip(self.spec.strides[1:], self.patch[1:], strict=True))

        def near(side: float, unit: int) -> set[int]:
            return {max(1, math.floor(side / unit)) * unit, math.ceil(side / unit) * unit}

        def misfit(size: tuple[int, int]) -> tuple[float, int, int]:
            height, width = size
            off = abs(math.log(width / height / aspect)) + abs(math.log(height * width / self.area)) / 2
            return round(off, 9), height, width

        height = math.sqrt(self.area / aspect)
        sizes = {(h, w) for h in near(height, unit_h) for w in near(height * aspect, unit_w)}
        return min(sizes, key=misfit)


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """A bucket, and what becomes of the clips in it."""

    bucket: Bucket
    clips: int
    cropped: float
    """Share of their pixels that is cut off, in the mean."""
    used: float
    """Share of their frames that a window has, in the mean."""
    enlarged: int
    """How many of them are magnified."""


def choose_shapes(
    frames: Int64[np.ndarray, "n"], aspects: Float64[np.ndarray, "n"], allowed: Allowed, num: int
) -> list[Shape]:
    """The shapes of up to `num` buckets for clips of so many available frames and these aspect ratios, ascending.

    One frame is for images: a bucket of one frame takes no clips that have more. Empty where no clip has frames enough.
    """
    times = np.array(allowed.frames())
    fitting = times.searchsorted(frames, side="right") - 1
    usable = (fitting >= 0) & ((times[fitting] > 1) | (frames == 1))
    if not usable.any():
        return []
    times = _spread_out(times[fitting[usable]])
    t = times[times.searchsorted(frames[usable], side="right") - 1]
    bins = np.round(np.log(aspects[usable]) / ASPECT_STEP).astype(np.int64)
    groups, weights = np.unique(np.stack([t, bins]), axis=1, return_counts=True)
    aspect = np.exp(groups[1] * ASPECT_STEP)
    sizes = sorted({allowed.size(math.exp(b * ASPECT_STEP)) for b in _spread_out(bins).tolist()})
    shapes = [(int(f), h, w) for f in times for h, w in sizes]
    stretch = np.array([w / h for _, h, w in shapes]) / aspect[:, None]
    share = np.array([f for f, _, _ in shapes]) / groups[0][:, None]
    share[(share > 1) | ((groups[0][:, None] > 1) & (np.array([f for f, _, _ in shapes]) == 1))] = 0
    chosen = _medoids(share * np.minimum(stretch, 1 / stretch), weights / weights.sum(), num)
    return sorted(shapes[c] for c in chosen)


def _spread_out(values: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "m"]:
    """The different ones among values, ascending; of many, the lowest, the highest and quantiles between them."""
    different = np.unique(values)
    if len(different) <= CANDIDATES:
        return different
    return np.unique(np.quantile(values, np.linspace(0, 1, CANDIDATES), method="nearest"))


def _medoids(gain: Float64[np.ndarray, "g c"], weights: Float64[np.ndarray, "g"], num: int) -> list[int]:
    """The columns of `gain` whose highest values in each row have the highest weighted mean."""
    chosen: list[int] = []
    best = np.zeros(len(gain))
    while len(chosen) < num:
        means = weights @ np.maximum(gain, best[:, None])
        column = int(means.argmax())
        if means[column] < weights @ best + MIN_GAIN:
            break
        chosen.append(column)
        best = np.maximum(best, gain[:, column])
    improved = True
    while improved:
        improved = False
        for n in range(len(chosen)):
            others = chosen[:n] + chosen[n + 1 :]
            without = gain[:, others].max(1, initial=0.0)
            means = weights @ np.maximum(gain, without[:, None])
            column = int(means.argmax())
            if means[column] > weights @ gain[:, chosen].max(1) + 1e-9:
                chosen[n] = column
                improved = True
    return chosen


def assess(
    frames: Sequence[int], sizes: Sequence[tuple[int, int]], buckets: Sequence[Bucket]
) -> tuple[list[Suggestion], int]:
    """What becomes of clips of so many available frames and these sizes (height, width) in each bucket, and how many
    have too few frames for all."""
    fallen: list[list[int]] = [[] for _ in buckets]
    left = 0
    for n, (count, (height, width)) in enumerate(zip(frames, sizes, strict=True)):
        place = choose_bucket(count, height, width, buckets, "drop")
        if isinstance(place, str):
            left += 1
        else:
            fallen[place].append(n)
    suggestions = []
    for bucket, members in zip(buckets, fallen, strict=True):
        stretches = [bucket.width / bucket.height * sizes[n][0] / sizes[n][1] for n in members]
        scales = [max(bucket.height / sizes[n][0], bucket.width / sizes[n][1]) for n in members]
        suggestions.append(
            Suggestion(
                bucket=bucket,
                clips=len(members),
                cropped=_mean([1 - min(s, 1 / s) for s in stretches]),
                used=_mean([bucket.frames / frames[n] for n in members]),
                enlarged=sum(scale > 1 for scale in scales),
            )
        )
    return suggestions, left


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def to_toml(suggestions: Sequence[Suggestion]) -> str:
    """The buckets as a recipe has them."""
    lines = [
        f"  {{ frames = {s.bucket.frames}, height = {s.bucket.height}, width = {s.bucket.width}, "
        f"batch_size = {s.bucket.batch_size} }},"
        for s in suggestions
    ]
    return "\n".join(["[data]", "buckets = [", *lines, "]"])
