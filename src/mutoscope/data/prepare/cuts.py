"""Lists of clips from films: where one scene ends and the next begins, by PySceneDetect (the extra "cuts").

PySceneDetect's ContentDetector compares each frame with the one before: the mean change of hue, saturation and
brightness (0 to 255). It is given our frames, and numbers in place of times, so that a cut is the number of a frame and
its time exact at any frame rate. Fades and dissolves are no cuts to it.

What is found is kept beside the list, in .LIST.scenes.jsonl, so that a command that was stopped goes on, and another
choice of lengths decodes nothing.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int64

from mutoscope.data.decoding import VideoError
from mutoscope.data.media import VIDEOS, Media, is_url
from mutoscope.data.sources.folder import Folder
from mutoscope.data.video import SAME_TIME, frame_index, iter_frames
from mutoscope.files import replacing
from mutoscope.progress import Bars
from mutoscope.randomness import seed_of
from mutoscope.supervise import Alive, Lost, supervise

if TYPE_CHECKING:
    from scenedetect.detectors import ContentDetector

VERSION = 1
"""Raised whenever other cuts would be found."""
WIDTH = 256
"""Pixels to which wider frames are scaled down before they are compared, as PySceneDetect does."""

Scenes = tuple[float, ...]
"""When each scene begins, in seconds from the first frame, and when the last one ends."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What `find_clips` found."""

    videos: int
    """Videos that could be read."""
    clips: int
    seconds: float
    """Of the clips, altogether."""
    short: int
    """Scenes, and rests of long ones, that were left out because they are too short."""
    short_seconds: float
    """Of those, altogether."""
    failures: tuple[str, ...]
    """Videos that could not be read, and why."""


def find_clips(
    places: Sequence[str],
    out: str | Path,
    *,
    min_seconds: float = 2.0,
    max_seconds: float = 10.0,
    threshold: float = 27.0,
    workers: int = os.cpu_count() or 1,
    timeout: float = 60.0,
    progress: bool = True,
) -> Found:
    """Write the list (CSV: file, start, end) of the scenes of some videos, and of all videos below some folders.

    No clip has a cut in it. Scenes longer than `max_seconds` are split into equal parts, or, where those would be
    shorter than `min_seconds`, into parts of `max_seconds` and a rest. What is shorter than `min_seconds` is left out
    and counted. `workers` processes work; 0 works in this one. A video that gives no frame for `timeout` seconds counts
    as broken.

    Raises ValueError where there are no videos, the options make no sense, or PySceneDetect is not installed.
    """
    out = Path(out)
    if not 0 < min_seconds <= max_seconds or not math.isfinite(max_seconds):
        raise ValueError(f"min_seconds={min_seconds} must be above 0, and no more than max_seconds={max_seconds}")
    if not 0 < threshold < 255:
        raise ValueError(f"threshold={threshold} must lie between 0 and 255; lower finds more cuts")
    if out.suffix != ".csv" or not out.parent.is_dir():
        raise ValueError(f"{out}: the list must be a .csv file in a folder that is there")
    videos = find_videos(places)
    _detector(threshold)  # Is PySceneDetect there? Before the work begins.
    scenes, failures = _scenes_of(videos, out, threshold, workers, timeout, progress)
    rows, kept, left = [], [], []
    for video in videos:
        if (bounds := scenes.get(video)) is not None:
            clips, short = split_scenes(bounds, min_seconds, max_seconds)
            kept += clips
            left += short
            rows += [(_relative(video, out.parent), f"{a:.6f}", f"{b:.6f}") for a, b in clips]
    with replacing(out) as aside, open(aside, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("file", "start", "end"), *rows])
    return Found(
        videos=len(scenes),
        clips=len(kept),
        seconds=sum(b - a for a, b in kept),
        short=len(left),
        short_seconds=sum(b - a for a, b in left),
        failures=tuple(failures),
    )


def find_videos(places: Iterable[str]) -> list[str]:
    """Files as they are, and all videos below folders, sorted, none twice. Raises ValueError where there is none."""
    found: list[str] = []
    for place in places:
        if os.path.isfile(place):
            found.append(place)
            continue
        if not is_url(place) and not os.path.isdir(place):
            raise ValueError(f"{place}: no such file or folder")
        folder, faults = Folder(place), list[str]()
        names = [name for name in folder.files(faults) if os.path.splitext(name)[1].lower() in VIDEOS]
        if faults or not names:
            raise ValueError(faults[0] if faults else f"{place}: no videos in it ({' '.join(sorted(VIDEOS))})")
        found += [folder.path(name) for name in names]
    return list(dict.fromkeys(found))


