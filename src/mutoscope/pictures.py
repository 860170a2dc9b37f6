"""Videos laid out for people to look at: a grid that plays, and film strips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from mutoscope.data.video import resize, write_video
from mutoscope.files import replacing

GAP = 2
"""Pixels between videos, after enlarging."""
SHADE = 40
"""Grey of the gaps."""


def write_grid(stem: Path, rows: Sequence[Sequence[UInt8[Tensor, "t h w 3"]]], fps: float) -> None:
    """STEM.mp4, in which all videos play beside each other, and STEM.png, the frame in the middle of it.

    Small videos are enlarged by a whole number, without smoothing.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    video = _tiled([[_enlarged(v.numpy()) for v in row] for row in rows])
    write_video(stem.with_suffix(".mp4"), video, fps)
    save_png(stem.with_suffix(".png"), video[len(video) // 2])


def write_strips(path: Path, videos: Sequence[UInt8[Tensor, "t h w 3"]]) -> None:
    """A PNG with the frames of each video in a row; of long videos, eight of them."""
    strips = [[v[None, i] for i in _picks(len(v))] for v in (_enlarged(video.numpy()) for video in videos)]
    save_png(path, _tiled(strips)[0])


def like(videos: UInt8[Tensor, "n t1 h1 w1 3"], shown: UInt8[Tensor, "m t2 h2 w2 3"]) -> UInt8[Tensor, "n t2 h2 w2 3"]:
    """Videos as large and as long as others, to be shown beside them: padded with black, or cut, and the last frame
    held."""
    _, frames, height, width, _ = shown.shape
    if videos.shape[1:] == shown.shape[1:]:
        return videos
    held = [min(i, videos.shape[1] - 1) for i in range(frames)]
    return torch.stack([torch.from_numpy(resize(v[held].numpy(), height, width, "pad")) for v in videos])


def save_png(path: Path, image: UInt8[np.ndarray, "h w 3"]) -> None:
    """Write a PNG, whole or not at all."""
    with replacing(path) as aside:
        Image.fromarray(image).save(aside, format="PNG")


def _enlarged(video: UInt8[np.ndarray, "t h w 3"], least: int = 96) -> UInt8[np.ndarray, "t H W 3"]:
    factor = max(1, least // video.shape[1])
    return video.repeat(factor, axis=1).repeat(factor, axis=2)


def _picks(frames: int, most: int = 8) -> list[int]:
    """At most `most` frames, evenly spread, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, frames - 1, min(frames, most))})


def _tiled(rows: Sequence[Sequence[UInt8[np.ndarray, "t h w 3"]]]) -> UInt8[np.ndarray, "t H W 3"]:
    """Videos of one size as one video, in rows."""
    frames, height, width, _ = rows[0][0].shape
    columns = max(len(row) for row in rows)
    size = (len(rows) * (height + GAP) - GAP, columns * (width + GAP) - GAP)
    canvas = np.full((frames, *size, 3), SHADE, np.uint8)
    for i, row in enumerate(rows):
        for j, video in enumerate(row):
            y, x = i * (height + GAP), j * (width + GAP)
            canvas[:, y : y + height, x : x + width] = video
    return canvas
