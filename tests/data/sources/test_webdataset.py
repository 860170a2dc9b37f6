"""Samples in tar shards: which members belong together, and what is remembered of them."""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
from collections.abc import Sequence
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mutoscope.data.sources import webdataset
from mutoscope.data.sources.webdataset import Sample, read_samples, split_name


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mutoscope" / "shards"


def write_tar(path: Path | str, files: Sequence[tuple[str, bytes | str | dict[str, object]]]) -> str:
    with fsspec.open(str(path), "wb", auto_mkdir=True) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in files:
            content = json.dumps(content) if isinstance(content, dict) else content
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def samples_of(path: str) -> list[Sample]:
    faults: list[str] = []
    samples = read_samples(path, faults)
    assert faults == []
    return samples


def faults_of(path: str) -> list[str]:
    faults: list[str] = []
    assert read_samples(path, faults) == []
    return faults


@pytest.mark.parametrize(("name", "key", "extension"), [
    ("000.mp4", "000", "mp4"), ("in/some.dir/a.b.MP4", "in/some.dir/a", "b.mp4"), ("a.tar.gz", "a", "tar.gz"),
])  # fmt: skip
def test_names_are_split_at_the_first_dot_of_the_last_part(name: str, key: str, extension: str) -> None:
    assert split_name(name) == (key, extension)


@pytest.mark.parametrize("name", ["README", "a/b.c/d", "._a.mp4", "in/.hidden.mp4", "in/__meta__.json", "a.", ""])
def test_names_that_belong_to_no_sample(name: str) -> None:
    assert split_name(name) is None


words = st.text("ab01-_ ", min_size=1, max_size=4)


@settings(max_examples=40)
@given(
    keys=st.dictionaries(st.lists(words, min_size=1, max_size=3).map("/".join), st.sets(words), max_size=6),
    order=st.randoms(use_true_random=False),
)
def test_members_are_grouped_whatever_their_order(
    keys: dict[str, set[str]], order: random.Random, tmp_path_factory: pytest.TempPathFactory
) -> None:
    files = [(f"{key}.mp4", key.encode()) for key in keys]
    files += [(f"{key}.{kind}.txt", f"{kind} of {key}".encode()) for key, kinds in keys.items() for kind in kinds]
    order.shuffle(files)
    path = write_tar(tmp_path_factory.mktemp("any") / "x.tar", files)
    content = Path(path).read_bytes()
    found = {s.key: s for s in samples_of(path)}
    assert found.keys() == keys.keys()
    for key, kinds in keys.items():
        member = found[key].media["mp4"]
        assert content[member.offset : member.offset + member.size] == key.encode()
        assert found[key].captions == {kind: f"{kind} of {key}".strip() for kind in kinds}


def test_what_a_sample_is_made_of(tmp_path: Path) -> None:
    facts = {"caption": "in the json", "label": 1, "fps": 8.0, "tags": ["a", "b"], "exif": {"x": 1}, "boxes": [1, 2],
             "captions": {"short": "a cat", "both": ["a", "b"]}}  # fmt: skip
    path = write_tar(tmp_path / "x.tar", [
        ("README", "not a sample's"), ("a.mp4", b"video"), ("a.json", facts), ("a.wav", b"left alone"),
        ("a.txt", "\ufeffa café 🎬\r\n"), ("a.cls", "7\n"), ("a.SHORT.txt", "from the file"), ("b.left.mp4", b""),
        ("b.right.MP4", b"r"), ("b.jpg", b"image"), ("b.caption", "a dog"),
    ])  # fmt: skip
    a, b = samples_of(path)
    assert (a.key, list(a.media)) == ("a", ["mp4"])
    assert a.captions == {"caption": "a café 🎬", "short": "from the file", "both": ["a", "b"]}
    assert a.facts == {"label": "7", "caption": "in the json", "fps": 8.0, "tags": ["a", "b"]}
    assert list(b.media) == ["left.mp4", "right.mp4", "jpg"]
    assert b.media["right.mp4"].name == "b.right.MP4"
    assert (b.captions, b.facts) == ({"caption": "a dog"}, {})


