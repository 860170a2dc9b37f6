"""Every frame of these videos carries its number in its pixels, so that each frame returned can be checked."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from bar_codes import number_of, numbers_of, painted
from hypothesis import given, settings
from hypothesis import strategies as st
from media_cases import CASES, IRREGULAR, encode, make

from mutoscope.data.video import (
    FrameIndex,
    VideoError,
    frame_index,
    frames_at,
    iter_frames,
    probe,
    read_frames,
    resize,
    write_video,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A case's file by name, made once."""
    folder = tmp_path_factory.mktemp("media")
    return lambda name: folder / name if (folder / name).exists() else make(name, folder)


@pytest.mark.parametrize("name", CASES)
def test_frames_are_exact(name: str, made: Callable[[str], Path]) -> None:
    case, path = CASES[name], made(name)
    expected, left = case.numbers, len(case.numbers)
    whole = read_frames(path, range(left))
    assert numbers_of(whole) == expected
    rng = np.random.default_rng(1)
    for n in {0, left - 1, *rng.integers(0, left, 8).tolist()}:
        alone = read_frames(path, [n])
        assert number_of(alone[0]) == expected[n]
        np.testing.assert_array_equal(alone[0], whole[n])  # However few of the others were decoded.
    for _ in range(4):  # Any order, with repeats.
        some = rng.integers(0, left, 8)
        np.testing.assert_array_equal(read_frames(path, some), whole[some])
    strided = list(range(min(1, left - 1), left, 7)) + [left - 1] * 2
    one_by_one = list(iter_frames(path, strided))
    np.testing.assert_array_equal(np.stack(one_by_one), whole[strided])


@pytest.mark.parametrize("name", CASES)
def test_sizes_and_times_are_right(name: str, made: Callable[[str], Path]) -> None:
    case, path = CASES[name], made(name)
    info, index = probe(path), frame_index(path)
    assert info.frames == len(index.times) == len(case.numbers)
    assert (info.height, info.width, info.image) == (case.height, case.width, case.image)
    assert info.rotation % 360 == case.rotation and info.rotation in (-180, -90, 0, 90, 180)
    assert info.pixel_aspect == pytest.approx(case.pixel_aspect, rel=1e-3)
    times = np.arange(info.frames) / 30 if case.times is None else np.array(case.times)[: info.frames]
    np.testing.assert_allclose(index.times, times, atol=case.tolerance)
    if case.image:
        assert (info.duration, info.fps, index.fps) == (0, 0, 0)
        assert frames_at(index, 24.0).tolist() == frames_at(index).tolist() == [0]
    else:
        assert times[-1] < info.duration < times[-1] + 0.09
        assert info.fps == pytest.approx(info.frames / info.duration)


def test_numbers_out_of_place(made: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"nowhere\.mp4: No such file"):
        probe(tmp_path / "nowhere.mp4")
    with pytest.raises(VideoError, match=r"nowhere\.png: No such file"):
        probe(tmp_path / "nowhere.png")
    with pytest.raises(VideoError, match="Is a directory"):
        (tmp_path / "folder.mp4").mkdir()
        probe(tmp_path / "folder.mp4")
    for suffix in (".mp4", ".png"):  # Opening it would wait for ever.
        os.mkfifo(tmp_path / f"pipe{suffix}")
        with pytest.raises(VideoError, match="Not a regular file"):
            probe(tmp_path / f"pipe{suffix}")
    path = made("one_frame.mp4")
    with pytest.raises(VideoError, match=r"one_frame\.mp4: no frame 1, it has 1"):
        read_frames(path, [0, 1])
    with pytest.raises(VideoError, match="no frame -1"):
        read_frames(path, [-1])
    with pytest.raises(VideoError, match=r"rgb\.png: no frame 1, it has 1"):
        read_frames(made("rgb.png"), [1])
    with pytest.raises(ValueError, match="no frame numbers given"):
        read_frames(path, [])
    with pytest.raises(ValueError, match="frame numbers must ascend"):
        next(iter_frames(made("constant.mp4"), [3, 2]))
    assert list(iter_frames(path, [])) == []


