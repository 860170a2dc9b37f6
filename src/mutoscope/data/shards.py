"""Append-only files of tensors, read at random and checked on every read.

A folder holds numbered shards, each a pair of files: ``00007.bin`` (the bytes of its records, end to end) and
``00007.jsonl`` (one line for each record: key, place, dtype, shape, checksum). Every line carries a checksum of itself,
every record one of its bytes: no flipped bit is read as data.

Data is synced before the line that names it is written. So a kill at any moment leaves a shard whose lines all have
their data; what lies behind the last line is cut off when the writer comes back. A shard's bytes depend on nothing but
the records and their order, so that a job that was killed and resumed makes the shards that an uninterrupted one makes.

Behind a URL, where nothing can be appended, a shard is written here and sent whole, every now and then and at its end.
Of what is read from there, each record is one request, and is kept here for the next time.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from mutoscope.data.places import Place
from mutoscope.files import sync_folder

COMMIT_SECONDS = 1.0
"""A writer syncs at least this often: the most work that a kill can undo."""
COMMIT_BYTES = 64 * 2**20
"""And at least every so many bytes, which bounds its memory."""
SEND_SECONDS = 60.0
"""Behind a URL, a shard is sent this often while it is written, or as often as takes a tenth of the time: the most work
that a kill can undo there."""


class StoreError(ValueError):
    """A store that is damaged, incomplete, or not the one that was asked for."""


class Record(NamedTuple):
    """Where a tensor lies."""

    shard: int
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    digest: str


class Shards:
    """All shards of one folder, for reading. Tensors of any dtype and shape, by key."""

    def __init__(self, folder: str | Path | Place) -> None:
        """Reads the indexes. Raises StoreError where a line of one is damaged; a torn last line, as a kill leaves it,
        is passed over."""
        self.place = Place.of(folder)
        self._maps: dict[int, mmap.mmap] = {}
        self.records: dict[str, Record] = {}
        names = [name for name in self.place.names() if name.endswith(".jsonl") and not name.startswith(".")]
        for name, content in zip(names, self.place.read_all(names), strict=True):
            lines, _ = _parse_index(content, f"{self.place}/{name}", int(name.removesuffix(".jsonl")))
            self.records.update((key, record) for key, record in lines)

    def __len__(self) -> int:
        return len(self.records)

    def __contains__(self, key: str) -> bool:
        return key in self.records

    def __iter__(self) -> Iterator[str]:
        return iter(self.records)

    def read(self, key: str) -> Tensor:
        """The tensor stored under `key`. Raises StoreError where there is none, or where its bytes have changed."""
        record = self.records.get(key)
        if record is None:
            raise StoreError(f"{self.place}: no record {key!r} (there are {len(self)})")
        if record.nbytes == 0:  # nothing to read, and empty files cannot be mapped
            return torch.empty(record.shape, dtype=getattr(torch, record.dtype))
        brain = record.dtype == "bfloat16"  # which NumPy lacks
        dtype = "uint16" if brain else record.dtype
        if self.place.remote:
            array = np.frombuffer(self._kept(record) or self._fetched(key, record), dtype).reshape(record.shape)
        else:
            array = np.ndarray(record.shape, dtype, self._mapped(key, record), record.offset)
            self._check(array.data, key, record)
        tensor = torch.from_numpy(array.copy())
        return tensor.view(torch.bfloat16) if brain else tensor

    def _check(self, data: bytes | memoryview, key: str, record: Record) -> None:
        if xxhash.xxh3_64_hexdigest(data) != record.digest:
            raise StoreError(
                f"{self.place}/{_name(record.shard)}: record {key!r} ({record.nbytes} bytes at {record.offset}) "
                f"is damaged: {_cure(record.shard)}"
            )

    def _check_end(self, size: int, key: str, record: Record) -> None:
        end = record.offset + record.nbytes
        if size < end:
            raise StoreError(f"{self.place}/{_name(record.shard)}: cut short: {size} bytes, record {key!r} ends at "
                             f"{end}: {_cure(record.shard)}")  # fmt: skip

    def _mapped(self, key: str, record: Record) -> mmap.mmap:
        """The record's shard. The file's size is looked at first: reading past its end kills the process."""
        mapped = self._maps.get(record.shard)
        if mapped is None or record.offset + record.nbytes > len(mapped):
            with open(self.place.path / _name(record.shard), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                self._check_end(size, key, record)
                self._maps[record.shard] = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        return self._maps[record.shard]

    def _kept(self, record: Record) -> bytes | None:
        """The record's bytes from the cache, a file with holes. What is not there yet, is damaged, or is of a shard
        that has since been made anew, has another hash. Where it can't be read, `_fetched` will tell."""
        if self.place.cache is not None:
            with suppress(OSError), open(self.place.cache / _name(record.shard), "rb", buffering=0) as file:
                data = os.pread(file.fileno(), record.nbytes, record.offset)
                if xxhash.xxh3_64_hexdigest(data) == record.digest:
                    return data
        return None

    def _fetched(self, key: str, record: Record) -> bytes:
        """The record's bytes from behind the URL. They are kept."""
        end = record.offset + record.nbytes
        data = self.place.read_part(_name(record.shard), record.offset, end)
        self._check_end(record.offset + len(data), key, record)
        self._check(data, key, record)
        if (cache := self.place.cache) is not None:
            try:
                cache.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(cache / _name(record.shard), os.O_RDWR | os.O_CREAT, 0o666)
                with open(descriptor, "r+b") as file:
                    file.seek(record.offset)
                    file.write(data)
            except OSError as error:
                raise StoreError(f"{cache}: {error.strerror}: what is read of {self.place} is kept there; set "
                                 "XDG_CACHE_HOME to a folder with room for all of it") from None  # fmt: skip
        return data

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}


