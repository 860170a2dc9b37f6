"""The same bytes are read the same, wherever they lie."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import fsspec
import numpy as np
import pytest
from bar_codes import numbers_of
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st
from media_cases import CASES, make

from mutoscope.data import media as media_module
from mutoscope.data.media import Media
from mutoscope.data.video import VideoError, probe, read_frames

NAMES = ["groups_of_12.mp4", "fragmented.mp4", "h264.mkv", "h264.ts", "h264.avi", "vp9.webm", "transparent.png",
         "turned.jpg"]  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    yield
    media_module._fetch.cache_clear()
    media_module._remote_version.cache_clear()
    MemoryFileSystem.store.clear()


def content(media: Media) -> bytes:
    with media.opened() as source:
        return Path(source).read_bytes() if isinstance(source, str) else source.read()


def check(media: Media, name: str) -> None:
    """That the frames of a case are in there."""
    expected = CASES[name].numbers
    assert numbers_of(read_frames(media, range(len(expected)))) == expected
    assert numbers_of(read_frames(media, [len(expected) - 1, 0])) == [expected[-1], expected[0]]
    assert probe(media).frames == len(expected) and probe(media).image == CASES[name].image


@pytest.mark.parametrize("name", NAMES)
def test_a_member_of_a_tar(name: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for other in ("bitmap.bmp", name, "no_b_frames.mp4"):
            archive.add(make(other, tmp_path), other)
    with tarfile.open(tmp_path / "a.tar") as archive:
        member = archive.getmember(name)
    media = Media(str(tmp_path / "a.tar"), name, member.offset_data, member.size)
    assert content(media) == (tmp_path / name).read_bytes() and media.suffix == Path(name).suffix
    assert str(media) == f"{tmp_path}/a.tar:{name}"
    check(media, name)


@pytest.mark.parametrize("fetched", [0, 2**24])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_behind_a_url(name: str, fetched: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_module, "FETCHED", fetched)  # Block by block, and in one request.
    data = make(name, tmp_path).read_bytes()
    fsspec.filesystem("memory").pipe({f"/set/{name}": data, "/set/a.tar": b"x" * 999 + data + b"y" * 99})
    for media in (Media(f"memory://set/{name}"), Media("memory://set/a.tar", name, 999, len(data))):
        assert content(media) == data
        check(media, name)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("name", NAMES)
def test_a_cell_of_a_table(name: str, suffix: str, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import ipc, parquet

    data = make(name, tmp_path).read_bytes()
    table = pa.table({"clip": pa.array([b"", data, b"not media", None], pa.binary())})
    path = str(tmp_path / f"a{suffix}")
    if suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        with ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    media = Media(path, "row 1", row=1, column="clip")
    assert content(media) == data
    check(media, name)  # Told from its first bytes, for it has no name.
    for row, reason in ((0, "the file is empty|can't be read"), (2, "can't be read"), (3, "no bytes"), (4, "row")):
        with pytest.raises(VideoError, match=reason) as caught:
            probe(Media(path, f"row {row}", row=row, column="clip"))
        assert str(caught.value).startswith(f"{path}:row {row}: ")


def test_names() -> None:
    assert Media("/a/B.MP4").suffix == ".mp4" and Media("/a/shard.tar", "b/c.JPG", 5, 6).suffix == ".jpg"
    assert Media("https://host/a.webm?sig=x.y/z").suffix == ".webm" and Media("s3://b/a?b.mp4").suffix == ".mp4"
    assert Media("/a.parquet", "row 3", row=3, column="v").suffix == ""
    assert str(Media("/a/b.mp4")) == "/a/b.mp4"


def test_the_version_changes_with_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"one")
    before = Media(str(path)).version()
    os.utime(path, ns=(1, 1))
    assert Media(str(path)).version() == (1, 3) != before
    memory = fsspec.filesystem("memory")
    media = Media("memory://a.mp4")
    memory.pipe("/a.mp4", b"one")
    before = media.version()
    assert content(media) == b"one"
    memory.pipe("/a.mp4", b"two")
    assert media.version() == before and content(media) == b"one"  # For a minute, without asking again.
    monkeypatch.setattr(media_module, "FRESH", 1e-9)
    assert media.version() != before and content(media) == b"two"


class Unreachable(MemoryFileSystem):
    """Whose library has errors of its own, as botocore does."""

    protocol = "unreachable"
    cachable = False

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        raise LookupError("no credentials")


class Failing(MemoryFileSystem):
    """Which fails while it is read."""

    protocol = "failing"
    cachable = False

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "size": 10**6, "type": "file"}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        raise LookupError("the line is down")

    def open(self, path: str, *_: Any, **__: Any) -> IO[bytes]:
        file = io.BytesIO(bytes(10**6))
        file.read = lambda *_: (_ for _ in ()).throw(LookupError("the line is down"))  # type: ignore[method-assign]
        return file


@pytest.mark.parametrize("suffix", [".mp4", ".png"])
@pytest.mark.parametrize("fetched", [0, 2**24])
def test_what_can_not_be_reached_is_named(fetched: int, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_module, "FETCHED", fetched)
    fsspec.register_implementation("unreachable", Unreachable, clobber=True)
    fsspec.register_implementation("failing", Failing, clobber=True)
    for url, reason in (
        (f"unreachable://a{suffix}", "LookupError: 'no credentials'|LookupError: no credentials"),
        (f"failing://a{suffix}", "LookupError: the line is down"),
        (f"memory://nowhere{suffix}", "nowhere|No such file"),
        (f"unheard-of://a{suffix}", "Protocol not known"),
    ):
        with pytest.raises(VideoError, match=reason) as caught:
            probe(Media(url))
        assert str(caught.value).startswith(f"{url}: ")
    with pytest.raises(OSError, match="no credentials"):
        Media("unreachable://a.mp4").version()


def test_a_shard_that_was_cut_is_noticed(tmp_path: Path) -> None:
    data = make("groups_of_12.mp4", tmp_path).read_bytes()
    shard = tmp_path / "a.tar"
    shard.write_bytes(bytes(512) + data[:-100])
    with pytest.raises(VideoError, match=r"a\.tar:b\.mp4: "):
        read_frames(Media(str(shard), "b.mp4", 512, len(data)), [0])


@given(
    st.binary(max_size=50),
    st.integers(0, 20),
    st.integers(0, 30),
    st.lists(st.tuples(st.integers(0, 3), st.integers(-60, 60))),
)
def test_a_slice_is_a_file_of_its_own(data: bytes, offset: int, size: int, steps: list[tuple[int, int]]) -> None:
    inside = data[offset : offset + size]
    ours: Any = media_module._Slice(io.BytesIO(data), offset, size)
    theirs = io.BytesIO(inside + bytes(size - len(inside)))  # Where the file is too short, only reading tells.
    for kind, number in steps:
        if kind == 3:
            read = ours.read(abs(number))
            assert read == inside[theirs.tell() :][: abs(number)]
            theirs.seek(len(read), io.SEEK_CUR)
        elif kind or number >= 0:
            place = max(0, {0: 0, 1: theirs.tell(), 2: size}[kind] + number)
            assert ours.seek(number, kind) == theirs.seek(place) == ours.tell()
    assert ours.seek(0) == 0 and ours.read() == inside and np.frombuffer(ours.read(), np.uint8).size == 0
