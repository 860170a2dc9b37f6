"""Every frame of these videos carries its number in its pixels, so that each frame returned can be checked."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mutoscope.data.video import (
    FrameIndex,
    VideoError,
    frame_index,
    frames_at,
    probe,
    read_frames,
    resize,
    write_video,
)

BITS = 10


def painted(count: int, height: int = 32, width: int = 80) -> np.ndarray:
    """Frames with their number as a bar code: black and white columns, lowest bit on the left."""
    bits = np.arange(count)[:, None] >> np.arange(BITS) & 1
    columns = bits[:, np.arange(width) * BITS // width] * 255
    return np.broadcast_to(columns[:, None, :, None], (count, height, width, 3)).astype(np.uint8)


def numbers(frames: np.ndarray) -> list[int]:
    """The numbers painted on frames."""
    width = frames.shape[2]
    centres = (np.arange(BITS) * 2 + 1) * width // (2 * BITS)
    return [int(n) for n in ((frames[:, frames.shape[1] // 2][:, centres].mean(-1) > 128) << np.arange(BITS)).sum(1)]


def encode(path: Path, frames: np.ndarray, pts: Sequence[int] | None = None, x264: str = "", pixels: str = "yuv420p",
           audio: bool = False) -> Path:  # fmt: skip
    """An mp4 whose frames are shown at these milliseconds (30 fps if none are given)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"x264-params": x264})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if audio:
            sound = container.add_stream("aac", rate=16000)
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 32000), np.float32), format="fltp", layout="mono")
            silence.rate, silence.pts = 16000, 0
            container.mux(sound.encode(silence))
            container.mux(sound.encode())
        for k, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if pts is not None:
                frame.time_base = Fraction(1, 1000)
            frame.pts = k if pts is None else int(pts[k])
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


IRREGULAR = np.random.default_rng(0).integers(5, 90, 100).cumsum().tolist()
B_FRAMES = "keyint=12:min-keyint=12:bframes=3:b-adapt=0:scenecut=0"
VIDEOS = {  # name -> (frames, arguments of encode, number painted on frame 0)
    "constant rate": (60, {}, 0),
    "variable rate": (100, {"pts": IRREGULAR}, 0),
    "variable rate, b-frames": (100, {"pts": IRREGULAR, "x264": B_FRAMES}, 0),
    "no b-frames": (60, {"x264": "bframes=0:keyint=10"}, 0),
    "keyframes only": (30, {"x264": "keyint=1"}, 0),
    "keyframes two apart": (40, {"x264": "keyint=2:min-keyint=1:bframes=1:open-gop=1:scenecut=0"}, 0),
    "open groups": (60, {"x264": "open-gop=1:" + B_FRAMES}, 0),
    "groups of 250": (300, {"x264": "keyint=250:min-keyint=250:scenecut=0:bframes=3"}, 0),
    "starts late": (40, {"pts": [1500 + 33 * k for k in range(40)]}, 0),
    "starts before zero": (40, {"pts": [33 * k - 200 for k in range(40)]}, 7),  # The muxer's edit list cuts those 7.
    "10 bits": (30, {"pixels": "yuv420p10le"}, 0),
    "4:4:4": (30, {"pixels": "yuv444p"}, 0),
    "with sound": (60, {"audio": True}, 0),
}


@pytest.mark.parametrize("name", VIDEOS)
def test_frames_are_exact(name: str, tmp_path: Path) -> None:
    count, options, first = VIDEOS[name]
    path = encode(tmp_path / "v.mp4", painted(count), **options)
    left = count - first
    assert probe(path).frames == left
    assert numbers(read_frames(path, range(left))) == list(range(first, count))
    rng = np.random.default_rng(1)
    for n in {0, left - 1, *rng.integers(0, left, 15).tolist()}:
        assert numbers(read_frames(path, [n])) == [first + n]
    for _ in range(5):  # Any order, with repeats.
        some = rng.integers(0, left, 8).tolist()
        assert numbers(read_frames(path, some)) == [first + n for n in some]
    strided = list(range(1, left, 7))
    assert numbers(read_frames(path, np.array(strided))) == [first + n for n in strided]


def test_an_edit_list_cuts_both_ends(tmp_path: Path) -> None:
    path = encode(tmp_path / "v.mp4", painted(100), x264="keyint=10:bframes=3")
    data = bytearray(path.read_bytes())
    place = data.index(b"elst") + 12
    duration, begin, rate = struct.unpack_from(">IiI", data, place)
    with av.open(str(path)) as container:
        per_frame = int(container.streams.video[0].time_base.denominator / 30)
    struct.pack_into(">IiI", data, place, duration // 4, begin + 55 * per_frame, rate)
    path.write_bytes(data)
    with av.open(str(path)) as container:
        shown = numbers(np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)]))
    assert shown[0] == 55 and 20 < len(shown) < 30  # What FFmpeg shows, all of it decoded from the start.
    assert probe(path).frames == len(shown)
    assert numbers(read_frames(path, range(len(shown)))) == shown
    assert numbers(read_frames(path, [20, 0, 7])) == [75, 55, 62]


