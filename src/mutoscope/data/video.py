"""Videos and images: exact frames out of them, at the moments and the size that are wanted, and mp4 files.

Everything here takes a path or a `Media`. An image is a video of one frame.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Literal

import av
import numpy as np
import torch
from av.container import OutputContainer
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import Int64, UInt8

from mutoscope.data.decoding import Deadline, VideoError
from mutoscope.data.images import is_image, read_image
from mutoscope.data.media import Media
from mutoscope.data.seeking import FrameIndex, Packets, decode, packets_of
from mutoscope.files import replacing

__all__ = [
    "Clock",
    "FrameIndex",
    "VideoError",
    "VideoInfo",
    "frame_index",
    "frames_at",
    "iter_frames",
    "probe",
    "read_frames",
    "resize",
    "write_video",
]

SAME_TIME = 1e-6
"""Seconds by which two timestamps may differ and still mean the same moment: rates and times are floats."""


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What `probe` finds."""

    frames: int
    fps: float
    """Mean rate: frames / duration; 0 for an image."""
    height: int
    """As displayed, after the rotation."""
    width: int
    """As displayed, after the rotation."""
    duration: float
    """Seconds; 0 for an image."""
    rotation: int
    """Degrees counter-clockwise by which stored frames are turned for display: -180, -90, 0, 90 or 180."""
    pixel_aspect: float = 1.0
    """Width of a pixel over its height. Frames come as they are stored, not stretched by it."""
    image: bool = False
    """Whether it is a still."""


def frame_index(media: str | Path | Media, timeout: float | None = None) -> FrameIndex:
    """The index of a file's frames. The last hundred files' are remembered until the file changes.

    timeout: seconds after which to give up. Raises VideoError where the file is missing, empty, cut short, damaged or
    not a video, or takes longer.
    """
    media = _media(media)
    if is_image(media):
        return FrameIndex(times=np.zeros(1), duration=0.0)
    return _sound(media, Deadline(media, timeout)).frames


def probe(media: str | Path | Media, timeout: float | None = None) -> VideoInfo:
    """Size, rate and length of a file; its first frame is decoded. Raises VideoError as `frame_index` does."""
    media = _media(media)
    if is_image(media):
        height, width = read_image(media).shape[:2]
        return VideoInfo(frames=1, fps=0.0, height=height, width=width, duration=0.0, rotation=0, image=True)
    deadline = Deadline(media, timeout)
    packets = _sound(media, deadline)
    pixels, rotation = next(decode(media, packets, np.zeros(1, np.int64), deadline))
    height, width = pixels.shape[:2]
    return VideoInfo(
        frames=len(packets.frames.times), fps=packets.frames.fps, height=height, width=width,
        duration=packets.frames.duration, rotation=rotation, pixel_aspect=packets.pixel_aspect,
    )  # fmt: skip


