"""A folder of clips, here or behind a URL that fsspec knows: which files are in it, and the bytes of the small ones.

Files are looked up in listings of whole folders and never one by one: on a network's disk a hundred thousand questions
take minutes.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator

import fsspec

from mutoscope.data.media import is_url


class Folder:
    """A folder and what lies below it. Names are relative to it, with slashes."""

    def __init__(self, root: str) -> None:
        """Raises ValueError where there is no such folder."""
        self.root = root.rstrip("/") if is_url(root) else os.path.normpath(os.path.expanduser(root))
        self._listed: dict[str, frozenset[str] | str] = {}
        if not is_url(self.root):
            if not os.path.isdir(self.root):
                kind = "not a folder" if os.path.exists(self.root) else "no such folder"
                raise ValueError(f"data.root={root}: {kind}")
        elif not self._remote_names(""):
            raise ValueError(f"data.root={root}: no such folder, or it is empty")

    def path(self, name: str) -> str:
        """Where a file of the folder is; an absolute name and a URL are kept."""
        if is_url(name):
            return name
        if is_url(self.root) and not name.startswith("/"):
            scheme, _, root = self.root.partition("://")
            return f"{scheme}://{posixpath.normpath(f'{root}/{name}')}" if name else self.root
        return name if name.startswith("/") else f"{self.root}/{name}"

    def names(self, below: str = "") -> dict[str, bool]:
        """The files and folders in a folder, and which of them are folders; empty where there is no such folder."""
        if is_url(self.root):
            return self._remote_names(below)
        if not os.path.isdir(self.path(below)):
            return {}
        return {entry.name: entry.is_dir() for entry in _scan(self.path(below))}

    def files(self, faults: list[str], below: str = "") -> list[str]:
        """All files below a folder of it, sorted, without hidden ones: macOS leaves a ._NAME.mp4 beside every file
        that it copies to a foreign disk. Links are followed; those to nowhere are added to `faults`."""
        start = f"{below}/" if below else ""
        return sorted(self._remote_files(start) if is_url(self.root) else self._local_files(start, faults))

    def find(self, name: str, below: str = "") -> tuple[str, str]:
        """Where a file is that a table or a list names, and its name relative to the folder; an absolute one for what
        lies elsewhere. Names are relative to `below`. What is behind a URL outside of this folder is not asked for.

        Raises ValueError where there is no such file.
        """
        if is_url(name):
            return name, name.removeprefix(f"{self.root}/")
        wanted = _normal(below, name)
        path = self.path(wanted)
        fault = self._why_missing(wanted, path)
        if fault and "\\" in name:  # Written on Windows.
            wanted = _normal(below, name.replace("\\", "/"))
            path = self.path(wanted)
            fault = self._why_missing(wanted, path)
        if fault:
            raise ValueError(f"{fault}: {path}")
        return path, wanted.removeprefix(f"{self.root}/")

    def _why_missing(self, name: str, path: str) -> str | None:
        """Why there is no such file; None where there is one."""
        if is_url(path):
            if name.startswith("../"):
                return None
            if "" not in self._listed:
                self._listed[""] = frozenset(self._remote_files(""))
            known = self._listed[""]
        else:
            below, _, name = path.rpartition("/")
            if below not in self._listed:
                self._listed[below] = _files_in(below or "/")
            known = self._listed[below]
            # A disk that takes A.mp4 and a.mp4 for one has the file under another name.
            if not isinstance(known, str) and name not in known and os.path.isfile(path):
                return None
        if isinstance(known, str):
            return known
        return None if name in known else "no such file"

    def _local_files(self, start: str, faults: list[str]) -> Iterator[str]:
        top = self.path(start)
        waiting: list[tuple[str, tuple[str, ...]]] = []
        if os.path.isdir(top):
            waiting.append((start, (os.path.realpath(top),)))
        while waiting:
            below, chain = waiting.pop()
            for entry in _scan(self.path(below)):
                name = below + entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(chain[-1], entry.name)
                    if real not in chain:  # Else a link to a folder above, which would go round for ever.
                        waiting.append((f"{name}/", (*chain, real)))
                elif entry.is_file():
                    yield name
                elif entry.is_symlink():
                    faults.append(f"{entry.path}: a link to a file that is not there; mend it or remove it")

    def _remote_files(self, start: str) -> Iterator[str]:
        for name in _remote(self.root, self.path(start), deep=True):
            if not any(part.startswith(".") for part in name.split("/")):
                yield name

    def _remote_names(self, below: str) -> dict[str, bool]:
        names = _remote(self.root, self.path(below), deep=False)
        return {posixpath.basename(name): is_folder for name, is_folder in names.items()}


def read_bytes(path: str) -> bytes:
    """What is in a file, here or at a URL. Raises ValueError where it can't be read."""
    try:
        with fsspec.open(path, "rb") if is_url(path) else open(path, "rb") as file:
            content: bytes = file.read()
            return content
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, ImportError) as error:
        raise ValueError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}") from error


def _normal(below: str, name: str) -> str:
    path = f"{below}/{name}" if below and not name.startswith("/") else name
    return posixpath.normpath(path) if "./" in path or "//" in path else path


def _scan(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise ValueError(f"{folder}: can't be read: {error.strerror}") from error


def _files_in(folder: str) -> frozenset[str] | str:
    """The files in a folder, or why they can't be known."""
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if entry.is_file())
    except FileNotFoundError:
        return "no such file"
    except OSError as error:
        return f"can't be read: {error.strerror}"


def _remote(root: str, folder: str, deep: bool) -> dict[str, bool]:
    """What lies in a folder at a URL, by name relative to the root, and which of it are folders."""
    try:
        system, path = fsspec.core.url_to_fs(folder)
        top = fsspec.core.url_to_fs(root)[1].rstrip("/")
        if deep:
            facts = system.find(path, detail=True).values() if system.isdir(path) else ()
        else:
            facts = system.ls(path, detail=True) if system.isdir(path) else ()
    except Exception as error:  # Each back end has exceptions of its own, for want of credentials for example.
        raise ValueError(f"{folder}: can't be listed: {type(error).__name__}: {error}") from error
    found = {str(fact["name"])[len(top) + 1 :].rstrip("/"): fact["type"] == "directory" for fact in facts}
    found.pop("", None)  # Object stores list a folder in itself.
    return found
