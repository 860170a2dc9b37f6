"""Frames of a video file by their numbers.

The number of a frame is its place in presentation order. It is found in an index of the packets' timestamps and
never by ``timestamp × rate``, which returns other frames than asked for where the rate varies. Where the timestamps
can't be relied on, frames are counted as the decoder puts them out.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import Float64, Int64, UInt8

from mutoscope.data.decoding import Deadline, VideoError, decode_from_keyframe, opened, rgb, why
from mutoscope.data.media import Media

MAX_SECONDS = 100_000
"""Length of a video: more than a day means damaged timestamps, and numbers of frames that fill the memory."""
REMEMBERED = 128
"""Files whose packets are remembered."""
SEEK_BY_PTS = ("mov", "matroska")
"""Containers that find a keyframe by when it is shown; others by when it is decoded."""
NO_PTS = ("avi", "h264", "hevc", "m4v", "mpegvideo")
"""Containers that don't store when frames are shown; what FFmpeg makes up is wrong where a codec reorders them."""


@dataclass(frozen=True, kw_only=True)
class FrameIndex:
    """When each frame of a video is shown; frame n is the n-th in presentation order."""

    times: Float64[np.ndarray, "frames"]
    """Seconds from the first frame, ascending."""
    duration: float
    """Seconds until the last frame leaves the screen; 0 for an image."""
    unit: Fraction = Fraction(1, 10**6)
    """Seconds that the times are whole multiples of."""

    @property
    def fps(self) -> float:
        """Mean rate; 0 for an image."""
        return len(self.times) / self.duration if self.duration else 0.0


@dataclass(frozen=True, kw_only=True)
class Packets:
    """Where the frames of a video file are."""

    frames: FrameIndex
    pts: Int64[np.ndarray, "frames"] | None
    """When each is shown, in the stream's own unit; None where the timestamps can't be relied on."""
    key_pts: Int64[np.ndarray, "keyframes"]
    """When the keyframes are shown, ascending."""
    key_seek: Int64[np.ndarray, "keyframes"]
    """Which timestamp leads the container to each keyframe."""
    pixel_aspect: float
    """Width of a pixel over its height."""
    fault: str = ""
    """Where the file is cut short or damaged, how: these are the frames before, whose numbers are certain."""


_remembered: dict[tuple[Media, tuple[int, int]], Packets] = {}
_lock = threading.Lock()


def packets_of(media: Media, deadline: Deadline) -> Packets:
    """The packets of a file, which are remembered until it changes.

    Raises VideoError where the file is missing, empty or not a video, or nothing of it is sound.
    """
    try:
        key = media, media.version()
    except (OSError, ImportError) as error:
        raise VideoError(f"{media}: {why(error)}") from error
    with _lock:
        packets = _remembered.pop(key, None)
    packets = packets or _read_packets(media, deadline)
    with _lock:
        _remembered[key] = packets  # At the end, as the latest.
        while len(_remembered) > REMEMBERED:
            del _remembered[next(iter(_remembered))]
    return packets


def decode(
    media: Media, packets: Packets, wanted: Int64[np.ndarray, "n"], deadline: Deadline
) -> Iterator[tuple[UInt8[np.ndarray, "h w 3"], int]]:
    """The frames of these numbers (ascending, none twice) as RGB, turned upright, and by how many degrees.

    Raises VideoError where one of them, or one on which it is built, can't be decoded.
    """
    done = 0
    converter = VideoReformatter()  # One for all frames: each new one sets up a swscale context, at 1.8x the cost.
    with opened(media, deadline) as (container, stream):
        find = _by_count if packets.pts is None else _by_pts
        for frame in find(media, container, stream, packets, wanted, deadline):
            yield rgb(media, frame, converter)
            done += 1
    if done < len(wanted):
        raise VideoError(f"{media}: frame {wanted[done]} of {len(packets.frames.times)} can't be decoded")