def find_cuts(media: Media, threshold: float = 27.0, alive: Alive = lambda: None) -> Int64[np.ndarray, "cuts"]:
    """Numbers of the frames with which a new scene begins, 0 not among them. Raises VideoError."""
    import cv2
    from scenedetect import FrameTimecode

    detector = _detector(threshold)
    cuts = []
    for number, frame in enumerate(iter_frames(media, np.arange(len(frame_index(media).times)))):
        alive()
        height, width = frame.shape[:2]
        if width > WIDTH:
            frame = cv2.resize(frame, (WIDTH, max(1, round(height * WIDTH / width))), interpolation=cv2.INTER_AREA)
        blue_first = np.ascontiguousarray(frame[..., ::-1])
        # The rate is of no consequence: with no least length of a scene, times only come back as they went in.
        found = detector.process_frame(FrameTimecode(number, 25.0), blue_first)
        cuts += [cut.frame_num for cut in found]
    return np.array(cuts, np.int64)


def split_scenes(
    bounds: Scenes, min_seconds: float, max_seconds: float
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """(start, end) of the clips, and of what is left out because it is shorter than `min_seconds`."""
    clips: list[tuple[float, float]] = []
    short: list[tuple[float, float]] = []
    for start, end in pairwise(bounds):
        parts = max(1, math.ceil((end - start - SAME_TIME) / max_seconds))
        length = (end - start) / parts
        if length < min_seconds - SAME_TIME:
            length = max_seconds
        for k in range(parts):
            part = start + k * length, end if k == parts - 1 else start + (k + 1) * length
            (short if part[1] - part[0] < min_seconds - SAME_TIME else clips).append(part)
    return clips, short


def _detector(threshold: float) -> ContentDetector:
    try:
        from scenedetect.detectors import ContentDetector
    except ImportError as error:
        raise ValueError(f'finding cuts takes PySceneDetect: pip install "mutoscope[cuts]" ({error})') from error
    return ContentDetector(threshold=threshold, min_scene_len=0)


def _scenes_of(
    videos: Sequence[str], out: Path, threshold: float, workers: int, timeout: float, progress: bool
) -> tuple[dict[str, Scenes], list[str]]:
    """The scenes of each video that can be read, and why the others can't."""
    memory = out.with_name(f".{out.name}.scenes.jsonl")
    known = _recall(memory)
    scenes, failures, jobs = {}, [], []
    for video in videos:
        try:
            key = _key(video, threshold)
        except OSError as error:
            failures.append(f"{video}: {error.strerror}")
            continue
        if key in known:
            scenes[video] = known[key]
        else:
            jobs.append((video, key))
    with Bars(progress) as bars, open(memory, "ab") as file:
        if file.tell():
            file.write(b"\n")  # A kill may have torn the last line.
        tell = bars.start("looking for cuts", len(jobs))
        work = partial(_work, threshold=threshold)
        here = ((job, work(job, lambda: None)) for job in jobs)
        for (video, key), result in here if workers == 0 else supervise(work, jobs, workers, timeout):
            if isinstance(result, str | Lost):
                failures.append(result if isinstance(result, str) else f"{video}: {result.reason}")
            else:
                scenes[video] = result
                file.write(json.dumps([key, result]).encode() + b"\n")
                file.flush()
            tell()
    return scenes, failures


def _work(job: tuple[str, str], alive: Alive, *, threshold: float) -> Scenes | str:
    """A video's scenes or, where it can't be read, why."""
    media = Media(job[0])
    try:
        index = frame_index(media)
        cuts = find_cuts(media, threshold, alive)
    except VideoError as error:
        return str(error)
    return (0.0, *index.times[cuts].tolist(), index.duration)


def _key(video: str, threshold: float) -> str:
    """Names a video as it is now, and how cuts are found. Raises OSError where it is not there."""
    place = video if is_url(video) else os.path.realpath(video)
    return f"{seed_of('cuts', VERSION, place, *Media(video).version(), str(threshold)):016x}"


def _recall(memory: Path) -> dict[str, Scenes]:
    """What earlier commands found. Lines torn by a kill are passed over: those videos are looked at again."""
    known = {}
    for line in memory.read_bytes().splitlines() if memory.exists() else ():
        with suppress(ValueError):
            key, scenes = json.loads(line)
            known[key] = tuple(scenes)
    return known


def _relative(video: str, folder: Path) -> str:
    """As the list's readers look for it: below the list's folder, or else by its whole path."""
    if is_url(video):
        return video
    path = os.path.relpath(video, folder)
    return os.path.abspath(video) if path.startswith(os.pardir) else path
