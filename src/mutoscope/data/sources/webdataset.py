"""Samples in WebDataset tar shards: which members belong together, where the videos lie, and what is said of them.

A shard's headers, captions and labels are read once, its videos never. What was found is remembered in
``$XDG_CACHE_HOME/mutoscope/shards`` (``~/.cache`` where that is not set) until the shard changes, so that a second
start reads no shard at all. The folder may be deleted at any time; a damaged file in it is written anew.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import xxhash

from mutoscope.data.media import IMAGES, VIDEOS, Media, is_url
from mutoscope.data.sources.tables import PLAIN, decode
from mutoscope.data.sources.tar import Member, Source, TarError, read_members
from mutoscope.files import cache_folder

VERSION = 1
"""Raised whenever the same shard would give other samples."""
MAX_TEXT = 2**20
"""Bytes of a caption, label or JSON."""
READ_AHEAD = 2**18
"""Bytes that a request for a remote header brings: the headers and texts of a sample, and of small ones the next."""
TEXTS = frozenset(("txt", "text", "caption"))
"""Extensions of captions; "short.txt" is one of the kind short."""


class Sample(NamedTuple):
    """Members of a tar that share a key."""

    key: str
    media: dict[str, Member]
    """Videos and images by extension, as in "mp4" and "left.mp4"."""
    captions: dict[str, Any]
    """Texts by kind, and what its JSON has under "captions"."""
    facts: dict[str, Any]
    """What else its JSON says, but for what is nested; the class index in .cls as "label"."""


def read_samples(path: str, faults: list[str]) -> list[Sample]:
    """The samples of a shard, here or at a URL, in the order of their first members.

    Members go together by WebDataset's rule: the key is the name up to the first dot behind the last slash, the
    extension is what follows. Hidden files and names as in __this__ are passed over. Why a shard can't be read, and
    which samples have no video, a member twice or a broken text, is added to `faults`; then nothing comes back.
    """
    bad: list[str] = []
    try:
        version = Media(path).version()
        if (remembered := _recall(path, version)) is not None:
            return remembered
        with _opened(path) as file:
            samples = _read(file, bad)
        if not bad:
            _remember(path, version, samples)
            return samples
    except (TarError, OSError, ImportError) as error:
        bad.append(getattr(error, "strerror", None) or str(error))
    except Exception as error:  # Each back end of fsspec has exceptions of its own.
        if not is_url(path):
            raise
        bad.append(f"can't be read: {type(error).__name__}: {error}")
    faults += [f"{path}: {reason}" for reason in bad]
    return []


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension of a member, the extension in lower case; None where it belongs to no sample."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if not stem or not extension or re.fullmatch("__.+__", stem):
        return None
    return f"{folder}{slash}{stem}", extension.lower()


@contextmanager
def _opened(path: str) -> Iterator[Source]:
    if not is_url(path):
        with open(path, "rb") as file:
            yield file
        return
    filesystem, place = fsspec.url_to_fs(path)
    with filesystem.open(place, "rb", block_size=READ_AHEAD, cache_type="readahead") as remote:
        yield remote


def _read(file: Source, faults: list[str]) -> list[Sample]:
    found: dict[str, Sample] = {}
    seen: set[tuple[str, str]] = set()
    objects: dict[str, dict[str, Any]] = {}
    for member in read_members(file, file.seek(0, os.SEEK_END)):
        if (name := split_name(member.name)) is None:
            continue
        key, extension = name
        sample = found.setdefault(key, Sample(key, {}, {}, {}))
        kind, _, last = extension.rpartition(".")
        if last in TEXTS:
            name = key, f"caption {kind or PLAIN}"
        try:
            if name in seen:
                raise ValueError(f"{key} has its {name[1]} twice; keep one")
            seen.add(name)
            if f".{last}" in VIDEOS or f".{last}" in IMAGES:
                sample.media[extension] = member
            elif last in TEXTS:
                sample.captions[kind or PLAIN] = _text(file, member)
            elif extension == "cls":
                sample.facts["label"] = _text(file, member)
            elif extension == "json":
                objects[key] = _object(_text(file, member))
        except ValueError as error:
            faults.append(f"{member.name}: {error}")
    for key, facts in objects.items():
        kinds = facts.pop("captions") if isinstance(facts.get("captions"), dict) else {}
        for own, said in ((found[key].captions, _flat(kinds)), (found[key].facts, _flat(facts))):
            own.update({name: value for name, value in said.items() if name not in own})  # A member has the last word.
    faults += [f"{s.key}: no video or image of this name" for s in found.values() if not s.media]
    return list(found.values())


def _object(text: str) -> dict[str, Any]:
    try:
        read = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(read, dict):
        raise ValueError('must be an object, as in {"caption": "a cat"}')
    return read


def _flat(said: Mapping[str, Any]) -> dict[str, Any]:
    """What is a text, a number or a list of texts."""
    return {
        name: value
        for name, value in said.items()
        if not isinstance(value, list | dict) or (isinstance(value, list) and all(isinstance(v, str) for v in value))
    }


def _text(file: Source, member: Member) -> str:
    if member.size > MAX_TEXT:
        raise ValueError(f"a text of {member.size} bytes; {MAX_TEXT} are the most")
    file.seek(member.offset)
    return decode(file.read(member.size), "text").strip()


# ---- remembering


def _place(path: str) -> Path | None:
    """The file for what is known of a shard; None where there is no home to keep it in."""
    folder = cache_folder("shards")
    return folder and folder / xxhash.xxh3_128_hexdigest(_full(path).encode())


def _recall(path: str, version: tuple[int, int]) -> list[Sample] | None:
    """What is remembered of a shard, if it has not changed."""
    if (place := _place(path)) is None:
        return None
    try:
        head, _, body = place.read_bytes().partition(b"\n")
    except OSError:  # Never written, or not ours to read.
        return None
    if head != _head(path, version, body):
        return None
    return [
        Sample(key, {extension: Member(*member) for extension, member in media.items()}, captions, facts)
        for key, media, captions, facts in json.loads(body)
    ]


def _remember(path: str, version: tuple[int, int], samples: list[Sample]) -> None:
    """Where it can't be written, nothing is remembered, and the next run reads the shard again."""
    if (place := _place(path)) is None:
        return
    body = json.dumps(samples).encode()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=place.parent)  # Of its own name: several processes may do this at once.
        try:
            with open(handle, "wb") as file:
                file.write(_head(path, version, body) + b"\n" + body)
            os.replace(aside, place)
        except OSError:
            os.unlink(aside)
            raise
    except OSError:  # Read-only, or full.
        return


def _head(path: str, version: tuple[int, int], body: bytes) -> bytes:
    """The first line of a file that is whole and about this version of this shard."""
    about = repr((VERSION, _full(path), version))
    return xxhash.xxh3_128_hexdigest(about.encode() + body).encode()


def _full(path: str) -> str:
    return path if is_url(path) else os.path.abspath(path)
