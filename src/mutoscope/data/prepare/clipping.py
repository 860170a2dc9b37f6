"""Clips out of long videos: a list of (file, start, end, caption) becomes a folder to train on.

A clip holds exactly the frames whose timestamps lie in [start, end), in seconds from the file's first frame, with the
times between them as they were. They are encoded anew, in short groups of pictures, since finding a frame decodes half
of one on average, and without B-frames, since an mp4 with them can't tell how long its last frame is shown where the
rate varies. Sound is left out.

DIR/.clips.jsonl tells of which row each clip was made, so that a command that was stopped goes on, and a row that has
changed gives a new clip. A line is written before a clip is begun and another when it is whole: a file that has neither
is somebody else's and never written over.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import os
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, fields
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

import av
import numpy as np
from jaxtyping import Int64, UInt8

from mutoscope.data.decoding import Deadline, VideoError
from mutoscope.data.images import is_image
from mutoscope.data.media import Media
from mutoscope.data.prepare.clip_list import Failure, Row, failure, read_list
from mutoscope.data.seeking import FrameIndex, Packets, packets_of
from mutoscope.data.sources.splits import LEDGER
from mutoscope.data.video import Clock, frames_at, iter_frames, resize, write_video
from mutoscope.errors import listed
from mutoscope.files import replacing
from mutoscope.progress import Bars
from mutoscope.randomness import seed_of
from mutoscope.supervise import Alive, Lost, supervise

VERSION = 1
"""Raised whenever the same row would give another file."""
FAILURES = "failures.csv"
IN_A_ROW = 8
"""Clips of one file that one process makes at most, one after the other: the file is demuxed once for them."""
FINEST = Fraction(1, 10**6)
"""Seconds. An mp4 has 32 bits for the time that a frame is shown: in much finer units that is too short."""
STOPS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
"""Faults of the folder that is written to, which the next clip would meet as well."""


@dataclass(frozen=True, kw_only=True)
class ClipFormat:
    """How clips are written."""

    fps: float | None = None
    """Frames per second to resample to; none keeps every frame and its time."""
    height: int | None = None
    """Height in pixels, even; none keeps the file's."""
    width: int | None = None
    """Width in pixels, even; none keeps the file's."""
    resize: Literal["crop", "pad", "squash"] = "crop"
    """How another aspect ratio is met."""
    gop: int = 24
    """Frames from one keyframe to the next at most."""


@dataclass(frozen=True, kw_only=True)
class Clipped:
    """What `clip` did."""

    made: int
    kept: int
    """Clips that were there, made of the same rows."""
    others: int
    """Clips in the folder that were made of rows that are not in this list."""
    failures: tuple[Failure, ...]
    """As in DIR/failures.csv."""


def clip(
    list_path: str | Path,
    out: str | Path,
    form: ClipFormat = ClipFormat(),
    *,
    root: str | None = None,
    workers: int = os.cpu_count() or 1,
    timeout: float = 60.0,
    keep_going: bool = False,
    progress: bool = True,
) -> Clipped:
    """Make DIR/ID.mp4 of every row of a list, and DIR/ID.txt of its caption: the layout `captioned_folder`.

    The list is a table (see `tables.rows`) with the columns file (or video, path, file_name), start and end (seconds,
    or hh:mm:ss.mmm) and, if there are any, caption (or text, prompt) and id. Files are looked for below `root`, which
    is the list's own folder unless it is given. Clips without ids are called by their file and counted: STEM_0001.

    An end may lie behind the file's by a frame, as rounded ones do; further, the row fails: no clip is ever shorter
    than its row says. A clip fails, too, if its file gives no frame for `timeout` seconds.

    `workers` processes work; 0 works in this one, which a hang or crash of a decoder then takes with it. The command
    may be stopped at any moment: run again, it makes the files that it would have made.

    Raises ValueError for a list with faults, before any clip is made; with `keep_going`, those rows fail.
    """
    out = Path(out)
    _check(form)
    rows, failures = read_list(str(list_path), root)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _opened_ledger(out) as ledger:
            rows, taken = ledger.without_taken(rows)
            failures += taken
            if failures and not keep_going:
                failures.sort(key=lambda f: (len(f.row), f.row))
                _write_failures(out / FAILURES, failures)
                count = f"{len(failures)} of {len(rows) + len(failures)} rows have faults"
                faults = listed(map(str, failures))
                raise ValueError(f"{list_path}: {count} (--keep-going makes the clips of the others):{faults}")
            keys = {row.id: _key(row, form) for row in rows}
            new = ledger.begin(rows, keys)
            made = 0
            with Bars(progress) as bars:
                tell = bars.start("clipping", len(new))
                for row, result in _make_all(new, out, form, workers, timeout):
                    if isinstance(result, OSError):
                        raise result
                    if isinstance(result, int):
                        ledger.finish(row, keys[row.id], result)
                        made += 1
                    else:
                        ledger.discard(row)
                        failures.append(failure(row, result))
                    tell()
            failures.sort(key=lambda f: (len(f.row), f.row))  # Line 3 before line 12.
            _write_failures(out / FAILURES, failures)
            others = ledger.others(keys)
    except OSError as error:
        raise ValueError(f"{out}: {error.strerror}; mend that and run the same again: it goes on from there") from error
    return Clipped(made=made, kept=len(rows) - len(new), others=others, failures=tuple(failures))


