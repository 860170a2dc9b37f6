"""Lists of clips: tables whose rows say which part of which file is a clip, and what is seen in it."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from mutoscope.data.media import Media, is_url
from mutoscope.data.sources.folder import Folder
from mutoscope.data.sources.tables import CAPTIONS, VIDEOS, find_column, is_empty, read_seconds, read_string
from mutoscope.data.sources.tables import rows as read_rows
from mutoscope.errors import listed


@dataclass(frozen=True)
class Row:
    """A row of the list."""

    where: str
    """In the list: "line 3"."""
    id: str
    """The clip's name: DIR/ID.mp4."""
    file: str
    """As the list has it."""
    media: Media
    version: tuple[int, int]
    """Of the file, as it is now."""
    start: float
    """Seconds from the file's first frame."""
    end: float
    """Seconds from the file's first frame."""
    caption: str | None


@dataclass(frozen=True)
class Failure:
    """A row that gave no clip."""

    row: str
    """Where it is in the list: "line 3"; empty where the reason says it."""
    id: str
    file: str
    start: str
    end: str
    reason: str

    def __str__(self) -> str:
        """For messages."""
        return f"{self.row}: {self.reason}" if self.row else self.reason


def read_list(path: str, root: str | None = None) -> tuple[list[Row], list[Failure]]:
    """The rows of a list that may be tried, and those with faults. Raises ValueError where all of it makes no sense."""
    lines: list[str] = []
    found = list(read_rows(path, lines))
    failures = [Failure("", "", "", "", "", line) for line in lines]
    if not found:
        raise ValueError(f"{path}: no rows in it{listed(lines)}")
    columns = list(dict.fromkeys(name for _, cells in found for name in cells))
    names = {
        name: find_column(columns, None, usual, "")
        for name, usual in (("file", ("file", *VIDEOS)), ("start", ("start",)), ("end", ("end",)),
                            ("caption", CAPTIONS), ("id", ("id",)))
    }  # fmt: skip
    if missing := [name for name in ("file", "start", "end") if names[name] is None]:
        raise ValueError(
            f"{path}: no column {' and none '.join(missing)}; a list of clips has the columns file, start, end and, if "
            f"there are any, caption and id; this one has {', '.join(columns) or 'none'}"
        )
    if root and not is_url(root) and not os.path.isdir(root):
        raise ValueError(f"{root}: no such folder to look for the files in")
    folder = Folder(root or os.path.dirname(path) or ".")
    rows: list[Row] = []
    counts = Counter[str]()
    versions: dict[Media, tuple[int, int]] = {}
    for where, cells in found:
        cell = {name: None if column is None else cells.get(column) for name, column in names.items()}
        counts[str(cell["file"])] += 1
        if names["id"] is None:
            cell["id"] = f"{PurePosixPath(str(cell['file'])).stem}_{counts[str(cell['file'])]:04d}"
        try:
            rows.append(_row(where, cell, folder, versions, names["caption"] is not None))
        except ValueError as error:
            said = {name: str(cell[name]) for name in ("id", "file", "start", "end")}
            failures.append(Failure(row=where, reason=str(error), **said))
    ids = Counter(row.id for row in rows)
    hint = "" if names["id"] else "; name the clips in a column id"
    twice = [failure(row, f"{ids[row.id]} rows have the id {row.id}{hint}") for row in rows if ids[row.id] > 1]
    return [row for row in rows if ids[row.id] == 1], [*failures, *twice]


def failure(row: Row, reason: str) -> Failure:
    """Of a row that has no fault in itself."""
    return Failure(row.where, row.id, row.file, str(row.start), str(row.end), reason)


def _row(
    where: str, cell: dict[str, Any], folder: Folder, versions: dict[Media, tuple[int, int]], has_captions: bool
) -> Row:
    """Raises ValueError for a fault."""
    if is_empty(cell["file"]):
        raise ValueError("no file named")
    file = read_string(cell["file"], "the file").strip()
    media = Media(folder.find(file)[0])
    if media not in versions:
        try:
            versions[media] = media.version()
        except (OSError, ImportError) as error:
            raise ValueError(f"{media}: {getattr(error, 'strerror', None) or error}") from error
    start, end = read_seconds(cell["start"]), read_seconds(cell["end"])
    if start is None or end is None or start >= end:
        raise ValueError(f"the start must lie before the end; it says {cell['start']!r} and {cell['end']!r}")
    if has_captions and is_empty(cell["caption"]):
        raise ValueError("the caption is empty; write one, or leave the column out")
    caption = read_string(cell["caption"], "a caption").strip() if has_captions else None
    clip_id = "" if is_empty(cell["id"]) else str(cell["id"]).strip().removesuffix(".mp4")
    _check_id(clip_id)
    return Row(where, clip_id, file, media, versions[media], start, end, caption)


def _check_id(clip_id: str) -> None:
    """Raises ValueError for one that leads out of the folder, that no file can have or that would be hidden."""
    for part in clip_id.split("/"):
        if not part or part.startswith(".") or not part.isprintable() or len(part.encode()) > 240 or "\\" in part:
            raise ValueError(
                f"the id {clip_id!r:.80} can't be a file's name: parts must have 1 to 240 bytes, begin with no dot and "
                "hold no backslash or unprintable character"
            )