@pytest.mark.parametrize(("matrix", "tag", "jpeg"), [
    (Colorspace.ITU709, 1, False),
    (Colorspace.ITU709, 1, True),
    (Colorspace.ITU601, 6, False),
    (Colorspace.ITU601, 2, False),  # Without a tag: what FFmpeg takes it for.
    (Colorspace.BT2020, 9, False),
])  # fmt: skip
def test_colours_are_those_of_the_files_tags(matrix: Colorspace, tag: int, jpeg: bool, tmp_path: Path) -> None:
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [120, 30, 200]], np.uint8)
    bars = np.ascontiguousarray(np.broadcast_to(colours.repeat(16, 0)[:, None], (96, 32, 3)))
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=10, options={"crf": "10"})
        stream.height, stream.width, stream.pix_fmt = 96, 32, "yuv420p"
        stream.codec_context.colorspace = tag
        full = ColorRange.JPEG if jpeg else ColorRange.MPEG
        stream.codec_context.color_range = full
        image = av.VideoFrame.from_ndarray(bars, format="rgb24")
        yuv = VideoReformatter().reformat(image, format="yuv420p", dst_colorspace=matrix, dst_color_range=full)
        yuv.pts = 0
        file.mux(stream.encode(yuv) + stream.encode())
    back = read_frames(path, [0])[0, 8::16, 16].astype(int)
    assert np.abs(back - colours).max() <= 4


@pytest.mark.parametrize(("matrix", "rotation"), [
    ((0, 1, -1, 0), -90),  # What phones write for a portrait video: turn it clockwise.
    ((0, -1, 1, 0), 90),
    ((-1, 0, 0, -1), -180),
])  # fmt: skip
def test_rotation_is_applied(matrix: tuple[int, ...], rotation: int, tmp_path: Path) -> None:
    frames = np.zeros((3, 32, 64, 3), np.uint8)
    frames[:, :16, :16] = 255  # White in the top left corner.
    path = tmp_path / "v.mp4"
    encode(path, frames)
    data = bytearray(path.read_bytes())
    a, b, c, d = (n * 2**16 for n in matrix)
    struct.pack_into(">9i", data, data.index(b"tkhd") + 44, a, b, 0, c, d, 0, 0, 0, 2**30)
    path.write_bytes(data)
    info, turned = probe(path), read_frames(path, range(3))
    assert abs(info.rotation) == abs(rotation) and (info.rotation == rotation or abs(rotation) == 180)
    assert turned.shape == (3, info.height, info.width, 3) == (3, *((64, 32) if abs(rotation) == 90 else (32, 64)), 3)
    rows, columns = {-90: (slice(0, 16), slice(-16, None)), 90: (slice(-16, None), slice(0, 16)),
                     -180: (slice(-16, None), slice(-16, None))}[rotation]  # fmt: skip
    white = np.zeros(turned.shape[1:3], bool)
    white[rows, columns] = True
    assert turned[1][white].min() > 200 and turned[1][~white].max() < 55


@pytest.mark.parametrize("height, width", [(32, 80), (33, 47), (17, 16), (1, 1)])
def test_lossless_keeps_every_pixel(height: int, width: int, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (4, height, width, 3), dtype=np.uint8)
    write_video(tmp_path / "v.mp4", noise, 10, lossless=True)
    np.testing.assert_array_equal(read_frames(tmp_path / "v.mp4", range(4)), noise)


def test_the_default_plays_everywhere_and_keeps_colours(tmp_path: Path) -> None:
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [120, 30, 200]], np.uint8)
    frames = np.broadcast_to(colours.repeat(16, 0)[None, :95, None], (5, 95, 33, 3))
    path = tmp_path / "v.mp4"
    write_video(path, frames, 29.97)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == Fraction(2997, 100)
        assert stream.codec_context.colorspace == 1  # BT.709, so that no player guesses.
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # A browser can begin before it has the whole file.
    back = read_frames(path, [0, 4])
    assert back.shape == (2, 96, 34, 3)  # 4:2:0 needs even sizes.
    assert np.abs(back[:, 8::16, 17].astype(int) - colours).max() <= 4


