"""Clips in shards, from the listing to their pixels: tar, Parquet and Arrow, here and behind URLs."""

from __future__ import annotations

import json
import random
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3

from mutoscope.data.sources.archives import arrow_dataset, parquet_videos, webdataset
from mutoscope.data.sources.layouts import Clip, list_clips
from mutoscope.data.sources.splits import split_by_hash
from mutoscope.data.video import read_frames, write_video
from mutoscope.recipe import ClipSet

VIDEO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CLIPS = 6
Content = bytes | str | dict[str, Any]
"""Of a member of a tar; a dict goes in as JSON."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def pixels(clip: int) -> np.ndarray[Any, Any]:
    """Four frames, in each its clip's number and its own."""
    frames = np.full((4, 16, 32, 3), 40 * clip, np.uint8)
    frames[:, :, :16] = 60 * np.arange(4, dtype=np.uint8)[:, None, None, None]
    return frames


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("videos")
    for n in range(CLIPS):
        write_video(folder / f"{n}.mp4", pixels(n), 8, lossless=True)
    return [(folder / f"{n}.mp4").read_bytes() for n in range(CLIPS)]


def put(path: str, content: bytes) -> str:
    with fsspec.open(path, "wb", auto_mkdir=True) as file:
        file.write(content)
    return path


def put_tar(path: str, files: dict[str, Content]) -> str:
    with fsspec.open(path, "wb", auto_mkdir=True) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            data = content if isinstance(content, bytes) else _text(content).encode()
            info.size = len(data)
            tar.addfile(info, fileobj=pa.BufferReader(data))
    return path


def _text(content: str | dict[str, Any]) -> str:
    return content if isinstance(content, str) else json.dumps(content)


def put_parquet(path: str, table: pa.Table, group: int = 2) -> str:
    with fsspec.open(path, "wb", auto_mkdir=True) as file:
        pq.write_table(table, file, row_group_size=group)
    return path


