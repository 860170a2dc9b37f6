"""Media: where the bytes of a video or an image are, and how to open them.

A file here; a file behind a URL that fsspec knows (s3://, gs://, hf://, https://); a member of a tar file, by its place
in it; or a cell of a Parquet or Arrow file. Nothing is unpacked. What is small and far away is fetched in one request,
of what is large only what the decoder asks for.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any

import fsspec

from mutoscope.data.sources.parquet import read_cell
from mutoscope.randomness import seed_of

FETCHED = 2**24
"""Bytes up to which what is behind a URL is fetched whole; larger files are read block by block."""
REMEMBERED = 4
"""How many of those are kept: a clip is opened for its timestamps, and at once again for its frames."""
FRESH = 60
"""Seconds for which the time and size of a file behind a URL are taken to be what they were."""

VIDEOS = frozenset([
    ".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm",
    ".wmv",
])  # fmt: skip
"""Suffixes of the videos that are looked for."""
IMAGES = frozenset([".bmp", ".jpeg", ".jpg", ".png", ".webp"])
"""Suffixes of the images that are looked for, clips of one frame each."""


@dataclass(frozen=True)
class Media:
    """The bytes of one video or image."""

    path: str
    """A file here, or a URL."""
    member: str = ""
    """Its name inside of the tar file, or "row 12" of the Parquet file; empty where it is the file itself."""
    offset: int = 0
    """Where it begins in the file, in bytes."""
    size: int | None = None
    """How many bytes it has; None up to the end of the file."""
    row: int | None = None
    """Row of a Parquet or Arrow file."""
    column: str = ""
    """Column of a Parquet or Arrow file."""

    def __str__(self) -> str:
        """For messages, and unique: path or path:member."""
        return f"{self.path}:{self.member}" if self.member else self.path

    @property
    def suffix(self) -> str:
        """As of a file's name, in lower case: ".mp4"."""
        name = self.member or self.path
        if name.startswith(("http://", "https://")):
            name = name.partition("?")[0]  # Behind it comes a signature.
        return os.path.splitext(name)[1].lower()

    def version(self) -> tuple[int, int]:
        """(time in ns, bytes) of the file: changes when the content does, behind a URL within a minute. There the time
        is a hash of what the server tells: time, ETag.

        Raises OSError where there is no such file, it is something else (a folder, a pipe) or can't be reached,
        ImportError where a URL needs a library that is not installed.
        """
        if is_url(self.path):
            return _remote_version(self.path, int(time.monotonic() / FRESH))
        state = os.stat(self.path)
        if stat.S_ISDIR(state.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), self.path)
        if not stat.S_ISREG(state.st_mode):  # Opening a pipe waits for somebody to write into it.
            raise OSError(errno.EINVAL, "Not a regular file", self.path)
        return state.st_mtime_ns, state.st_size

    @contextmanager
    def opened(self) -> Iterator[str | IO[bytes]]:
        """The path of a whole local file, or else a seekable stream of the bytes. Raises as `version` does, also when
        the stream is read."""
        if self.row is not None:
            try:
                cell = read_cell(self.path, self.row, self.column)
            except ValueError as error:
                raise OSError(str(error)) from error
            yield io.BytesIO(cell)
        elif is_url(self.path):
            version = self.version()
            size = version[1] - self.offset if self.size is None else self.size
            if size <= FETCHED:
                yield io.BytesIO(_fetch(self.path, self.offset, size, version))
                return
            with _explained():
                filesystem, place = fsspec.url_to_fs(self.path)
                file = filesystem.open(place, "rb")
            with file:
                yield _Slice(file, self.offset, size)  # type: ignore[misc]
        elif self.offset or self.size is not None:
            with open(self.path, "rb", buffering=0) as file:  # The decoder has a buffer of its own.
                size = os.fstat(file.fileno()).st_size - self.offset if self.size is None else self.size
                yield _Slice(file, self.offset, size)  # type: ignore[misc]
        else:
            yield self.path


def is_url(path: str) -> bool:
    """Whether a path is for fsspec to open."""
    return "://" in path


@lru_cache(maxsize=4096)
def _remote_version(path: str, minute: int) -> tuple[int, int]:
    """minute: is there to forget."""
    with _explained():
        filesystem, place = fsspec.url_to_fs(path)
        facts = filesystem.info(place)
        if facts.get("size") is None:
            raise OSError("the server does not tell its size")
    stamps = [str(facts[key]) for key in ("mtime", "LastModified", "created", "ETag") if key in facts]
    return seed_of("version", *stamps), int(facts["size"])


@lru_cache(maxsize=REMEMBERED)
def _fetch(path: str, offset: int, size: int, version: tuple[int, int]) -> bytes:
    """version: is there to forget what has changed."""
    with _explained():
        filesystem, place = fsspec.url_to_fs(path)
        return filesystem.cat_file(place, start=offset, end=offset + size)


@contextmanager
def _explained() -> Iterator[None]:
    """Errors of what is behind a URL as OSError. The libraries of object stores have their own, such as botocore's."""
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


class _Slice(io.RawIOBase):
    """Some bytes of an open file (Python's or fsspec's) as a file of their own."""

    def __init__(self, file: Any, offset: int, size: int) -> None:
        self.file, self.offset, self.size, self.place = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        self.place = max(0, base + place)
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer: Any) -> int:
        with _explained():
            self.file.seek(self.offset + self.place)
            read = self.file.read(max(0, min(len(buffer), self.size - self.place)))
        buffer[: len(read)] = read
        self.place += len(read)
        return len(read)