def test_equal_frames_give_equal_bytes(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    for lossless in (False, True):
        for name in ("a.mp4", "b.mp4"):
            write_video(tmp_path / name, noise, 24, lossless=lossless)
        assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
        # x264's macroblock tree makes them differ, but seldom: only where freed memory is found in a bad state.
        assert b"threads=1" in (tmp_path / "a.mp4").read_bytes() and b"mbtree=0" in (tmp_path / "a.mp4").read_bytes()


def test_frames_may_come_one_by_one(tmp_path: Path) -> None:
    write_video(tmp_path / "all.mp4", painted(9), 10)
    write_video(tmp_path / "one_by_one.mp4", (frame for frame in painted(9)), 10)
    assert (tmp_path / "all.mp4").read_bytes() == (tmp_path / "one_by_one.mp4").read_bytes()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    write_video(path, painted(3), 10)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="fps=0 must be between"):
        write_video(path, painted(3), 0)
    with pytest.raises(ValueError, match="no frames to write"):
        write_video(path, painted(0), 10)
    with pytest.raises(ValueError, match=r"frames of 40000 × 2 can't be written as H\.264"):
        write_video(path, np.zeros((1, 2, 40000, 3), np.uint8), 10)
    with pytest.raises(ValueError, match=r"frame 1 has the shape \(16, 80, 3\), the first one \(32, 80, 3\)"):
        write_video(path, [painted(1)[0], painted(1, height=16)[0]], 10)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write_video(tmp_path / "no" / "v.mp4", painted(3), 10)
    assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"] and path.read_bytes() == before


def constant(count: int, fps: float) -> FrameIndex:
    return FrameIndex(times=np.arange(count) / fps, duration=count / fps)


def test_resampling_golden() -> None:
    at = lambda *key: frames_at(*key).tolist()
    assert at(constant(6, 30), None) == [0, 1, 2, 3, 4, 5]
    assert at(constant(8, 30), 15) == [0, 2, 4, 6]
    assert at(constant(4, 10), 24) == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]  # At or before, never after.
    assert at(constant(12, 24), 10) == [0, 2, 4, 7, 9]
    assert at(constant(10, 10), 10, 0.3) == [3, 4, 5, 6, 7, 8, 9]
    assert at(constant(10, 10), 5, 0.3, 0.8) == [3, 5, 7]
    assert at(constant(10, 10), None, 0.3, 0.8) == [3, 4, 5, 6, 7]
    assert at(constant(10, 10), None, 0.5, 99.0) == [5, 6, 7, 8, 9]
    assert at(constant(10, 10), 10, 2.0) == []
    varying = FrameIndex(times=np.array([0, 0.1, 0.15, 0.5, 0.52]), duration=0.6)
    assert at(varying, 10) == [0, 1, 2, 2, 2, 3]


@settings(deadline=None)
@given(st.integers(1, 500), st.one_of(st.sampled_from([24000 / 1001, 30000 / 1001, 25.0]), st.floats(0.5, 240)))
def test_resampling_to_the_same_rate_changes_nothing(count: int, fps: float) -> None:
    assert frames_at(constant(count, fps), fps).tolist() == list(range(count))


@settings(deadline=None)
@given(
    st.lists(st.floats(0.001, 2.0), min_size=1, max_size=60),
    st.floats(0.1, 120),
    st.floats(0, 20),
    st.one_of(st.none(), st.floats(0, 100)),
)
def test_resampling_shows_what_is_on_screen(gaps: list[float], fps: float, start: float, end: float | None) -> None:
    ends = np.cumsum(gaps)
    index = FrameIndex(times=ends - ends[0], duration=float(ends[-1] - ends[0] + gaps[0]))
    shown = frames_at(index, fps, start, end)
    last = min(index.duration, index.duration if end is None else end)
    assert len(shown) == max(0, math.ceil((last - start - 1e-6) * fps))
    for k, n in enumerate(shown.tolist()):
        moment = start + k / fps
        assert index.times[n] <= moment + 1e-6 and moment < last
        assert n == len(index.times) - 1 or index.times[n + 1] > moment + 1e-6 - 1e-9
    every = frames_at(index, None, start, end).tolist()
    assert every == [n for n, t in enumerate(index.times) if start - 1e-6 <= t < last - 1e-6]


