"""Small media files of every kind, whose frames carry their number in their pixels; for each, what is right.

``CASES[name]`` knows the numbers, times and size of what is in a file; ``BROKEN[name]`` the reason why it must be
refused. ``make(name, folder)`` writes a file, and `bar_codes.number_of` reads a frame's number back.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from bar_codes import painted
from PIL import Image

HEIGHT, WIDTH, FPS = 32, 80, 30


# ---- files


def encode(
    path: Path | io.IOBase, frames: np.ndarray, codec: str = "libx264", *, pts: Sequence[int] | None = None,
    pixels: str = "yuv420p", options: Mapping[str, str] = {}, container: str | None = None,
    container_options: Mapping[str, str] = {}, prepare: Callable[[Any], None] | None = None, audio: bool = False,
    cover: bool = False,
) -> None:  # fmt: skip
    """A video whose frames are shown at these milliseconds; 30 per second if none are given."""
    unit = Fraction(1, FPS) if pts is None else Fraction(1, 1000)
    with av.open(
        path if isinstance(path, io.IOBase) else str(path), "w", format=container, options=dict(container_options)
    ) as file:
        if cover:
            picture = file.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = 64, 64, "yuvj420p"
            picture.disposition = Disposition.attached_pic
        # x264's macroblock tree reads memory that nothing wrote: without it, the same call gives the same bytes.
        steady = {"mbtree": "0"} if codec.startswith("libx264") else {}
        stream = file.add_stream(codec, rate=FPS, options=steady | dict(options))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        stream.codec_context.thread_count = 1
        if pts is not None:
            stream.codec_context.time_base = unit
        if prepare is not None:
            prepare(stream)
        if audio:
            sound = file.add_stream("aac", rate=16000)
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 32000), np.float32), format="fltp", layout="mono")
            silence.rate, silence.pts = 16000, 0
            file.mux(sound.encode(silence))
            file.mux(sound.encode())
        if cover:
            grey = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 99, np.uint8), format="rgb24")
            file.mux(picture.encode(grey) + picture.encode())
        for k, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = k if pts is None else int(pts[k]), unit
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


class _Pipe(io.RawIOBase):
    """A file that can't be gone back in, so that the writer can't put the duration into its head."""

    def __init__(self) -> None:
        self.written = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.written += data
        return len(data)


def _live(path: Path, frames: np.ndarray, **how: Any) -> None:
    pipe = _Pipe()
    encode(pipe, frames, container="matroska", container_options={"live": "1"}, **how)
    path.write_bytes(pipe.written)


def _edited(path: Path, frames: np.ndarray) -> None:
    """An mp4 whose edit list shows the second quarter from the middle on."""
    encode(path, frames, options={"x264-params": "keyint=10:bframes=3"})
    data = bytearray(path.read_bytes())
    place = data.index(b"elst") + 12
    duration, begin, rate = struct.unpack_from(">IiI", data, place)
    with av.open(str(path)) as file:
        unit = file.streams.video[0].time_base
    struct.pack_into(">IiI", data, place, duration // 4, begin + 55 * int(1 / unit / FPS), rate)
    path.write_bytes(data)


def _joined(path: Path, frames: np.ndarray) -> None:
    """Two recordings one behind the other: time begins anew in the middle."""
    halves = np.array_split(frames, 2)
    for half, place in zip(halves, (path, path.with_suffix(".second")), strict=True):
        flags = {"mpegts_flags": "initial_discontinuity"}
        encode(place, half, container="mpegts", options=GROUPS, container_options=flags)
    with open(path, "ab") as file:
        file.write(path.with_suffix(".second").read_bytes())
    path.with_suffix(".second").unlink()


def _turned(path: Path, frames: np.ndarray, degrees: int, mirrored: bool = False) -> None:
    """Stored turned and mirrored, with a display matrix that undoes it."""
    stored = frames[:, :, ::-1] if mirrored else frames
    stored = np.rot90(stored, -degrees // 90, axes=(1, 2))
    prepare = lambda stream: stream.set_display_rotation(degrees, hflip=mirrored)
    encode(path, np.ascontiguousarray(stored), prepare=prepare)


def _all_keyframes(path: Path, frames: np.ndarray, **how: Any) -> None:
    """An mp4 without the list of its keyframes, which means that every frame is one. That is a lie."""
    encode(path, frames, **how)
    data = path.read_bytes()
    assert data.count(b"stss") == 1
    path.write_bytes(data.replace(b"stss", b"free"))


def _stretched(stream: Any) -> None:
    stream.codec_context.sample_aspect_ratio = Fraction(4, 3)


@dataclass(frozen=True)
class Case:
    """What is right about a file."""

    write: Callable[[Path, np.ndarray], None]
    """From its path and the painted frames."""
    count: int = 40
    """Frames that are painted."""
    first: int = 0
    """Number on the first frame that is shown."""
    shown: int | None = None
    """Frames that are shown, of those painted; None for all from the first on."""
    height: int = HEIGHT
    width: int = WIDTH
    times: Sequence[float] | None = None
    """Seconds from the first frame; None for 30 per second."""
    tolerance: float = 2e-3
    """Of the times, in seconds: the container's unit."""
    rotation: int = 0
    pixel_aspect: float = 1.0
    image: bool = False

    @property
    def numbers(self) -> list[int]:
        """Painted on the frames, in the order in which they are shown."""
        return list(range(self.first, self.count if self.shown is None else self.first + self.shown))