def _by_pts(
    media: Media,
    container: InputContainer,
    stream: VideoStream,
    packets: Packets,
    wanted: Int64[np.ndarray, "n"],
    deadline: Deadline,
) -> Iterator[av.VideoFrame]:
    """Each run of frames from the keyframe before it on, up to the first that does not come."""
    assert packets.pts is not None
    pts = packets.pts[wanted]
    keys = np.searchsorted(packets.key_pts, pts, side="right") - 1
    # A gap is not decoded where there is a keyframe in it.
    gaps = np.flatnonzero((packets.key_pts[keys[1:]] > pts[:-1]) & (np.diff(wanted) > 1)) + 1
    for first, end in pairwise([0, *gaps, len(pts)]):
        targets, key, back = deque(pts[first:end].tolist()), int(keys[first]), 0
        while targets:
            container.seek(int(packets.key_seek[max(0, key - back)]), stream=stream)
            before = len(targets)
            for frame in decode_from_keyframe(media, container, stream, deadline, set(targets)):
                if frame.pts is None or frame.pts < targets[0]:
                    continue
                if frame.pts > targets[0]:
                    break
                yield frame
                targets.popleft()
                if not targets:
                    break
            if len(targets) == before:
                if back >= key:
                    return
                back = 2 * back + 1  # The keyframe was not one to start at: try the ones before.


def _by_count(
    media: Media,
    container: InputContainer,
    stream: VideoStream,
    packets: Packets,
    wanted: Int64[np.ndarray, "n"],
    deadline: Deadline,
) -> Iterator[av.VideoFrame]:
    """From the start of the file, which has just been opened."""
    numbers = set(wanted.tolist())
    for number, frame in enumerate(decode_from_keyframe(media, container, stream, deadline)):
        if number in numbers:
            yield frame
            if number == wanted[-1]:
                return


def _read_packets(media: Media, deadline: Deadline) -> Packets:
    with opened(media, deadline) as (container, stream):
        packets = _demux_all(media, container, stream, deadline)
    if packets is None:
        with opened(media, deadline) as (container, stream):
            packets = _decode_all(media, container, stream, deadline)
    if packets.frames.duration > MAX_SECONDS:
        raise VideoError(f"{media}: {packets.frames.duration:.3g} s long, by its timestamps; they are damaged")
    return packets


class _Stamp(NamedTuple):
    """What is kept of a packet."""

    pts: int | None
    dts: int | None
    duration: int
    key: bool
    shown: bool


def _demux_all(media: Media, container: InputContainer, stream: VideoStream, deadline: Deadline) -> Packets | None:
    """From the packets alone, without decoding; None where their timestamps can't be relied on."""
    stamps: list[_Stamp] = []
    total, fault = 0, ""
    expected = len(stream.index_entries)  # Not `stream.frames`, which counts what an edit list leaves out.
    for packet in container.demux(stream):
        deadline.check()
        if packet.dts is None and packet.pts is None and not packet.size:
            continue  # The end.
        total += 1
        if packet.is_corrupt:
            fault = f"{media}: cut short or damaged: packet {total} of {max(expected, total)} is not whole"
            break
        if packet.size:  # Else the frame before stays on screen.
            # An edit list cuts a packet: decoded, because others build on it, but not shown.
            shown = not packet.is_discard
            stamps.append(_Stamp(packet.pts, packet.dts, packet.duration or 0, packet.is_keyframe, shown))
    if total < expected and not fault:
        fault = f"{media}: cut short: {total} of {expected} frames are there"
    if container.format.name.startswith(("avi", "matroska", "gif")) and not fault:
        fault = _missing_bytes(media)
    if not any(s.key for s in stamps):
        raise VideoError(fault or f"{media}: no frames in it")
    if _are_reliable(container, stream, stamps):
        return _index(media, container, stream, stamps, fault)
    if fault:
        raise VideoError(fault)
    return None


