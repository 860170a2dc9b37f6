"""`mutoscope data stats`: how long, fast, large, wide, lively and wordy the clips are, without decoding them all.

Motion is the mean absolute difference of grey levels (0 to 255) between frames 1/8 s apart, at 64×64 pixels, over the
middle two seconds of a clip: 0 is a still, below 1 hardly anything moves, above 20 the scene is cut or flickers. It is
measured on a sample of the clips, the same one each time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mutoscope.data import flying_mnist as mnist
from mutoscope.data.decoding import VideoError
from mutoscope.data.flying_mnist import FLYING_MNIST
from mutoscope.data.index import ClipInfo, inspect
from mutoscope.data.seeking import FrameIndex
from mutoscope.data.sources.layouts import Clip, list_clips
from mutoscope.data.video import frame_index, frames_at, read_frames, resize
from mutoscope.progress import Bars
from mutoscope.randomness import seed_of
from mutoscope.recipe import ClipSet
from mutoscope.supervise import Alive, Lost, supervise

MOTION_FPS = 8
MOTION_FRAMES = 17
MOTION_SIDE = 64
BINS = 12
"""Bars of a histogram, at most about."""


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What is known of the clips of a set."""

    root: str
    clips: list[Clip]
    """Those that can be read."""
    infos: list[ClipInfo]
    """Of each of them."""
    broken: list[str]
    """Why each of the others can't be read."""
    motion: dict[str, float]
    """Of the clips of the sample, by id."""

    @property
    def title(self) -> str:
        """What they are, in a line."""
        broken = f", {len(self.broken):,} broken" if self.broken else ""
        return f"{self.root}: {len(self.clips):,} clips{broken}"


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """How often values are met."""

    name: str
    bars: tuple[tuple[str, int], ...]
    """Label and count of each bar."""


def collect(
    clip_set: ClipSet, *, motion_clips: int = 200, workers: int = 1, timeout: float = 60.0, progress: bool = True
) -> Stats:
    """Look at every clip's head and timestamps, and decode two seconds of `motion_clips` of them.

    workers: processes that decode. timeout: seconds after which a clip counts as broken. Raises ValueError where the
    clips can't be listed, or none can be read.
    """
    if motion_clips < 0 or timeout <= 0:
        raise ValueError(f"motion_clips={motion_clips} must be at least 0, and timeout={timeout:g} above 0")
    listed = list_clips(clip_set)
    with Bars(progress) as bars:
        found = inspect(listed, timeout, bars.start("looking at clips", len(listed)))
        clips = [c for c, info in zip(listed, found, strict=True) if isinstance(info, ClipInfo)]
        infos = [info for info in found if isinstance(info, ClipInfo)]
        broken = [info for info in found if isinstance(info, str)]
        if not clips:
            raise ValueError(f"{clip_set.root}: none of {len(broken)} clips can be read, such as {broken[0]}")
        moving = [c for c, info in zip(clips, infos, strict=True) if not info.image]
        sample = sorted(moving, key=lambda c: seed_of("motion", c.id))[:motion_clips]
        tell = bars.start("measuring motion", len(sample))
        motion: dict[str, float] = {}
        for clip, result in supervise(measure_motion, sample, workers, timeout):
            if isinstance(result, Lost):
                broken.append(f"{clip.path}: {result.reason}")
            elif isinstance(result, str):
                broken.append(result)
            elif result is not None:
                motion[clip.id] = result
            tell()
    return Stats(root=clip_set.root, clips=clips, infos=infos, broken=broken, motion=motion)


def measure_motion(clip: Clip, _: Alive) -> float | str | None:
    """The clip's motion, or why it can't be read; None of a clip that is too short to show any."""
    try:
        if clip.path.startswith(FLYING_MNIST):
            name, split, number = clip.path.removeprefix(FLYING_MNIST).split("/")
            preset = mnist.preset_named(name)
            drawn = mnist.render(preset, "train" if split == "train" else "val", int(number)).frames
            index = FrameIndex(times=np.arange(preset.frames) / preset.fps, duration=preset.frames / preset.fps)
            frames = drawn[_middle(frames_at(index, MOTION_FPS, clip.start, clip.end))]
        else:
            numbers = frames_at(frame_index(clip.media), MOTION_FPS, clip.start, clip.end)
            frames = read_frames(clip.media, _middle(numbers))
    except VideoError as error:
        return str(error)
    if len(frames) < 2:
        return None
    grey = resize(frames, MOTION_SIDE, MOTION_SIDE, "squash").mean(-1, dtype=np.float32)
    return float(np.abs(np.diff(grey, axis=0)).mean())


def _middle(numbers: np.ndarray) -> np.ndarray:
    first = max(0, (len(numbers) - MOTION_FRAMES) // 2)
    return numbers[first : first + MOTION_FRAMES]


# ---- histograms


def histograms(stats: Stats) -> list[Histogram]:
    """Duration, rate, size, aspect ratio, motion and length of captions."""
    moving = [info for info in stats.infos if not info.image]
    sizes = Counter(f"{info.width}×{info.height}" for info in stats.infos).most_common()
    rest = sum(n for _, n in sizes[BINS:])
    words = [len(text.split()) for clip in stats.clips for texts in clip.captions.values() for text in texts]
    found = {
        "duration in seconds": binned([info.duration for info in moving]),
        "frames per second": binned([round(info.fps, 2) for info in moving]),
        "size in pixels": (*sizes[:BINS], *([(f"{len(sizes) - BINS} others", rest)] if rest else [])),
        "width / height": binned([round(info.width / info.height, 3) for info in stats.infos]),
        f"motion of {len(stats.motion)} clips, grey levels in 1/{MOTION_FPS} s": binned(list(stats.motion.values())),
        "words of a caption": binned(words),
    }
    return [Histogram(name=name, bars=counted) for name, counted in found.items() if counted]


def binned(values: Sequence[float]) -> tuple[tuple[str, int], ...]:
    """Label and count for each of a dozen ranges of round numbers, or for each value where there are no more.

    The highest hundredth of the values goes into a last, open range where it lies far out.
    """
    counts = Counter(values)
    if len(counts) <= BINS:
        return tuple((f"{value:g}", n) for value, n in sorted(counts.items()))
    low, high = float(np.quantile(values, 0.01)), float(np.quantile(values, 0.99))
    step = _round_step((high - low) / (BINS - 2) or max(abs(high), 1) / BINS)
    first, last = math.floor(low / step), math.floor(high / step)
    places = Counter(min(max(math.floor(value / step), first - 1), last + 1) for value in values)
    found = []
    for place in range(first - 1, last + 2):
        begin, end = _number(place * step), _number((place + 1) * step)
        label = f"below {end}" if place < first else f"{begin} and more" if place > last else f"{begin} to {end}"
        if first <= place <= last or places[place]:
            found.append((label, places[place]))
    return tuple(found)


def _round_step(step: float) -> float:
    """1, 2 or 5 times a power of ten, at least this."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))


def _number(value: float) -> str:
    return f"{round(value, 10):g}"