@pytest.mark.parametrize(("files", "fault"), [
    ([("a.mp4", b"1"), ("a.mp4", b"2")], "a.mp4: a has its mp4 twice; keep one"),
    ([("a.mp4", b"1"), ("a.MP4", b"2")], "a.MP4: a has its mp4 twice; keep one"),
    ([("a.mp4", b""), ("a.txt", "x"), ("a.caption", "y")], "a.caption: a has its caption caption twice; keep one"),
    ([("a.txt", "x"), ("a.npy", b"")], "a: no video or image of this name"),
    ([("a.mp4", b""), ("a.txt", b"caf\xe9")], "a.txt: text, line 1: not UTF-8 (byte 3 of the file); save it as UTF-8"),
    ([("a.mp4", b""), ("a.json", "{")], "a.json: not JSON: Expecting property name"),
    ([("a.mp4", b""), ("a.json", "[" * 100_000)], "a.json: not JSON: maximum recursion depth"),
    ([("a.mp4", b""), ("a.json", "[]")], 'a.json: must be an object, as in {"caption": "a cat"}'),
    ([("a.mp4", b""), ("a.txt", b" " * (2**20 + 1))], "a.txt: a text of 1048577 bytes; 1048576 are the most"),
])  # fmt: skip
def test_faults_name_the_member(files: list[tuple[str, bytes | str]], fault: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", files)
    for _ in range(2):  # What is wrong is not remembered.
        (found,) = faults_of(path)
        assert found.startswith(f"{path}: {fault}")


def test_all_faults_of_a_shard_come_together(tmp_path: Path) -> None:
    files: list[tuple[str, bytes]] = [(f"{n}.json", b"{") for n in range(3)]
    assert len(faults_of(write_tar(tmp_path / "x.tar", files))) == 6  # Each without a video, too.


def test_shards_that_can_not_be_opened(tmp_path: Path) -> None:
    assert faults_of(f"{tmp_path}/no.tar") == [f"{tmp_path}/no.tar: No such file or directory"]
    (tmp_path / "folder.tar").mkdir()
    assert faults_of(f"{tmp_path}/folder.tar") == [f"{tmp_path}/folder.tar: Is a directory"]
    (tmp_path / "cut.tar").write_bytes(
        Path(write_tar(tmp_path / "x.tar", [("a.mp4", b"v" * 9000)])).read_bytes()[:5000]
    )
    assert "cut.tar: cut short: a.mp4 in it ends at" in faults_of(f"{tmp_path}/cut.tar")[0]
    assert faults_of("memory://none.tar")[0].startswith("memory://none.tar: ")
    assert "Protocol not known" in faults_of("nobackend://none.tar")[0]


# ---- remembering


FILES: list[tuple[str, bytes | str]] = [("a.mp4", b"video"), ("a.txt", "a cat"), ("b.mp4", b"more")]


def test_a_shard_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "x.tar", FILES)
    first = samples_of(path)
    with monkeypatch.context() as patch:
        patch.setattr(webdataset, "read_members", None)
        assert samples_of(path) == first
        patch.chdir(tmp_path)
        assert samples_of("x.tar") == first  # The same file by another name.
    write_tar(path, [*FILES, ("c.mp4", b"")])
    assert [s.key for s in samples_of(path)] == ["a", "b", "c"]


def test_what_is_damaged_is_read_again(tmp_path: Path, cache: Path) -> None:
    path = write_tar(tmp_path / "x.tar", FILES)
    first = samples_of(path)
    (file,) = cache.iterdir()
    good = file.read_bytes()
    for bad in (b"", good[:-1], good[:30], good.replace(b"video", b"").replace(b"a.mp4", b"b.mp4"), b"\0" * 100):
        file.write_bytes(bad)
        assert samples_of(path) == first
        assert file.read_bytes() == good
    assert list(cache.iterdir()) == [file]  # Nothing is left behind.


def test_without_a_place_to_remember(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "x.tar", FILES)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # Nothing can be made below it.
    assert len(samples_of(path)) == len(samples_of(path)) == 2


def test_remote_shards_are_remembered_until_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mutoscope.data.media.FRESH", 1e-9)  # Ask each time.
    path = write_tar("memory://remembered/x.tar", FILES)
    first = samples_of(path)
    assert first[0].captions == {"caption": "a cat"}
    with monkeypatch.context() as patch:
        patch.setattr(webdataset, "read_members", None)
        assert samples_of(path) == first
    write_tar(path, [("z.mp4", b"")])
    assert [s.key for s in samples_of(path)] == ["z"]


def test_the_videos_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "x.tar", [(f"{n}.mp4", os.urandom(2**20)) for n in range(8)])
    read = 0

    class Counting(io.FileIO):
        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            nonlocal read
            read += (count := super().readinto(buffer) or 0)
            return count

    monkeypatch.setattr("builtins.open", lambda path, mode: io.BufferedReader(Counting(path)), raising=True)
    with webdataset._opened(path) as file:
        assert len(webdataset._read(file, [])) == 8
    assert read < 2**18
