"""Validation files: every mistake in them told before anything is loaded; rows shared out over processes."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mutoscope.data.video import read_frames, write_video
from mutoscope.samplers.cogvideox import Drawer, open_drawer
from mutoscope.samplers.request import Request, request_for
from mutoscope.validation import draw_requests, read_requests, settings

T2V, I2V = "tiny://cogvideox-t2v", "tiny://cogvideox-i2v"
ROWS: list[dict[str, Any]] = [
    {"prompt": "a cat, red", "seed": 3, "height": 48, "width": 32, "guidance_scale": 1.5, "scheduler": "dpm"},
    {"prompt": "ein Hügel\nim Nebel", "frames": 17, "steps": 2, "fps": 12.5, "negative_prompt": "a dog"},
    {"prompt": "", "dynamic_guidance": "cosine"},
]


def defaults(path: str = T2V) -> Request:
    return replace(request_for(path), steps=4, seed=7)


def write(folder: Path, suffix: str, rows: list[dict[str, Any]]) -> Path:
    """The same table in any format; what a row lacks is an empty cell."""
    file = folder / f"validation{suffix}"
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if suffix == ".jsonl":
        file.write_text("\n".join(json.dumps(row) for row in rows))
    elif suffix == ".json":  # as finetrainers has it
        file.write_text(json.dumps({"data": rows}))
    elif suffix == ".parquet":
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in columns}), file)
    else:
        tab = "\t" if suffix == ".tsv" else ","
        lines = [tab.join(f'"{row.get(name, "")}"' for name in columns) for row in rows]
        file.write_text("\n".join([tab.join(columns), *lines]))
    return file


def values(request: Request) -> dict[str, Any]:
    return {f.name: getattr(request, f.name) for f in fields(request)}


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_rows_become_requests_and_what_they_lack_is_the_defaults(tmp_path: Path, suffix: str) -> None:
    requests = read_requests(write(tmp_path, suffix, ROWS), T2V, defaults())
    assert [values(request) for request in requests] == [values(replace(defaults(), **row)) for row in ROWS]


def test_images_and_videos_lie_beside_the_table(tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    Image.new("RGB", (60, 40)).save(tmp_path / "media" / "a.png")
    write_video(tmp_path / "media" / "b.mp4", np.zeros((17, 32, 48, 3), np.uint8), 8)
    for path, name, file in ((I2V, "image", "media/a.png"), (T2V, "video", "media/b.mp4")):
        for cell in (file, str(tmp_path / file)):
            table = write(tmp_path, ".jsonl", [{"prompt": "x", name: cell}])
            (request,) = read_requests(table, path, defaults(path))
            assert getattr(request, name) == str(tmp_path / file)


@pytest.mark.parametrize(
    "row, told",
    [
        ({"caption": "x"}, "caption; call it prompt\n"),
        ({"prompt": "x", "num_frames": 9}, "num_frames; call it frames\n"),
        ({"prompt": "x", "promt": "y", "guidance": 1}, r"2 of its columns.*promt; did you mean prompt\?.*guidance"),
        ({"seed": 1}, "no column prompt"),
        ({"prompt": None, "seed": 1}, "line 2: no prompt"),
        ({"prompt": 3}, "line 2: prompt: it must be text; it is 3"),
        ({"prompt": "x", "steps": "many"}, "line 2: steps: must be a whole number; it is 'many'"),
        ({"prompt": "x", "steps": 2.5}, "line 2: steps: must be a whole number; it is 2.5"),
        ({"prompt": "x", "steps": True}, "line 2: steps: must be a whole number; it is True"),
        ({"prompt": "x", "fps": "fast"}, "line 2: fps: must be a number; it is 'fast'"),
        ({"prompt": "x", "scheduler": "dpm++"}, "scheduler: must be one of ddim, dpm; it is 'dpm"),
        ({"prompt": "x", "frames": 10}, "line 2: frames=10 .*nearest: 9 or 17"),
        ({"prompt": "x", "image": "a.png"}, "line 2: this checkpoint is for text to video, and takes no image"),
        ({"prompt": "x", "video": "a.mp4"}, "line 2: .*a.mp4: No such file"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, row: dict[str, Any], told: str) -> None:
    first = {"prompt": "all right"} if "prompt" in row else {}
    with pytest.raises(ValueError, match=f"(?s){told}"):
        read_requests(write(tmp_path, ".jsonl", [first, row]), T2V, defaults())


def test_all_mistakes_are_found_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing files, too: ten are told, and how many there are."""
    monkeypatch.setattr("mutoscope.checkpoints.load_part", None)
    (tmp_path / "broken.png").write_bytes(b"not an image")
    names = ["broken.png", *(f"missing{k}.png" for k in range(11))]
    table = write(tmp_path, ".csv", [{"prompt": "x", "image": name} for name in names])
    with pytest.raises(ValueError, match=r"(?s)12 faults:.*line 2: .*broken.png: not a PNG.*missing8.*and 2 more") as e:
        read_requests(table, I2V, defaults(I2V))
    assert "missing9" not in str(e.value)