def test_a_moment_before_the_start_is_refused() -> None:
    with pytest.raises(ValueError, match=r"start=-0\.5"):
        frames_at(constant(10, 10), 10, -0.5)


def test_a_varying_rate_is_resampled_by_its_timestamps(made: Callable[[str], Path]) -> None:
    moments = IRREGULAR[0] + 1000 * np.arange(100) / 12.5
    on_screen = [max(k for k in range(100) if IRREGULAR[k] <= m) for m in moments if m < IRREGULAR[-1]]
    path = made("variable_b_frames.mp4")
    assert numbers_of(read_frames(path, frames_at(frame_index(path), 12.5)))[: len(on_screen)] == on_screen


def test_resize_geometry() -> None:
    frames = np.zeros((10, 40, 80, 3), np.uint8)
    frames[:, :, :20], frames[:, :, 20:60], frames[:, :, 60:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    crop = resize(frames, 20, 20, "crop")
    assert crop.shape == (10, 20, 20, 3) and (crop[:, :, 1:-1] == (0, 255, 0)).all()  # The centre, of green alone.
    assert (crop[:, :, [0, -1], 1] > 200).all()
    pad = resize(frames, 40, 40, "pad")
    assert (pad[:, :10] == 0).all() and (pad[:, 30:] == 0).all()
    assert (pad[:, 10:30, 0] == (255, 0, 0)).all() and (pad[:, 10:30, -1] == (0, 0, 255)).all()
    squash = resize(frames, 20, 20, "squash")
    assert (squash[:, :, 0] == (255, 0, 0)).all() and (squash[:, :, 10] == (0, 255, 0)).all()
    assert (squash[:, :, -1] == (0, 0, 255)).all()
    assert resize(frames, 40, 80, "pad") is frames


@settings(max_examples=50, deadline=None)
@given(*[st.integers(1, 40)] * 4, st.sampled_from(["crop", "pad", "squash"]))
def test_resize_of_any_size(h1: int, w1: int, h2: int, w2: int, mode: str) -> None:
    white = resize(np.full((2, h1, w1, 3), 255, np.uint8), h2, w2, mode)
    assert white.shape == (2, h2, w2, 3) and white.any()
    if mode != "pad":
        assert (white == 255).all()


def test_resize_is_antialiased() -> None:
    checkers = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    small = resize(np.broadcast_to(checkers[None, ..., None], (1, 64, 64, 3)), 16, 16, "squash")
    assert small.min() >= 120 and small.max() <= 135


@pytest.mark.parametrize("size", [(48, 64), (30, 31), (97, 160), (200, 33), (7, 5)])
def test_resize_is_within_one_level_of_floats(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (5, 97, 121, 3), dtype=np.uint8)
    floats = torch.from_numpy(noise).permute(0, 3, 1, 2).double()
    exact = torch.nn.functional.interpolate(floats, size, mode="bilinear", antialias=True, align_corners=False)
    error = resize(noise, *size, "squash").astype(float) - exact.permute(0, 2, 3, 1).numpy()
    assert np.abs(error).max() < 1.05 and np.abs(error.mean()) < 0.05


def test_crop_cuts_where_it_is_told() -> None:
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, None, :, None], (2, 100, 200, 3))
    cut = lambda place: resize(ramp, 100, 51, "crop", place)[0, 0, [0, -1], 0].tolist()
    assert cut((0.5, 0.0)) == [0, 50] and cut((0.5, 1.0)) == [149, 199] and cut((0.5, 0.5)) == [74, 124]
    starts = {cut((0.5, float(x)))[0] for x in np.linspace(0, 1, 1000)}
    assert starts == set(range(150))
    down = resize(ramp.swapaxes(1, 2), 51, 100, "crop", (1.0, 0.0))
    assert down[0, :, 0, 0].tolist() == list(range(149, 200))
    for place in ((-0.1, 0.5), (0.5, 1.1)):
        with pytest.raises(ValueError, match="place="):
            resize(ramp, 100, 51, "crop", place)
    with pytest.raises(ValueError, match="height=0"):
        resize(ramp, 0, 51, "crop")
