"""Videos with the number of each frame painted into it, so that a benchmark sees which frames it was given."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace
from jaxtyping import Bool, Float32, Int64, UInt8
from torch.nn.functional import interpolate

UNIT = Fraction(1, 600)
"""Seconds, of timestamps."""
SQUARE, BITS = 16, 12
"""Side of the squares that spell a frame's number, and how many there are."""


def scene(frames: int, height: int, width: int, seed: int) -> UInt8[np.ndarray, "t h w 3"]:
    """A textured wall that moves by, a patch that moves otherwise, and noise; each frame with its number painted in."""
    random = np.random.default_rng(seed)
    size = (height + frames, width + frames)
    wall = 128 + sum(texture(random, size, cell, deviation) for cell, deviation in ((64, 60), (16, 40), (4, 20)))
    wall = np.clip(wall, 0, 255).astype(np.int16)
    noise = random.integers(-6, 7, (8, height, width, 1), np.int16)
    video = np.empty((frames, height, width, 3), np.uint8)
    for t, frame in enumerate(video):
        pixels = wall[t // 2 : t // 2 + height, t : t + width] + noise[t % 8]
        top = int((height - 64) * (0.5 + 0.5 * np.sin(t / 23 + seed)))
        left = int((width - 64) * (0.5 + 0.5 * np.cos(t / 17)))
        pixels[top : top + 64, left : left + 64] = 255 - wall[:64, :64]
        frame[:] = pixels.clip(0, 255)
        for bit in range(BITS):
            frame[:SQUARE, bit * SQUARE : (bit + 1) * SQUARE] = 235 if t >> bit & 1 else 20
    return video


def texture(
    random: np.random.Generator, size: tuple[int, int], cell: int, deviation: float
) -> Float32[np.ndarray, "h w 3"]:
    """Smooth noise with features of so many pixels."""
    coarse = random.standard_normal((1, 3, size[0] // cell + 2, size[1] // cell + 2), np.float32)
    fine = interpolate(torch.from_numpy(coarse), scale_factor=cell, mode="bicubic")[0].permute(1, 2, 0).numpy()
    return deviation * fine[: size[0], : size[1]]


def numbers_in(frames: UInt8[np.ndarray, "n h w 3"]) -> Int64[np.ndarray, "n"]:
    """The numbers that `scene` painted into frames."""
    inner = slice(SQUARE // 4, -SQUARE // 4)
    squares = frames[:, :SQUARE, : BITS * SQUARE].reshape(len(frames), SQUARE, BITS, SQUARE, 3)
    bits: Bool[np.ndarray, "n bits"] = squares[:, inner, :, inner].mean(axis=(1, 3, 4)) > 128
    return bits @ (1 << np.arange(BITS))


def write(
    path: Path, frames: UInt8[np.ndarray, "t h w 3"], keyframe_interval: int, steps: list[int] | None = None
) -> None:
    """An mp4 as they are found (H.264, 4:2:0, B-frames), at 30 frames per second.

    steps: the time from each frame to the next, in `UNIT`, of a variable rate.
    """
    steps = steps or [20] * len(frames)
    every = f"keyint={keyframe_interval}:min-keyint={keyframe_interval}:scenecut=0:bframes=3"
    options = {"preset": "veryfast", "crf": "23", "x264-params": every}
    shown = 0
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = UNIT
        stream.codec_context.colorspace, stream.codec_context.color_range = Colorspace.ITU709, ColorRange.MPEG
        for pixels, step in zip(frames, steps, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
            frame.pts, frame.time_base = shown, UNIT
            shown += step
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
