"""How frames are found, what is refused, and what that costs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import pytest
from bar_codes import number_of, numbers_of, painted
from media_cases import BROKEN, make

from mutoscope.data import decoding, seeking
from mutoscope.data.video import VideoError, frame_index, probe, read_frames, write_video


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A case's file by name, made once."""
    folder = tmp_path_factory.mktemp("media")
    return lambda name: folder / name if (folder / name).exists() else make(name, folder)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named_with_the_reason(name: str, made: Callable[[str], Path]) -> None:
    path = made(name)
    with pytest.raises(VideoError, match=BROKEN[name][1]) as caught:
        read_frames(path, range(probe(path, timeout=10).frames), timeout=10)
    assert str(path) in str(caught.value)


def test_a_frame_before_the_damage_is_read_and_one_behind_is_not(made: Callable[[str], Path]) -> None:
    path = made("scratched.mp4")
    damaged = int(float(re.findall(r"at ([\d.]+) s", str(_raised(path, range(30))))[0]) * 30 + 0.5)
    assert 5 < damaged < 29
    assert len(read_frames(path, range(damaged))) == damaged
    assert "damaged" in str(_raised(path, [29]))  # Built on it, without a keyframe between.


def _raised(path: Path, numbers: Any) -> VideoError:
    with pytest.raises(VideoError) as caught:
        read_frames(path, numbers)
    return caught.value


@pytest.mark.parametrize("name", ["groups_of_12.mp4", "open_groups.mp4", "h264.mkv", "h264.ts", "mpeg2.ts", "hevc.mp4"])
def test_decoding_starts_at_the_keyframe_before_and_ends_at_once(
    name: str, made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FFmpeg seeks in some containers by when frames are shown and in others by when they are decoded: the wrong one
    of them leads a group too far back, which costs time and shows in no frame."""
    decoded: list[int | None] = []

    def counting(*args: Any) -> Iterator[av.VideoFrame]:
        for frame in decoding.decode_from_keyframe(*args):
            decoded.append(number_of(frame.to_ndarray(format="rgb24")))
            yield frame

    monkeypatch.setattr(seeking, "decode_from_keyframe", counting)
    read_frames(made(name), [33])
    assert decoded[0] is not None and decoded[0] > 33 - 12 and decoded[-1] == 33  # Groups are of 12 frames.


def test_damage_and_hugeness_are_found_before_memory_is_filled(
    made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "MAX_PIXELS", 1000)
    with pytest.raises(VideoError, match="frames of 80 × 32 are too large to be decoded"):
        read_frames(made("constant.mp4"), [0])
    monkeypatch.undo()
    monkeypatch.setattr(seeking, "MAX_SECONDS", 1)
    with pytest.raises(VideoError, match="2 s long, by its timestamps; they are damaged"):
        frame_index(make("no_b_frames.mp4", made("constant.mp4").parent))


def test_reading_ends_in_time(made: Callable[[str], Path]) -> None:
    for name in ("groups_of_250.mp4", "h264.avi"):
        with pytest.raises(VideoError, match=f"{name}: took longer than 1e-05 s"):
            read_frames(make(name, made("444.mp4").parent), range(30), timeout=1e-5)
        assert len(read_frames(made(name), range(30), timeout=60.0)) == 30


def test_a_file_is_remembered_until_it_changes_and_not_for_ever(
    made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["444.mp4", "gray.mp4", "mjpeg.mov"]
    monkeypatch.setattr(seeking, "REMEMBERED", 2)
    monkeypatch.setattr(seeking, "_remembered", {})
    first = frame_index(made(names[0]))
    for name in names[:2]:
        frame_index(made(name))
    assert frame_index(made(names[0])) is first
    for name in names[1:]:
        frame_index(made(name))
    assert frame_index(made(names[0])) is not first


def test_a_name_is_no_protocol(made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = made("a:b, %03d ä.mp4")
    monkeypatch.chdir(path.parent)
    assert numbers_of(read_frames(path.name, [2, 0])) == [2, 0]


def test_the_index_follows_a_changed_file(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    write_video(path, painted(5), 10)
    assert probe(path).frames == 5
    write_video(path, painted(9), 10)
    assert probe(path).frames == 9
