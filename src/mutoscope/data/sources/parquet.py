"""Parquet files, here or behind a URL, and Arrow files of datasets.save_to_disk, by pyarrow (the extra "parquet").

A cell of a Parquet file can't be read alone: what comes with it are the pages before it in its row group, which writers
often make as large as the group. So the size of the groups decides what a clip costs in random order. Measured with
videos of 1 MB in the page cache, on one busy core: 0.7 ms with 1 row in a group, 4 ms with 10, 50 ms with 100, and as
much memory. Write videos with ``pyarrow.parquet.write_table(table, path, row_group_size=1, compression="none",
use_dictionary=False)``, small ones up to 10 rows a group; `datasets` makes groups of 10 videos or 100 images. A cell of
an Arrow file costs its own bytes, whatever the batches.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import fsspec
import numpy as np
from jaxtyping import Bool

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import parquet as pq

MAX_READ = 2**23
"""Bytes of a row group that are read at a time, until the page with the row is there."""
MAX_KEPT = 2**26
"""Bytes of cells that a process keeps: a clip is opened for its timestamps, and at once again for its frames."""


class TableInfo(NamedTuple):
    """What a file is made of."""

    columns: list[str]
    media: list[str]
    """The columns that can hold media: of bytes, or of ``struct<bytes, path>`` as Hugging Face's Video and Image."""
    rows: int


def table_info(path: str) -> TableInfo:
    """What a Parquet or .arrow file is made of. Raises as `read_table` does."""
    if _is_arrow(path):
        table = _arrow(path)
        schema, rows = table.schema, table.num_rows
    else:
        with _parquet(path) as (file, starts):
            schema, rows = file.schema_arrow, starts[-1]
    return TableInfo(schema.names, [field.name for field in schema if _is_media(field.type)], rows)


def column_names(path: str) -> list[str]:
    """The columns of a Parquet or .arrow file. Raises as `read_table` does."""
    return table_info(path).columns


