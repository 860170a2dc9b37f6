"""Histograms of what lies in a folder, and how much moves in it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mutoscope.data.index import ClipInfo
from mutoscope.data.media import Media
from mutoscope.data.prepare.shapes import Suggestion
from mutoscope.data.prepare.stats import Histogram, Stats, binned, collect, histograms, measure_motion
from mutoscope.data.prepare.stats_page import print_histograms, print_suggestions, write_page
from mutoscope.data.sources.layouts import Clip
from mutoscope.data.video import write_video
from mutoscope.recipe import Bucket, ClipSet


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def motion_of(path: Path, start: float = 0.0, end: float | None = None) -> float | str | None:
    return measure_motion(Clip(id="c", media=Media(str(path)), split="train", start=start, end=end), lambda: None)


def test_motion_golden(tmp_path: Path) -> None:
    def motion(greys: list[float], fps: float, start: float = 0.0) -> float | str | None:
        frames = np.array(greys, np.uint8)[:, None, None, None] + np.zeros((1, 96, 64, 3), np.uint8)
        write_video(tmp_path / "v.mp4", frames, fps, lossless=True)
        return motion_of(tmp_path / "v.mp4", start)

    assert motion([80] * 16, 8) == 0
    assert motion([100, 110] * 8, 8) == 10
    assert motion(list(range(0, 200, 4)), 8) == 4
    assert motion(list(range(0, 200, 4)), 24) == pytest.approx(12, abs=0.01)  # Time counts, frames do not.
    assert motion([0] * 40 + [0, 40] * 8 + [0] * 41, 8) == 40  # The middle.
    assert motion([7], 8) is None and motion([7, 9], 24) is None
    assert motion([7, 9, 11], 8, start=0.25) is None


def test_motion_of_what_is_broken(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(b"no video")
    assert str(motion_of(tmp_path / "v.mp4")).startswith(str(tmp_path / "v.mp4"))


def test_collect(tmp_path: Path) -> None:
    for n in range(6):
        frames = np.random.default_rng(n).integers(0, 255, (8 + n, 32, 64, 3), np.uint8)
        write_video(tmp_path / f"{n}.mp4", frames if n else frames[:1].repeat(8, 0), 8, lossless=True)
        (tmp_path / f"{n}.txt").write_text("a word " * (n + 1))
    (tmp_path / "6.mp4").write_bytes(b"")
    (tmp_path / "6.txt").write_text("none")
    stats = collect(ClipSet(root=str(tmp_path)), motion_clips=4, workers=1, progress=False)
    assert [c.id for c in stats.clips] == list("012345") and [i.frames for i in stats.infos] == [8, 9, 10, 11, 12, 13]
    assert len(stats.broken) == 1 and "6.mp4" in stats.broken[0]
    assert len(stats.motion) == 4 and all((m == 0) == (i == "0") for i, m in stats.motion.items())
    found = {h.name: h.bars for h in histograms(stats)}
    assert found["duration in seconds"][0] == ("1", 1) and found["frames per second"] == (("8", 6),)
    assert found["size in pixels"] == (("64×32", 6),) and found["width / height"] == (("2", 6),)
    assert found["words of a caption"] == tuple((str(2 * n), 1) for n in range(1, 7))
    assert any(name.startswith("motion of 4 clips") for name in found)
    with pytest.raises(ValueError, match="none of 1 clips can be read, such as"):
        for n in range(6):
            (tmp_path / f"{n}.mp4").unlink()
            (tmp_path / f"{n}.txt").unlink()
        collect(ClipSet(root=str(tmp_path)), progress=False)


def test_bins_golden() -> None:
    assert binned([]) == ()
    assert binned([3, 1, 3, 2.5]) == (("1", 1), ("2.5", 1), ("3", 2))
    assert binned(list(range(100))) == tuple((f"{n} to {n + 10}", 10) for n in range(0, 100, 10))
    far = binned([*np.linspace(0, 9.9, 1000).tolist(), 5000.0])
    assert far[-1] == ("10 and more", 1) and sum(n for _, n in far) == 1001 and len(far) == 11
    assert [label for label, _ in binned([k / 1000 for k in range(13)])][:2] == ["0 to 0.002", "0.002 to 0.004"]


@given(st.lists(st.one_of(st.integers(-(10**6), 10**6), st.floats(-1e9, 1e9)), max_size=300))
def test_bins_count_everything_once(values: list[float]) -> None:
    bars = binned(values)
    assert sum(n for _, n in bars) == len(values)
    assert len(bars) <= 16 and len({label for label, _ in bars}) == len(bars)


SHOWN = (
    "clips: 1,203",
    [Histogram(name="duration <s>", bars=(("0 to 1", 800), ("1 to 2", 100), ("2 to 3", 1), ("3 to 4", 0)))],
    [Suggestion(bucket=Bucket(frames=49, height=480, width=720, batch_size=3), clips=1200, cropped=0.125, used=0.9,
                enlarged=7)],
    3,
)  # fmt: skip
TOML = "[data]\nbuckets = [\n  { frames = 49, height = 480, width = 720, batch_size = 3 },\n]\n"


def test_terminal() -> None:
    file = io.StringIO()
    console = Console(file=file, width=100)
    print_histograms(console, *SHOWN[:2])
    print_suggestions(console, *SHOWN[2:])
    text = file.getvalue()
    assert text.startswith("clips: 1,203\n\nduration <s>\n") and text.endswith("\n" + TOML) and "\x1b" not in text
    lines = text.splitlines()
    assert [line.count("█") for line in lines[3:7]] == [40, 5, 0, 0]
    assert lines[3].endswith(" 800") and "▏ 1" in lines[5] and "▏" not in lines[6]
    words = [line.split() for line in lines]
    assert ["49", "frames", "of", "720×480", "3", "1,200", "7", "12%", "90%"] in words
    assert ["none:", "too", "short", "3"] in words


def test_page(tmp_path: Path) -> None:
    write_page(tmp_path / "stats.html", *SHOWN)
    page = (tmp_path / "stats.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 1 and "duration &lt;s&gt;" not in page.partition("</svg>")[2]
    assert TOML.strip() in page and "<td>1,200</td>" in page and "<td>none: too short</td>" in page
    with pytest.raises(FileNotFoundError):
        write_page(tmp_path / "no" / "stats.html", *SHOWN)


def test_images_have_no_duration() -> None:
    info = ClipInfo(frames=1, fps=0.0, height=8, width=8, duration=0.0, rotation=0, image=True)
    clips = [Clip(id="a", media=Media("a.png"), split="train")]
    names = [h.name for h in histograms(Stats(root="r", clips=clips, infos=[info], broken=[], motion={}))]
    assert names == ["size in pixels", "width / height"]
