"""What a checkpoint can draw, and what it can't: told before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mutoscope.samplers.request import Request, check_requests, request_for

IMAGE = np.zeros((32, 48, 3), np.uint8)
VIDEO = np.zeros((9, 32, 48, 3), np.uint8)


def request(name: str = "cogvideox-t2v", **fields: Any) -> Request:
    small = {"frames": 9, "height": 32, "width": 48, "steps": 3}
    image = {"image": IMAGE} if "i2v" in name else {}
    return replace(request_for(f"tiny://{name}", "a red dog"), **(small | image | fields))


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mutoscope.checkpoints.load_part", None)
    monkeypatch.setattr("mutoscope.checkpoints.open_checkpoint", None)


@pytest.mark.parametrize(
    "checkpoint, expected",
    [
        ("THUDM/CogVideoX-2b", (49, 480, 720, 8)),
        ("zai-org/CogVideoX-5b-I2V", (49, 480, 720, 8)),
        ("THUDM/CogVideoX1.5-5B", (81, 768, 1360, 16)),
        ("tiny://cogvideox-2b", (9, 32, 48, 8)),
    ],
)
def test_a_checkpoint_draws_what_it_was_trained_for(checkpoint: str, expected: tuple[int, int, int, float]) -> None:
    asked = request_for(checkpoint)
    assert (asked.frames, asked.height, asked.width, asked.fps) == expected


@pytest.mark.parametrize(
    "name, fields, told",
    [
        ("cogvideox-t2v", {"frames": 12}, "frames=12 .*nearest: 9 or 17"),
        ("cogvideox-1.5-t2v", {"frames": 80}, "frames=80 .*nearest: 73 or 81.*16·n"),
        ("cogvideox-t2v", {"height": 40}, "height=40 .*nearest: 32 or 48"),
        ("cogvideox-1.5-t2v", {"width": 144}, "32 × 144 pixels are more than .* reach, 128 × 128"),
        ("cogvideox-t2v", {"steps": 0}, "steps=0"),
        ("cogvideox-t2v", {"guidance_scale": 0.5}, "guidance_scale=0.5"),
        ("cogvideox-t2v", {"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ("cogvideox-t2v", {"guidance_scale": 1.0, "dynamic_guidance": "cosine"}, "guidance_scale above 1"),
        ("cogvideox-t2v", {"seed": -1}, "seed=-1"),
        ("cogvideox-t2v", {"fps": 0.0}, "fps=0"),
        ("cogvideox-t2v", {"image": IMAGE}, "takes no image"),
        ("cogvideox-i2v", {"image": None}, "there is no image"),
        ("cogvideox-i2v", {"image": None, "video": VIDEO}, "of text to video"),
        ("cogvideox-i2v", {"video": VIDEO}, "give one"),
        ("cogvideox-i2v", {"image": "no/such.png"}, "no/such.png: No such file"),
        ("cogvideox-t2v", {"video": VIDEO[:4]}, "4 frames, 9 are to be drawn"),
        ("cogvideox-t2v", {"video": VIDEO, "frames": 17}, "9 frames, 17 .*frames=9"),
        ("cogvideox-t2v", {"video": "no/such.mp4"}, "no/such.mp4"),
        ("cogvideox-t2v", {"video": VIDEO, "strength": 0.2}, "strength=0.2"),
        ("cogvideox-t2v", {"video": VIDEO, "strength": 1.2}, "strength=1.2"),
    ],
)
def test_what_cannot_be_drawn_is_told(name: str, fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        check_requests([request(name, **fields)], f"tiny://{name}")


@pytest.mark.parametrize("name, field", [("cogvideox-i2v", "image"), ("cogvideox-t2v", "video")])
def test_arrays_of_other_kinds_are_told(name: str, field: str) -> None:
    for array in (IMAGE[..., :1], VIDEO[..., :1], VIDEO.astype(np.float32), IMAGE / 255):
        asked = request(name)
        object.__setattr__(asked, field, array)  # past the check of types, which only tests have
        with pytest.raises(ValueError, match=f"{field}: must be uint8"):
            check_requests([asked], f"tiny://{name}")


def test_faults_are_told_ten_at_a_time() -> None:
    with pytest.raises(ValueError, match=r"(?s)12 faults:.*request 1: .*request 10: .*and 2 more"):
        check_requests([request(), *[request(steps=0)] * 12], "tiny://cogvideox-t2v")
