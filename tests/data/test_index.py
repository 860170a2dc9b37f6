"""What is found out about clips without decoding them, and what is remembered of it."""

from __future__ import annotations

import io
import os
import random
import tarfile
import time
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mutoscope.data import index as index_module
from mutoscope.data.flying_mnist import PRESETS
from mutoscope.data.index import ClipInfo, inspect, look
from mutoscope.data.media import Media
from mutoscope.data.seeking import FrameIndex
from mutoscope.data.sources.layouts import Clip
from mutoscope.data.video import VideoInfo, frame_index, frames_at, write_video
from mutoscope.supervise import Alive

probe_each = index_module._probe_each


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mutoscope" / "clips"


def clip_of(media: Media | Path, start: float = 0.0, end: float | None = None) -> Clip:
    media = media if isinstance(media, Media) else Media(str(media))
    return Clip(id=f"{media}#{start}", media=media, split="train", start=start, end=end)


def video(path: Path, frames: int = 8, height: int = 16, width: int = 32, fps: float = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, np.zeros((frames, height, width, 3), np.uint8), fps)
    return path


def variable_rate(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height = stream.width = 16
        stream.codec_context.time_base = Fraction(1, 1000)
        for pts in sorted(random.Random(0).sample(range(3000), 60)):
            frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
            frame.time_base, frame.pts = Fraction(1, 1000), pts
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are probed from here on."""
    seen: list[str] = []
    real = index_module.probe

    def probe(media: Media, timeout: float) -> VideoInfo:
        seen.append(str(media))
        return real(media, timeout)

    monkeypatch.setattr(index_module, "probe", probe)
    return seen


def test_golden(tmp_path: Path) -> None:
    path, told = video(tmp_path / "a.mp4", frames=12, fps=24), []
    infos = inspect(
        [clip_of(path), clip_of(path, 0.125, 0.25), clip_of(path, 0.25, 99)], on_clip=lambda: told.append(1)
    )
    assert infos == [
        ClipInfo(frames=12, fps=24, height=16, width=32, duration=0.5, rotation=0, image=False),
        ClipInfo(frames=3, fps=24, height=16, width=32, duration=0.125, rotation=0, image=False),
        ClipInfo(frames=6, fps=24, height=16, width=32, duration=0.25, rotation=0, image=False),
    ]
    assert infos[0].count(None) == 12 and infos[0].count(8) == 4 and infos[0].count(48) == 24
    assert len(told) == 3
    assert inspect([]) == []


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return variable_rate(tmp_path_factory.mktemp("uneven") / "v.mp4")


@given(st.floats(0, 2.5), st.one_of(st.none(), st.floats(0.1, 9)), st.one_of(st.none(), st.floats(0.5, 240)))
def test_count_is_what_is_read(uneven: Path, start: float, length: float | None, fps: float | None) -> None:
    end = None if length is None else start + length
    times: FrameIndex = frame_index(uneven)
    (info,) = inspect([clip_of(uneven, start, end)])
    if isinstance(info, str):
        assert len(frames_at(times, None, start, end)) == 0
        return
    assert info.frames == len(frames_at(times, None, start, end))
    assert info.count(fps) == len(frames_at(times, fps, start, end))
    assert inspect([clip_of(uneven, start, end)]) == [info]  # Now from the disk.


def test_a_second_look_reads_no_file(tmp_path: Path, probes: list[str]) -> None:
    clips = [clip_of(video(tmp_path / name / "v.mp4", frames=n + 1)) for n, name in enumerate("abc")]
    first = inspect(clips)
    assert len(probes) == 3
    assert inspect(clips) == first == inspect(clips[:1]) + inspect(clips[1:]) and len(probes) == 3
    video(tmp_path / "b" / "v.mp4", frames=7)
    again = inspect(clips)
    assert probes[3:] == [str(tmp_path / "b" / "v.mp4")] and again[1].frames == 7 and again[0] == first[0]
    os.utime(tmp_path / "c" / "v.mp4", ns=(1, 1))
    assert inspect(clips) == again and len(probes) == 5


def test_parts_of_a_file_are_probed_together(tmp_path: Path, probes: list[str]) -> None:
    path = video(tmp_path / "film.mp4", frames=80)
    clips = [clip_of(path, n, n + 1) for n in range(10)]
    assert [info.frames for info in inspect(clips)] == [8] * 10 and len(probes) == 1
    inspect(clips)
    assert len(probes) == 1


def test_the_folder_that_one_is_in_makes_no_difference(
    tmp_path: Path, probes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, frames in (("a", 3), ("b", 5)):
        video(tmp_path / name / "v.mp4", frames=frames)
        os.utime(tmp_path / name / "v.mp4", ns=(1, 1))
    found = []
    for name in "ab":
        monkeypatch.chdir(tmp_path / name)
        found += inspect([clip_of(Path("v.mp4")), clip_of(tmp_path / name / "v.mp4")])
    assert [info.frames for info in found] == [3, 3, 5, 5]


def test_members_of_a_tar_file_are_told_apart(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for n in (3, 5):
            data = video(tmp_path / f"{n}.mp4", frames=n).read_bytes()
            member = tarfile.TarInfo(f"{n}.mp4")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with tarfile.open(tmp_path / "0.tar") as tar:
        clips = [clip_of(Media(tar.name, m.name, m.offset_data, m.size)) for m in tar.getmembers()]
    for _ in range(2):
        assert [info.frames for info in inspect(clips)] == [3, 5]


def test_broken_clips_say_why_and_are_tried_again(tmp_path: Path, probes: list[str]) -> None:
    good, bad = video(tmp_path / "good.mp4"), tmp_path / "bad.mp4"
    bad.write_bytes(good.read_bytes()[:-40])
    clips = [clip_of(good), clip_of(bad), clip_of(tmp_path / "none.mp4"), clip_of(good, 5), clip_of(good, 5, 6)]
    infos = inspect(clips)
    assert isinstance(infos[0], ClipInfo)
    assert infos[1].startswith(f"{bad}: ")
    assert infos[2] == f"{tmp_path / 'none.mp4'}: No such file or directory"
    assert infos[3] == f"{good}: no frames from 5 s to its end; it is 1 s long"
    assert infos[4] == f"{good}: no frames from 5 s to 6 s; it is 1 s long"
    assert [look(clip) for clip in clips] == infos
    stamp = bad.stat().st_mtime_ns
    probes.clear()
    assert inspect(clips) == infos and str(bad) in probes
    size = bad.stat().st_size
    bad.write_bytes(good.read_bytes()[:size])
    os.utime(bad, ns=(stamp, stamp))
    assert inspect(clips)[1] == infos[1]


def test_drawn_clips_touch_no_file(cache: Path) -> None:
    tiny = PRESETS["tiny"]
    (info,) = inspect([clip_of(Media("flying-mnist://tiny/train/00003"))])
    assert info == ClipInfo(frames=tiny.frames, fps=tiny.fps, height=tiny.size, width=tiny.size,
                            duration=tiny.frames / tiny.fps, rotation=0, image=False)  # fmt: skip
    assert info == look(clip_of(Media("flying-mnist://tiny/val/00000")))
    assert not cache.exists()


def test_damage_is_never_believed(tmp_path: Path, cache: Path, probes: list[str]) -> None:
    clips = [clip_of(video(tmp_path / "v" / f"{n}.mp4", frames=n)) for n in range(1, 9)]
    truth = inspect(clips)
    assert truth == [look(clip) for clip in clips]
    (file,) = cache.iterdir()
    whole, chance = file.read_bytes(), random.Random(0)
    for _ in range(100):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 5)):
            place = chance.randrange(len(data))
            if chance.random() < 0.3:
                del data[place : place + chance.randint(1, 200)]
                data += b"0"
            else:
                data[place] = chance.choice([chance.randrange(256), *b"0123456789"])
        file.write_bytes(data)
        assert inspect(clips) == truth
    file.write_bytes(whole[: len(whole) // 2])  # As by a writer that died.
    assert inspect(clips) == truth
    probes.clear()
    assert inspect(clips) == truth and not probes


def _inspect_in(folder: str, first: int) -> list[int]:
    return [
        info.frames for n in range(first, first + 12) for info in inspect([clip_of(Path(folder) / f"{n % 16}.mp4")])
    ]


def test_writers_may_meet(tmp_path: Path, probes: list[str]) -> None:
    for n in range(16):
        video(tmp_path / "v" / f"{n}.mp4", frames=n + 1)
    with get_context("spawn").Pool(2) as pool:
        found = pool.starmap(_inspect_in, [(str(tmp_path / "v"), first) for first in (0, 8)])
    assert found == [list(range(1, 13)), [n % 16 + 1 for n in range(8, 20)]]
    assert [info.frames for info in inspect([clip_of(tmp_path / "v" / f"{n}.mp4") for n in range(16)])] == [
        *range(1, 17)
    ]
    assert not probes


@pytest.mark.parametrize("home", ["a file", "relative", "none"])
def test_without_a_place_to_remember(
    home: str, tmp_path: Path, probes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = [clip_of(video(tmp_path / "v.mp4"))]
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setenv("XDG_CACHE_HOME", {"a file": str(tmp_path / "file"), "relative": "cache", "none": ""}[home])
    assert inspect(clips) == inspect(clips) and len(probes) == 2
    assert not list(here.iterdir())


def test_what_is_done_is_kept_when_it_is_cut_short(tmp_path: Path, probes: list[str]) -> None:
    clips = [clip_of(video(tmp_path / f"{n}.mp4")) for n in range(6)]
    left = iter(range(3))

    def on_clip() -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        inspect(clips, on_clip=on_clip)
    probes.clear()
    time.sleep(0.2)  # For threads that are still at it.
    inspect(clips)
    assert len(probes) == 3


def test_one_that_hangs_holds_up_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = index_module.probe

    def probe(media: Media, timeout: float) -> VideoInfo:
        if media.path.endswith("stuck.mp4"):
            time.sleep(3)
        return real(media, timeout)

    monkeypatch.setattr(index_module, "probe", probe)
    monkeypatch.setattr(index_module, "THREADS", 1)
    monkeypatch.setattr(index_module, "GRACE", 0.1)
    names = ["stuck", "a", "b"]
    begin = time.monotonic()
    infos = inspect([clip_of(video(tmp_path / f"{name}.mp4")) for name in names], timeout=0.2)
    assert infos[0] == f"{tmp_path / 'stuck.mp4'}: given up after 0.3 seconds"
    assert [info.frames for info in infos[1:]] == [8, 8]
    assert time.monotonic() - begin < 2.5


def dying(job: list[tuple[int, list[Clip]]], alive: Alive, timeout: float) -> list[list[ClipInfo | str]]:
    if any(clip.path.endswith("fatal.mp4") for _, clips in job for clip in clips):
        os.abort()
    return probe_each(job, alive, timeout)


def test_many_files_are_looked_at_in_processes_where_a_crash_is_a_broken_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "MANY", 20)
    monkeypatch.setattr(index_module, "PROCESSES", 2)
    monkeypatch.setattr(index_module, "_probe_each", dying)
    sound = video(tmp_path / "0.mp4")
    names = [*map(str, range(1, 20)), "fatal"]
    for name in names:
        os.link(sound, tmp_path / f"{name}.mp4")
    (tmp_path / "empty.mp4").touch()
    clips = [clip_of(tmp_path / f"{name}.mp4") for name in ["0", *names, "empty"]]
    told: list[None] = []
    infos = inspect(clips, on_clip=lambda: told.append(None))
    assert len(told) == len(clips) and [i.frames for i in infos[:20]] == [8] * 20
    assert infos[20] == f"{clips[20].path}: the process that worked on it died: Aborted (signal 6)"
    assert infos[21] == f"{clips[21].path}: can't be read as a video: the file is empty"


def test_mistakes_of_ours_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def probe(media: Media, timeout: float) -> VideoInfo:
        raise TypeError("a bug")

    monkeypatch.setattr(index_module, "probe", probe)
    with pytest.raises(TypeError, match="a bug"):
        inspect([clip_of(video(tmp_path / "v.mp4"))])
