"""Clips of videos whose frames carry their numbers, so that it can be read off a clip which frames are in it."""

from __future__ import annotations

import csv
import json
import os
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from bar_codes import numbers_of, painted
from media_cases import B_FRAMES, CASES, IRREGULAR, VIDEOS, encode
from media_cases import make as make_case

from mutoscope.data.prepare import clipping
from mutoscope.data.prepare.clip_list import read_list
from mutoscope.data.prepare.clipping import ClipFormat, Clipped, clip
from mutoscope.data.sources.layouts import list_clips
from mutoscope.data.video import frame_index, probe, read_frames, write_video
from mutoscope.recipe import ClipSet
from mutoscope.supervise import Lost

TIMES = (np.array(IRREGULAR) - IRREGULAR[0]) / 1000
"""Seconds from the first frame."""
AS_IT_IS = ClipFormat()


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cfr.mp4: 60 frames, 30 per second; vfr.mp4 and vfr.mkv: 100 frames at `TIMES`, with B-frames, not from 0 on."""
    folder = tmp_path_factory.mktemp("films")
    encode(folder / "cfr.mp4", painted(60), options={"x264-params": B_FRAMES})
    for name in ("vfr.mp4", "vfr.mkv"):
        encode(folder / name, painted(100), pts=IRREGULAR, options={"x264-params": B_FRAMES})
    return folder


def write_list(path: Path, *rows: tuple[object, ...], header: str = "file,start,end,caption") -> Path:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    return path


def make(rows: Path, out: Path, form: ClipFormat = AS_IT_IS, **options: Any) -> Clipped:
    return clip(rows, out, form, workers=0, progress=False, **options)


def shown(path: Path) -> list[int]:
    return numbers_of(read_frames(path, range(probe(path).frames)))


def exact_times(path: Path) -> list[Fraction]:
    """When its frames are shown, and when the last one ends, without rounding."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        packets = sorted((p.pts, p.duration) for p in container.demux(stream) if p.pts is not None)
        return [stream.time_base * pts for pts in (*(p[0] for p in packets), sum(packets[-1]))]


def contents(out: Path) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*.*") if not p.name.startswith(".")}