def iter_frames(
    media: str | Path | Media, indices: Sequence[int] | Int64[np.ndarray, "n"], timeout: float | None = None
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """The frames of these numbers, which must not descend, as RGB and upright, one after the other.

    A number that is repeated gives the same array again. timeout: seconds after which to give up, with what the caller
    does in between. Raises as `read_frames` does.
    """
    numbers = np.asarray(indices, dtype=np.int64)
    if (np.diff(numbers) < 0).any():
        raise ValueError(f"{media}: frame numbers must ascend; read_frames takes them in any order")
    wanted, repeats = np.unique(numbers, return_counts=True)
    for pixels, repeat in zip(_decode(_media(media), wanted, timeout), repeats, strict=True):
        frame = np.array(pixels)
        for _ in range(repeat):
            yield frame


def read_frames(
    media: str | Path | Media, indices: Sequence[int] | Int64[np.ndarray, "n"], timeout: float | None = None
) -> UInt8[np.ndarray, "n h w 3"]:
    """The frames of these numbers (any order, repeats allowed) as RGB, turned (and mirrored) upright.

    Decodes from the keyframe before each run of frames and matches by timestamp, so that the frames are exact
    whatever the codec's order, the rate or the edit list. Transparent parts of an image come on black. timeout:
    seconds after which to give up. Raises VideoError where the file can't be read, is damaged at or before a frame that
    is wanted, has no such frame, or takes longer.
    """
    media = _media(media)
    numbers = np.asarray(indices, dtype=np.int64)
    if not len(numbers):
        raise ValueError(f"{media}: no frame numbers given")
    wanted, places = np.unique(numbers, return_inverse=True)
    frames = np.empty(0, np.uint8)
    for done, pixels in enumerate(_decode(media, wanted, timeout)):
        if done == 0:
            frames = np.empty((len(wanted), *pixels.shape), np.uint8)
        frames[done] = pixels
    return frames if np.array_equal(wanted, numbers) else frames[places]


def _decode(
    media: Media, wanted: Int64[np.ndarray, "n"], timeout: float | None
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """The frames of these ascending numbers, all of one size."""
    image = is_image(media)
    deadline = Deadline(media, timeout)
    packets = None if image else packets_of(media, deadline)
    count = 1 if packets is None else len(packets.frames.times)
    if not len(wanted):
        return
    if not 0 <= wanted[0] <= wanted[-1] < count:
        if packets is not None and packets.fault and wanted[0] >= 0:
            raise VideoError(packets.fault)
        raise VideoError(f"{media}: no frame {wanted[-1] if wanted[0] >= 0 else wanted[0]}, it has {count} (from 0)")
    if packets is None:
        yield from [read_image(media)] * len(wanted)
        return
    shape = None
    for number, (pixels, _) in zip(wanted, decode(media, packets, wanted, deadline), strict=True):
        shape = shape or pixels.shape
        if pixels.shape != shape:
            raise VideoError(f"{media}: frame {number} has another size than the frames before")
        yield pixels


def _sound(media: Media, deadline: Deadline) -> Packets:
    """The packets of a file, which must be whole."""
    packets = packets_of(media, deadline)
    if packets.fault:
        raise VideoError(packets.fault)
    return packets


def _media(media: str | Path | Media) -> Media:
    return media if isinstance(media, Media) else Media(str(media))


def frames_at(
    index: FrameIndex, fps: float | int | None = None, start: float = 0.0, end: float | None = None
) -> Int64[np.ndarray, "n"]:
    """Numbers of the frames that a clip from `start` to `end` (seconds from the first frame) shows at `fps`.

    The k-th is the frame on screen at ``start + k / fps``: the last one at or before that moment. A higher rate than
    the file's repeats frames, a lower one skips. Without `fps`: every frame, as the file has them. An `end` beyond
    the file's is the file's. An image shows its one frame at any rate. Raises ValueError for a start before the first
    frame.
    """
    if start < 0:
        raise ValueError(f"start={start} must be at least 0")
    if index.duration == 0:
        return np.zeros(1, np.int64)
    end = index.duration if end is None else min(end, index.duration)
    if fps is None:
        first, last = np.searchsorted(index.times, [start - SAME_TIME, end - SAME_TIME])
        return np.arange(first, last)
    count = max(0, math.ceil((end - start - SAME_TIME) * fps))
    moments = start + np.arange(count) / fps
    return np.searchsorted(index.times, moments + SAME_TIME, side="right") - 1


def resize(
    frames: UInt8[np.ndarray, "t h1 w1 3"],
    height: int,
    width: int,
    mode: Literal["crop", "pad", "squash"],
    place: tuple[float, float] = (0.5, 0.5),
) -> UInt8[np.ndarray, "t h2 w2 3"]:
    """Frames at another size, bilinear and antialiased.

    crop: scale until both sides are covered and cut at `place`: (0, 0) is the top left corner, (0.5, 0.5) the centre,
    (1, 1) the bottom right corner; pad: scale until both sides fit and centre on black; squash: scale each side by
    itself. Frames of the right size come back as they are.

    Computed in integers (torch's kernel for bytes), at a tenth of the cost of floats, the same on every CPU, and within
    1/255 of floats: each of the two passes rounds by 1/2 at most. Raises ValueError for a size below 1 or a place
    outside [0, 1].
    """
    old_height, old_width = frames.shape[1:3]
    if height < 1 or width < 1 or not all(0 <= p <= 1 for p in place):
        raise ValueError(f"height={height} and width={width} must be at least 1, place={place} in [0, 1]")
    if (old_height, old_width) == (height, width):
        return frames
    scale_h, scale_w = height / old_height, width / old_width
    if mode != "squash":
        scale_h = scale_w = max(scale_h, scale_w) if mode == "crop" else min(scale_h, scale_w)
    size = max(1, round(old_height * scale_h)), max(1, round(old_width * scale_w))
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)  # Channels last: the fast kernel.
    pixels = torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
    scaled = pixels.permute(0, 2, 3, 1).numpy()
    if mode == "crop":
        top, left = (math.ceil((a - b) * p - 0.5) for a, b, p in zip(size, (height, width), place, strict=True))
        return np.ascontiguousarray(scaled[:, top : top + height, left : left + width])
    top, left = (height - size[0] + 1) // 2, (width - size[1] + 1) // 2
    canvas = np.zeros((len(frames), height, width, 3), np.uint8)
    canvas[:, top : top + size[0], left : left + size[1]] = scaled
    return canvas


@dataclass(frozen=True, kw_only=True)
class Clock:
    """When frames are shown, where they come at no constant rate."""

    pts: Int64[np.ndarray, "frames_and_end"]
    """When each is shown, ascending from 0, and when the last one leaves the screen."""
    unit: Fraction
    """Of those, in seconds."""

    @property
    def fps(self) -> float:
        """Mean rate."""
        return float((len(self.pts) - 1) / (int(self.pts[-1]) * self.unit))


def write_video(
    path: str | Path,
    frames: UInt8[np.ndarray, "t h w 3"] | Iterable[UInt8[np.ndarray, "h w 3"]],
    fps: float | int | Clock,
    *,
    lossless: bool = False,
    gop: int | None = None,
    pixel_aspect: float = 1.0,
) -> None:
    """Write RGB frames, an array (T, H, W, 3) or one after the other, to an mp4 (H.264); the same frames give the same
    bytes.

    Every browser plays the default (4:2:0, crf 18). It needs even sizes: the last column or row of an odd one is
    written twice. `lossless` keeps every pixel and the size as they are, in a profile that few browsers play.
    gop: frames from one keyframe to the next at most, 250 unless given. pixel_aspect: width of a pixel over its height,
    for players to stretch it by. With a `Clock` there are no B-frames, since an mp4 with them can't tell how long its
    last frame is shown.

    The file appears under its name only when it is whole. Raises ValueError for no frames, frames of different sizes
    or of one that H.264 does not allow, or a rate outside [0.01, 1000], FileNotFoundError where the folder is missing.
    """
    path = Path(path)
    rate = fps.fps if isinstance(fps, Clock) else fps
    if not 0.01 <= rate <= 1000:
        raise ValueError(f"{path}: fps={rate} must be between 0.01 and 1000")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    images = iter(frames)
    first = next(images, None)
    if first is None or first.size == 0:
        raise ValueError(f"{path}: no frames to write" + ("" if first is None else f", shape {first.shape}"))
    with replacing(path) as aside:
        _encode(path, aside, chain([first], images), first.shape, fps, lossless, gop, pixel_aspect)


def _encode(
    path: Path, aside: Path, images: Iterator[UInt8[np.ndarray, "h w 3"]], shape: tuple[int, ...],
    fps: float | int | Clock, lossless: bool, gop: int | None, pixel_aspect: float,
) -> None:  # fmt: skip
    grow = (0, 0) if lossless else (shape[0] % 2, shape[1] % 2)
    # bitexact keeps the muxer's version and the time of day out of the file; faststart lets a player begin at once.
    with av.open(str(aside), "w", format="mp4", options={"movflags": "+faststart", "fflags": "+bitexact"}) as container:
        stream = _add_stream(container, shape[0] + grow[0], shape[1] + grow[1], fps, lossless, gop)
        if pixel_aspect != 1:
            stream.codec_context.sample_aspect_ratio = Fraction(pixel_aspect).limit_denominator(1000)
        try:
            stream.codec_context.open()
        except av.FFmpegError as error:
            raise ValueError(
                f"{path}: frames of {shape[1]} × {shape[0]} can't be written as H.264 ({error.strerror}); "
                "it takes up to 16384 × 16384"
            ) from error
        converter = VideoReformatter()
        for number, pixels in enumerate(images):
            if pixels.shape != shape:
                raise ValueError(f"{path}: frame {number} has the shape {pixels.shape}, the first one {shape}")
            if any(grow):
                pixels = np.pad(pixels, [(0, grow[0]), (0, grow[1]), (0, 0)], mode="edge")
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if not lossless:
                frame = converter.reformat(frame, format="yuv420p", dst_colorspace=Colorspace.ITU709, threads=1)
            frame.pts = number
            if isinstance(fps, Clock):
                frame.pts, frame.duration = int(fps.pts[number]), int(fps.pts[number + 1] - fps.pts[number])
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _add_stream(
    container: OutputContainer, height: int, width: int, fps: float | int | Clock, lossless: bool, gop: int | None
) -> VideoStream:
    # The macroblock tree reads memory that nothing wrote, and the bytes differ from one run to the next.
    options = {"qp": "0"} if lossless else {"crf": "18", "x264-params": "mbtree=0"}
    if gop is not None:
        options["g"] = str(gop)
    if isinstance(fps, Clock):
        options |= {"bf": "0", "flags": "+frame_duration"}
    rate = Fraction(fps.fps if isinstance(fps, Clock) else fps).limit_denominator(1001)
    stream = container.add_stream("libx264rgb" if lossless else "libx264", rate=rate, options=options)
    assert isinstance(stream, VideoStream)
    stream.height, stream.width = height, width
    stream.codec_context.thread_count = 1
    if isinstance(fps, Clock):
        stream.codec_context.time_base = fps.unit
    if lossless:
        stream.pix_fmt = "rgb24"
    else:
        stream.pix_fmt = "yuv420p"
        # Untagged files are BT.601 to some players and BT.709 to others, and their colours shift.
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_primaries = ColorPrimaries.BT709
        stream.codec_context.color_trc = ColorTrc.BT709
        stream.codec_context.color_range = ColorRange.MPEG
    return stream
