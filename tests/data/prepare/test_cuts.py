"""Films with cuts at known frames: the cuts that are found are those, to the frame, at any frame rate."""

from __future__ import annotations

import csv
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bar_codes import numbers_of, painted
from hypothesis import given
from hypothesis import strategies as st

from mutoscope.data.media import Media
from mutoscope.data.prepare import cuts
from mutoscope.data.prepare.clipping import clip
from mutoscope.data.prepare.cuts import Found, find_clips, find_cuts, find_videos, split_scenes
from mutoscope.data.video import Clock, probe, read_frames, write_video

CUTS = [40, 41, 90, 130]
"""First frames of new scenes; the second scene is a single frame, as of a flash."""
FRAMES = 200
PTS = np.random.default_rng(0).integers(10, 120, FRAMES + 1).cumsum()
TIMES = (PTS - PTS[0]) / 1000
"""When the frames are shown, and when the last one ends: 13 s in all."""


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a/cfr.mp4: 25 frames per second; vfr.mp4: at `TIMES`. Each scene has a colour of its own, which drifts, around
    the bar code with the number of the frame."""
    folder = tmp_path_factory.mktemp("films")
    (folder / "a").mkdir()
    frames = painted(FRAMES, 96, 320)
    colours = [(200, 40, 40), (255, 255, 255), (40, 200, 40), (30, 30, 160), (220, 220, 60)]
    for colour, start, end in zip(colours, [0, *CUTS], [*CUTS, FRAMES], strict=True):
        drift = np.linspace(0, 30, end - start, dtype=int)[:, None, None, None]
        picture = np.clip(np.array(colour) + drift, 0, 255)
        frames[start:end, :20] = frames[start:end, 28:68] = frames[start:end, 76:] = picture
    write_video(folder / "a" / "cfr.mp4", frames, 25)
    write_video(folder / "vfr.mp4", frames, Clock(pts=PTS - PTS[0], unit=Fraction(1, 1000)))
    return folder


def look(places: list[str], out: Path, **options: Any) -> Found:
    return find_clips(places, out, workers=0, progress=False, **options)


def rows_of(path: Path) -> list[list[str]]:
    with open(path, newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("name", ["a/cfr.mp4", "vfr.mp4"])
def test_cuts_are_exact_to_the_frame(name: str, films: Path) -> None:
    pytest.importorskip("scenedetect")
    assert find_cuts(Media(str(films / name))).tolist() == CUTS
    assert find_cuts(Media(str(films / name)), threshold=200).tolist() == []


def test_a_list_of_scenes_makes_clips_without_cuts(films: Path, tmp_path: Path) -> None:
    pytest.importorskip("scenedetect")
    (tmp_path / "broken.mp4").write_text("no video")
    out = tmp_path / "list.csv"
    found = look([str(films), str(tmp_path / "broken.mp4")], out, min_seconds=1, max_seconds=2)
    assert found.videos == 2 and len(found.failures) == 1 and "broken.mp4: can't be read" in found.failures[0]
    header, *rows = rows_of(out)
    assert header == ["file", "start", "end"] and len(rows) == found.clips
    done = clip(out, tmp_path / "clips", workers=0, progress=False)
    assert done.made == found.clips and not done.failures
    for film, times in (("cfr", np.arange(FRAMES + 1) / 25), ("vfr", TIMES)):
        shown = [
            numbers_of(read_frames(p, range(probe(p).frames))) for p in sorted((tmp_path / "clips").glob(f"{film}*"))
        ]
        scenes = zip([0, *CUTS], [*CUTS, FRAMES], strict=True)
        long = [n for a, b in scenes if times[b] - times[a] >= 1 for n in range(a, b)]
        assert [n for clip_shown in shown for n in clip_shown] == long  # Each frame once, and none of the flash.
        for clip_shown in shown:
            assert 1 <= times[clip_shown[-1] + 1] - times[clip_shown[0]] <= 2.2
            assert not {*clip_shown[1:]} & {*CUTS}
    assert found.short == 2 and found.short_seconds == pytest.approx(1 / 25 + TIMES[41] - TIMES[40], abs=1e-5)


def test_what_was_found_is_kept(films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scenedetect")
    out, memory = tmp_path / "list.csv", tmp_path / ".list.csv.scenes.jsonl"
    look([str(films)], out)
    first = rows_of(out)
    lines = memory.read_text().splitlines()
    memory.write_text(lines[0] + "\n" + lines[1][:20])  # As a kill leaves it.
    seen = []

    def find(media: Media, *rest: Any) -> Any:
        seen.append(media.path)
        return find_cuts(media, *rest)

    monkeypatch.setattr(cuts, "find_cuts", find)
    look([str(films)], out)
    assert len(seen) == 1 and rows_of(out) == first
    look([str(films)], out, min_seconds=0.5, max_seconds=1)  # Another choice of lengths decodes nothing.
    assert len(seen) == 1 and len(rows_of(out)) > len(first)
    look([str(films)], out, threshold=200)
    assert len(seen) == 3


lengths = st.floats(0.02, 30)


@given(st.lists(lengths, min_size=1, max_size=8), st.floats(0.1, 5), st.floats(1, 4))
def test_splitting_keeps_every_second(scenes: list[float], shortest: float, ratio: float) -> None:
    bounds, longest = (0.0, *np.cumsum(scenes).tolist()), shortest * ratio
    clips, short = split_scenes(bounds, shortest, longest)
    assert all(shortest - 1e-5 <= b - a <= longest + 1e-5 for a, b in clips)
    assert all(b - a <= shortest for a, b in short)
    pieces = sorted(clips + short)
    assert [a for a, _ in pieces] == [0.0, *(b for _, b in pieces[:-1])] and pieces[-1][1] == bounds[-1]
    assert {*bounds} <= {0.0, *(b for _, b in pieces)}  # No clip goes over a cut.
    if ratio >= 2:  # Only whole scenes are too short.
        assert len(short) == sum(n < shortest - 1e-6 for n in np.diff(bounds))


def test_splitting_golden() -> None:
    split = lambda bounds: split_scenes(bounds, 2, 10)
    assert split((0.0, 1.0, 9.0)) == ([(1.0, 9.0)], [(0.0, 1.0)])
    assert split((0.0, 12.0)) == ([(0.0, 6.0), (6.0, 12.0)], [])
    assert split_scenes((0.0, 11.0), 6, 10) == ([(0.0, 10.0)], [(10.0, 11.0)])
    assert split_scenes((0.0, 20.0), 10, 10) == ([(0.0, 10.0), (10.0, 20.0)], [])


@pytest.mark.parametrize(("options", "reason"), [
    ({"min_seconds": 0}, "min_seconds=0 must be above 0"),
    ({"min_seconds": 3, "max_seconds": 2}, "no more than max_seconds=2"),
    ({"threshold": 300}, "threshold=300 must lie between"),
    ({"out": "list.txt"}, r"list\.txt: the list must be a \.csv file"),
    ({"places": ["nowhere"]}, "nowhere: no such file or folder"),
])  # fmt: skip
def test_options_that_are_none(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    out = tmp_path / options.pop("out", "list.csv")
    with pytest.raises(ValueError, match=reason):
        look(options.pop("places", [str(tmp_path)]), out, **options)
    with pytest.raises(ValueError, match="no videos in it"):
        look([str(tmp_path)], tmp_path / "list.csv")


def test_without_pyscenedetect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "film.mp4").touch()
    monkeypatch.setitem(sys.modules, "scenedetect.detectors", None)
    with pytest.raises(ValueError, match=r'pip install "mutoscope\[cuts\]"'):
        look([str(tmp_path)], tmp_path / "list.csv")


def test_videos_are_found_once(tmp_path: Path) -> None:
    for name in ("b.mp4", "a/c.MKV", "a/notes.txt", "._b.mp4", "odd.vid"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    folder, odd = str(tmp_path), str(tmp_path / "odd.vid")
    assert find_videos([folder, odd, f"{folder}/b.mp4"]) == [f"{folder}/a/c.MKV", f"{folder}/b.mp4", odd]
