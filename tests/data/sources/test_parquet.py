"""Cells of Parquet and Arrow files: any of them, exactly, and no more of the file than needed."""

from __future__ import annotations

import random
import sys
import threading
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mutoscope.data.sources import parquet
from mutoscope.data.sources.parquet import column_names, null_rows, read_cell, read_table, table_info

VIDEO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def cell(n: int) -> bytes:
    return random.Random(n).randbytes(100 + n)


def table_of(rows: int = 10, kind: pa.DataType = VIDEO, nulls: tuple[int, ...] = ()) -> pa.Table:
    cells: list[Any] = [None if n in nulls else cell(n) for n in range(rows)]
    if pa.types.is_struct(kind):
        cells = [{"bytes": c, "path": f"{n}.mp4"} for n, c in enumerate(cells)]
    return pa.table(
        {"caption": [f"clip {n}" for n in range(rows)], "video": pa.array(cells, kind), "label": range(rows)}
    )


def write(path: Path, table: pa.Table, group: int = 3, **options: Any) -> str:
    if path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=group)
    else:
        pq.write_table(table, path, row_group_size=group, **options)
    return str(path)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("kind", [VIDEO, pa.binary(), pa.large_binary(), pa.struct([("bytes", pa.large_binary())])])
def test_cells_are_what_was_written(suffix: str, kind: pa.DataType, tmp_path: Path) -> None:
    path = write(tmp_path / f"x{suffix}", table_of(kind=kind))
    order = random.Random(0).sample(range(10), 10)
    assert [read_cell(path, n, "video") for n in order] == [cell(n) for n in order]
    assert table_info(path) == (["caption", "video", "label"], ["video"], 10)
    assert column_names(path) == ["caption", "video", "label"]


@pytest.mark.parametrize("options", [
    {"compression": "zstd"}, {"compression": "none", "use_dictionary": False}, {"data_page_size": 64},
    {"data_page_version": "2.0"}, {"write_statistics": False},
])  # fmt: skip
def test_cells_of_files_written_otherwise(options: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", table_of(), group=100, **options)
    assert [read_cell(path, n, "video") for n in (9, 0, 5)] == [cell(9), cell(0), cell(5)]


def test_checksums_are_looked_at_where_there_are_some(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "x.parquet", table_of(), compression="none", write_page_checksum=True))
    content = path.read_bytes()
    path.write_bytes(content.replace(cell(4), cell(4)[:-1] + bytes([cell(4)[-1] ^ 1])))
    assert read_cell(str(path), 9, "video") == cell(9)
    with pytest.raises(ValueError, match=r"x.parquet: can't be read: .*CRC"):
        read_cell(str(path), 4, "video")


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_rows_come_without_the_media(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"x{suffix}", table_of(4))
    assert read_table(path) == [{"caption": f"clip {n}", "label": n} for n in range(4)]
    assert read_table(path, ["label"]) == [{"label": n} for n in range(4)]
    assert read_table(path, []) == [{}] * 4
    assert read_table(path, ["video"])[3] == {"video": {"bytes": cell(3), "path": "3.mp4"}}  # As it was asked for.


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("kind", [VIDEO, pa.binary()])
def test_rows_without_bytes(suffix: str, kind: pa.DataType, tmp_path: Path) -> None:
    path = write(tmp_path / f"x{suffix}", table_of(kind=kind, nulls=(0, 5, 9)))
    assert null_rows(path, "video") == [0, 5, 9]
    assert read_cell(path, 4, "video") == cell(4)
    with pytest.raises(ValueError, match=f"x{suffix}: column video has no bytes in row 5"):
        read_cell(path, 5, "video")
    whole = write(tmp_path / f"y{suffix}", pa.table({"video": pa.array([None, {"bytes": b"x", "path": None}], VIDEO)}))
    assert null_rows(whole, "video") == [0]  # The struct itself.


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_wrong_questions(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"x{suffix}", table_of())
    for row in (-1, 10):
        with pytest.raises(ValueError, match=rf"x{suffix}: no row {row}, it has 10 \(from 0\)"):
            read_cell(path, row, "video")
    for ask in (
        lambda: read_cell(path, 0, "film"),
        lambda: read_table(path, ["film"]),
        lambda: null_rows(path, "film"),
    ):
        with pytest.raises(ValueError, match=f"x{suffix}: no column film; there are caption, video, label"):
            ask()
    with pytest.raises(ValueError, match="column caption is of string, which holds no bytes"):
        read_cell(path, 0, "caption")
    with pytest.raises(FileNotFoundError):
        read_table(f"{tmp_path}/none{suffix}")


