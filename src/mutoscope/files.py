"""Files and folders that are whole or not there: written aside, synced, and renamed into place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path in the same folder to write to, which takes the place of `path` when the block ends.

    A kill, a full disk or an exception at any moment leaves what was at `path` before.
    """
    aside = path.with_name(f".{path.name}.tmp")
    try:
        yield aside
        with open(aside, "rb") as written:
            os.fsync(written.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write to that becomes `path` when the block ends; nothing, or an empty folder, may be there before.

    A kill, a full disk or an exception at any moment leaves nothing at `path`.
    """
    aside = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed
    aside.mkdir(parents=True)
    try:
        yield aside
        for written in aside.rglob("*"):
            if written.is_dir():
                sync_folder(written)
            else:
                with open(written, "rb") as file:
                    os.fsync(file.fileno())
        sync_folder(aside)
        os.rename(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync_folder(path.parent)


def cache_folder(name: str) -> Path | None:
    """Where what may be deleted at any time is kept, ``$XDG_CACHE_HOME/mutoscope/NAME`` (``~/.cache`` where that is not
    set); None where there is no home. It need not be there yet."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # The XDG standard: relative paths are to be ignored.
        cache = os.path.expanduser("~/.cache")
    return Path(cache) / "mutoscope" / name if os.path.isabs(cache) else None


def sync_folder(folder: Path) -> None:
    """Make the folder's list of names survive a power cut; syncing a new file alone does not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