def test_times_follow_the_timestamps(tmp_path: Path) -> None:
    path = encode(tmp_path / "v.mp4", painted(100), pts=IRREGULAR, x264=B_FRAMES)
    index = frame_index(path)
    np.testing.assert_allclose(index.times, (np.array(IRREGULAR) - IRREGULAR[0]) / 1000, atol=1e-4)
    info = probe(path)
    assert (info.height, info.width, info.rotation) == (32, 80, 0)
    assert info.duration == pytest.approx((IRREGULAR[-1] - IRREGULAR[0]) / 1000 + 1 / 30, abs=0.04)
    assert info.fps == pytest.approx(100 / info.duration)


def test_the_index_follows_a_changed_file(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    write_video(path, painted(5), 10)
    assert probe(path).frames == 5
    write_video(path, painted(9), 10)
    assert probe(path).frames == 9


@pytest.mark.parametrize(("matrix", "rotation"), [
    ((0, 1, -1, 0), -90),  # What phones write for a portrait video: turn it clockwise.
    ((0, -1, 1, 0), 90),
    ((-1, 0, 0, -1), -180),
])  # fmt: skip
def test_rotation_is_applied(matrix: tuple[int, ...], rotation: int, tmp_path: Path) -> None:
    frames = np.zeros((3, 32, 64, 3), np.uint8)
    frames[:, :16, :16] = 255  # White in the top left corner.
    path = encode(tmp_path / "v.mp4", frames)
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


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    write_video(path, painted(3), 10)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="fps=0 must be between"):
        write_video(path, painted(3), 0)
    with pytest.raises(ValueError, match="no frames to write"):
        write_video(path, painted(0), 10)
    with pytest.raises(av.FFmpegError):  # Wider than H.264 allows.
        write_video(path, np.zeros((1, 2, 40000, 3), np.uint8), 10)
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


def test_resampling_shows_what_is_on_screen(tmp_path: Path) -> None:
    path = encode(tmp_path / "v.mp4", painted(100), pts=IRREGULAR, x264=B_FRAMES)
    moments = IRREGULAR[0] + 1000 * np.arange(100) / 12.5
    on_screen = [max(k for k in range(100) if IRREGULAR[k] <= m) for m in moments if m < IRREGULAR[-1]]
    shown = frames_at(frame_index(path), 12.5)
    assert numbers(read_frames(path, shown))[: len(on_screen)] == on_screen


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


def damaged(kind: str, folder: Path) -> Path:
    path = folder / "broken.mp4"
    write_video(path, np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8), 10)
    whole = path.read_bytes()
    if kind == "audio":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=16000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.rate, frame.pts = 16000, 0
            container.mux([*stream.encode(frame), *stream.encode()])
        return path
    middle = len(whole) // 2
    path.write_bytes({
        "empty": b"",
        "text": b"this is no video\n" * 50,
        "random": np.random.default_rng(0).bytes(5000),
        "cut": whole[:middle],
        "cut by a byte": whole[:-1],
        "header only": whole[: whole.index(b"mdat") + 4],
        "half a header": whole[: whole.index(b"moov") + 20],
        "overwritten": whole[:middle] + bytes(3000) + whole[middle + 3000 :],
        "scratched": whole[:middle] + b"\xff" * 100 + whole[middle + 100 :],
    }[kind])  # fmt: skip
    return path


@pytest.mark.parametrize(("kind", "reason"), [
    ("empty", "the file is empty"),
    ("text", "not a video, cut short or damaged"),
    ("random", "not a video, cut short or damaged"),
    ("cut", r"cut short or damaged: packet \d+ of 30 is not whole"),
    ("cut by a byte", "cut short or damaged: packet 30 of 30 is not whole"),
    ("header only", "cut short: 0 of 30 frames are there"),
    ("half a header", "no video in it$"),
    ("overwritten", "damaged"),
    ("scratched", r"frame \d+ is damaged"),
    ("audio", "no video in it, only audio"),
])  # fmt: skip
def test_broken_files_are_named_with_the_reason(kind: str, reason: str, tmp_path: Path) -> None:
    path = damaged(kind, tmp_path)
    with pytest.raises(VideoError, match=reason) as caught:
        read_frames(path, range(30))
    assert str(path) in str(caught.value)


def test_a_missing_file_and_missing_frames_are_named(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"nowhere\.mp4: No such file"):
        probe(tmp_path / "nowhere.mp4")
    path = tmp_path / "v.mp4"
    write_video(path, painted(4), 10)
    with pytest.raises(VideoError, match=r"v\.mp4: no frame 4, it has 4"):
        read_frames(path, [0, 4])
    with pytest.raises(VideoError, match="no frame -1"):
        read_frames(path, [-1])
