from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mutoscope.data.video import probe, read_frames
from mutoscope.pictures import GAP, SHADE, write_grid, write_strips


def test_a_grid_plays_all_videos_beside_each_other(tmp_path: Path) -> None:
    videos = [torch.full((3, 16, 24, 3), v, dtype=torch.uint8) for v in (30, 90, 150, 210, 250)]
    write_grid(tmp_path / "deep" / "grid", [videos[:3], videos[3:]], fps=5)
    info = probe(tmp_path / "deep" / "grid.mp4")
    size = 96 // 16  # enlarged by whole numbers to 96 pixels
    assert (info.frames, round(info.fps, 6)) == (3, 5)
    assert (info.height, info.width) == (2 * 16 * size + GAP, 3 * 24 * size + 2 * GAP)
    frame = read_frames(tmp_path / "deep" / "grid.mp4", [1])[0].astype(int)
    still = np.asarray(Image.open(tmp_path / "deep" / "grid.png")).astype(int)
    assert np.abs(still - frame).mean() < 2  # the mp4 is lossy
    at = lambda row, column: frame[row * (16 * size + GAP) + 48, column * (24 * size + GAP) + 72, 0]
    assert np.abs(np.array([at(0, 0), at(0, 1), at(0, 2), at(1, 0), at(1, 1)]) - [30, 90, 150, 210, 250]).max() <= 3
    assert abs(at(1, 2) - SHADE) <= 3  # the place of a sixth video


def test_film_strips_show_first_and_last_frames_pixel_by_pixel(tmp_path: Path) -> None:
    video = torch.arange(20, dtype=torch.uint8)[:, None, None, None].expand(20, 96, 96, 3) * 10
    write_strips(tmp_path / "strips.png", [video])
    sheet = np.asarray(Image.open(tmp_path / "strips.png"))
    assert sheet.shape == (96, 8 * 96 + 7 * GAP, 3)
    assert sheet[5, 5, 0] == 0
    assert sheet[5, -5, 0] == 190