def test_a_clip_has_the_frames_whose_times_lie_in_it(films: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    spans = np.sort(rng.uniform(0, TIMES[-1], (10, 2)), axis=1)
    spans[0], spans[1] = TIMES[[10, 20]], TIMES[[40, 41]]  # At frames: the first is in, the last is not.
    for name in ("vfr.mp4", "vfr.mkv"):
        out = tmp_path / name
        rows = [(films / name, repr(a), repr(b)) for a, b in spans.tolist()]
        done = make(write_list(tmp_path / "list.csv", *rows, header="file,start,end"), out)
        assert done == Clipped(made=10, kept=0, others=0, failures=())
        for k, (start, end) in enumerate(spans):
            path = out / f"vfr_{k + 1:04d}.mp4"
            inside = np.flatnonzero((start - 1e-9 <= TIMES) & (end - 1e-9 > TIMES)).tolist()
            assert shown(path) == inside
            ms = [IRREGULAR[n] - IRREGULAR[inside[0]] for n in inside]
            assert exact_times(path)[:-1] == [Fraction(m, 1000) for m in ms]
            if inside[-1] < 99:  # It stays until the next one would come or the clip is over, but as long as is usual.
                last = min(TIMES[inside[-1] + 1], max(end, TIMES[inside[-1]] + np.median(np.diff(TIMES))))
                assert float(exact_times(path)[-1]) == pytest.approx(last - TIMES[inside[0]], abs=1e-3)


@pytest.mark.parametrize("name", VIDEOS)
def test_clips_of_every_kind_of_source(name: str, tmp_path: Path) -> None:
    case, source = CASES[name], make_case(name, tmp_path)
    index, count = frame_index(source), len(case.numbers)
    bounds = np.append(index.times, index.duration)
    a, b = count // 3, count - count // 4
    rows = write_list(tmp_path / "list.csv", (source, *bounds[[a, b]].tolist()), header="file,start,end")
    done = make(rows, tmp_path / "out")
    assert done.made == 1, done.failures
    path = next((tmp_path / "out").glob("*.mp4"))
    assert shown(path) == case.numbers[a:b]
    times = frame_index(path).times
    np.testing.assert_allclose(times, index.times[a:b] - index.times[a], atol=1e-6)


def test_sources_that_start_late_and_ends_that_are_rounded(tmp_path: Path) -> None:
    """Times count from the first frame on; an end may lie a frame behind the file's, and no further."""
    encode(tmp_path / "late.mp4", painted(40), pts=[1500 + 40 * k for k in range(40)])
    rows = [("late.mp4", "0", "0.4"), ("late.mp4", "00:00:01.200", "00:01.630"), ("late.mp4", "1.2", "1.7")]
    done = make(write_list(tmp_path / "list.csv", *rows, header="video,start,end"), tmp_path / "out")
    assert shown(tmp_path / "out" / "late_0001.mp4") == list(range(10))
    assert shown(tmp_path / "out" / "late_0002.mp4") == list(range(30, 40))
    assert [f.reason for f in done.failures] == [f"{tmp_path}/late.mp4: ends at 1.593 s, the clip would at 1.7 s"]
    assert not (tmp_path / "out" / "late_0003.mp4").exists()


def test_resampled_and_resized(films: Path, tmp_path: Path) -> None:
    rows = write_list(tmp_path / "list.csv", (films / "vfr.mp4", 0.5, 2.5), header="file,start,end")
    make(rows, tmp_path / "out", ClipFormat(fps=25, height=40, width=60, resize="squash", gop=10))
    path = tmp_path / "out" / "vfr_0001.mp4"
    on_screen = [int(np.searchsorted(TIMES, 0.5 + k / 25 + 1e-6)) - 1 for k in range(50)]
    assert shown(path) == on_screen
    info = probe(path)
    assert (info.height, info.width, info.fps, info.duration) == (40, 60, 25, 2)
    with av.open(str(path)) as container:
        keys = [k for k, p in enumerate(p for p in container.demux(video=0) if p.size) if p.is_keyframe]
    assert keys[0] == 0 and max(np.diff([*keys, 50])) == 10  # And where the picture changes.


def test_the_shape_of_pixels_is_kept(films: Path, tmp_path: Path) -> None:
    write_video(tmp_path / "dvd.mp4", painted(6, 48, 80), 10, pixel_aspect=16 / 15)
    rows = write_list(tmp_path / "list.csv", ("dvd.mp4", 0, 0.5), header="file,start,end")
    make(rows, tmp_path / "kept")
    make(rows, tmp_path / "squashed", ClipFormat(height=32, width=64, resize="squash"))
    assert probe(tmp_path / "kept" / "dvd_0001.mp4").pixel_aspect == pytest.approx(16 / 15)
    assert probe(tmp_path / "squashed" / "dvd_0001.mp4").pixel_aspect == 1


def test_the_folder_can_be_trained_on_at_once(films: Path, tmp_path: Path) -> None:
    """Captions with commas, quotes, line ends and other scripts; ids with folders; other files beside the clips."""
    captions = ['a "red", round ball', "ein Käse", "二\n行"]
    rows = [(films / "cfr.mp4", k, k + 0.5, text, f"part {k}/clip.{k}.mp4") for k, text in enumerate(captions)]
    rows[2] = (films / "cfr.mp4", 9, 10, captions[2], "gone")
    path = write_list(tmp_path / "list.csv", *rows, header="path,start,end,text,id")
    done = make(path, tmp_path / "out")
    assert done.made == 2 and (tmp_path / "out" / "failures.csv").exists()
    clips = list_clips(ClipSet(root=str(tmp_path / "out")))
    assert [(c.id, c.captions["caption"]) for c in clips] == [
        ("part 0/clip.0", (captions[0],)), ("part 1/clip.1", (captions[1],))
    ]  # fmt: skip


def test_tables_of_other_kinds(films: Path, tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    spans, film = [(0.25, 0.5), (1.0, 1.25)], str(films / "cfr.mp4")
    tsv, jsonl, parquet = (tmp_path / f"list.{end}" for end in ("tsv", "jsonl", "parquet"))
    tsv.write_text("File\tStart\tEnd\n" + "".join(f"{film}\t00:00:0{a:.3f}\t{b}\n" for a, b in spans))
    jsonl.write_text("".join(json.dumps({"video": film, "start": a, "end": b, "fps": 30}) + "\n" for a, b in spans))
    starts, ends = zip(*spans, strict=True)
    pq.write_table(pa.table({"file_name": [film] * 2, "start": starts, "end": ends}), parquet)
    for path in (tsv, jsonl, parquet):
        rows, failures = read_list(str(path))
        assert [(r.id, r.file, r.start, r.end, r.caption) for r in rows] == [
            (f"cfr_{k:04d}", film, a, b, None) for k, (a, b) in enumerate(spans, 1)
        ]
        assert not failures


FAULTS = [
    (("nowhere.mp4", 0, 1, "x", "a"), "no such file"),
    (("cfr.mp4", 1, 1, "x", "b"), "the start must lie before the end"),
    (("cfr.mp4", "", 1, "x", "c"), "the start must lie before the end"),
    (("cfr.mp4", 0, "soon", "x", "d"), "'soon'"),
    (("cfr.mp4", -1, 1, "x", "e"), "'-1'"),
    (("cfr.mp4", 0, 1, "  ", "f"), "the caption is empty"),
    (("", 0, 1, "x", "g"), "no file named"),
    (("cfr.mp4", 0, 1, "x", ""), "the id '' can't be"),
    (("cfr.mp4", 0, 1, "x", "../h"), "the id '../h' can't be"),
    (("cfr.mp4", 0, 1, "x", "/etc/i"), "the id '/etc/i' can't be"),
    (("cfr.mp4", 0, 1, "x", "j//k"), "can't be"),
    (("cfr.mp4", 0, 1, "x", ".l"), "can't be"),
    (("cfr.mp4", 0, 1, "x", "m" * 241), "can't be"),
    (("cfr.mp4", 0, 1, "x", "twice"), "2 rows have the id twice"),
    (("cfr.mp4", 0, 1, "x", "twice.mp4"), "2 rows have the id twice"),
]


def test_faults_of_the_list_are_told_before_anything_is_made(films: Path, tmp_path: Path) -> None:
    rows = [*(row for row, _ in FAULTS), ("cfr.mp4", 0, 0.5, "x", "good"), ("cfr.mp4", 0, 1)]
    path, out = write_list(tmp_path / "list.csv", *rows, header="file,start,end,caption,id"), tmp_path / "out"
    with pytest.raises(ValueError, match=r"list.csv: 16 of 17 rows have faults") as caught:
        make(path, out, root=str(films))
    assert "list.csv, line 18: 3 cells where the header has 5" in str(caught.value)
    assert "line 2: no such file" in str(caught.value) and "... and 6 more" in str(caught.value)
    assert not list(out.glob("*.mp4"))
    done = make(path, out, root=str(films), keep_going=True)
    assert done.made == 1 and shown(out / "good.mp4") == list(range(15))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["list.csv", "out"]
    with open(out / "failures.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert [f["row"] for f in found] == ["", *(f"line {k}" for k in range(2, 17))]
    for (_, reason), failure in zip(FAULTS, found[1:], strict=True):
        assert reason in failure["reason"]


@pytest.mark.parametrize(("text", "reason"), [
    ("start,file\n1,x\n", "no column end; a list of clips has the columns file, .* this one has start, file"),
    ("file,start,end\nx,1\n", r"no rows in it\n  .*line 2: 2 cells where the header has 3"),
    ("start,end\n1,2\n", "no column file"),
    ("", "no rows in it"),
])  # fmt: skip
def test_lists_that_are_none(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(ValueError, match=reason):
        make(tmp_path / "list.csv", tmp_path / "out")
    with pytest.raises(ValueError, match="no such file"):
        make(tmp_path / "other.csv", tmp_path / "out")


@pytest.mark.parametrize(("form", "reason"), [
    (ClipFormat(fps=0), "fps=0 must be between"),
    (ClipFormat(height=64), "given together"),
    (ClipFormat(height=64, width=63), "width=63 must be even"),
    (ClipFormat(gop=0), "gop=0 must be"),
])  # fmt: skip
def test_formats_that_are_none(form: ClipFormat, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        make(tmp_path / "list.csv", tmp_path / "out", form)


def test_of_a_broken_source_the_whole_clips_are_made(tmp_path: Path) -> None:
    """Cut short, and scratched in the middle: a clip has all its frames, or there is none."""
    encode(
        tmp_path / "whole.mp4", painted(120), options={"x264-params": "keyint=30:min-keyint=30:bframes=3:scenecut=0"}
    )
    from_the_front = tmp_path / "fast.mp4"  # The header before the frames, else nothing of it can be read.
    with (
        av.open(str(tmp_path / "whole.mp4")) as source,
        av.open(str(from_the_front), "w", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    data = from_the_front.read_bytes()
    mdat = data.index(b"mdat")
    at = mdat + (len(data) - mdat) * 6 // 10
    (tmp_path / "cut.mp4").write_bytes(data[:at])
    (tmp_path / "scratched.mp4").write_bytes(data[:at] + b"\xff" * 60 + data[at + 60 :])
    for name in ("cut", "scratched"):
        rows = [(f"{name}.mp4", f"{k / 30:.6f}", f"{(k + 10) / 30:.6f}", str(k)) for k in range(0, 120, 10)]
        out = tmp_path / name
        done = make(write_list(tmp_path / "list.csv", *rows, header="file,start,end,id"), out)
        failed = {int(f.id) for f in done.failures}
        made = {int(p.stem) for p in out.glob("*.mp4")}
        assert made | failed == set(range(0, 120, 10)) and not made & failed
        assert {0, 10, 20, 30, 40} <= made and (name == "scratched" or {80, 90, 100, 110} <= failed) and failed
        for k in made:
            frames = shown(out / f"{k}.mp4")
            assert frames == list(range(k, k + 10))
        assert all("cut short" in f.reason if name == "cut" else "scratched.mp4" in f.reason for f in done.failures)


def test_images_and_text_fail_as_sources(tmp_path: Path) -> None:
    (tmp_path / "notes.mp4").write_text("no video")
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "still.png")
    rows = write_list(tmp_path / "l.csv", ("notes.mp4", 0, 1), ("still.png", 0, 1), header="file,start,end")
    reasons = [f.reason for f in make(rows, tmp_path / "out").failures]
    assert "not a video" in reasons[0] and "an image, not a video" in reasons[1]


def test_a_stopped_command_goes_on_and_changed_rows_are_made_anew(films: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "film.mp4", tmp_path / "out"
    source.write_bytes((films / "cfr.mp4").read_bytes())
    rows = [["film.mp4", k / 2, k / 2 + 0.5, f"part {k}", f"c{k}"] for k in range(4)]

    def again(*rows: list[Any], form: ClipFormat = AS_IT_IS) -> set[str]:
        """What is made anew."""
        before = {p.name: p.stat().st_mtime_ns for p in out.glob("c*")} if out.exists() else {}
        path = write_list(tmp_path / "list.csv", *map(tuple, rows), header="file,start,end,caption,id")
        done = make(path, out, form)
        changed = {p.name for p in out.glob("c*") if before.get(p.name) != p.stat().st_mtime_ns}
        assert not done.failures and done.made + done.kept == len(rows)
        assert done.made == len([name for name in changed if name.endswith(".mp4")])
        return changed

    both = lambda *names: {f"{name}.{end}" for name in names for end in ("mp4", "txt")}
    assert again(*rows) == both("c0", "c1", "c2", "c3")
    assert again(*rows) == set()
    rows[1][2] = 0.9
    assert again(*rows) == both("c1") and shown(out / "c1.mp4") == list(range(15, 27))
    rows[2][3] = "another caption"
    assert again(*rows) == {"c2.txt"} and (out / "c2.txt").read_text() == "another caption\n"
    (out / "c3.mp4").write_bytes((out / "c3.mp4").read_bytes()[:-1])
    (out / "c0.txt").unlink()
    assert again(*rows) == both("c3") | {"c0.txt"} and len(shown(out / "c3.mp4")) == 15
    with open(out / ".clips.jsonl", "a") as ledger:
        ledger.write('{"id": "c0", "fi')  # As a kill leaves it.
    assert again(*rows) == set()
    os.utime(source, ns=(1, 1))
    assert again(*rows) == both("c0", "c1", "c2", "c3")
    assert again(*rows, form=ClipFormat(gop=5)) == both("c0", "c1", "c2", "c3")
    assert make(write_list(tmp_path / "list.csv", *map(tuple, rows[:1]), header="file,start,end,caption,id"), out,
                ClipFormat(gop=5)) == Clipped(made=0, kept=1, others=3, failures=())  # fmt: skip


def test_a_row_that_fails_leaves_no_older_clip(films: Path, tmp_path: Path) -> None:
    out, header = tmp_path / "out", "file,start,end,caption,id"
    make(write_list(tmp_path / "list.csv", ("cfr.mp4", 0, 1, "x", "a"), header=header), out, root=str(films))
    assert {p.name for p in out.glob("a*")} == {"a.mp4", "a.txt"}
    rows = write_list(tmp_path / "list.csv", ("cfr.mp4", 0, 9, "x", "a"), header=header)
    assert len(make(rows, out, root=str(films)).failures) == 1
    assert {p.name for p in out.iterdir()} == {".clips.jsonl", "failures.csv"}
    write_list(rows, ("cfr.mp4", 0, 2, "x", "a"), header=header)
    assert make(rows, out, root=str(films)).made == 1 and not (out / "failures.csv").exists()


def test_nothing_of_others_is_written_over(films: Path, tmp_path: Path) -> None:
    out, header = tmp_path / "out", "file,start,end,id"
    out.mkdir()
    (out / "mine.txt").write_text("my notes")
    rows = write_list(tmp_path / "list.csv", ("cfr.mp4", 0, 1, "mine"), ("cfr.mp4", 0, 1, "a"), header=header)
    with pytest.raises(ValueError, match=r"mine\.txt is there and not made by this command"):
        make(rows, out, root=str(films))
    assert make(rows, out, root=str(films), keep_going=True).made == 1
    write_list(rows, ("vfr.mp4", 0, 1, "a"), header=header)
    with pytest.raises(ValueError, match=r"a\.mp4 is there and a clip of cfr\.mp4"):
        make(rows, out, root=str(films))
    assert (out / "mine.txt").read_text() == "my notes" and shown(out / "a.mp4") == list(range(30))
    with clipping._opened_ledger(out), pytest.raises(ValueError, match="another `mutoscope data clip`"):
        make(rows, out, root=str(films))
    (out / ".clips.jsonl").write_text("no JSON\n")
    with pytest.raises(ValueError, match=r"\.clips\.jsonl, line 1: damaged"):
        make(rows, out, root=str(films))


@pytest.mark.parametrize("after", [17, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_command_ends_the_same(after: int, films: Path, tmp_path: Path) -> None:
    rows = [(films / "cfr.mp4", k / 30, k / 30 + 0.5, f"part {k}", f"c{k:02d}") for k in range(40)]
    path = write_list(tmp_path / "list.csv", *rows, header="file,start,end,caption,id")
    make(path, tmp_path / "whole")
    out = tmp_path / "killed"
    code = "import sys; from mutoscope.data.prepare.clipping import clip; clip(sys.argv[1], sys.argv[2], workers=1)"
    process = subprocess.Popen([sys.executable, "-c", code, path, out], stderr=subprocess.DEVNULL)
    while len(list(out.glob("*.mp4"))) < after:
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()  # The command alone: its worker sees that and follows.
    assert process.wait() == -signal.SIGKILL
    left = len(list(out.glob("*.mp4")))
    done = make(path, out)
    assert not done.failures and after <= left < 40 and done.made >= 40 - left
    assert contents(out) == contents(tmp_path / "whole")
    assert not [p for p in out.iterdir() if p.name.endswith(".tmp")]


def test_a_crash_costs_one_clip(films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips of one file go to one process; of those that it loses, each is tried by itself."""
    runs = []

    def supervise(work: Any, jobs: list[Any], workers: int, timeout: float) -> Iterator[tuple[Any, Any]]:
        for job in jobs:
            runs.append([row.id for row in job])
            yield job, Lost("it died") if any(row.id == "c3" for row in job) else work(job, lambda: None)

    monkeypatch.setattr(clipping, "supervise", supervise)
    rows = [(films / f"{'cfr' if k < 20 else 'vfr'}.mp4", k / 100, k / 100 + 0.1, f"c{k}") for k in range(32)]
    done = clip(write_list(tmp_path / "list.csv", *rows, header="file,start,end,id"), tmp_path / "out",
                workers=1, progress=False)  # fmt: skip
    together = [[f"c{k}" for k in range(*ends)] for ends in pairwise((0, 8, 16, 20, 28, 32))]
    assert runs == [*together, *([c] for c in together[0])]
    assert done.made == 31
    assert [(f.id, f.reason) for f in done.failures] == [("c3", f"{films}/cfr.mp4: it died")]


def test_a_full_disk_stops_it_and_it_goes_on_later(films: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (10, 64, 64, 3), dtype=np.uint8)
    write_video(tmp_path / "noise.mp4", noise, 10)
    rows = [(films / "cfr.mp4", 0, 0.1, "c0"), ("noise.mp4", 0, 1, "c1")]
    path = write_list(tmp_path / "list.csv", *rows, header="file,start,end,id")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
        with pytest.raises(ValueError, match=r"out: .*; mend that and run the same again"):
            make(path, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {".clips.jsonl", "c0.mp4"}
    assert make(path, tmp_path / "out") == Clipped(made=1, kept=1, others=0, failures=())


def test_memory_does_not_grow_with_a_clip(tmp_path: Path) -> None:
    encode(tmp_path / "long.mp4", painted(150, 96, 160), options={"x264-params": "keyint=20"})
    rows = write_list(tmp_path / "list.csv", ("long.mp4", 0, 4.999), header="file,start,end")
    tracemalloc.start()
    try:
        make(rows, tmp_path / "out", ClipFormat(height=192, width=320))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert probe(tmp_path / "out" / "long_0001.mp4").frames == 150
    assert peak < 3e6  # All of its frames are 28 MB.


def test_a_slide_ends_with_the_clip(tmp_path: Path) -> None:
    encode(tmp_path / "slides.mp4", painted(4), pts=[0, 100, 300_000, 300_100], options={"x264-params": "bframes=0"})
    rows = write_list(tmp_path / "list.csv", ("slides.mp4", 0, 8), header="file,start,end")
    make(rows, tmp_path / "out")
    index = frame_index(tmp_path / "out" / "slides_0001.mp4")
    assert index.times.tolist() == [0, 0.1]
    assert index.duration == 8  # Not 300.
