"""Which files are the shards of a data set: below a folder, by a glob, by braces, or as state.json lists them."""

from __future__ import annotations

import glob
import json
import os
import posixpath
import re
from itertools import product
from math import prod
from typing import NamedTuple

import fsspec

from mutoscope.data.media import is_url
from mutoscope.data.sources.folder import Folder
from mutoscope.data.sources.tables import SPLIT_NAMES, SplitName, name_some, read_text
from mutoscope.errors import listed

MAX_SHARDS = 10**6
"""Names that braces may stand for."""
_COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|(tar|parquet)\.(gz|bz2|xz|zst|lz4))$", re.IGNORECASE)
_SPLIT = re.compile(rf"({'|'.join(SPLIT_NAMES)})(?![^-_.])", re.IGNORECASE)


class Shard(NamedTuple):
    """A file with many clips."""

    path: str
    """A file here, or a URL."""
    name: str
    """Its path below the root without suffix, with which its clips' ids begin."""

    @property
    def split(self) -> SplitName | None:
        """That after which it or the folder that it is in is called, as in train-000 and val/000."""
        for part in reversed(self.name.split("/")):
            if match := _SPLIT.match(part):
                return SPLIT_NAMES[match[1].lower()]
        return None


def find_shards(root: str, suffix: str) -> list[Shard]:
    """The files with this suffix below a folder; or those that a glob (``*``, ``**``, ``?``, ``[ab]``) or braces
    (``{000..127}``, ``{a,b}``) stand for; or the root itself. Sorted by name.

    Raises ValueError where there is none, and where there are compressed ones as well.
    """
    plain = root if is_url(root) else os.path.normpath(os.path.expanduser(root))
    wild = re.search(r"[*?\[{]", plain)
    if wild is not None and (is_url(plain) or not os.path.exists(plain)):
        base = plain[: plain.rfind("/", 0, wild.start()) + 1]
        paths = {path: path[len(base) :] for pattern in expand_braces(plain) for path in _matches(pattern, base)}
    elif (plain.lower().endswith(suffix) or _COMPRESSED.search(plain)) and not os.path.isdir(plain):
        paths = {plain: posixpath.basename(plain)}
    else:
        folder, faults = Folder(plain), list[str]()
        paths = {folder.path(name): name for name in folder.files(faults)}
        if faults:
            raise ValueError(f"data.root={root}: {len(faults)} faults:{listed(faults)}")
    if packed := [path for path in paths if _COMPRESSED.search(path)]:
        raise ValueError(f"data.root={root}: {len(packed)} compressed shards, where a clip is reached through all "
                         f"before it; unpack them (gunzip, unxz, unzstd) to *{suffix}:{listed(packed)}")  # fmt: skip
    shards = [Shard(path, name[: -len(suffix)]) for path, name in paths.items() if path.lower().endswith(suffix)]
    if not shards:
        only = f", only {name_some(sorted(paths.values()))}" if paths else ""
        raise ValueError(f"data.root={root}: no *{suffix} there{only}")
    return sorted(shards, key=lambda shard: shard.name)


def expand_braces(pattern: str) -> list[str]:
    """What a pattern with braces stands for, as a shell has it: {08..11} keeps the zeros, {a,b} is a or b. No braces
    within braces. Raises ValueError where it stands for more than a million names."""
    parts = [_alternatives(part) for part in re.split(r"(\{[^{}]*\})", pattern)]
    if (count := prod(map(len, parts))) > MAX_SHARDS:
        raise ValueError(f"data.root={pattern}: braces for {count} shards; {MAX_SHARDS} are the most")
    return ["".join(choice) for choice in product(*parts)]


def saved_dataset(root: str) -> list[Shard]:
    """The Arrow files of a folder that `save_to_disk` of a datasets.Dataset or DatasetDict wrote.

    Raises ValueError where it is none, or where it is not here.
    """
    if is_url(root):
        raise ValueError(f"data.root={root}: layout arrow maps files into memory, which a URL can't be; fetch the "
                         "folder, or write the data set as Parquet (Dataset.to_parquet)")  # fmt: skip
    folder = os.path.expanduser(root)
    if not os.path.isdir(folder):
        raise ValueError(f"data.root={root}: no such folder")
    parts = [""]
    if os.path.isfile(listing := os.path.join(folder, "dataset_dict.json")):
        parts = _names(listing, "splits")
    shards = []
    for part in parts:
        state = os.path.join(folder, part, "state.json")
        if not os.path.isfile(state):
            raise ValueError(f"{state}: no such file; layout arrow wants a folder that Dataset.save_to_disk wrote")
        for name in _names(state, "_data_files"):
            shards.append(Shard(os.path.join(folder, part, name), posixpath.join(part, posixpath.splitext(name)[0])))
    return shards


def _alternatives(part: str) -> list[str]:
    if ends := re.fullmatch(r"\{(\d{1,18})\.\.(\d{1,18})\}", part):
        first, last = int(ends[1]), int(ends[2])
        zeros = any(end.startswith("0") and len(end) > 1 for end in ends.groups())
        width = max(map(len, ends.groups())) if zeros else 0
        if abs(first - last) >= MAX_SHARDS:
            raise ValueError(f"data.root: {part} stands for {abs(first - last) + 1} shards; {MAX_SHARDS} are the most")
        step = 1 if first <= last else -1
        return [f"{n:0{width}d}" for n in range(first, last + step, step)]
    if re.fullmatch(r"\{[^{}]*,[^{}]*\}", part):
        return part[1:-1].split(",")
    return [part]


def _matches(pattern: str, base: str) -> list[str]:
    """The files that a glob stands for; what is no glob stands for itself, be it there or not."""
    if not glob.has_magic(pattern):
        return [pattern]
    if not is_url(pattern):
        return [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
    try:
        system, place = fsspec.url_to_fs(pattern)
        top = system._strip_protocol(base)
        found = system.glob(place, detail=True)
    except Exception as error:  # Each back end has exceptions of its own.
        raise ValueError(f"data.root={pattern}: can't be listed: {type(error).__name__}: {error}") from error
    names = [posixpath.relpath(path, top) for path, facts in found.items() if facts["type"] == "file"]
    return [base + name for name in names if not any(part.startswith(".") for part in name.split("/"))]


def _names(path: str, field: str) -> list[str]:
    """The names of files, or folders, that a JSON file of save_to_disk lists."""
    try:
        value = json.loads(read_text(path))[field]
        names = [item["filename"] if isinstance(item, dict) else item for item in value]
        good = all(isinstance(name, str) and name and posixpath.basename(name) == name for name in names)
    except (json.JSONDecodeError, KeyError, TypeError, RecursionError):
        good = False
    if not good:
        raise ValueError(f"{path}: not as Dataset.save_to_disk writes it: no list of names under {field}")
    return names
