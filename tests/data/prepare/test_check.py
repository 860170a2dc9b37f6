"""What `mutoscope data check` finds, in a folder where all sorts of things are wrong."""

from __future__ import annotations

import base64
import io
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mutoscope.data.prepare import check as check_module
from mutoscope.data.prepare.check import Checked, check
from mutoscope.data.prepare.check_page import clock, print_report, write_page
from mutoscope.data.video import write_video
from mutoscope.recipe import Bucket, ClipSet, Data
from mutoscope.supervise import Alive

BUCKETS = tuple(
    Bucket(frames=f, height=h, width=w, batch_size=1) for f, h, w in [(4, 32, 64), (16, 32, 64), (16, 64, 32)]
)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def video(path: Path, frames: int, height: int = 32, width: int = 64, fps: float = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = np.linspace(0, 255, frames).astype(np.uint8)[:, None, None, None]
    noise = np.random.default_rng(0).integers(0, 40, (frames, height, width, 3), np.uint8)
    write_video(path, np.clip(grey.astype(int) + noise, 0, 255).astype(np.uint8), fps)
    path.with_suffix(".txt").write_text(f"it gets brighter, {path.stem} & <b>so on</b>", encoding="utf-8")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clips")
    for n in range(4):
        video(root / "train" / f"good {n}.mp4", 16 + n)
    video(root / "train" / "tall.mp4", 17, 64, 32)
    video(root / "train" / "slow.mp4", 5, fps=1)
    video(root / "train" / "short.mp4", 2)
    video(root / "val" / "held out.mp4", 16, fps=24)
    for name in ("good 1", "good 2"):
        (root / "train" / f"{name}.txt").write_text("the same")
    (root / "val" / "held out.txt").unlink()
    (root / "train" / "good 0.json").write_text('{"label": 3}')
    for name in ("cut", "damaged"):
        video(root / "train" / f"{name}.mp4", 40)
    cut, damaged = root / "train" / "cut.mp4", root / "train" / "damaged.mp4"
    cut.write_bytes(cut.read_bytes()[:-500])
    data = bytearray(damaged.read_bytes())  # Its index is whole: only who decodes it sees what is wrong.
    place = data.index(b"mdat") + len(data) // 2
    data[place : place + 400] = os.urandom(400)
    damaged.write_bytes(data)
    (root / "train" / "empty.mp4").touch()
    return root


@pytest.fixture(scope="module")
def found(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[Checked]]:
    data = Data(root=str(root), frames=16, height=32, width=64, buckets=BUCKETS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return check(ClipSet(root=str(root)), data, workers=2, progress=False)


def test_report_golden(root: Path, found: tuple[dict[str, Any], list[Checked]]) -> None:
    report, checked = found
    broken = report.pop("broken")
    assert [b["id"] for b in broken] == ["train/cut", "train/damaged", "train/empty"]
    assert all(b["path"] == f"{root / b['id']}.mp4" and b["reason"].startswith(b["path"] + ": ") for b in broken)
    assert broken[2]["reason"].endswith("the file is empty")
    report["broken"] = broken
    words = {"min": 2, "median": 7, "max": 8}
    short = str(root / "train" / "short.mp4")
    assert {k: v for k, v in report.items() if k != "broken"} == {
        "root": str(root),
        "layout": "split_folders",
        "clips": 11,
        "splits": {"train": 10, "val": 1},
        "unplaced": [
            {"id": "train/short", "path": short, "reason": f"{short}: too short: 2 frames, 4 are needed"},
        ],
        "frames": 16 + 17 + 18 + 19 + 17 + 5 + 2 + 16,
        "duration": {
            "total": pytest.approx((16 + 17 + 18 + 19 + 17 + 2) / 8 + 5 + 16 / 24),
            "min": 0.25, "median": pytest.approx(17 / 8), "max": 5.0,
            "ranges": [
                {"from": 0, "to": 0.5, "clips": 1}, {"from": 0.5, "to": 1, "clips": 1},
                {"from": 2, "to": 3, "clips": 5}, {"from": 5, "to": 10, "clips": 1},
            ],
        },
        "fps": [{"fps": 8.0, "clips": 6}, {"fps": 1.0, "clips": 1}, {"fps": 24.0, "clips": 1}],
        "sizes": [{"width": 64, "height": 32, "clips": 7}, {"width": 32, "height": 64, "clips": 1}],
        "images": 0,
        "buckets": [
            {"frames": 4, "height": 32, "width": 64, "clips": 1},
            {"frames": 16, "height": 32, "width": 64, "clips": 5},
            {"frames": 16, "height": 64, "width": 32, "clips": 1},
        ],
        "captions": {
            "clips": 9, "missing": 2, "shared": 2,
            "kinds": [{"kind": "caption", "clips": 9, "captions": 9, "words": words}],
        },
        "labels": {"missing": 10, "classes": {"3": 1}},
        "faulty": True,
    }  # fmt: skip
    assert json.loads(json.dumps(report)) == report
    assert [c.clip.id for c in checked] == sorted(c.clip.id for c in checked)


def test_thumbnails_show_the_middle(found: tuple[dict[str, Any], list[Checked]]) -> None:
    _, checked = found
    for c in checked:
        assert (c.thumbnail is None) == (c.broken is not None)
        if c.thumbnail is not None:
            image = Image.open(io.BytesIO(c.thumbnail))
            assert image.format == "JPEG" and max(image.size) <= check_module.THUMBNAIL_SIDE
            assert (image.width > image.height) == (c.info.width > c.info.height)
            middle = (c.info.frames // 2) / (c.info.frames - 1)
            assert abs(np.asarray(image).mean() - min(255, 255 * middle + 20)) < 8


class Page(HTMLParser):
    """The text of a page, its pictures and its elements."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.pictures, self.tags = "", [], []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.pictures.append(dict(attrs))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page(found: tuple[dict[str, Any], list[Checked]], tmp_path: Path) -> None:
    report, checked = found
    write_page(tmp_path / "check.html", report, checked, BUCKETS)
    source = (tmp_path / "check.html").read_text(encoding="utf-8")
    page = Page(source)
    assert [base64.b64decode(p["src"].partition(",")[2]) for p in page.pictures] == [
        c.thumbnail for c in checked if c.thumbnail is not None
    ]
    assert all(p["loading"] == "lazy" for p in page.pictures)
    assert not re.search(r"(src|href)='(?!data:)|https?:", source)  # All of it is in the file.
    places = [page.text.index(b["reason"]) for b in report["broken"]]
    assert max(places) < page.text.index("Clips: 8") < page.text.index("train/good 0")
    assert page.text.count("good 3 & <b>so on</b>") == 1 and page.tags.count("b") == 4 + 8  # Escaped: no b of theirs.
    assert "bucket:\N{NO-BREAK SPACE}16\N{NO-BREAK SPACE}frames\N{NO-BREAK SPACE}of\N{NO-BREAK SPACE}32×64" in page.text
    with pytest.raises(FileNotFoundError):
        write_page(tmp_path / "no" / "check.html", report, checked)


def test_terminal(found: tuple[dict[str, Any], list[Checked]]) -> None:
    report, _ = found
    file = io.StringIO()
    print_report(report, Console(file=file, width=60))
    lines = [" ".join(line.split()) for line in file.getvalue().splitlines()]
    for line in ("clips all 11", "train 10", "broken 3", "shortest 0.25 s", "longest 5 s", "2 to 3 s 5", "fps 8 6",
                 "size 64×32 7", "bucket 4 frames of 64×32 1", "none 1", "captions caption: 2 to 8 words, median 7 9",
                 "clips that share theirs 2", "clips that can't be read: 3",
                 "clips that fall in no bucket: 1"):  # fmt: skip
        assert line in lines
    for fault in report["broken"] + report["unplaced"]:  # Whole, however long.
        assert " ".join(fault["reason"].split()) in lines
    assert "\x1b" not in file.getvalue()


def test_what_is_faulty_hangs_on_the_recipe(found: tuple[dict[str, Any], list[Checked]], root: Path) -> None:
    _, checked = found
    sound = [c for c in checked if c.broken is None]
    data = Data(root=str(root), frames=16, height=32, width=64, buckets=BUCKETS)
    drop = Data(root=str(root), frames=16, height=32, width=64, buckets=BUCKETS, short="drop")
    faulty = lambda data, checked: check_module.summarise(ClipSet(root=str(root)), data, checked)["faulty"]
    assert faulty(data, sound) and not faulty(drop, sound) and faulty(drop, checked)


def dying(job: check_module.Job, alive: Alive) -> Checked:
    if job.clip.id.endswith("good 2"):
        os.abort()
    return check_module.decode(job, alive)


def test_a_crash_is_a_broken_clip(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "decode", dying)
    report, _ = check(ClipSet(root=str(root)), workers=1, progress=False)
    path = root / "train" / "good 2.mp4"
    assert {b["id"]: b["reason"] for b in report["broken"]} == {
        "train/cut": report["broken"][0]["reason"],
        "train/damaged": report["broken"][1]["reason"],
        "train/empty": f"{root / 'train' / 'empty.mp4'}: can't be read as a video: the file is empty",
        "train/good 2": f"{path}: the process that worked on it died: Aborted (signal 6)",
    }
    assert report["buckets"] is None and report["unplaced"] == []


def test_drawn_clips_are_checked_and_few_are_shown(tmp_path: Path) -> None:
    report, checked = check(ClipSet(root="flying-mnist://tiny"), workers=1, thumbnails=10, progress=False)
    assert not report["faulty"] and report["layout"] == "flying_mnist"
    assert report["clips"] == 64 and report["frames"] == 64 * 4 and report["splits"] == {"train": 48, "val": 16}
    assert report["labels"]["missing"] == 0 and sum(report["labels"]["classes"].values()) == 64
    shown = [n for n, c in enumerate(checked) if c.thumbnail is not None]
    assert shown == list(range(0, 64, 7))
    write_page(tmp_path / "check.html", report, checked)
    assert "Clips: 10 of 64, evenly spread" in Page((tmp_path / "check.html").read_text(encoding="utf-8")).text


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        check(ClipSet(root=str(tmp_path)), progress=False)
    with pytest.raises(ValueError, match="timeout=0 must be above 0"):
        check(ClipSet(root="flying-mnist://tiny"), timeout=0, progress=False)


def test_clock() -> None:
    told = ["0.04 s", "12.3 s", "1:01 min", "1:02:03 h", "100:00:00 h"]
    assert [clock(s) for s in (0.04, 12.345, 61, 3723.4, 360000)] == told