def put_arrow(folder: Path, table: pa.Table) -> str:
    folder.mkdir(parents=True)
    names = [f"data-0000{n}-of-00002.arrow" for n in range(2)]
    for n, name in enumerate(names):
        part = table.slice(n * 3, 3)
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, part.schema) as writer:
            writer.write_table(part, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return str(folder)


def table_of(videos: list[bytes], **columns: list[Any]) -> pa.Table:
    cells = pa.array([{"bytes": video, "path": f"{n}.mp4"} for n, video in enumerate(videos)], VIDEO)
    return pa.table({"video": cells, **columns})


def check_pixels(clips: list[Clip]) -> None:
    """In random order, each clip's frames are those of the number that its caption ends in."""
    for clip in random.Random(0).sample(clips, len(clips)):
        number = int(clip.captions["caption"][0][-1])
        assert np.array_equal(read_frames(clip.media, [3, 0, 2]), pixels(number)[[3, 0, 2]])


def splits(clips: list[Clip]) -> dict[str, str]:
    return {clip.id: clip.split for clip in clips}


# ---- tar


def shards(root: str, videos: list[bytes], names: tuple[str, str] = ("000", "001")) -> None:
    for n, name in enumerate(names):
        files: dict[str, Content] = {}
        for k in range(n * 3, n * 3 + 3):
            files |= {f"in/{k}.mp4": videos[k], f"in/{k}.txt": f"clip {k}", f"in/{k}.cls": str(k)}
        put_tar(f"{root}/{name}.tar", files)


@pytest.mark.parametrize("scheme", ["", "file://", "memory:/"])
def test_webdataset_here_and_elsewhere(scheme: str, videos: list[bytes], tmp_path: Path) -> None:
    root = f"{scheme}{tmp_path}"
    shards(f"{root}/shards", videos)
    for form in ("shards", "shards/*.tar", "shards/{000..001}.tar"):
        clips = list_clips(ClipSet(root=f"{root}/{form}", layout="webdataset"), 0.3)
        assert [clip.id for clip in clips] == [f"00{k // 3}/in/{k}" for k in range(6)]
        assert [clip.label for clip in clips] == list(range(6))
        assert splits(clips) == split_by_hash([clip.id for clip in clips], 0.3)
        check_pixels(clips)
    assert str(clips[0].media) == f"{root}/shards/000.tar:in/0.mp4"
    assert list_clips(ClipSet(root=f"{root}/shards"), 0.3) == webdataset(ClipSet(root=f"{root}/shards"), 0.3)
    assert len(list_clips(ClipSet(root=f"{root}/shards/001.tar"))) == 3


@pytest.mark.parametrize(("names", "val"), [
    (("train-000", "val-000"), range(3, 6)), (("train/a", "validation/a"), range(3, 6)),
    (("test_0", "other"), range(3)), (("x", "dev.1"), range(3, 6)),
])  # fmt: skip
def test_shards_called_val_are_held_out(
    names: tuple[str, str], val: range, videos: list[bytes], tmp_path: Path
) -> None:
    shards(str(tmp_path), videos, names)
    clips = webdataset(ClipSet(root=str(tmp_path)), 0.5)
    assert {clip.label for clip in clips if clip.split == "val"} == set(val)
    assert len(clips) == 6


def test_test_shards_are_left_out_beside_val(videos: list[bytes], tmp_path: Path) -> None:
    shards(str(tmp_path), videos, ("train-0", "test-0"))
    put_tar(f"{tmp_path}/val-0.tar", {"a.mp4": videos[0], "a.txt": "clip 0"})
    assert splits(webdataset(ClipSet(root=str(tmp_path)), 0.1)) == {
        "val-0/a": "val", **{f"train-0/in/{k}": "train" for k in range(3)},
    }  # fmt: skip
    (tmp_path / "val-0.tar").unlink(), (tmp_path / "train-0.tar").unlink()
    with pytest.raises(ValueError, match="no clip to train on: all are of split val or test"):
        webdataset(ClipSet(root=str(tmp_path)), 0.1)


def test_captions_of_several_kinds(tmp_path: Path) -> None:
    path = put_tar(f"{tmp_path}/x.tar", {
        "a.mp4": b"", "a.txt": "plain", "a.short.txt": "s", "a.json": {"text": "no", "long": ["l1", "l2"]},
    })  # fmt: skip
    captions = lambda **options: webdataset(ClipSet(root=path, **options), 0.0)[0].captions
    assert captions() == {"caption": ("plain",), "short": ("s",)}
    assert captions(caption_columns=("long",)) == {"caption": ("l1", "l2")}
    assert captions(caption_columns=("long", "short")) == {"long": ("l1", "l2"), "short": ("s",)}
    with pytest.raises(ValueError, match=r"no column 'lang' \(data.caption_columns\); did you mean long"):
        captions(caption_columns=("lang",))
    put_tar(path, {"a.mp4": b"", "a.json": {"Text": "said", "captions": {"short": "s"}}})
    assert captions() == {"caption": ("said",), "short": ("s",)}
    put_tar(path, {"a.mp4": b""})
    assert captions() == {}


def test_which_of_several_members_is_the_video(tmp_path: Path) -> None:
    path = put_tar(f"{tmp_path}/x.tar", {"a.jpg": b"", "a.left.mp4": b"l", "b.png": b"", "b.left.mp4": b""})
    members = lambda column: [c.media.member for c in webdataset(ClipSet(root=path, video_column=column), 0.0)]
    assert members(None) == ["a.left.mp4", "b.left.mp4"]  # A video before an image.
    assert members(".LEFT.mp4") == ["a.left.mp4", "b.left.mp4"]
    with pytest.raises(ValueError, match=r"x.tar:b: no member .jpg \(data.video_column\); there is .left.mp4, .png"):
        members("jpg")
    put_tar(path, {"a.left.mp4": b"", "a.right.mp4": b""})
    with pytest.raises(ValueError, match=r"several videos: .left.mp4, .right.mp4; name one by data.video_column"):
        members(None)


def test_faults_of_all_shards_come_together(tmp_path: Path) -> None:
    for n in range(7):
        put_tar(f"{tmp_path}/{n}.tar", {"a.json": "{", "b.txt": "x", "c.mp4": b""})
    put(f"{tmp_path}/7.tar", b"\x1f\x8b" + bytes(600))
    with pytest.raises(ValueError) as error:
        webdataset(ClipSet(root=str(tmp_path)), 0.1)
    first, *lines = str(error.value).splitlines()
    assert first == f"data.root={tmp_path}: 22 faults:"
    assert lines[0].startswith(f"  {tmp_path}/0.tar: a.json: not JSON")
    assert len(lines) == 11 and lines[10] == "  ... and 12 more"


@pytest.mark.parametrize(("files", "reason"), [
    ({"a.mp4": b"", "a.txt": "x", "b.mp4": b""}, "x.tar:b.mp4: no caption in caption"),
    ({"a.mp4": b"", "a.txt": " \n"}, "x.tar:a.mp4: no caption in caption"),
    ({"a.mp4": b"", "a.json": {"caption": 3}}, "x.tar:a.mp4: a caption must be text; it is 3"),
    ({"a.mp4": b"", "a.cls": "cat"}, "x.tar:a.mp4: the label must be a whole number from 0 on; it is 'cat'"),
    ({}, "no clips in these shards"),
])  # fmt: skip
def test_what_is_wrong_with_a_sample(files: dict[str, Content], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        webdataset(ClipSet(root=put_tar(f"{tmp_path}/x.tar", files)), 0.1)


def test_shards_of_braces_that_are_missing(videos: list[bytes], tmp_path: Path) -> None:
    shards(str(tmp_path), videos)
    with pytest.raises(
        ValueError, match=r"14 faults:\n  .*/002.tar: No such file or directory\n(.*\n){9}  ... and 4 more"
    ):
        webdataset(ClipSet(root=f"{tmp_path}/{{000..015}}.tar"), 0.1)


def test_twenty_mutated_shards(videos: list[bytes], tmp_path: Path) -> None:
    shards(str(tmp_path / "good"), videos)
    order, errors = random.Random(0), 0
    for n in range(20):
        content = bytearray((tmp_path / "good/000.tar").read_bytes())
        for _ in range(3):
            place = order.randrange(len(content))
            if order.random() < 0.5:
                del content[place : place + order.choice((1, 512, 2000))]
            else:
                content[place // 512 * 512 + order.randrange(160)] = order.randrange(256)
        root = put(f"{tmp_path}/{n}.tar", bytes(content))
        try:
            for clip in webdataset(ClipSet(root=root), 0.0):
                read_frames(clip.media, [0])
        except ValueError as error:
            assert f"{n}.tar" in str(error)
            errors += 1
    assert errors > 15


# ---- Parquet and Arrow


def test_a_snapshot_of_a_hub_data_set(videos: list[bytes], tmp_path: Path) -> None:
    for scheme in ("", "memory:/"):
        root = f"{scheme}{tmp_path}/set"
        table = table_of(videos, text=[f"clip {k}" for k in range(6)], label=[0, 1, 2, 3, 4, 5])
        put_parquet(f"{root}/data/train-00000-of-00001.parquet", table.slice(0, 4))
        put_parquet(f"{root}/data/validation-00000-of-00001.parquet", table.slice(4))
        clips = list_clips(ClipSet(root=root), 0.5)
        train, val = ("data/train-00000-of-00001", "data/validation-00000-of-00001")
        assert splits(clips) == {
            **{f"{train}/{k:06d}": "train" for k in range(4)}, **{f"{val}/{k:06d}": "val" for k in range(2)},
        }  # fmt: skip
        assert [clip.label for clip in clips] == list(range(6))
        assert str(clips[5].media) == f"{root}/{val}.parquet:row 1"
        check_pixels(clips)


def test_columns_of_a_parquet_file(videos: list[bytes], tmp_path: Path) -> None:
    table = table_of(
        videos, thumb=videos, short=[f"s{k}" for k in range(6)], long=[[f"a{k}", f"b{k}"] for k in range(6)],
        ID=[f"clip-{k}" for k in range(6)], split=["train"] * 4 + ["test"] * 2, start=[0, 0, 0, 0, 0, 0.25],
        end=["", "", "", "", "0.25", "0:00.5"],
    )  # fmt: skip
    path = put_parquet(f"{tmp_path}/x.parquet", table)
    clips = parquet_videos(ClipSet(root=path, caption_columns=("short", "long"), video_column="video"), 0.5)
    assert splits(clips) == {f"clip-{k}": "train" if k < 4 else "val" for k in range(6)}
    assert clips[3].captions == {"short": ("s3",), "long": ("a3", "b3")}
    assert [(clip.start, clip.end) for clip in clips[3:]] == [(0.0, None), (0.0, 0.25), (0.25, 0.5)]
    with pytest.raises(ValueError, match=r"x.parquet: no column 'films' \(data.video_column\); there is video, thumb"):
        parquet_videos(ClipSet(root=path, video_column="films"), 0.5)
    with pytest.raises(ValueError, match=r"name that of the videos by data.video_column"):
        parquet_videos(ClipSet(root=path, video_column="short"), 0.5)
    two = put_parquet(f"{tmp_path}/two.parquet", table.select(["thumb", "short"]).append_column("b", table["thumb"]))
    with pytest.raises(ValueError, match=r"no column, or no single one, of bytes \(thumb, b\) among thumb, short, b"):
        parquet_videos(ClipSet(root=two), 0.5)
    one = put_parquet(f"{tmp_path}/one.parquet", table.select(["thumb", "short"]))
    assert {clip.media.column for clip in parquet_videos(ClipSet(root=one), 0.5)} == {"thumb"}


def test_faults_of_parquet_files(videos: list[bytes], tmp_path: Path) -> None:
    cells = pa.array([{"bytes": None, "path": f"{k}.mp4"} for k in range(6)], VIDEO)
    put_parquet(f"{tmp_path}/1-paths.parquet", pa.table({"video": cells}))
    put(f"{tmp_path}/2-broken.parquet", b"no parquet")
    put_parquet(f"{tmp_path}/3-text.parquet", pa.table({"video": ["a.mp4"]}))
    with pytest.raises(ValueError) as error:
        parquet_videos(ClipSet(root=str(tmp_path)), 0.1)
    first, *lines = str(error.value).splitlines()
    assert first == f"data.root={tmp_path}: 3 faults:"
    for line, reason in zip(lines, (
        "1-paths.parquet: column video has no bytes in 6 of 6 rows, such as row 0; paths alone are for layout table",
        "2-broken.parquet: can't be read: ArrowInvalid: Parquet magic bytes not found",
        "3-text.parquet: no column, or no single one, of bytes (none) among video",
    ), strict=True):  # fmt: skip
        assert reason in line
    same = table_of(videos[:2], id=["a", "a"])
    with pytest.raises(ValueError, match=r"x.parquet:row 1: the id a is that of .*x.parquet:row 0 too"):
        parquet_videos(ClipSet(root=put_parquet(f"{tmp_path}/x.parquet", same)), 0.1)
    bad = table_of(videos[:3], caption=["x", None, "y"], start=[0, 0, 2], end=[0.5, 0.5, 1])
    with pytest.raises(ValueError, match=r"2 faults:\n.*row 1: no caption in caption.*\n.*row 2: start \(2\) must lie"):
        parquet_videos(ClipSet(root=put_parquet(f"{tmp_path}/x.parquet", bad)), 0.1)


def test_what_save_to_disk_writes(videos: list[bytes], tmp_path: Path) -> None:
    table = table_of(videos, caption=[f"clip {k}" for k in range(6)])
    one = put_arrow(tmp_path / "one", table)
    clips = list_clips(ClipSet(root=one), 0.3)
    assert [clip.id for clip in clips] == [f"data-0000{k // 3}-of-00002/{k % 3:06d}" for k in range(6)]
    assert splits(clips) == split_by_hash([clip.id for clip in clips], 0.3)
    check_pixels(clips)
    for part in ("train", "validation"):
        put_arrow(tmp_path / "both" / part, table)
    (tmp_path / "both/dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    both = list_clips(ClipSet(root=str(tmp_path / "both")), 0.3)
    assert [clip.split for clip in both] == ["train"] * 6 + ["val"] * 6
    check_pixels(both)
    assert arrow_dataset(ClipSet(root=one), 0.3) == clips


# ---- S3


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3.bucket("clips") as url:
        yield url


@pytest.fixture(scope="module")
def uploaded(bucket: str, videos: list[bytes]) -> str:
    shards(f"{bucket}/tar", videos)
    put_parquet(f"{bucket}/parquet/train-0.parquet", table_of(videos, caption=[f"clip {k}" for k in range(6)]))
    return bucket


@pytest.mark.parametrize("form", ["tar", "tar/*.tar", "tar/{000..001}.tar", "parquet", "parquet/*.parquet"])
def test_clips_in_a_bucket(form: str, uploaded: str) -> None:
    clips = list_clips(ClipSet(root=f"{uploaded}/{form}"), 0.3)
    assert len(clips) == 6
    check_pixels(clips)


def test_what_is_not_in_a_bucket(uploaded: str) -> None:
    with pytest.raises(ValueError, match=r"s3://clips/none/\*.tar: no \*.tar there"):
        list_clips(ClipSet(root=f"{uploaded}/none/*.tar"))
    with pytest.raises(ValueError, match=r"s3://clips/tar/002.tar: "):
        list_clips(ClipSet(root=f"{uploaded}/tar/{{001..002}}.tar"))


def test_a_clip_in_a_bucket_is_one_request(bucket: str, videos: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    shards(f"{bucket}/requests", videos)
    (clip, *_) = list_clips(ClipSet(root=f"{bucket}/requests"), 0.0)
    system = type(fsspec.filesystem("s3"))
    calls: list[tuple[str, str]] = []
    call = system._call_s3

    async def noting(self: Any, method: str, *args: Any, **options: Any) -> Any:
        calls.append((method, options.get("Range", "")))
        return await call(self, method, *args, **options)

    monkeypatch.setattr(system, "_call_s3", noting)
    assert np.array_equal(read_frames(clip.media, [1, 3]), pixels(0)[[1, 3]])
    end = clip.media.offset + (clip.media.size or 0) - 1
    assert [c for c in calls if c[0] == "get_object"] == [("get_object", f"bytes={clip.media.offset}-{end}")]


@pytest.mark.slow
def test_workers_read_from_a_bucket(uploaded: str) -> None:
    """Processes are spawned, as the loader's are: fsspec's event loop does not outlive a fork."""
    clips = [c for form in ("tar", "parquet") for c in list_clips(ClipSet(root=f"{uploaded}/{form}"), 0.0)]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        for clip, frames in zip(clips, pool.map(read_frames, [c.media for c in clips], [[0, 3]] * 12), strict=True):
            assert np.array_equal(frames, pixels(int(clip.captions["caption"][0][-1]))[[0, 3]])
