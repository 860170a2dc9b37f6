"""Where the files in a tar are, by its headers alone.

Not `tarfile.TarFile`: that one takes a damaged header for the end, so that what lies behind it is lost without a word,
and it follows whatever sizes and chains of headers a damaged file has. Nothing is ever extracted.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

BLOCK = tarfile.BLOCKSIZE
MAX_EXTENSION = 2**20
"""Bytes of a header that extends the next; they hold a name, so that more means a damaged file."""
AFTER_END = 2**20
"""Bytes behind the end of a tar that are looked at: writers pad it with a few thousand zeros."""
COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ\x00": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
"""What compressed files begin with, and what makes them plain."""

_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_OTHERS = {
    tarfile.LNKTYPE: "a hard link (GNU tar stores a file instead with --hard-dereference)",
    tarfile.SYMTYPE: "a symbolic link (GNU tar stores its file instead with --dereference)",
    tarfile.GNUTYPE_SPARSE: "a sparse file; write the tar without --sparse",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
}
_CONTROL = re.compile("[\\x00-\\x1f]")
_PAX = re.compile(rb"(\d{1,7}) ([^=\n]+)=")


class TarError(ValueError):
    """A tar file that can't be read by ranges; the text says why, but not which."""


@runtime_checkable
class Source(Protocol):
    """A file that is open for reading, here or elsewhere."""

    def read(self, size: int, /) -> bytes: ...

    def seek(self, place: int, whence: int = 0, /) -> int: ...


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    offset: int
    """Where its content begins, in bytes from the start of the tar."""
    size: int


def read_members(file: Source, size: int) -> Iterator[Member]:
    """The files in a tar of `size` bytes, in order. `file` may be read and moved between one member and the next.

    POSIX ustar and pax and GNU tar (long names, sizes of 8 GiB and more). Folders are passed over. Raises TarError for
    whatever is damaged, cut short, compressed or not a tar, and for a link, a sparse file or a device.
    """
    place, for_all, for_next = 0, dict[str, str](), dict[str, str]()
    while (header := _header(file, place)) is not None:
        place += BLOCK
        length = header.size
        if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            name = _extension(file, place, length).rstrip(b"\0").decode("utf-8", "surrogateescape")
            for_next["path" if header.type == tarfile.GNUTYPE_LONGNAME else "linkpath"] = name
        elif header.type == tarfile.XGLTYPE:
            for_all |= _pax(_extension(file, place, length))
        elif header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            for_next |= _pax(_extension(file, place, length))
        else:
            says = for_all | for_next
            for_next = {}
            name = _name(says.get("path") or header.name)
            if header.type == tarfile.DIRTYPE:
                continue
            kind = tarfile.GNUTYPE_SPARSE if any(key.startswith("GNU.sparse") for key in says) else header.type
            if kind not in _FILES:
                raise TarError(f"{name} in it is {_OTHERS.get(kind, f'of the unknown type {kind!r}')}")
            if "size" in says:
                length = _number(says["size"])
            if place + length > size:
                raise TarError(f"cut short: {name} in it ends at byte {place + length}, the tar at {size}; "
                               "fetch or write it again")  # fmt: skip
            yield Member(name, place, length)
        place += -(-length // BLOCK) * BLOCK
    if for_next:
        raise TarError(f"cut short: a name is announced before byte {place}, and then the end comes")
    _check_end(file, place, size)


def _header(file: Source, place: int) -> tarfile.TarInfo | None:
    """The header at this place; None for the zeros that end a tar."""
    block = _read(file, place, BLOCK)
    if not any(block):
        return None
    if place == 0:
        for start, tool in COMPRESSED.items():
            if block.startswith(start):
                raise TarError(f"compressed, which leaves no way to one clip but through all before; use {tool}")
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise TarError(f"not a tar, or damaged: header at byte {place}: {error}") from error
    if header.size < 0:
        raise TarError(f"damaged: header at byte {place}: a size of {header.size} bytes")
    return header


def _extension(file: Source, place: int, length: int) -> bytes:
    if length > MAX_EXTENSION:
        raise TarError(f"damaged: a name or a pax header of {length} bytes at byte {place}")
    return _read(file, place, length)


def _read(file: Source, place: int, length: int) -> bytes:
    file.seek(place)
    data = file.read(length)
    if len(data) == length:
        return data
    if not place and not data:
        raise TarError("the file is empty")
    if not data:
        raise TarError(f"cut short: it ends at byte {place} without the zeros that end a tar; "
                       "fetch or write it again (or, if it is whole: truncate --size=+1024)")  # fmt: skip
    raise TarError(f"cut short: it ends at byte {place + len(data)}, within a header; fetch or write it again")


def _pax(body: bytes) -> dict[str, str]:
    """The records of a pax header: "LENGTH KEY=VALUE\\n" each, with the length of the whole record."""
    found, place = {}, 0
    while place < len(body):
        record = _PAX.match(body, place)
        end = place + int(record[1]) if record else 0
        if record is None or not record.end() < end <= len(body) or body[end - 1] != 0x0A:
            raise TarError(f"damaged: a pax header: {body[place : place + 40]!r}")
        found[record[2].decode("utf-8", "replace")] = body[record.end() : end - 1].decode("utf-8", "surrogateescape")
        place = end
    return found


def _number(text: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", text):
        raise TarError(f"damaged: a size of {text:.40} bytes in a pax header")
    return int(text)


def _name(name: str) -> str:
    """The name as it is, without the "./" that tar writes for members of the folder it stands in."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise TarError(f"the name {name!r} in it is not UTF-8") from error
    if _CONTROL.search(name):
        raise TarError(f"the name {name!r} in it has control characters")
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    if name.startswith("/") or ".." in name.split("/"):
        raise TarError(f"the name {name!r} in it leads out of the archive")
    return name


def _check_end(file: Source, place: int, size: int) -> None:
    file.seek(place)
    if any(file.read(min(AFTER_END, size - place))):
        raise TarError(f"more behind its end at byte {place}, as `cat` leaves it; join tars with tar --concatenate")
