"""The clips' index: how long, how fast and how large every clip is, found without decoding it and remembered on disk.

What is found is kept in ``$XDG_CACHE_HOME/mutoscope/clips`` (``~/.cache`` where that is not set), so that a second
start on a large data set costs a look at the files' times and nothing else. An entry is found by a hash of the file's
name, its time and size, and the part of it that is the clip: what has changed is not found, and probed anew. Only what
could be read is remembered; a broken clip is tried each time, so that a mended disk or library is seen at once.

The folder may be deleted at any time. Its files are only ever appended to, a block of lines in one write. Every line
carries a checksum, so that writers that meet, or one that dies, spoil a line at most, and that line is not taken.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass, fields
from functools import lru_cache, partial

import av
import xxhash

from mutoscope.data.decoding import VideoError
from mutoscope.data.flying_mnist import FLYING_MNIST, preset_named
from mutoscope.data.media import Media, is_url
from mutoscope.data.sources.layouts import Clip
from mutoscope.data.video import SAME_TIME, frame_index, frames_at, probe
from mutoscope.files import cache_folder
from mutoscope.supervise import Alive, Lost, in_threads, supervise

VERSION = 1
"""Raised whenever the same file would give another `ClipInfo`."""
FILES = 256
"""Files of the index. Which one an entry is in hangs on its clip's folder, so that a data set touches few of them."""
BLOCK = 1000
"""Entries that are written at a time: what a run that is killed loses at most."""
THREADS = min(32, (os.cpu_count() or 1) + 4)
"""More than cores, for the disk is waited for as well."""
MANY = 1000
"""Files from which on it is worth while to start processes."""
PROCESSES = min(32, 2 * (os.cpu_count() or 1))
"""More than cores, for the same reason."""
TOGETHER = 16
"""Files that a process is given at a time."""
GRACE = 5.0
"""Seconds beyond its time that a file gets to notice that it is late, which a dead disk keeps it from."""