def test_a_file_without_rows_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no rows"):
        read_requests(write(tmp_path, ".jsonl", []), T2V, defaults())
    with pytest.raises(FileNotFoundError, match="no such validation file"):
        read_requests(tmp_path / "none.csv", T2V, defaults())


# ---------------------------------------------------------------- drawing


@cache
def drawer() -> Drawer:
    return open_drawer(T2V, [replace(defaults(), prompt=row["prompt"]) for row in ROWS] + [nothing()], weights="fp32")


def nothing() -> Request:
    return replace(defaults(), prompt="nothing")


def test_a_sample_is_a_video_and_what_was_asked_for(tmp_path: Path) -> None:
    request = replace(defaults(), prompt=ROWS[1]["prompt"], steps=2)
    steps: list[int] = []
    (file,) = draw_requests(drawer(), [request], tmp_path / "00000010", on_step=lambda: steps.append(1))
    assert file == tmp_path / "00000010" / "0-ein-h-gel-im-nebel.mp4"
    assert sorted(p.name for p in file.parent.iterdir()) == [f"{file.stem}.json", file.name]
    drawn, written = drawer().draw(request).astype(int), read_frames(file, range(9)).astype(int)
    assert np.abs(drawn - written).mean() < 12  # H.264 of what is almost noise
    told = json.loads(file.with_suffix(".json").read_text())
    assert told == settings(request) and told["prompt"] == request.prompt and told["steps"] == len(steps) == 2
    assert list(told) == [f.name for f in fields(Request)]


@pytest.mark.parametrize("world", [1, 2, 3, 13])
def test_processes_share_the_rows_and_none_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    """Upstream hangs unless the number of rows divides by that of processes."""
    drawn: list[int] = []

    def draw(self: Drawer, request: Request, on_step: Any) -> Any:
        drawn.append(request.seed)
        return np.zeros((2, 32, 48, 3), np.uint8)

    monkeypatch.setattr(Drawer, "draw", draw)
    monkeypatch.setattr(torch.distributed, "barrier", None)
    requests = [replace(nothing(), seed=k, prompt="x" * k) for k in range(11)]
    shares = [draw_requests(drawer(), requests, tmp_path, rank=rank, world=world) for rank in range(world)]
    assert sorted(drawn) == list(range(11))
    assert [len(share) for share in shares] == [len(range(rank, 11, world)) for rank in range(world)]
    files = sorted(file.name for share in shares for file in share)
    assert files == sorted(p.name for p in tmp_path.glob("*.mp4"))
    assert files[0] == "00-video.mp4" and files[3] == "03-xxx.mp4" and len(files) == 11


def test_a_drawing_that_fails_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(self: Drawer, request: Request, on_step: Any) -> Any:
        if request.seed == 1:
            raise KeyboardInterrupt
        return np.zeros((2, 32, 48, 3), np.uint8)

    monkeypatch.setattr(Drawer, "draw", draw)
    with pytest.raises(KeyboardInterrupt):
        draw_requests(drawer(), [replace(nothing(), seed=k) for k in range(3)], tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0-nothing.json", "0-nothing.mp4"]


def test_settings_are_json_whatever_a_video_starts_from(tmp_path: Path) -> None:
    for image, told in (
        (tmp_path / "a.png", str(tmp_path / "a.png")),
        (np.zeros((4, 6, 3), np.uint8), "ndarray (4, 6, 3)"),
        (Image.new("RGB", (6, 4)), "Image (6, 4)"),
    ):
        assert json.loads(json.dumps(settings(replace(nothing(), image=image))))["image"] == told
