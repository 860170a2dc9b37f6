"""A folder that a latent store lies in: here, or behind a URL of an object store that fsspec knows (s3://, gs://).

Here, files are appended to and replaced atomically. In an object store nothing can be appended, but every object is
there whole or not at all: what is written is sent whole. What is read of large files is kept in
``$XDG_CACHE_HOME/mutoscope/stores`` (`data/shards.py`).
"""

from __future__ import annotations

import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import xxhash

from mutoscope.data.media import is_url
from mutoscope.files import cache_folder, replacing

LOCK = ".lock"
RENEW = 15.0
"""Seconds after which the holder of a lock in an object store says again that it lives."""


@dataclass(frozen=True)
class Place:
    """A folder, here or behind a URL. Names are of what lies in it, and may have slashes.

    Raises FileNotFoundError for what is not there, and ValueError where a URL can't be reached.
    """

    root: str

    @staticmethod
    def of(root: str | Path | Place) -> Place:
        """file:// is here."""
        if isinstance(root, Place):
            return root
        text = os.fspath(root).removeprefix("file://").removeprefix("local://")
        return Place(text.rstrip("/") or "/")

    def __str__(self) -> str:
        return self.root

    def __truediv__(self, name: str) -> Place:
        return Place(f"{self.root}/{name}")

    @property
    def remote(self) -> bool:
        """Whether it is behind a URL."""
        return is_url(self.root)

    @property
    def path(self) -> Path:
        """Of a folder here."""
        assert not self.remote
        return Path(self.root)

    @property
    def cache(self) -> Path | None:
        """Where what is read from behind a URL is kept; None where there is no home."""
        folder = cache_folder("stores")
        return folder and folder / xxhash.xxh3_128_hexdigest(self.root.encode())

    def names(self) -> list[str]:
        """What lies directly in it, sorted; nothing where there is no such folder."""
        if not self.remote:
            return sorted(os.listdir(self.root)) if os.path.isdir(self.root) else []
        with self._opened() as (system, path):
            system.invalidate_cache()  # Others write there, too.
            try:
                found = system.ls(path, detail=False)
            except FileNotFoundError:
                return []
        names = (name.rstrip("/") for name in found)
        return sorted(name.rpartition("/")[2] for name in names if name != path.rstrip("/"))

    def read(self, name: str) -> bytes:
        """A file's content."""
        if not self.remote:
            return (self.path / name).read_bytes()
        with self._opened() as (system, path):
            content: bytes = system.cat_file(f"{path}/{name}")
            return content

    def read_all(self, names: list[str]) -> list[bytes]:
        """Several small files' contents, at once from behind a URL."""
        if not self.remote or not names:
            return [self.read(name) for name in names]
        with self._opened() as (system, path):
            contents = system.cat([f"{path}/{name}" for name in names])
            return [contents[f"{path}/{name}"] for name in names]

    def read_part(self, name: str, start: int, stop: int) -> bytes:
        """Bytes of a file behind a URL; fewer where it is shorter."""
        with self._opened() as (system, path):
            content: bytes = system.cat_file(f"{path}/{name}", start=start, end=stop)
            return content

    def write(self, name: str, content: bytes) -> None:
        """Replaces a file, all or nothing."""
        if not self.remote:
            self.path.mkdir(parents=True, exist_ok=True)
            with replacing(self.path / name) as aside:
                aside.write_bytes(content)
            return
        with self._opened() as (system, path):
            system.pipe_file(f"{path}/{name}", content)

    def send(self, file: Path, name: str) -> None:
        """Replaces a file behind a URL by one from here, all or nothing."""
        with self._opened() as (system, path):
            system.put_file(str(file), f"{path}/{name}")

    def fetch(self, name: str, file: Path) -> None:
        """Copies a file from behind a URL."""
        with self._opened() as (system, path):
            system.get_file(f"{path}/{name}", str(file))

    @contextmanager
    def held(self, say: Callable[[str], None]) -> Iterator[None]:
        """Keeps other processes that ask for it, too, from writing here meanwhile. say: told if that takes a while.

        Raises ValueError where another process holds it. Here the lock goes with the process, however it ends. An
        object store has no such locks: there the lock is an object, written on the condition that there is none, and
        again and again while it is held. One that is not written any more is that of a job which was killed, and is
        taken over.
        """
        if self.remote:
            with self._held_by_object(say):
                yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / LOCK, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{self}: another process is encoding into it") from None
            yield

    @contextmanager
    def _held_by_object(self, say: Callable[[str], None]) -> Iterator[None]:
        owner = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}"
        try:
            with self._opened() as (system, path):
                system.pipe_file(f"{path}/{LOCK}", owner.encode(), mode="create")
        except FileExistsError:
            self._wait_for_sign(say)
            self.write(LOCK, owner.encode())
        ended = threading.Event()

        def renew() -> None:
            beat = 0
            while not ended.wait(RENEW):
                beat += 1
                self.write(LOCK, f"{owner} {beat}".encode())

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            with self._opened() as (system, path), suppress(FileNotFoundError):
                if system.cat_file(f"{path}/{LOCK}").decode().startswith(owner):
                    system.rm_file(f"{path}/{LOCK}")

    def _wait_for_sign(self, say: Callable[[str], None]) -> None:
        """Returns when whoever holds the lock has shown to be dead; raises ValueError as soon as it lives."""
        with suppress(FileNotFoundError):  # Given back meanwhile.
            seen = self.read(LOCK)
            host, number = (seen.decode().split() or ["somebody", "?"])[:2]  # a folder's, copied here, is empty
            if host == socket.gethostname() and not os.path.exists(f"/proc/{number}"):
                return
            say(f"{self}: {host} (process {number}) was encoding into it; seeing for {2 * RENEW:g} s whether it lives")
            until = time.monotonic() + 2 * RENEW
            while time.monotonic() < until:
                time.sleep(RENEW / 10)
                if self.read(LOCK) != seen:
                    raise ValueError(f"{self}: another process is encoding into it: {host}, process {number}")

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, str]]:
        """The file system, and the folder's path in it. Each back end has exceptions of its own."""
        try:
            yield fsspec.url_to_fs(self.root)
        except (FileNotFoundError, FileExistsError):
            raise
        except Exception as error:
            raise ValueError(f"{self}: can't be reached: {type(error).__name__}: {error}") from error