def _check(form: ClipFormat) -> None:
    if form.fps is not None and not 0.01 <= form.fps <= 1000:
        raise ValueError(f"fps={form.fps} must be between 0.01 and 1000")
    if (form.height is None) != (form.width is None):
        raise ValueError("height and width are given together, or neither is")
    for name in ("height", "width"):
        if (side := getattr(form, name)) is not None and (side < 2 or side % 2 or side > 16384):
            raise ValueError(f"{name}={side} must be even, from 2 to 16384")
    if form.gop < 1:
        raise ValueError(f"gop={form.gop} must be at least 1")


# ---- making clips


def _make_all(
    rows: Sequence[Row], out: Path, form: ClipFormat, workers: int, timeout: float
) -> Iterator[tuple[Row, int | str | OSError]]:
    """Each row with the size of its file or, where there is none, why."""
    runs: list[list[Row]] = []
    most = max(1, min(IN_A_ROW, len(rows) // (4 * max(1, workers))))
    for row in sorted(rows, key=lambda r: (r.file, r.start, r.id)):
        if not runs or runs[-1][0].file != row.file or len(runs[-1]) == most:
            runs.append([])
        runs[-1].append(row)
    work = partial(_make_run, out=out, form=form)
    if workers == 0:
        for run in runs:
            for row in run:
                yield row, work([row], lambda: None)[0]
        return
    while runs:
        again = []
        for run, result in supervise(work, runs, workers, timeout):
            if not isinstance(result, Lost):
                yield from zip(run, result, strict=True)
            elif len(run) > 1:
                again += [[row] for row in run]  # One of them did it.
            else:
                yield run[0], f"{run[0].media}: {result.reason}"
        runs = again


def _make_run(rows: list[Row], alive: Alive, *, out: Path, form: ClipFormat) -> list[int | str | OSError]:
    return [_make(row, alive, out / f"{row.id}.mp4", form) for row in rows]


def _make(row: Row, alive: Alive, target: Path, form: ClipFormat) -> int | str | OSError:
    """Write a clip. Its size in bytes or, where it can't be made, why."""
    try:
        if is_image(row.media):
            return f"{row.media}: an image, not a video"
        packets = packets_of(row.media, Deadline(row.media, None))
        numbers = _numbers(packets, row, form)
        aspect = 1.0 if form.height is not None and form.resize == "squash" else packets.pixel_aspect
        frames = _frames(row.media, numbers, alive, form)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_video(
            target, frames, form.fps or _clock(packets.frames, numbers, row.end), gop=form.gop, pixel_aspect=aspect
        )
        return target.stat().st_size
    except (OSError, av.FFmpegError) as error:
        if error.errno in STOPS:
            return OSError(error.errno, error.strerror)
        return f"{target}: can't be written: {error.strerror or error}"
    except ValueError as error:  # VideoError, or frames that can't be written.
        return str(error)


def _numbers(packets: Packets, row: Row, form: ClipFormat) -> Int64[np.ndarray, "n"]:
    """Of the clip's frames. Raises VideoError where the file does not have them all."""
    index, fault = packets.frames, packets.fault
    whole_until = float(index.times[-1]) if fault else index.duration
    if row.end > whole_until + (0.0 if fault else 1 / index.fps):
        raise VideoError(fault or f"{row.media}: ends at {index.duration:.3f} s, the clip would at {row.end:g} s")
    numbers = frames_at(index, form.fps, row.start, row.end)
    if not len(numbers):
        raise VideoError(f"{row.media}: no frame has its time between {row.start:g} and {row.end:g} s")
    return numbers


def _clock(index: FrameIndex, numbers: Int64[np.ndarray, "n"], end: float) -> Clock:
    """When these frames are shown, the first at 0. The last one stays as long as in the file, but past the clip's end
    only as long as the file's frames usually do: a slide may stay for minutes."""
    times = np.append(index.times, index.duration)
    usual = float(np.median(np.diff(times)))
    times = times[numbers[0] : numbers[-1] + 2]
    times[-1] = min(times[-1], max(end, times[-2] + usual))
    unit = max(index.unit, FINEST)
    return Clock(pts=np.rint((times - times[0]) / float(unit)).astype(np.int64), unit=unit)


def _frames(
    media: Media, numbers: Int64[np.ndarray, "n"], alive: Alive, form: ClipFormat
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    for frame in iter_frames(media, numbers):
        alive()
        if form.height is not None and form.width is not None:
            frame = resize(frame[None], form.height, form.width, form.resize)[0]
        yield frame


# ---- what there is


def _key(row: Row, form: ClipFormat) -> str:
    """Names what is in a clip's file: the source as it is now, the part of it and the format."""
    facts = (VERSION, row.file, *row.version, row.start, row.end, *astuple(form))
    return f"{seed_of('clip', *map(str, facts)):016x}"


class _Ledger:
    """What DIR/.clips.jsonl says: by id, the last line on it.

    {"id", "file"}: was begun; {"id", "file", "clip", "bytes", "caption"}: is whole, of this key, size and caption.
    """

    def __init__(self, out: Path, file: IO[bytes]) -> None:
        self.out, self.file = out, file
        self.entries: dict[str, dict[str, Any]] = {}
        whole = 0
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):  # Else torn by a kill.
                try:
                    entry = json.loads(line)
                    self.entries[entry["id"]] = entry
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{out / LEDGER}, line {number}: damaged; choose another folder") from error
                whole += len(line)
        file.truncate(whole)

    def without_taken(self, rows: Sequence[Row]) -> tuple[list[Row], list[Failure]]:
        """The rows without those whose clips would take the place of others, and these."""
        free, taken = [], []
        for row in rows:
            entry = self.entries.get(row.id)
            there = next((p for p in self._paths(row) if p.exists()), None)
            if there and (entry is None or entry["file"] != row.file):
                maker = "not made by this command" if entry is None else f"a clip of {entry['file']}"
                taken.append(failure(row, f"{there} is there and {maker}; remove it, or choose another id or folder"))
            else:
                free.append(row)
        return free, taken

    def begin(self, rows: Sequence[Row], keys: Mapping[str, str]) -> list[Row]:
        """The rows whose clips have to be made. Of the others, new captions are written."""
        new = []
        for row in rows:
            entry, (video, caption) = self.entries.get(row.id, {}), self._paths(row)
            if entry.get("clip") != keys[row.id] or not video.exists() or video.stat().st_size != entry["bytes"]:
                new.append(row)
            elif entry["caption"] != row.caption or caption.exists() != (row.caption is not None):
                self.finish(row, keys[row.id], entry["bytes"])
        self._write(*({"id": row.id, "file": row.file} for row in new))
        return new

    def finish(self, row: Row, key: str, size: int) -> None:
        """The row's file is written: write its caption, and that it is whole."""
        text = self._paths(row)[1]
        if row.caption is None:
            text.unlink(missing_ok=True)
        else:
            with replacing(text) as aside:
                aside.write_text(row.caption + "\n", encoding="utf-8", newline="")
        self._write({"id": row.id, "file": row.file, "clip": key, "bytes": size, "caption": row.caption})

    def discard(self, row: Row) -> None:
        """Remove what was made of an earlier form of a row that has failed."""
        for path in self._paths(row):
            path.unlink(missing_ok=True)

    def others(self, ids: Container[str]) -> int:
        """Number of finished clips that have none of these ids."""
        return sum("clip" in entry and name not in ids for name, entry in self.entries.items())

    def _paths(self, row: Row) -> tuple[Path, Path]:
        return self.out / f"{row.id}.mp4", self.out / f"{row.id}.txt"

    def _write(self, *entries: dict[str, Any]) -> None:
        self.entries.update((entry["id"], entry) for entry in entries)
        self.file.write("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode())
        self.file.flush()
        os.fsync(self.file.fileno())


@contextmanager
def _opened_ledger(out: Path) -> Iterator[_Ledger]:
    """Raises ValueError where another process has it open."""
    with open(out / LEDGER, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"{out}: another `mutoscope data clip` is at work there") from error
        file.seek(0)
        yield _Ledger(out, file)


def _write_failures(path: Path, failures: Sequence[Failure]) -> None:
    if not failures:
        return path.unlink(missing_ok=True)
    with replacing(path) as aside, open(aside, "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, [field.name for field in fields(Failure)])
        table.writeheader()
        table.writerows(asdict(failure) for failure in failures)
    return None