def _index(media: Media, container: InputContainer, stream: VideoStream, stamps: list[_Stamp], fault: str) -> Packets:
    pts = np.array([s.pts for s in stamps], dtype=np.int64)
    dts = np.array([s.pts if s.dts is None else s.dts for s in stamps], dtype=np.int64)
    keys = np.flatnonzero([s.key for s in stamps])
    keys = keys[np.argsort(pts[keys])]
    shown = [s.shown for s in stamps] & (pts >= pts[keys[0]])  # What comes before a keyframe can't be decoded.
    if fault:
        shown &= pts <= stamps[-1].dts if stamps[-1].dts is not None else False  # What is lost is shown after that.
    in_order = np.flatnonzero(shown)
    if not len(in_order):
        raise VideoError(fault or f"{media}: no frames in it")
    in_order = in_order[np.argsort(pts[in_order])]
    unit, rate, pixel_aspect = _facts(stream)
    times = (pts[in_order] - pts[in_order[0]]) * float(unit)
    last = stamps[in_order[-1]].duration * float(unit)
    duration = float(times[-1]) + (last if last > 0 else 1 / rate)
    return Packets(
        frames=FrameIndex(times=times, duration=duration, unit=unit),
        pts=pts[in_order],
        key_pts=pts[keys],
        key_seek=(pts if container.format.name.startswith(SEEK_BY_PTS) else dts)[keys],
        pixel_aspect=pixel_aspect,
        fault=fault,
    )


def _missing_bytes(media: Media) -> str:
    """What an AVI, Matroska, WebM or GIF file lacks; their readers take any end for the end. Empty where it is nothing.

    Source: RFC 8794 (EBML), 4 and 6; RFC 9559, 5.1; GIF89a, 27.
    """
    with media.opened() as source, open(source, "rb") if isinstance(source, str) else nullcontext(source) as file:
        head = file.read(4096)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 16))
        tail = file.read(16)
    if head.startswith(b"GIF8") and not tail.rstrip(b"\0\r\n").endswith(b";"):
        return f"{media}: cut short: the sign that ends a GIF is not there"
    end = 0
    if head.startswith(b"RIFF"):
        end = 8 + int.from_bytes(head[4:8], "little")
    elif head.startswith(b"\x1a\x45\xdf\xa3"):
        place = head.find(b"\x18\x53\x80\x67") + 4  # The segment, which holds everything behind the first few bytes.
        if 4 <= place < len(head) and head[place]:
            length = 9 - head[place].bit_length()  # Of the number there: one more than the zeros that it begins with.
            most = (1 << 7 * length) - 1
            stated = int.from_bytes(head[place : place + length], "big") & most
            end = 0 if stated == most else place + length + stated  # Of a live recording it is unknown.
    return f"{media}: cut short: {size} of {end} bytes are there" if end > size else ""


def _are_reliable(container: InputContainer, stream: VideoStream, stamps: list[_Stamp]) -> bool:
    """Whether the packets' timestamps tell when which frame is shown."""
    pts = {s.pts for s in stamps}
    dts = [s.dts for s in stamps if s.dts is not None]
    if None in pts or len(pts) < len(stamps) or any(b < a for a, b in pairwise(dts)):
        return False  # Such as where recordings are joined, and time begins anew.
    # VP8 has packets that are not shown.
    return container.format.name not in NO_PTS and stream.codec_context.name != "vp8"


def _decode_all(media: Media, container: InputContainer, stream: VideoStream, deadline: Deadline) -> Packets:
    """By decoding everything. Times are the frames' own where they ascend, and else from the mean rate."""
    stamps = [frame.pts for frame in decode_from_keyframe(media, container, stream, deadline)]
    if not stamps:
        raise VideoError(f"{media}: no frames in it")
    unit, rate, pixel_aspect = _facts(stream)
    times = np.arange(len(stamps)) / rate
    pts = [s for s in stamps if s is not None]
    if len(pts) == len(stamps) and all(b > a for a, b in pairwise(pts)):
        times = (np.array(pts) - pts[0]) * float(unit)
    none = np.empty(0, np.int64)
    frames = FrameIndex(times=times, duration=float(times[-1]) + 1 / rate, unit=unit)
    return Packets(frames=frames, pts=None, key_pts=none, key_seek=none, pixel_aspect=pixel_aspect)


def _facts(stream: VideoStream) -> tuple[Fraction, float, float]:
    """The unit of its timestamps in seconds, its mean rate, and the aspect ratio of its pixels."""
    assert stream.time_base is not None
    rate = stream.guessed_rate or stream.average_rate or 25  # The mean that a bare stream claims is always 25.
    return stream.time_base, float(rate), float(stream.sample_aspect_ratio or 1)