def _video(codec: str = "libx264", **how: Any) -> Callable[[Path, np.ndarray], None]:
    return partial(encode, codec=codec, **how)


def _x264(parameters: str, **how: Any) -> Callable[[Path, np.ndarray], None]:
    return partial(encode, options={"x264-params": parameters}, **how)


IRREGULAR = np.random.default_rng(0).integers(5, 90, 100).cumsum().tolist()
"""Milliseconds."""
VARYING = [(ms - IRREGULAR[0]) / 1000 for ms in IRREGULAR]
B_FRAMES = "keyint=12:min-keyint=12:bframes=3:b-adapt=0:scenecut=0"
GROUPS = {"g": "12", "bf": "2"}

HEVC = {"x265-params": "keyint=12:bframes=3:open-gop=1:log-level=none"}
VP9 = {"lag-in-frames": "10", "g": "12", "cpu-used": "8"}

VIDEOS: dict[str, Case] = {
    "constant.mp4": Case(_video(), 60),
    "variable.mp4": Case(_video(pts=IRREGULAR), 100, times=VARYING),
    "variable_b_frames.mp4": Case(_x264(B_FRAMES, pts=IRREGULAR), 100, times=VARYING),
    "no_b_frames.mp4": Case(_x264("bframes=0:keyint=10"), 60),
    "groups_of_12.mp4": Case(_x264(B_FRAMES), 60),
    "groups_of_250.mp4": Case(_x264("keyint=250:min-keyint=250:scenecut=0:bframes=3"), 300),
    "keyframes_only.mp4": Case(_x264("keyint=1")),
    "keyframes_two_apart.mp4": Case(_x264("keyint=2:min-keyint=1:bframes=1:open-gop=1:scenecut=0")),
    "open_groups.mp4": Case(_x264("open-gop=1:" + B_FRAMES), 60),
    "intra_refresh.mp4": Case(_x264("intra-refresh=1:keyint=15:bframes=0"), 60),
    "interlaced.mp4": Case(_x264("tff=1:keyint=12:bframes=2"), 30, height=64),
    "starts_late.mp4": Case(_video(pts=[1500 + 33 * k for k in range(40)]), times=[0.033 * k for k in range(40)]),
    # The muxer's edit list cuts the 7 frames before zero.
    "starts_before_zero.mp4": Case(
        _video(pts=[33 * k - 200 for k in range(40)]), first=7, times=[0.033 * k for k in range(33)]
    ),
    "edit_list.mp4": Case(_edited, 100, first=55, shown=25),
    "fragmented.mp4": Case(
        _video(options=GROUPS, container_options={"movflags": "frag_keyframe+empty_moov+default_base_moof"}), 60
    ),
    "turned_90.mp4": Case(partial(_turned, degrees=90), 3, rotation=90),
    "turned_180.mp4": Case(partial(_turned, degrees=180), 3, rotation=180),
    "turned_270.mp4": Case(partial(_turned, degrees=270), 3, rotation=270),
    "mirrored.mp4": Case(partial(_turned, degrees=0, mirrored=True), 3),
    "mirrored_turned_90.mp4": Case(partial(_turned, degrees=90, mirrored=True), 3, rotation=270),
    "stretched.mp4": Case(_video(prepare=_stretched), 3, pixel_aspect=4 / 3),
    "false_keyframes.mp4": Case(partial(_all_keyframes, options={"x264-params": B_FRAMES}), 60),
    "false_keyframes_mpeg4.mp4": Case(partial(_all_keyframes, codec="mpeg4", options=GROUPS)),
    "false_keyframes_hevc.mp4": Case(partial(_all_keyframes, codec="libx265", options=HEVC), 60),
    "false_keyframes_vp9.mp4": Case(partial(_all_keyframes, codec="libvpx-vp9", options=VP9)),
    "one_frame.mp4": Case(_video(), 1),
    "10_bits.mp4": Case(_video(pixels="yuv420p10le")),
    "444.mp4": Case(_video(pixels="yuv444p")),
    "gray.mp4": Case(_video(pixels="gray")),
    "full_range.mp4": Case(_video(pixels="yuvj420p")),
    "rgb.mp4": Case(_video("libx264rgb", pixels="rgb24", options={"qp": "0"})),
    "odd.mp4": Case(_video(pixels="yuv444p"), height=33, width=83),
    "sound.mp4": Case(_video(audio=True), 60),
    "cover.mp4": Case(_video(cover=True)),
    "a:b, %03d ä.mp4": Case(_video(), 3),
    "hevc.mp4": Case(_video("libx265", options=HEVC), 60),
    "mpeg4.mp4": Case(_video("mpeg4", options=GROUPS)),
    "odd_mpeg4.mp4": Case(_video("mpeg4", options=GROUPS), height=33, width=83),
    "h264.mkv": Case(_x264(B_FRAMES), 60),
    "live.mkv": Case(partial(_live, options={"x264-params": B_FRAMES}), 60),
    "ffv1.mkv": Case(_video("ffv1")),
    "alpha.mkv": Case(_video("ffv1", pixels="yuva420p")),
    "vp8.webm": Case(_video("libvpx", options={"auto-alt-ref": "1", "lag-in-frames": "10", "g": "12"})),
    "vp9.webm": Case(_video("libvpx-vp9", options=VP9)),
    "odd.webm": Case(_video("libvpx-vp9", options=VP9), height=33, width=83),
    "prores.mov": Case(_video("prores_ks", pixels="yuv422p10le"), 12),
    "mjpeg.mov": Case(_video("mjpeg", pixels="yuvj420p")),
    "mpeg4.avi": Case(_video("mpeg4", options=GROUPS)),
    "h264.avi": Case(_video(options=GROUPS)),  # Which says nothing of when frames are shown.
    "mjpeg.avi": Case(_video("mjpeg", pixels="yuvj420p")),
    "h264.ts": Case(_video(options=GROUPS, container="mpegts"), 60),
    "mpeg2.ts": Case(_video("mpeg2video", options=GROUPS, container="mpegts"), 60),
    "joined.ts": Case(_joined),
    "mpeg2.mpg": Case(_video("mpeg2video", options=GROUPS, container="mpeg"), 60),
    "h264.flv": Case(_video(options=GROUPS, container="flv")),
    "wmv2.wmv": Case(_video("wmv2", options={"g": "12"}, container="asf")),
    "bare.h264": Case(_video(options=GROUPS, container="h264")),
    "bare.m2v": Case(_video("mpeg2video", options=GROUPS, container="mpeg2video")),
    "animated.gif": Case(_video("gif", pixels="rgb8"), tolerance=0.02),
}