Key = tuple[int, bytes]
"""Which of the index's files, and the entry's name there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipInfo:
    """What is known of a clip without decoding it; where it is a part of a file, of that part."""

    frames: int
    """As many as the file has."""
    fps: float
    """Mean rate of the whole file; 0 for an image."""
    height: int
    """As displayed, after the rotation."""
    width: int
    """As displayed, after the rotation."""
    duration: float
    """Seconds; 0 for an image."""
    rotation: int
    """Degrees counter-clockwise by which stored frames are turned for display."""
    image: bool
    """Whether it is a still."""

    def count(self, fps: float | None) -> int:
        """Frames after resampling to this rate: as many as `video.frames_at` gives."""
        if fps is None or self.image:
            return self.frames
        return max(0, math.ceil((self.duration - SAME_TIME) * fps))


_FIELDS = tuple(field.name for field in fields(ClipInfo))


def inspect(
    clips: Sequence[Clip], timeout: float = 60.0, on_clip: Callable[[], None] | None = None
) -> list[ClipInfo | str]:
    """Each clip's info or, of one that can't be read, why.

    A file is demuxed once, however many clips are parts of it; one that takes more than `timeout` seconds
    counts as broken. `on_clip` is called once for every clip, in this thread.
    """
    found: list[ClipInfo | str | None] = [None] * len(clips)

    def note(place: int, info: ClipInfo | str) -> None:
        found[place] = info
        if on_clip is not None:
            on_clip()

    keys: dict[int, Key] = {}
    versions = _versions({c.media.path for c in clips if not _is_drawn(c)})
    for place, clip in enumerate(clips):
        if _is_drawn(clip):
            note(place, _drawn_info(clip))
        elif isinstance(version := versions[clip.media.path], str):
            note(place, f"{clip.path}: {version}")
        else:
            keys[place] = _key(clip, version)
    for place, info in _recall(keys):
        note(place, info)
    parts: dict[Media, list[int]] = {}
    for place in keys:
        if found[place] is None:
            parts.setdefault(clips[place].media, []).append(place)
    new: list[tuple[Key, ClipInfo]] = []
    try:
        waiting = list(parts.values())
        for number, infos in _look_at([[clips[p] for p in places] for places in waiting], timeout):
            for n, place in enumerate(waiting[number]):
                one = f"{clips[place].path}: {infos.reason}" if isinstance(infos, Lost) else infos[n]
                note(place, one)
                if isinstance(one, ClipInfo):
                    new.append((keys[place], one))
            if len(new) >= BLOCK:
                _remember(new)
                new.clear()
    finally:
        _remember(new)
    return [info for info in found if info is not None]


def look(clip: Clip, timeout: float = 60.0) -> ClipInfo | str:
    """`inspect` of one clip, here and now, whatever is remembered."""
    return _drawn_info(clip) if _is_drawn(clip) else _probe([clip], timeout)[0]


# ---- finding out


def _is_drawn(clip: Clip) -> bool:
    return clip.media.path.startswith(FLYING_MNIST)


def _drawn_info(clip: Clip) -> ClipInfo:
    return _info_of_preset(clip.media.path.removeprefix(FLYING_MNIST).partition("/")[0])


@lru_cache
def _info_of_preset(name: str) -> ClipInfo:
    p = preset_named(name)
    return ClipInfo(
        frames=p.frames, fps=p.fps, height=p.size, width=p.size, duration=p.frames / p.fps, rotation=0, image=False
    )  # fmt: skip


def _versions(paths: Iterable[str]) -> dict[str, tuple[int, int] | str]:
    """Time and size of every file, or why there are none."""

    def look(some: list[str]) -> list[tuple[int, int] | str]:
        return [_version(path) for path in some]

    listed = list(paths)
    blocks = [listed[n : n + 256] for n in range(0, len(listed), 256)]  # A future for each path would cost more.
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(listed, (version for block in pool.map(look, blocks) for version in block), strict=True))


def _version(path: str) -> tuple[int, int] | str:
    try:
        return Media(path).version()
    except (OSError, ImportError) as error:
        return getattr(error, "strerror", None) or str(error)


def _look_at(files: list[list[Clip]], timeout: float) -> Iterator[tuple[int, list[ClipInfo | str] | Lost]]:
    """`_probe` of the clips of each file, by its number, as they finish: a few, or what lies behind a URL, in threads.

    Many are shared by processes, for threads would wait for one another in Python, at twice the CPU time; there, one
    that crashes the decoder is broken like others.
    """
    if len(files) < MANY or any(is_url(clips[0].media.path) for clips in files):
        yield from in_threads(lambda n: _probe(files[n], timeout), range(len(files)), THREADS, timeout + GRACE)
        return
    numbered = list(enumerate(files))
    jobs = [numbered[n : n + TOGETHER] for n in range(0, len(files), TOGETHER)]
    while jobs:
        again = []
        for job, found in supervise(partial(_probe_each, timeout=timeout), jobs, PROCESSES, timeout + GRACE):
            if not isinstance(found, Lost):
                yield from zip((number for number, _ in job), found, strict=True)
            elif len(job) > 1:
                again += [[one] for one in job]  # One of them did it.
            else:
                yield job[0][0], found
        jobs = again


def _probe_each(job: list[tuple[int, list[Clip]]], alive: Alive, timeout: float) -> list[list[ClipInfo | str]]:
    found = []
    for _, clips in job:
        alive()
        found.append(_probe(clips, timeout))
    return found


def _probe(clips: list[Clip], timeout: float) -> list[ClipInfo | str]:
    """The infos of clips that are parts of one file."""
    media = clips[0].media
    try:
        whole, index = probe(media, timeout), frame_index(media, timeout)
    except VideoError as error:
        return [str(error)] * len(clips)
    infos: list[ClipInfo | str] = []
    for clip in clips:
        frames = len(frames_at(index, None, clip.start, clip.end))
        end = index.duration if clip.end is None else min(clip.end, index.duration)
        if not frames:
            part = f"from {clip.start:g} s to {'its end' if clip.end is None else f'{clip.end:g} s'}"
            infos.append(f"{media}: no frames {part}; it is {index.duration:g} s long")
            continue
        infos.append(
            ClipInfo(
                frames=frames, fps=whole.fps, height=whole.height, width=whole.width, rotation=whole.rotation,
                duration=0.0 if whole.image else end - clip.start, image=whole.image,
            )
        )  # fmt: skip
    return infos


# ---- remembering


def _key(clip: Clip, version: tuple[int, int]) -> Key:
    m = clip.media
    path = m.path if is_url(m.path) else os.path.abspath(m.path)
    place = (path, m.member, m.offset, m.size, m.row, m.column, clip.start, clip.end)
    identity = repr((VERSION, av.__version__, place, version))
    return _file_of(os.path.dirname(path)), xxhash.xxh3_128_hexdigest(identity.encode()).encode()


@lru_cache(maxsize=4096)
def _file_of(folder: str) -> int:
    return xxhash.xxh3_64_intdigest(os.fsencode(folder)) % FILES


def _recall(keys: dict[int, Key]) -> Iterator[tuple[int, ClipInfo]]:
    """Those of these clips that are remembered, by place."""
    if (folder := cache_folder("clips")) is None:
        return
    wanted: dict[int, dict[bytes, list[int]]] = {}
    for place, (number, name) in keys.items():
        wanted.setdefault(number, {}).setdefault(name, []).append(place)
    for number, names in wanted.items():
        # Never written, or not ours to read: nothing is known then.
        with suppress(OSError), open(folder / f"{number:02x}", "rb") as file:
            for line in file:
                checksum, _, entry = line.rstrip(b"\n").partition(b" ")
                name, _, values = entry.partition(b" ")
                if name in names and checksum == _checksum(entry):
                    info = _parse(values)
                    for place in names.pop(name):  # Another run may have written it, too.
                        yield place, info


def _remember(entries: Sequence[tuple[Key, ClipInfo]]) -> None:
    """Append to the index. Where it can't be written, nothing is remembered, and the next run probes again."""
    if (folder := cache_folder("clips")) is None or not entries:
        return
    files: dict[int, list[bytes]] = {}
    for (number, name), info in entries:
        entry = name + b" " + json.dumps(astuple(info)).encode()
        files.setdefault(number, []).append(_checksum(entry) + b" " + entry)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, lines in files.items():
            # Unbuffered: one write appends the block whole, whoever else appends. It begins on a new line, whatever
            # a writer that died has left.
            with open(folder / f"{number:02x}", "ab", buffering=0) as file:
                file.write(b"\n" + b"\n".join(lines) + b"\n")
    except OSError:  # Read-only, or full.
        return


def _checksum(entry: bytes) -> bytes:
    return xxhash.xxh3_64_hexdigest(entry).encode()


@lru_cache(maxsize=4096)  # Most clips of a data set are alike.
def _parse(values: bytes) -> ClipInfo:
    return ClipInfo(**dict(zip(_FIELDS, json.loads(values), strict=True)))