@contextmanager
def shard_writer(folder: Place, shard: int) -> Iterator[ShardWriter]:
    """A `ShardWriter`. Behind a URL it writes to a folder here, which goes on from what is there and is sent there."""
    if not folder.remote:
        with ShardWriter(folder.path, shard) as writer:
            yield writer
        return
    index = _name(shard, ".jsonl")
    with TemporaryDirectory(prefix="mutoscope-shard-") as scratch:
        here, last, took = Path(scratch), time.monotonic(), 0.0

        def send() -> None:
            nonlocal last, took
            start = time.monotonic()
            for name in (_name(shard), index):  # as they are synced: first the data, then the lines that name it
                folder.send(here / name, name)
            last = time.monotonic()
            took = last - start

        def send_if_due() -> None:
            if time.monotonic() - last >= max(SEND_SECONDS, 9 * took):
                send()

        with suppress(FileNotFoundError):  # it is new
            for name in (index, _name(shard)):  # in this order, lest there be lines whose data is not there
                folder.fetch(name, here / name)
        writer = ShardWriter(here, shard, send_if_due)
        before = len(writer.keys)
        try:
            with writer:
                yield writer
        finally:
            if len(writer.keys) > before:
                send()


class ShardWriter:
    """Appends to one shard; use as a context manager. Raises StoreError while another process writes the shard."""

    def __init__(self, folder: str | Path, shard: int, on_commit: Callable[[], None] = lambda: None) -> None:
        """Opens the shard, or creates it, and cuts off what a kill has left half-written. on_commit: called when what
        was appended has become safe, but for the last time."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / _name(shard)
        with ExitStack() as opened:
            self._data = opened.enter_context(open(path, "ab"))
            self._index = opened.enter_context(open(path.with_suffix(".jsonl"), "ab"))
            try:
                fcntl.flock(self._index, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreError(f"{path}: another process is writing this shard") from None
            self._recover(path)
            sync_folder(folder)
            self._files = opened.pop_all()
        self._pending_data: list[bytes] = []
        self._pending_lines: list[bytes] = []
        self._committed = time.monotonic()
        self._on_commit = on_commit

    def _recover(self, path: Path) -> None:
        index = path.with_suffix(".jsonl")
        lines, ends = _parse_index(index.read_bytes(), index, int(path.stem))
        size = os.fstat(self._data.fileno()).st_size
        whole = sum(1 for _, record in lines if record.offset + record.nbytes <= size)
        self.keys = [key for key, _ in lines[:whole]]
        """What the shard holds, in order."""
        self._offset = lines[whole - 1][1].offset + lines[whole - 1][1].nbytes if whole else 0
        self._data.truncate(self._offset)
        self._index.truncate(ends[whole - 1] if whole else 0)

    def append(self, key: str, tensor: Tensor) -> None:
        """Add a record. It is safe on disk after the next commit, at most a second and one record later."""
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        self._pending_data.append(data)
        self._pending_lines.append(
            seal(
                {
                    "key": key,
                    "offset": self._offset,
                    "nbytes": len(data),
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                    "shape": list(tensor.shape),
                    "digest": xxhash.xxh3_64_hexdigest(data),
                }
            )
        )
        self.keys.append(key)
        self._offset += len(data)
        due = time.monotonic() - self._committed >= COMMIT_SECONDS
        if due or sum(map(len, self._pending_data)) >= COMMIT_BYTES:
            self.commit()
            self._on_commit()

    def commit(self) -> None:
        """Make all that was appended safe: the data first, then the lines that name it."""
        data, lines = b"".join(self._pending_data), b"".join(self._pending_lines)
        self._pending_data, self._pending_lines = [], []  # now: after a Ctrl-C below, none of it is written again
        for file, content in ((self._data, data), (self._index, lines)):
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self._committed = time.monotonic()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._files:
            if kind is None or not issubclass(kind, OSError):  # after a full disk, writing on would only hide it
                self.commit()


def _name(shard: int, suffix: str = ".bin") -> str:
    return f"{shard:05d}{suffix}"


_SEAL = re.compile(rb', "xxh3": "([0-9a-f]{16})"\}')
_SEAL_LENGTH = len(b', "xxh3": "0123456789abcdef"}')


def seal(fields: dict[str, Any]) -> bytes:
    """One line of JSON whose last field is a checksum of the others."""
    body = json.dumps(fields).encode()[:-1]
    return body + b', "xxh3": "%s"}\n' % xxhash.xxh3_64_hexdigest(body).encode()


def unseal(lines: Iterable[bytes], source: str | Path) -> list[dict[str, Any]]:
    """The lines of a file read back, without the checksums. Raises StoreError naming a line that has changed."""
    read = []
    for number, line in enumerate(lines, start=1):
        body, tail = line[:-_SEAL_LENGTH], _SEAL.fullmatch(line[-_SEAL_LENGTH:])
        if tail is None or xxhash.xxh3_64_hexdigest(body).encode() != tail[1]:
            raise StoreError(f"{source}: line {number} is damaged (its checksum does not match): {line[:80]!r}")
        read.append(json.loads(body + b"}"))
    return read


def _parse_index(content: bytes, source: str | Path, shard: int) -> tuple[list[tuple[str, Record]], list[int]]:
    """The records of a shard in order, and where each one's line ends. A line without its end is not there yet."""
    lines = content.split(b"\n")[:-1]
    records = [
        (r["key"], Record(shard, r["offset"], r["nbytes"], r["dtype"], tuple(r["shape"]), r["digest"]))
        for r in unseal(lines, source)
    ]
    ends = np.cumsum([len(line) + 1 for line in lines], dtype=np.int64).tolist()
    return records, ends


def _cure(shard: int) -> str:
    bin, index = _name(shard), _name(shard, ".jsonl")
    return f"remove {bin} and {index} there and encode again; only this shard is made anew"
