"""Videos to draw while a model trains, as rows of a table: prompt, image, size, seed, ... in columns.

The rows are divided over the copies of the model, each of which draws its share by itself and waits for nobody: their
number need not divide by that of the copies.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

from mutoscope.checkpoints import part_config
from mutoscope.data.media import is_url
from mutoscope.data.sources.tables import is_empty, read_string, rows
from mutoscope.data.video import write_video
from mutoscope.errors import did_you_mean, listed
from mutoscope.files import replacing
from mutoscope.known_checkpoints import Config
from mutoscope.samplers.cogvideox import Drawer
from mutoscope.samplers.request import Guidance, Request, Resize, Solver, faults

COLUMNS = tuple(f.name for f in fields(Request))
"""What the columns may be called; only prompt must be there. Paths are relative to the table."""
_WHOLE = ("frames", "height", "width", "seed", "steps")
_NUMBERS = ("fps", "guidance_scale", "strength")
_WORDS = {"resize": get_args(Resize), "dynamic_guidance": get_args(Guidance), "scheduler": get_args(Solver)}
_OTHER_NAMES = {
    "caption": "prompt",
    "text": "prompt",
    "image_path": "image",
    "video_path": "video",
    "num_frames": "frames",
    "num_inference_steps": "steps",
    "frame_rate": "fps",
    "export_fps": "fps",
}
"""Of columns in finetrainers' validation files."""


def read_requests(file: Path, path: str, defaults: Request) -> list[Request]:
    """The rows of a validation file (CSV, TSV, JSON, JSON Lines or Parquet).

    path: the checkpoint that draws them. defaults: what stands where a cell is empty or a column is missing.

    Raises FileNotFoundError; ValueError with the first ten faults and their number: columns that mean nothing, cells
    that are not of their kind, images and videos that are missing or broken, and what the checkpoint can't draw.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such validation file")
    wrong: list[str] = []
    config = part_config(path, "transformer")
    table = [(where, row) for where, row in rows(str(file), wrong)]
    _check_columns(file, dict.fromkeys(column for _, row in table for column in row))
    requests = []
    for where, row in table:
        found, request = _read_row(row, file.parent, defaults, config)
        wrong += [f"{file}, {where}: {fault}" for fault in found]
        requests += [request] if request is not None else []
    if wrong:
        raise ValueError(f"{file}: {len(wrong)} faults:{listed(wrong)}")
    if not requests:
        raise ValueError(f"{file}: no rows; write one for each video to draw")
    return requests


def draw_requests(
    drawer: Drawer,
    requests: Sequence[Request],
    folder: Path,
    *,
    rank: int = 0,
    world: int = 1,
    write: bool = True,
    on_step: Callable[[], None] = lambda: None,
) -> list[Path]:
    """Draw the share of process `rank`, every `world`-th request, and write each to FOLDER/ROW-PROMPT.mp4 as soon as it
    is drawn, with ROW-PROMPT.json beside it, which says what was asked for. Returns the mp4 files.

    write: False draws without writing, for processes that only help another to draw.
    on_step: called after each step of each video. Raises as `Drawer.draw` and `write_video`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for row in range(rank, len(requests), world):
        request = requests[row]
        frames = drawer.draw(request, on_step)
        if not write:
            continue
        stem = f"{row:0{len(str(len(requests) - 1))}}-{_slug(request.prompt)}"
        write_video(folder / f"{stem}.mp4", frames, request.fps)
        with replacing(folder / f"{stem}.json") as aside:
            aside.write_text(json.dumps(settings(request), indent=2, ensure_ascii=False) + "\n")
        written.append(folder / f"{stem}.mp4")
    return written


def settings(request: Request) -> dict[str, Any]:
    """A request as JSON has it: paths as text; images and videos that are in memory by their shape alone."""
    values = {f.name: getattr(request, f.name) for f in fields(request)}
    for name in ("image", "video"):
        value = values[name]
        if isinstance(value, str | Path) or value is None:
            values[name] = None if value is None else str(value)
        else:
            values[name] = f"{type(value).__name__} {getattr(value, 'shape', None) or value.size}"
    return values


def _check_columns(file: Path, columns: Mapping[str, None]) -> None:
    unknown = [
        name + (f"; call it {_OTHER_NAMES[name]}" if name in _OTHER_NAMES else did_you_mean(name, COLUMNS))
        for name in columns
        if name not in COLUMNS
    ]
    if unknown:
        raise ValueError(f"{file}: {len(unknown)} of its columns mean nothing here:{listed(unknown)}\n"
                         f"Known are {', '.join(COLUMNS)}")  # fmt: skip
    if columns and "prompt" not in columns:
        raise ValueError(f"{file}: no column prompt; it says what each video shows")


def _read_row(
    row: Mapping[str, Any], folder: Path, defaults: Request, config: Config
) -> tuple[list[str], Request | None]:
    """What is wrong with a row, and the request in it where its cells could be read."""
    cells: dict[str, Any] = {}
    wrong = []
    for name, value in row.items():
        try:
            if not is_empty(value):
                cells[name] = _read_cell(name, value, folder)
        except ValueError as error:
            wrong.append(f"{name}: {error}")
    if row.get("prompt") is None:
        wrong.append('no prompt; write "" for none')
    if wrong:
        return wrong, None
    request = replace(defaults, **{"prompt": "", **cells})
    return list(faults(request, config)), request


def _read_cell(name: str, value: Any, folder: Path) -> Any:
    """A cell as the field of `Request` wants it. Raises ValueError where it makes no sense."""
    if name in _WHOLE:
        # Columns with gaps come out of pandas as 3.0
        whole = None if isinstance(value, bool) else re.fullmatch(r"(-?[0-9]{1,20})(\.0*)?", str(value).strip())
        if whole is None:
            raise ValueError(f"must be a whole number; it is {value!r:.40}")
        return int(whole[1])
    if name in _NUMBERS:
        try:
            return float(value)
        except (TypeError, ValueError):
            raise ValueError(f"must be a number; it is {value!r:.40}") from None
    text = read_string(value, "it")
    if name in _WORDS and text not in _WORDS[name]:
        raise ValueError(f"must be one of {', '.join(_WORDS[name])}; it is {text!r:.40}")
    return str(folder / text) if name in ("image", "video") and not is_url(text) else text


def _slug(prompt: str) -> str:
    """What of a prompt can stand in the name of a file, on any disk."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    return words[:40].strip("-") or "video"