def test_arrow_files_at_urls_are_refused() -> None:
    with pytest.raises(ValueError, match=r"memory://x.arrow: Arrow files are mapped into memory, which a URL"):
        read_cell("memory://x.arrow", 0, "video")


def test_urls(tmp_path: Path) -> None:
    content = Path(write(tmp_path / "x.parquet", table_of())).read_bytes()
    for url in (f"file://{tmp_path}/y.parquet", "memory://cells/x.parquet"):
        with fsspec.open(url, "wb") as file:
            file.write(content)
        assert [read_cell(url, n, "video") for n in (7, 2)] == [cell(7), cell(2)]
        assert read_table(url, ["label"])[9] == {"label": 9}
    with pytest.raises(FileNotFoundError):
        read_table("memory://cells/none.parquet")
    with pytest.raises(ValueError, match=r"nobackend://x.parquet: can't be read: .*Protocol not known"):
        read_table("nobackend://x.parquet")


def test_without_pyarrow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", table_of())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for ask in (lambda: read_table(path), lambda: read_cell(path, 0, "video")):
        with pytest.raises(
            ValueError, match=r'x.parquet: reading it takes pyarrow: pip install "mutoscope\[parquet\]"'
        ):
            ask()


def test_a_file_that_is_written_anew_is_read_anew(tmp_path: Path) -> None:
    for suffix in (".parquet", ".arrow"):
        path = write(tmp_path / f"x{suffix}", table_of(4))
        assert read_cell(path, 3, "video") == cell(3)
        (tmp_path / "aside").mkdir(exist_ok=True)
        other = write(tmp_path / f"aside/x{suffix}", table_of(9).slice(3))
        Path(other).replace(path)  # Writing over a file that is mapped would change the map.
        assert read_cell(path, 3, "video") == cell(6)
        assert table_info(path).rows == 6


def test_only_what_is_needed_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [np.random.default_rng(n).bytes(2**18) for n in range(60)]
    table = pa.table({"v": pa.array(cells, pa.binary()), "text": [f"{n}" * 2**18 for n in range(60)]})
    read = 0
    with fsspec.open("memory://needed/x.parquet", "wb") as file:
        pq.write_table(table, file, row_group_size=6, compression="none")
    memory = type(fsspec.filesystem("memory").open("needed/x.parquet"))

    def counting(self: Any, size: int = -1) -> bytes:
        nonlocal read
        data: bytes = super(memory, self).read(size)
        read += len(data)
        return data

    monkeypatch.setattr(memory, "read", counting, raising=False)
    assert read_cell("memory://needed/x.parquet", 8, "v") == cells[8]
    assert 2**18 < read < 7 * 2**18  # One column in one of the ten row groups, and the footer.
    read = 0
    assert read_cell("memory://needed/x.parquet", 8, "v") == cells[8]  # Once for the index, once for the frames.
    assert read == 0


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MAX_KEPT", 1000)
    kept = parquet._Kept()
    for n in range(100):
        kept.put(n, bytes(300))
        kept.put(n, bytes(300))
    kept.put("large", bytes(1001))
    assert [n for n in (*range(100), "large") if kept.get(n) is not None] == [97, 98, 99]


def test_threads_may_read_at_once(tmp_path: Path) -> None:
    paths = [write(tmp_path / name, table_of(60), group=7) for name in ("x.parquet", "x.arrow")]
    wrong: list[object] = []

    def work(seed: int) -> None:
        order = random.Random(seed)
        for _ in range(40):
            path, n = order.choice(paths), order.randrange(60)
            if read_cell(path, n, "video") != cell(n):
                wrong.append((path, n))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_mutated_files_give_bytes_or_an_error(suffix: str, tmp_path: Path) -> None:
    good = Path(write(tmp_path / f"good{suffix}", table_of(12))).read_bytes()
    order = random.Random(0)
    errors = 0
    for n in range(60):
        data = bytearray(good)
        for _ in range(order.choice((1, 4, 40))):
            place = order.randrange(len(data))
            match order.randrange(3):
                case 0:
                    data[place] = order.randrange(256)
                case 1:
                    del data[place : place + order.choice((1, 100))]
                case 2:
                    data[place:place] = order.randbytes(8)
        path = tmp_path / f"bad{n}{suffix}"
        path.write_bytes(data)
        try:
            read_table(str(path))
            null_rows(str(path), "video")
            for row in range(12):
                assert isinstance(read_cell(str(path), row, "video"), bytes)
        except ValueError as error:
            assert str(path) in str(error)
            errors += 1
    assert errors > 20
