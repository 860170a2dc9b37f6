"""Opening and decoding a video file, by PyAV: whatever goes wrong is a `VideoError`, and nothing takes for ever."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import UInt8

from mutoscope.data.media import Media

MAX_PIXELS = 2**26
"""Pixels of a frame; larger ones (8192 × 8192) are taken for decompression bombs."""
HEIF = ("heic", "heix", "mif1")
"""Kinds of mp4-like files that hold the tiles of an image as videos."""
P, B = 2, 3
"""Kinds of frames (FFmpeg's AV_PICTURE_TYPE) that are built on others."""
MPEG = ("flv", "h263", "mpeg1video", "mpeg2video", "mpeg4", "msmpeg4", "msmpeg4v2", "wmv1", "wmv2")
"""Decoders that make up a frame, of the kind 0, where they don't have the one that another is built on."""


class VideoError(ValueError):
    """A video or image that can't be read, or that has too few frames; the text names it and the reason."""


class Deadline:
    """When the reading of a file is given up."""

    def __init__(self, media: Media, seconds: float | None) -> None:
        self.media, self.seconds = media, seconds
        self._moment = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float | None:
        """Seconds until then."""
        return None if self._moment is None else max(0.001, self._moment - time.monotonic())

    def check(self) -> None:
        """Raises VideoError afterwards."""
        if self._moment is not None and time.monotonic() > self._moment:
            raise self.error()

    def error(self) -> VideoError:
        """What is raised."""
        return VideoError(f"{self.media}: took longer than {self.seconds:g} s")


@contextmanager
def opened(media: Media, deadline: Deadline) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A file and its video stream; whatever goes wrong inside becomes a VideoError that names the file."""
    limits = {"max_pixels": str(MAX_PIXELS)}
    try:
        with (
            media.opened() as source,
            av.open(
                # "file:" lest "a:b.mp4" be taken for a protocol; no other, for a playlist could name any address.
                f"file:{source}" if isinstance(source, str) else source,
                "r",
                options=limits | _lean(media),
                container_options={"protocol_whitelist": "file"},
                metadata_errors="replace",
                timeout=deadline.left(),
            ) as container,
        ):
            stream = _video_stream(media, container)
            codec = stream.codec_context
            if codec.width * codec.height > MAX_PIXELS:
                raise VideoError(f"{media}: frames of {codec.width} × {codec.height} are too large to be decoded")
            # The JPEG decoder patches half of the damage that it notices with an older frame, unless told to stop.
            codec.options = limits | ({"err_detect": "explode"} if codec.name == "mjpeg" else {})
            codec.thread_count = 1  # More threads cost 20-25 % more CPU; workers are parallel already.
            yield container, stream
    except (av.FFmpegError, OSError, ImportError) as error:
        if isinstance(error, av.ExitError) and deadline.seconds is not None:
            raise deadline.error() from error
        reason = why(error)
        if isinstance(error, av.InvalidDataError):
            reason = "not a video, cut short or damaged" if media.size or media.version()[1] else "the file is empty"
        raise VideoError(f"{media}: can't be read as a video: {reason}") from error


def _lean(media: Media) -> dict[str, str]:
    """Opening decodes frames to guess what is in them; of mp4 files the header says it, in half of the time."""
    return {"skip_frame": "all"} if media.suffix in (".mp4", ".mov", ".m4v") else {}


def why(error: Exception) -> str:
    """What an error says, without the file's name."""
    if reason := getattr(error, "strerror", None):
        return str(reason)
    return "No such file or directory" if isinstance(error, FileNotFoundError) else str(error) or type(error).__name__


def decode_from_keyframe(
    media: Media, container: InputContainer, stream: VideoStream, deadline: Deadline, wanted: set[int] | None = None
) -> Iterator[av.VideoFrame]:
    """The frames from the next keyframe on, in presentation order; none where it is not one to start at.

    wanted: timestamps of the only frames that need to come; None means all up to the end of the file. Raises
    VideoError or av.FFmpegError for a frame that the decoder finds damaged: docs/data.md tells how much of it which
    decoder finds.
    """
    start, started, first = None, False, False
    codec = stream.codec_context
    # A frame that no other is built on need not be decoded unless it is wanted. H.264 marks them without fail.
    skip = codec.name == "h264"
    left = None if wanted is None else set(wanted)
    built_on_others = (P, B, 0) if codec.name in MPEG else (P, B)
    for packet in container.demux(stream):
        deadline.check()
        if not started:
            if not packet.is_keyframe:
                continue  # Seeking in a stream without an index ends anywhere.
            # What an edit list cuts off does not come out.
            start, started, first = packet.pts, True, not packet.is_discard
        if skip and wanted is not None:
            codec.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        frames = packet.decode()
        if left is not None:
            left.discard(packet.pts)
            if not left:
                frames += codec.decode(None)  # The decoder has all of them: it need not see more to put them in order.
        for frame in frames:
            if frame.pts is not None and start is not None and frame.pts < start:
                continue  # It may be built on what is before the keyframe.
            if frame.is_corrupt:
                moment = "" if frame.time is None else f" at {frame.time:.3f} s"
                raise VideoError(f"{media}: damaged: the frame{moment} is not whole")
            if first and not frame.key_frame and frame.pict_type in built_on_others:
                return  # Marked as a keyframe, but it is none.
            first = False
            yield frame
        if left is not None and not left:
            return


def rgb(media: Media, frame: av.VideoFrame, converter: VideoReformatter) -> tuple[UInt8[np.ndarray, "h w 3"], int]:
    """A frame as its display matrix wants it, and the degrees (counter-clockwise) by which it is turned for that.

    Raises VideoError where those are no multiple of 90.
    """
    frame = converter.reformat(frame, format="rgb24", threads=1)
    plane = frame.planes[0]
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(frame.height, plane.line_size)  # No copy; padded.
    pixels = rows[:, : 3 * frame.width].reshape(frame.height, frame.width, 3)
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV stumbles over kinds of side data that it does not know.
        turns = round(frame.rotation / 90)
        return np.rot90(pixels, turns), 90 * turns
    if matrix is None:
        return pixels, 0
    a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), np.int32).tolist()  # type: ignore[call-overload]
    x, y = (abs(a), abs(d)) if abs(a) > abs(b) else (abs(b), abs(c))
    if not x / 2 < y < x * 2 or abs(a * c + b * d) > x * y / 100:  # They may scale, but not skew.
        raise VideoError(f"{media}: its display matrix turns it by no multiple of 90°, or is damaged")
    if a * d < b * c:  # Mirrored: left to right first, and then turned.
        pixels, a, b = pixels[:, ::-1], -a, -b
    turns = round(-math.atan2(b, a) / (math.pi / 2))
    return np.rot90(pixels, turns), 90 * turns


def _video_stream(media: Media, container: InputContainer) -> VideoStream:
    """The first video stream that is not a cover picture."""
    videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not videos:
        kinds = " and ".join(sorted({s.type for s in container.streams}))
        raise VideoError(f"{media}: no video in it" + (f", only {kinds}" if kinds else ""))
    if container.metadata.get("major_brand") in HEIF:
        raise VideoError(f"{media}: an image in HEIF; convert it to JPEG or PNG")
    if videos[0].codec_context is None:
        raise VideoError(f"{media}: its codec is unknown to this FFmpeg")
    return videos[0]
