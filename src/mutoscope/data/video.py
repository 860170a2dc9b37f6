"""Video files: exact frames out of them (PyAV), and mp4 files that every browser plays.

The number of a frame is its place in presentation order. It is found in an index of the packets' timestamps and
never by ``timestamp × rate``, which returns other frames than asked for where the rate varies.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Literal

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import Float64, Int64, UInt8

from mutoscope.files import replacing

SAME_TIME = 1e-6
"""Seconds by which two timestamps may differ and still mean the same moment: rates and times are floats."""


class VideoError(ValueError):
    """A video file that can't be read, or that has too few frames; the text names the file and the reason."""


@dataclass(frozen=True, kw_only=True)
class FrameIndex:
    """When each frame of a video is shown; frame n is the n-th in presentation order."""

    times: Float64[np.ndarray, "frames"]
    """Seconds from the first frame, ascending."""
    duration: float
    """Seconds until the last frame leaves the screen."""

    @property
    def fps(self) -> float:
        """Mean rate."""
        return len(self.times) / self.duration


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What `probe` finds."""

    frames: int
    fps: float
    """Mean rate: frames / duration."""
    height: int
    """As displayed, after the rotation."""
    width: int
    """As displayed, after the rotation."""
    duration: float
    """Seconds."""
    rotation: int
    """Degrees counter-clockwise by which stored frames are turned for display: -180, -90, 0, 90 or 180."""


@dataclass(frozen=True)
class _Packets:
    """The timestamps of a file's packets, in the stream's own unit."""

    pts: Int64[np.ndarray, "frames"]
    key_pts: Int64[np.ndarray, "keyframes"]
    key_dts: Int64[np.ndarray, "keyframes"]
    frames: FrameIndex


def frame_index(path: str | Path) -> FrameIndex:
    """The index of a file's frames. The last few hundred files' are remembered until the file changes.

    Raises VideoError where the file is missing, empty, cut short, not a video or without timestamps.
    """
    return _packets(path).frames


def probe(path: str | Path) -> VideoInfo:
    """Size, rate and length of a file; its first frame is decoded. Raises VideoError as `read_frames` does."""
    index = frame_index(path)
    with _opened(path) as (container, stream):
        first = next(container.decode(stream), None)
        if first is None:
            raise VideoError(f"{path}: none of its {len(index.times)} frames can be decoded")
        rotation = round(first.rotation / 90)
        height, width = (first.width, first.height) if rotation % 2 else (first.height, first.width)
    return VideoInfo(
        frames=len(index.times), fps=index.fps, height=height, width=width,
        duration=index.duration, rotation=90 * rotation,
    )  # fmt: skip


def read_frames(path: str | Path, indices: Sequence[int] | Int64[np.ndarray, "n"]) -> UInt8[np.ndarray, "n h w 3"]:
    """The frames of these numbers (any order, repeats allowed) as RGB, turned upright.

    Decodes from the keyframe before each run of frames and matches by timestamp, so that the frames are exact
    whatever the codec's order, the rate or the edit list. Raises VideoError where the file can't be read or has no
    such frame.
    """
    packets = _packets(path)
    count = len(packets.pts)
    wanted, places = np.unique(np.asarray(indices, dtype=np.int64), return_inverse=True)
    if not len(wanted):
        raise ValueError(f"{path}: no frame numbers given")
    if wanted[0] < 0 or wanted[-1] >= count:
        raise VideoError(f"{path}: no frame {wanted[-1] if wanted[0] >= 0 else wanted[0]}, it has {count} (from 0)")
    frames, done = np.empty(0, np.uint8), 0
    converter = VideoReformatter()  # One for all frames: each new one sets up a swscale context, at 1.8x the cost.
    with _opened(path) as (container, stream):
        for frame in _decode(container, stream, packets, wanted):
            if frame.is_corrupt:
                raise VideoError(f"{path}: frame {wanted[done]} is damaged")
            pixels = converter.reformat(frame, format="rgb24", threads=1).to_ndarray()
            pixels = np.rot90(pixels, round(frame.rotation / 90))
            if done == 0:
                frames = np.empty((len(places), *pixels.shape), np.uint8)
            elif pixels.shape != frames.shape[1:]:
                raise VideoError(f"{path}: frame {wanted[done]} has another size than the frames before")
            frames[places == done] = pixels
            done += 1
    if done < len(wanted):
        raise VideoError(f"{path}: frame {wanted[done]} of {count} can't be decoded")
    return frames


def frames_at(
    index: FrameIndex, fps: float | int | None = None, start: float = 0.0, end: float | None = None
) -> Int64[np.ndarray, "n"]:
    """Numbers of the frames that a clip from `start` to `end` (seconds from the first frame) shows at `fps`.

    The k-th is the frame on screen at ``start + k / fps``: the last one at or before that moment. A higher rate than
    the file's repeats frames, a lower one skips. Without `fps`: every frame, as the file has them. An `end` beyond
    the file's is the file's.
    """
    end = index.duration if end is None else min(end, index.duration)
    if fps is None:
        first, last = np.searchsorted(index.times, [start - SAME_TIME, end - SAME_TIME])
        return np.arange(first, last)
    count = max(0, math.ceil((end - start - SAME_TIME) * fps))
    moments = start + np.arange(count) / fps
    return np.searchsorted(index.times, moments + SAME_TIME, side="right") - 1


def resize(
    frames: UInt8[np.ndarray, "t h1 w1 3"], height: int, width: int, mode: Literal["crop", "pad", "squash"]
) -> UInt8[np.ndarray, "t h2 w2 3"]:
    """Frames at another size, antialiased (bilinear, computed in float).

    crop: scale until both sides are covered and cut the centre; pad: scale until both sides fit and centre on
    black; squash: scale each side by itself. Frames of the right size come back as they are.
    """
    old_height, old_width = frames.shape[1:3]
    if (old_height, old_width) == (height, width):
        return frames
    scale_h, scale_w = height / old_height, width / old_width
    if mode != "squash":
        scale_h = scale_w = max(scale_h, scale_w) if mode == "crop" else min(scale_h, scale_w)
    size = max(1, round(old_height * scale_h)), max(1, round(old_width * scale_w))
    parts = []
    for part in torch.from_numpy(np.ascontiguousarray(frames)).split(8):  # Floats of a long clip may not fit in memory.
        pixels = part.permute(0, 3, 1, 2).float()
        pixels = torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
        parts.append(pixels.round_().clamp_(0, 255).byte().permute(0, 2, 3, 1))
    scaled = torch.cat(parts).numpy()
    top, left = (size[0] - height) // 2, (size[1] - width) // 2  # Negative where there is room to pad.
    if mode == "crop":
        return np.ascontiguousarray(scaled[:, top : top + height, left : left + width])
    canvas = np.zeros((len(frames), height, width, 3), np.uint8)
    canvas[:, -top : size[0] - top, -left : size[1] - left] = scaled
    return canvas


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The file and its video stream; whatever goes wrong inside becomes a VideoError that names the file."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                kinds = " and ".join(sorted({s.type for s in container.streams}))
                raise VideoError(f"{path}: no video in it" + (f", only {kinds}" if kinds else ""))
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # More threads cost 20-25 % more CPU; workers are parallel already.
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        reason = error.strerror or str(error)
        if isinstance(error, av.InvalidDataError):
            reason = "not a video, cut short or damaged" if os.path.getsize(path) else "the file is empty"
        raise VideoError(f"{path}: can't be read as a video: {reason}") from error


def _packets(path: str | Path) -> _Packets:
    try:
        state = os.stat(path)
    except OSError as error:
        raise VideoError(f"{path}: {error.strerror}") from error
    return _read_packets(str(path), state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=512)
def _read_packets(path: str, mtime_ns: int, size: int) -> _Packets:
    """Demux the file, which decodes nothing. The time and size are there to forget what has changed."""
    shown, keys, total = {}, [], 0
    with _opened(path) as (container, stream):
        expected = len(stream.index_entries)  # Not `stream.frames`, which counts what an edit list leaves out.
        for packet in container.demux(stream):
            if packet.dts is None and packet.pts is None and not packet.size:
                continue  # The end.
            total += 1
            if packet.is_corrupt:
                raise VideoError(f"{path}: cut short or damaged: packet {total} of {expected} is not whole")
            if packet.pts is None:
                raise VideoError(f"{path}: no timestamps; re-mux it with: ffmpeg -i {path} -c copy out.mp4")
            if packet.is_keyframe:
                keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
            if not packet.is_discard:  # An edit list cuts it: decoded, because others build on it, but not shown.
                shown[packet.pts] = packet.duration or 0
        assert stream.time_base is not None
        unit, rate = float(stream.time_base), float(stream.average_rate or 25)
    if total < expected:
        raise VideoError(f"{path}: cut short: {total} of {expected} frames are there")
    keys.sort()
    pts = np.array(sorted(shown), dtype=np.int64)
    pts = pts[pts >= keys[0][0]] if keys else pts[:0]  # What comes before a keyframe can't be decoded.
    if not len(pts):
        raise VideoError(f"{path}: no frames in it")
    times = (pts - pts[0]) * unit
    frames = FrameIndex(times=times, duration=float(times[-1]) + (shown[int(pts[-1])] * unit or 1 / rate))
    key_pts, key_dts = np.array(keys, dtype=np.int64).T
    return _Packets(pts, key_pts, key_dts, frames)


def _decode(
    container: InputContainer, stream: VideoStream, packets: _Packets, wanted: Int64[np.ndarray, "n"]
) -> Iterator[av.VideoFrame]:
    """The frames of these ascending numbers in order, up to the first that the decoder does not yield."""
    targets = packets.pts[wanted]
    keys = np.searchsorted(packets.key_pts, targets, side="right") - 1
    back, done = 0, 0
    while done < len(targets):
        key = max(0, keys[done] - back)
        container.seek(int(packets.key_dts[key]), stream=stream, backward=True)
        before = done
        for frame in container.decode(stream):
            if frame.pts is None or frame.pts < targets[done]:
                continue
            if frame.pts > targets[done]:
                break
            yield frame
            done += 1
            if done == len(targets):
                return
            if packets.key_pts[keys[done]] > frame.pts and wanted[done] > wanted[done - 1] + 1:
                break  # The next one is nearer from a keyframe than from here.
        if done > before:
            back = 0
        elif key == 0:
            return
        else:  # The keyframe was not one to start at: try the ones before.
            back = 2 * back + 1


def write_video(
    path: str | Path, frames: UInt8[np.ndarray, "t h w 3"], fps: float | int, *, lossless: bool = False
) -> None:
    """Write RGB frames (T, H, W, 3) to an mp4 (H.264); the same frames give the same bytes.

    Every browser plays the default (4:2:0, crf 18). It needs even sizes: the last column or row of an odd one is
    written twice. `lossless` keeps every pixel and the size as they are, in a profile that few browsers play.
    The file appears under its name only when it is whole. Raises ValueError for no frames or a rate outside
    [0.01, 1000], FileNotFoundError where the folder is missing.
    """
    path = Path(path)
    if frames.size == 0:
        raise ValueError(f"{path}: no frames to write, shape {frames.shape}")
    if not 0.01 <= fps <= 1000:
        raise ValueError(f"{path}: fps={fps} must be between 0.01 and 1000")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    if not lossless:
        frames = np.pad(frames, [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)], mode="edge")
    with replacing(path) as aside:
        _encode(aside, frames, fps, lossless)


def _encode(path: Path, frames: UInt8[np.ndarray, "t h w 3"], fps: float | int, lossless: bool) -> None:
    # bitexact keeps the muxer's version and the time of day out of the file; faststart lets a player begin at once.
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart", "fflags": "+bitexact"}) as container:
        codec = "libx264rgb" if lossless else "libx264"
        # The macroblock tree reads memory that nothing wrote, and the bytes differ from one run to the next.
        options = {"qp": "0"} if lossless else {"crf": "18", "x264-params": "mbtree=0"}
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
        assert isinstance(stream, VideoStream)
        stream.height, stream.width = frames.shape[1:3]
        stream.codec_context.thread_count = 1
        if lossless:
            stream.pix_fmt = "rgb24"
        else:
            stream.pix_fmt = "yuv420p"
            # Untagged files are BT.601 to some players and BT.709 to others, and their colours shift.
            stream.codec_context.colorspace = Colorspace.ITU709
            stream.codec_context.color_primaries = ColorPrimaries.BT709
            stream.codec_context.color_trc = ColorTrc.BT709
            stream.codec_context.color_range = ColorRange.MPEG
        converter = VideoReformatter()
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if not lossless:
                frame = converter.reformat(frame, format="yuv420p", dst_colorspace=Colorspace.ITU709, threads=1)
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
