"""Damaged media: an error or frames, but never a crash, a hang or a frame that depends on what else was read.

The reading happens in a process of its own, with little memory, so that a crash is seen as one.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
from bar_codes import number_of
from media_cases import CASES, make

from mutoscope.data.video import VideoError, probe, read_frames

FILES = 200
SECONDS = 5.0
"""That reading a file may take."""
KINDS = [name for name in CASES if CASES[name].count <= 100]
# FFV1 notices damage by a checksum, patches it with the frame decoded before, and tells nobody but the log.
PATCHING = ("ffv1.mkv", "alpha.mkv")
# Their sample tables are apart from their pixels, so that damage to pixels loses no packet.
TABLED = ["groups_of_12.mp4", "no_b_frames.mp4", "keyframes_two_apart.mp4", "keyframes_only.mp4", "hevc.mp4",
          "mpeg4.mp4", "prores.mov", "mjpeg.mov"]  # fmt: skip


def mutated(name: str, data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """A file with bits flipped (anywhere, at its head or its end), overwritten, cut, or with something too much."""
    changed, size = bytearray(data), len(data)
    place = int(rng.integers(size))
    end = min(size, place + int(rng.integers(1, max(2, size // 8))))
    kind = rng.integers(9)
    if kind < 3:
        low, high = [(0, size), (0, min(size, 2000)), (max(0, size - 2000), size)][kind]
        for at in rng.integers(low, high, size=rng.integers(1, 20)):
            changed[at] ^= 1 << int(rng.integers(8))
    elif kind == 3:
        changed[place:end] = rng.bytes(end - place)
    elif kind == 4:
        changed[place:end] = bytes([int(rng.choice([0, 255]))]) * (end - place)
    elif kind == 5:
        del changed[place:]
    elif kind == 6:
        del changed[place:end]
    elif kind == 7:
        changed[place:place] = other[int(rng.integers(len(other))) :][: end - place]
    else:
        changed[place:place] = changed[place:end]
    return bytes(changed)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("sound")
    return {name: make(name, folder).read_bytes() for name in KINDS}


def test_mutated_files_are_refused_or_read_but_never_crash_or_hang(sound: dict[str, bytes], tmp_path: Path) -> None:
    for seed in range(FILES):
        rng = np.random.default_rng(seed)
        name = KINDS[seed % len(KINDS)]
        other = sound[KINDS[int(rng.integers(len(KINDS)))]]
        (tmp_path / f"{seed:03d}_{name}").write_bytes(mutated(name, sound[name], other, rng))
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", __file__, str(tmp_path)], capture_output=True, text=True,
        timeout=FILES * SECONDS, env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )  # fmt: skip
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, f"died at file {len(results)}: {done.stderr[-2000:]}"
    assert len(results) == FILES
    wrong = [r for r in results if r["wrong"]]
    assert not wrong, wrong
    assert max(r["seconds"] for r in results) < 2 * SECONDS
    refused = sum(r["refused"] is not None for r in results)
    assert FILES // 4 < refused < FILES  # Damage is seen, and not everything is.


def _read(path: Path) -> dict[str, object]:
    """What becomes of a damaged file."""
    start, refused, wrong = time.monotonic(), None, ""
    try:
        count = probe(path, timeout=SECONDS).frames
        frames = read_frames(path, range(count), timeout=SECONDS)
        for n in {0, count // 3, count - 1} if not path.name.endswith(PATCHING) else set():
            alone = read_frames(path, [n], timeout=SECONDS)[0]
            if not np.array_equal(alone, frames[n]):
                wrong = f"frame {n} alone shows {number_of(alone)}, with the others {number_of(frames[n])}"
    except VideoError as error:
        refused = str(error)
        if not refused.startswith(str(path)):
            wrong = f"does not name the file: {refused}"
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
    return {"file": path.name, "refused": refused, "wrong": wrong, "seconds": time.monotonic() - start}


@pytest.mark.parametrize("name", TABLED)
def test_damaged_pixels_spoil_no_frame_that_is_not_built_on_them(name: str, tmp_path: Path) -> None:
    """What a decoder notices is an error. What it can't notice, for the bits make sense, stays in its group of frames:
    all others are pixel for pixel what they were."""
    path = make(name, tmp_path)
    data, count = path.read_bytes(), len(CASES[name].numbers)
    whole = read_frames(path, range(count))
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        packets = [p for p in file.demux(stream) if p.size]
        starts = sorted({0} | {n for n, p in enumerate(packets) if p.is_keyframe})
        spans = [(p.pos, p.size) for p in packets]
    for seed in range(12):
        rng = np.random.default_rng(seed)
        hit = int(rng.integers(len(spans)))
        first, size = spans[hit]
        changed = bytearray(data)
        at = first + int(rng.integers(size))
        end = min(first + size, at + int(rng.integers(1, size + 1)))
        changed[at:end] = rng.bytes(end - at)
        damaged = tmp_path / f"{seed}{path.suffix}"
        damaged.write_bytes(changed)
        group = max(n for n, start in enumerate(starts) if start <= hit)
        low = starts[group] - 4  # In decoding order; what is shown before the keyframe may be decoded behind it.
        high = starts[group + 1] + 4 if group + 1 < len(starts) else count
        for n in {0, count - 1, max(0, low - 1), min(count - 1, high)}:
            if not low <= n < high:
                np.testing.assert_array_equal(read_frames(damaged, [n])[0], whole[n])
        try:
            frames = read_frames(damaged, range(max(0, low), high))
        except VideoError as error:
            assert str(damaged) in str(error)
        else:
            assert len(frames) == high - max(0, low)


# Of damage to packets that reaches pixels, the share that is refused at the least; what is measured is about 0.1 more.
# No decoder is told by its bits whether they are the right ones (FFmpeg's err_detect changes nothing but for JPEG).
NOTICED = {"groups_of_12.mp4": 0.8, "hevc.mp4": 0.4, "vp9.webm": 0.5, "vp8.webm": 0.15, "mpeg4.mp4": 0.75,
           "prores.mov": 0.7, "mjpeg.mov": 0.8}  # fmt: skip


@pytest.mark.parametrize("name", NOTICED)
def test_damaged_packets_are_refused_as_often_as_the_codec_lets_them_be_noticed(name: str, tmp_path: Path) -> None:
    """The guarantee that docs/data.md states: an error, or as many frames as there are, of the size that they have; and
    an error in so many of the cases in which a pixel is not what it was."""
    path = make(name, tmp_path)
    data, count = path.read_bytes(), len(CASES[name].numbers)
    whole = read_frames(path, range(count))
    with av.open(str(path)) as file:
        spans = [(p.pos, p.size) for p in file.demux(file.streams.video[0]) if p.size]
    refused = changed_pixels = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        first, size = spans[int(rng.integers(len(spans)))]
        changed = bytearray(data)
        at = first + int(rng.integers(size))
        if seed % 2:
            changed[at] ^= 1 << int(rng.integers(8))
        else:
            end = min(first + size, at + int(rng.integers(1, size + 1)))
            changed[at:end] = rng.bytes(end - at)
        damaged = tmp_path / f"{seed}{path.suffix}"
        damaged.write_bytes(changed)
        try:
            frames = read_frames(damaged, range(count))
        except VideoError as error:
            assert str(damaged) in str(error)
            refused += 1
        else:
            assert frames.shape == whole.shape
            changed_pixels += not np.array_equal(frames, whole)
    assert refused >= NOTICED[name] * (refused + changed_pixels)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))
    for path in sorted(Path(sys.argv[1]).iterdir()):
        print(json.dumps(_read(path)), flush=True)