# ---- images


def _image(path: Path, frames: np.ndarray, mode: str = "RGB", **how: Any) -> None:
    picture = Image.fromarray(frames[0])
    if mode == "RGBA":  # Black from what is transparent: its own colour is white.
        alpha = frames[0].max(-1)
        picture = Image.fromarray(np.dstack([np.full_like(frames[0], 255), alpha]))
    elif mode == "I;16":
        picture = Image.fromarray(frames[0, ..., 0].astype(np.uint16) * 257)
    elif mode != "RGB":
        picture = picture.convert(mode)
    picture.save(path, **how)


def _exif(path: Path, frames: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # To be turned clockwise.
    Image.fromarray(np.ascontiguousarray(np.rot90(frames[0]))).save(path, exif=exif, quality=95)


def _still(write: Callable[[Path, np.ndarray], None]) -> Case:
    return Case(lambda path, frames: write(path, frames[-1:]), 6, first=5, times=[0.0], image=True)


IMAGES: dict[str, Case] = {
    "rgb.png": _still(_image),
    "grey.png": _still(partial(_image, mode="L")),
    "grey_16.png": _still(partial(_image, mode="I;16")),
    "palette.png": _still(partial(_image, mode="P")),
    "transparent.png": _still(partial(_image, mode="RGBA")),
    "photo.jpg": _still(_image),
    "photo.JPEG": _still(partial(_image, mode="CMYK")),
    "turned.jpg": _still(_exif),
    "lossless.webp": _still(partial(_image, lossless=True)),
    "bitmap.bmp": _still(_image),
}
CASES = VIDEOS | IMAGES


# ---- broken ones


def _whole(folder: Path, suffix: str = ".mp4", **how: Any) -> bytes:
    """A sound video of 30 frames of noise, which does not compress: damage hits pixels."""
    path = folder / f"whole{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (30, 64, 64, 3), dtype=np.uint8)
    faststart = {"movflags": "faststart"} if suffix in (".mp4", ".mov") else {}
    encode(path, noise, **{"container_options": faststart} | how)
    data = path.read_bytes()
    path.unlink()
    return data


def _middle(data: bytes, instead: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + instead + data[middle + len(instead) :]


def _audio(folder: Path) -> bytes:
    path = folder / "sound.m4a"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate, frame.pts = 16000, 0
        file.mux([*stream.encode(frame), *stream.encode()])
    data = path.read_bytes()
    path.unlink()
    return data


def _picture(folder: Path, suffix: str) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, suffix)
    return file.getvalue()


def _huge_jpegs(folder: Path) -> bytes:
    """A video of JPEGs that say they are 65000 × 65000."""
    data = bytearray(_whole(folder, ".mov", codec="mjpeg", pixels="yuvj420p"))
    for place in (n for n in range(len(data) - 1) if data[n : n + 2] == b"\xff\xc0"):
        struct.pack_into(">HH", data, place + 5, 65000, 65000)
    return bytes(data)


def _huge_png(folder: Path) -> bytes:
    data = bytearray(_picture(folder, "png"))
    struct.pack_into(">II", data, 16, 30000, 30000)
    import zlib

    struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    return bytes(data)


def _billions(folder: Path) -> bytes:
    """An mp4 whose head says that it has two billion frames of 9 bytes."""
    data = bytearray(_whole(folder))
    struct.pack_into(">II", data, data.index(b"stsz") + 8, 9, 2**31 - 9)
    return bytes(data)


NO_VIDEO = "not a video, cut short or damaged"
BROKEN: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "empty.mp4": (lambda folder: b"", "the file is empty"),
    "text.mp4": (lambda folder: b"this is no video\n" * 50, NO_VIDEO),
    "random.mp4": (lambda folder: np.random.default_rng(0).bytes(5000), NO_VIDEO),
    "playlist.mp4": (lambda folder: b"#EXTM3U\n#EXTINF:1,\nhttp://localhost:1/x.ts\n#EXT-X-ENDLIST\n", "can't be read"),
    "cut.mp4": (lambda f: _whole(f)[: len(_whole(f)) // 2], r"cut short or damaged: packet \d+ of 30 is not whole"),
    "cut_by_a_byte.mp4": (lambda f: _whole(f)[:-1], "cut short or damaged: packet 30 of 30 is not whole"),
    "header_only.mp4": (
        lambda f: (d := _whole(f))[: d.index(b"mdat") + 4],
        "cut short: 0 of 30 frames are there",
    ),
    "half_a_header.mp4": (
        lambda f: (d := _whole(f))[: d.index(b"moov") + 20],
        "no video in it$",
    ),
    "header_lost.mp4": (lambda f: (d := _whole(f, container_options={}))[: d.index(b"moov") - 4], NO_VIDEO),
    "overwritten.mp4": (lambda f: _middle(_whole(f), bytes(3000)), "damaged"),
    "scratched.mp4": (lambda f: _middle(_whole(f), b"\xff" * 100), "damaged: the frame at .* is not whole"),
    "scratched.mov": (lambda f: _middle(_whole(f, ".mov", codec="mjpeg", pixels="yuvj420p"), b"\xff" * 100), "damaged"),
    "scratched.m4v": (lambda f: _middle(_whole(f, codec="mpeg4"), b"\xff" * 100), "damaged"),
    "scratched.mpg": (
        lambda f: _middle(_whole(f, ".mpg", codec="mpeg2video", container="mpeg"), bytes(100)),
        "damaged",
    ),
    "photo.heic": (lambda f: _whole(f).replace(b"ftypisom", b"ftypheic"), "an image in HEIF"),
    "audio.mp4": (_audio, "no video in it, only audio"),
    "huge.mov": (_huge_jpegs, "damaged"),
    "billions.mp4": (_billions, "no frames in it"),
    "cut.mkv": (lambda f: _whole(f, ".mkv")[:-5000], "cut short"),
    "cut.gif": (lambda f: _whole(f, ".gif", codec="gif", pixels="rgb8")[:-500], "cut short"),
    "cut.avi": (lambda f: _whole(f, ".avi", codec="mpeg4")[:-5000], "cut short"),
    "empty.png": (lambda folder: b"", "not a PNG"),
    "cut.png": (lambda f: _picture(f, "png")[:-100], "damaged"),
    "cut.jpg": (lambda f: _picture(f, "jpeg")[:-100], "damaged"),
    "text.jpg": (lambda folder: b"this is no image\n" * 50, "not a PNG, JPEG, WebP or BMP image"),
    "huge.png": (_huge_png, "900000000 pixels|30000 × 30000"),
}


def make(name: str, folder: Path) -> Path:
    """Write a file of `CASES` or `BROKEN` into a folder."""
    path = folder / name
    if name in CASES:
        case = CASES[name]
        case.write(path, painted(case.count, case.height, case.width))
    else:
        path.write_bytes(BROKEN[name][0](folder))
    return path
