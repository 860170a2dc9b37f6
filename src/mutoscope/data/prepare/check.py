"""`mutoscope data check`: decodes every frame of every clip and tells what is there and what is broken.

The report, as ``--json`` prints it (seconds, pixels, frames per second; lists are sorted by count or by id)::

    root, layout    where they lie, and how they are laid out
    clips           how many; broken ones are not counted in what follows them
    splits          {"train": 90, "val": 10}
    broken          [{"id", "path", "reason"}]: can't be read to the last frame
    unplaced        [{"id", "path", "reason"}]: none of the recipe's buckets takes them
    frames          how many were decoded
    duration        {"total", "min", "median", "max", "ranges": [{"from", "to", "clips"}]}, `to` of the last is null
    fps             [{"fps", "clips"}], rounded to hundredths
    sizes           [{"width", "height", "clips"}]
    images          how many of the clips are stills; they are not in duration and fps
    buckets         [{"frames", "height", "width", "clips"}], or null without a recipe
    captions        {"clips", "missing", "shared", "kinds": [{"kind", "clips", "captions",
                    "words": {"min", "median", "max"}}]}; shared: clips whose captions another clip has, too
    labels          {"missing", "classes": {"0": 12}}
    faulty          whether something has to be mended: broken clips, or unplaced ones where data.short is "error"
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mutoscope.data import flying_mnist as mnist
from mutoscope.data.buckets import available_frames, choose_bucket
from mutoscope.data.captions import check_captions
from mutoscope.data.decoding import VideoError
from mutoscope.data.flying_mnist import FLYING_MNIST
from mutoscope.data.index import ClipInfo, look
from mutoscope.data.sources.detect import detect
from mutoscope.data.sources.layouts import Clip, list_clips
from mutoscope.data.video import frame_index, frames_at, iter_frames
from mutoscope.hub import local_root
from mutoscope.progress import Bars
from mutoscope.recipe import ClipSet, Data
from mutoscope.supervise import Alive, Lost, supervise

THUMBNAILS = 10_000
"""Clips that are shown on the page at most, evenly spread over all of them: a browser has to hold it."""
THUMBNAIL_SIDE = 144
"""Longer side in pixels."""
DURATIONS = (0, 0.5, 1, 2, 3, 5, 10, 20, 30, 60, 300, 1800)
"""Where the ranges of durations begin, in seconds."""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A clip and what was found out about it."""

    clip: Clip
    info: ClipInfo | None
    """None where it can't be read at all."""
    broken: str | None = None
    """Why it is broken."""
    unplaced: str | None = None
    """Why no bucket takes it."""
    bucket: int | None = None
    """The one that takes it."""
    thumbnail: bytes | None = None
    """The frame in its middle, as a JPEG."""


def check(
    clip_set: ClipSet,
    data: Data | None = None,
    *,
    workers: int = os.cpu_count() or 1,
    timeout: float = 60.0,
    thumbnails: int = THUMBNAILS,
    progress: bool = True,
) -> tuple[dict[str, Any], list[Checked]]:
    """Decode every clip of a set, in `workers` processes, and say what there is: the report (see above), and each clip.

    data: of a recipe; says into which buckets the clips would fall.
    timeout: seconds without a new frame after which a clip counts as broken.
    thumbnails: clips of which to make one.

    A clip that crashes the process that decodes it is broken; the others go on. Raises ValueError where the clips
    can't be listed, or their captions are not what the recipe's templates need.
    """
    if timeout <= 0:
        raise ValueError(f"timeout={timeout:g} must be above 0")
    clips = list_clips(clip_set) if data is None else list_clips(clip_set, data.val_fraction)
    if data is not None:
        check_captions(clips, data)
    every = -(-len(clips) // max(1, thumbnails))
    jobs = [Job(n, clip, thumbnails > 0 and n % every == 0, timeout) for n, clip in enumerate(clips)]
    found: dict[int, Checked] = {}
    with Bars(progress) as bars:
        tell = bars.start("decoding clips", len(jobs))
        for job, result in supervise(decode, jobs, workers, timeout):
            if isinstance(result, Lost):
                result = Checked(clip=job.clip, info=None, broken=f"{job.clip.path}: {result.reason}")
            found[job.place] = _placed(result, data)
            tell()
    checked = [found[n] for n in range(len(clips))]
    return summarise(clip_set, data, checked), checked


# ---- decoding


@dataclass(frozen=True)
class Job:
    """A clip to decode."""

    place: int
    clip: Clip
    thumbnail: bool
    timeout: float


def decode(job: Job, alive: Alive) -> Checked:
    """Decode all frames of a clip. It is looked at here, in a process that may crash, and nothing that is remembered
    of it is believed."""
    clip = job.clip
    info = look(clip, job.timeout)
    if isinstance(info, str):
        return Checked(clip=clip, info=None, broken=info)
    count, thumbnail, size = 0, None, (info.height, info.width)
    try:
        for frame in _frames(clip):
            if frame.shape[:2] != size:
                raise VideoError(f"{clip.path}: frame {count} is {frame.shape[1]}×{frame.shape[0]}, the first one is "
                                 f"{info.width}×{info.height}")  # fmt: skip
            if count == info.frames // 2 and job.thumbnail:
                thumbnail = _jpeg(frame)
            count += 1
            alive()
        if count != info.frames:
            raise VideoError(f"{clip.path}: {count} of {info.frames} frames can be decoded")
    except VideoError as error:
        return Checked(clip=clip, info=info, broken=str(error))
    return Checked(clip=clip, info=info, thumbnail=thumbnail)


def _frames(clip: Clip) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    if clip.path.startswith(FLYING_MNIST):
        name, split, index = clip.path.removeprefix(FLYING_MNIST).split("/")
        yield from mnist.render(mnist.preset_named(name), "train" if split == "train" else "val", int(index)).frames
    else:
        yield from iter_frames(clip.media, frames_at(frame_index(clip.media), None, clip.start, clip.end))


def _jpeg(frame: UInt8[np.ndarray, "h w 3"]) -> bytes:
    image = Image.fromarray(frame)
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=70)
    return file.getvalue()


