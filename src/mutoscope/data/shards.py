"""Append-only files of tensors, read at random and checked on every read.

A folder holds numbered shards, each a pair of files: ``00007.bin`` (the bytes of its records, end to end) and
``00007.jsonl`` (one line for each record: key, place, dtype, shape, checksum). Every line carries a checksum of itself,
every record one of its bytes: no flipped bit is read as data.

Data is synced before the line that names it is written. So a kill at any moment leaves a shard whose lines all have
their data; what lies behind the last line is cut off when the writer comes back. A shard's bytes depend on nothing but
the records and their order, so that a job that was killed and resumed makes the shards that an uninterrupted one makes.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from mutoscope.files import sync_folder

COMMIT_SECONDS = 1.0
"""A writer syncs at least this often: the most work that a kill can undo."""
COMMIT_BYTES = 64 * 2**20
"""And at least every so many bytes, which bounds its memory."""


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

    def __init__(self, folder: str | Path) -> None:
        """Reads the indexes. Raises StoreError where a line of one is damaged; a torn last line, as a kill leaves it,
        is passed over."""
        self.folder = Path(folder)
        self._maps: dict[int, mmap.mmap] = {}
        self.records: dict[str, Record] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            lines, _ = _read_index(path)
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
            raise StoreError(f"{self.folder}: no record {key!r} (there are {len(self)})")
        if record.nbytes == 0:  # nothing to read, and empty files cannot be mapped
            return torch.empty(record.shape, dtype=getattr(torch, record.dtype))
        mapped = self._maps.get(record.shard)
        if mapped is None or record.offset + record.nbytes > len(mapped):
            mapped = self._map(key, record)
        brain = record.dtype == "bfloat16"  # which NumPy lacks
        array = np.ndarray(record.shape, "uint16" if brain else record.dtype, mapped, record.offset)
        if xxhash.xxh3_64_hexdigest(array.data) != record.digest:
            raise StoreError(
                f"{shard_path(self.folder, record.shard)}: record {key!r} ({record.nbytes} bytes at {record.offset}) "
                f"is damaged: {_cure(self.folder, record.shard)}"
            )
        tensor = torch.from_numpy(array.copy())
        return tensor.view(torch.bfloat16) if brain else tensor

    def _map(self, key: str, record: Record) -> mmap.mmap:
        """Map the record's shard. The file's size is looked at first: reading past its end kills the process."""
        path, end = shard_path(self.folder, record.shard), record.offset + record.nbytes
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < end:
                raise StoreError(f"{path}: cut short: {size} bytes, record {key!r} ends at {end}: "
                                 f"{_cure(self.folder, record.shard)}")  # fmt: skip
            self._maps[record.shard] = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        return self._maps[record.shard]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}


class ShardWriter:
    """Appends to one shard; use as a context manager. Raises StoreError while another process writes the shard."""

    def __init__(self, folder: str | Path, shard: int) -> None:
        """Opens the shard, or creates it, and cuts off what a kill has left half-written."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = shard_path(folder, shard)
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

    def _recover(self, path: Path) -> None:
        lines, ends = _read_index(path.with_suffix(".jsonl"))
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

    def commit(self) -> None:
        """Make all that was appended safe: the data first, then the lines that name it."""
        for file, pending in ((self._data, self._pending_data), (self._index, self._pending_lines)):
            file.write(b"".join(pending))
            file.flush()
            os.fsync(file.fileno())
            pending.clear()
        self._committed = time.monotonic()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._files:
            if kind is None or not issubclass(kind, OSError):  # after a full disk, writing on would only hide it
                self.commit()


def shard_path(folder: Path, shard: int) -> Path:
    """The data file of a shard; its index is the .jsonl beside it."""
    return folder / f"{shard:05d}.bin"


_SEAL = re.compile(rb', "xxh3": "([0-9a-f]{16})"\}')
_SEAL_LENGTH = len(b', "xxh3": "0123456789abcdef"}')


def seal(fields: dict[str, Any]) -> bytes:
    """One line of JSON whose last field is a checksum of the others."""
    body = json.dumps(fields).encode()[:-1]
    return body + b', "xxh3": "%s"}\n' % xxhash.xxh3_64_hexdigest(body).encode()


def unseal(lines: Iterable[bytes], path: Path) -> list[dict[str, Any]]:
    """The lines of `path` read back, without the checksums. Raises StoreError naming a line that has changed."""
    read = []
    for number, line in enumerate(lines, start=1):
        body, tail = line[:-_SEAL_LENGTH], _SEAL.fullmatch(line[-_SEAL_LENGTH:])
        if tail is None or xxhash.xxh3_64_hexdigest(body).encode() != tail[1]:
            raise StoreError(f"{path}: line {number} is damaged (its checksum does not match): {line[:80]!r}")
        read.append(json.loads(body + b"}"))
    return read


def _read_index(path: Path) -> tuple[list[tuple[str, Record]], list[int]]:
    """The records of a shard in order, and where each one's line ends. A line without its end is not there yet."""
    shard = int(path.stem)
    lines = path.read_bytes().split(b"\n")[:-1]
    records = [
        (r["key"], Record(shard, r["offset"], r["nbytes"], r["dtype"], tuple(r["shape"]), r["digest"]))
        for r in unseal(lines, path)
    ]
    ends = np.cumsum([len(line) + 1 for line in lines], dtype=np.int64).tolist()
    return records, ends


def _cure(folder: Path, shard: int) -> str:
    return f"remove {shard:05d}.bin and {shard:05d}.jsonl there and encode again; only this shard is made anew"