def read_table(path: str, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a Parquet or .arrow file. Without `columns`, all columns but those that can hold media.

    Raises ValueError where pyarrow is missing, the file is damaged or a column is not there; FileNotFoundError or
    PermissionError where it can't be opened.
    """
    info = table_info(path)
    wanted = [name for name in info.columns if name not in info.media] if columns is None else list(columns)
    if missing := [name for name in wanted if name not in info.columns]:
        raise ValueError(f"{path}: no column {', '.join(missing)}; there are {', '.join(info.columns)}")
    if not wanted:
        return [{} for _ in range(info.rows)]
    if _is_arrow(path):
        with _explained(path):
            return _arrow(path).select(wanted).to_pylist()
    with _parquet(path) as (file, _):
        return file.read(columns=wanted, use_threads=False).select(wanted).to_pylist()


def read_cell(path: str, row: int, column: str) -> bytes:
    """The bytes in a cell of a Parquet or .arrow file, of a column of bytes or of ``struct<bytes, path>``.

    Raises as `read_table` does, and ValueError where there is no such row or its cell has no bytes.
    """
    key = (path, _version(path), row, column)
    cell = _kept.get(key)
    if cell is None:
        cell = _arrow_cell(path, row, column) if _is_arrow(path) else _parquet_cell(path, row, column)
        if cell is None:
            raise ValueError(f"{path}: column {column} has no bytes in row {row}")
        _kept.put(key, cell)
    return cell


def null_rows(path: str, column: str) -> list[int]:
    """Rows whose cell has no bytes. Raises as `read_cell` does.

    Row groups without statistics are passed over, for they would have to be read whole; writers leave none out.
    """
    rows: list[int] = []
    if _is_arrow(path):
        table, start = _arrow(path), 0
        _leaf(path, table.schema, column)
        for chunk in table.column(column).chunks:
            rows += (start + np.flatnonzero(_are_null(chunk))).tolist()
            start += len(chunk)
        return rows
    with _parquet(path) as (file, starts):
        leaf = _leaf(path, file.schema_arrow, column)
        for group, start in enumerate(starts[:-1]):
            if _nulls(file.metadata.row_group(group), leaf):
                cells = file.iter_batches(1, row_groups=[group], columns=[leaf], use_threads=False)
                rows += [start + n for n, batch in enumerate(cells) if _bytes(batch.column(0)[0]) is None]
    return rows


# ---- Parquet


@contextmanager
def _parquet(path: str) -> Iterator[tuple[pq.ParquetFile, list[int]]]:
    """The file, and the row at which each of its row groups starts, with the number of all rows at the end."""
    with _explained(path), _source(path) as source:
        from pyarrow import parquet as pq

        # Of a URL the size has to do for a version, as it is known when the file is open.
        version = _version(path) or (0, source.seek(0, os.SEEK_END))
        footer, starts = _footer(path, version)
        with pq.ParquetFile(
            source, metadata=footer, pre_buffer=False, buffer_size=MAX_READ,
            page_checksum_verification=True,  # Where the file has checksums.
        ) as file:  # fmt: skip
            yield file, starts


@contextmanager
def _source(path: str) -> Iterator[Any]:
    if "://" not in path:
        yield path
        return
    filesystem, place = fsspec.url_to_fs(path)
    with filesystem.open(place, "rb", cache_type="none") as source:  # pyarrow buffers.
        yield source


@lru_cache(maxsize=256)
def _footer(path: str, version: tuple[int, int]) -> tuple[pq.FileMetaData, list[int]]:
    """The version is there to forget what has changed."""
    from pyarrow import parquet as pq

    with _source(path) as source:
        footer = pq.read_metadata(source)
    rows = [footer.row_group(n).num_rows for n in range(footer.num_row_groups)]
    return footer, np.cumsum([0, *rows]).tolist()


def _parquet_cell(path: str, row: int, column: str) -> bytes | None:
    with _parquet(path) as (file, starts):
        leaf = _leaf(path, file.schema_arrow, column)
        _check_row(path, row, starts[-1])
        group = bisect_right(starts, row) - 1
        batches = file.iter_batches(1, row_groups=[group], columns=[leaf], use_threads=False)
        (batch,) = islice(batches, row - starts[group], row - starts[group] + 1)
        return _bytes(batch.column(0)[0])


def _nulls(group: pq.RowGroupMetaData, leaf: str) -> int:
    """Null cells in a row group, as its statistics say."""
    for n in range(group.num_columns):
        chunk = group.column(n)
        if chunk.path_in_schema == leaf and chunk.is_stats_set and chunk.statistics.has_null_count:
            return chunk.statistics.null_count
    return 0


# ---- Arrow


def _arrow(path: str) -> pa.Table:
    version = _version(path)
    if version is None:
        raise ValueError(
            f"{path}: Arrow files are mapped into memory, which a URL can't be; fetch it, or write Parquet"
        )
    with _explained(path):
        return _mapped(path, version)


@lru_cache(maxsize=256)
def _mapped(path: str, version: tuple[int, int]) -> pa.Table:
    """All offsets are checked here: a wrong one would be followed to memory that is not ours."""
    import pyarrow as pa

    table = pa.ipc.open_stream(pa.memory_map(path)).read_all()
    table.validate(full=True)
    return table


def _arrow_cell(path: str, row: int, column: str) -> bytes | None:
    table = _arrow(path)
    _leaf(path, table.schema, column)
    _check_row(path, row, table.num_rows)
    return _bytes(table.column(column)[row])


def _are_null(cells: pa.Array) -> Bool[np.ndarray, "n"]:
    import pyarrow as pa
    from pyarrow import compute

    if pa.types.is_struct(cells.type):
        cells = compute.struct_field(cells, "bytes")
    return cells.is_null().to_numpy(zero_copy_only=False)


# ---- both


def _is_arrow(path: str) -> bool:
    return path.endswith(".arrow")


def _version(path: str) -> tuple[int, int] | None:
    """Changes when a file here does; None for a URL."""
    if "://" in path:
        return None
    state = os.stat(path)
    return state.st_mtime_ns, state.st_size


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Whatever pyarrow or the library behind a URL raises becomes a ValueError that names the file."""
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise ValueError(f'{path}: reading it takes pyarrow: pip install "mutoscope[parquet]"') from None
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(f"{path}: "):
            raise
        raise ValueError(f"{path}: can't be read: {type(error).__name__}: {error}") from error


def _is_media(kind: pa.DataType) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and not types.is_struct(kind.field(place).type) and _is_media(kind.field(place).type)
    return types.is_binary(kind) or types.is_large_binary(kind)


def _leaf(path: str, schema: pa.Schema, column: str) -> str:
    """The name by which the column's bytes go in a Parquet file."""
    from pyarrow import types

    place = schema.get_field_index(column)
    if place < 0:
        raise ValueError(f"{path}: no column {column}; there are {', '.join(schema.names)}")
    kind = schema.field(place).type
    if not _is_media(kind):
        raise ValueError(f"{path}: column {column} is of {kind}, which holds no bytes")
    return f"{column}.bytes" if types.is_struct(kind) else column


def _check_row(path: str, row: int, rows: int) -> None:
    if not 0 <= row < rows:
        raise ValueError(f"{path}: no row {row}, it has {rows} (from 0)")


def _bytes(cell: pa.Scalar) -> bytes | None:
    value = cell.as_py()
    return value["bytes"] if isinstance(value, dict) else value


class _Kept:
    """The cells that were read last, up to MAX_KEPT bytes; threads may share it."""

    def __init__(self) -> None:
        self.cells: OrderedDict[object, bytes] = OrderedDict()
        self.bytes = 0
        self.lock = Lock()

    def get(self, key: object) -> bytes | None:
        with self.lock:
            return self.cells.get(key)

    def put(self, key: object, cell: bytes) -> None:
        with self.lock:
            if key in self.cells or len(cell) > MAX_KEPT:
                return
            self.cells[key] = cell
            self.bytes += len(cell)
            while self.bytes > MAX_KEPT:
                self.bytes -= len(self.cells.popitem(last=False)[1])


_kept = _Kept()