# ---- the report


def _placed(checked: Checked, data: Data | None) -> Checked:
    """With the bucket that it falls in."""
    if data is None or checked.broken is not None or checked.info is None:
        return checked
    info = checked.info
    bucket = choose_bucket(available_frames(info, data), info.height, info.width, data.shapes(1), data.short)
    return (
        replace(checked, unplaced=f"{checked.clip.path}: {bucket}")
        if isinstance(bucket, str)
        else replace(checked, bucket=bucket)
    )


def summarise(clip_set: ClipSet, data: Data | None, checked: Sequence[Checked]) -> dict[str, Any]:
    """The report on clips that have been decoded."""
    sound = [c for c in checked if c.broken is None]
    infos = [c.info for c in sound if c.info is not None]
    broken, unplaced = _faults(checked, "broken"), _faults(checked, "unplaced")
    moving = [info for info in infos if not info.image]
    sizes = Counter((info.width, info.height) for info in infos)
    buckets = None
    if data is not None:
        fallen = Counter(c.bucket for c in sound)
        buckets = [
            {"frames": b.frames, "height": b.height, "width": b.width, "clips": fallen[n]}
            for n, b in enumerate(data.shapes(1))
        ]
    here = replace(clip_set, root=local_root(clip_set.root))
    return {
        "root": clip_set.root,
        "layout": detect(here) if clip_set.layout == "auto" else clip_set.layout,
        "clips": len(checked),
        "splits": dict(sorted(Counter(c.clip.split for c in checked).items())),
        "broken": broken,
        "unplaced": unplaced,
        "frames": sum(info.frames for info in infos),
        "duration": _durations([info.duration for info in moving]),
        "fps": [{"fps": fps, "clips": n} for fps, n in _by_count(Counter(round(info.fps, 2) for info in moving))],
        "sizes": [{"width": w, "height": h, "clips": n} for (w, h), n in _by_count(sizes)],
        "images": len(infos) - len(moving),
        "buckets": buckets,
        "captions": _captions([c.clip for c in checked]),
        "labels": _labels([c.clip for c in checked]),
        "faulty": bool(broken or (unplaced and data is not None and data.short == "error")),
    }


def _faults(checked: Sequence[Checked], kind: str) -> list[dict[str, str]]:
    reasons = ((c.clip, getattr(c, kind)) for c in checked)
    return [{"id": clip.id, "path": clip.path, "reason": reason} for clip, reason in reasons if reason is not None]


def _by_count(counts: Counter[Any]) -> list[tuple[Any, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _durations(seconds: Sequence[float]) -> dict[str, Any]:
    ends = [*DURATIONS[1:], None]
    ranges = [
        {"from": begin, "to": end, "clips": sum(begin <= s and (end is None or s < end) for s in seconds)}
        for begin, end in zip(DURATIONS, ends, strict=True)
    ]
    return {"total": sum(seconds), **_spread(seconds), "ranges": [r for r in ranges if r["clips"]]}


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {"min": None, "median": None, "max": None}
    return {"min": min(values), "median": median(values), "max": max(values)}


def _captions(clips: Sequence[Clip]) -> dict[str, Any]:
    texts: dict[str, list[tuple[str, ...]]] = {}
    for clip in clips:
        for kind, captions in clip.captions.items():
            texts.setdefault(kind, []).append(captions)
    same = Counter(tuple(sorted(clip.captions.items())) for clip in clips if clip.captions)
    return {
        "clips": sum(bool(clip.captions) for clip in clips),
        "missing": sum(not clip.captions for clip in clips),
        "shared": sum(n for n in same.values() if n > 1),
        "kinds": [
            {
                "kind": kind,
                "clips": len(groups),
                "captions": sum(map(len, groups)),
                "words": _spread([len(text.split()) for group in groups for text in group]),
            }
            for kind, groups in sorted(texts.items())
        ],
    }


def _labels(clips: Sequence[Clip]) -> dict[str, Any]:
    counts = Counter(clip.label for clip in clips)
    missing = counts.pop(None, 0)
    return {"missing": missing, "classes": {str(label): n for label, n in sorted(counts.items())}}
