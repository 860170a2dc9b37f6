"""Random clips of 32 frames out of H.264 files, against decord, torchcodec and imageio.

    python -m benchmarks.decode [--clips 12] [--peer .]

The peers are libraries, whichever are installed (decord==0.6.0, torchcodec==0.13.0, imageio[ffmpeg,pyav]), so that
--peer is accepted for the sake of one form for all benchmarks and not used. Every frame has its number painted into it:
ours are checked to be the ones asked for, and equal to the peers'; how many of the peers' are is printed.

Each side opens the file for each clip and gives RGB as a NumPy array of uint8. We have to find the frames' timestamps
anew for each clip, too: the memory of the latest files' is turned off. torchcodec is in its exact mode. Files are in
the page cache. One thread each, seconds are CPU seconds of the process and its children (imageio's FFmpeg is one).
"""

from __future__ import annotations

import argparse
import resource
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import geometric_mean, median
from unittest import mock

import numpy as np
import torch
from jaxtyping import Int64, UInt8

from benchmarks.harness import last_line, table
from benchmarks.painted import numbers_in, scene, write
from mutoscope.data import seeking
from mutoscope.data.video import read_frames

FRAMES, LENGTH, FILES = 32, 300, 4
Numbers = Int64[np.ndarray, "n"]
Frames = UInt8[np.ndarray, "n h w 3"]
Read = Callable[[Path, Numbers], Frames]


@dataclass(frozen=True)
class Case:
    """What kind of files."""

    name: str
    height: int
    width: int
    keyframe_interval: int
    variable_rate: bool = False


CASES = (
    Case("256x256, GOP 250", 256, 256, 250),
    Case("256x256, GOP 30", 256, 256, 30),
    Case("480x720, GOP 250", 480, 720, 250),
    Case("480x720, GOP 30", 480, 720, 30),
    Case("256x256, GOP 30, VFR", 256, 256, 30, variable_rate=True),
)


@dataclass(frozen=True)
class Result:
    """What was measured of one side, in one kind of files."""

    ratios: list[float]
    """Its CPU time over ours, of each repeat."""
    fps: float
    """Frames per CPU second, median."""
    exact: float
    """Share of the frames that were those asked for."""
    difference: int
    """The largest of a pixel from ours, in frames that were."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=12, help="of each kind")
    parser.add_argument("--peer", type=Path, help="not needed: the peers are installed libraries")
    clips = parser.parse_args().clips
    torch.set_num_threads(1)
    quick, slow = peers()
    found: dict[str, list[Result]] = {name: [] for name in ("ours", *quick, *slow)}
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(seeking, "REMEMBERED", 0):
        for case in CASES:
            jobs = make_clips(Path(folder), case, clips)
            for name, result in [
                *measure({"ours": read_frames, **quick}, jobs, 5),
                *measure({"ours": read_frames, **slow}, jobs[::2], 2)[1:],
            ]:
                found[name].append(result)
    report(found)
    for name in quick:  # decord last, as the headline: most of the trainers that we know decode with it.
        per_repeat = zip(*(result.ratios for result in found[name]), strict=True)
        last_line("decode", name, [(1.0, geometric_mean(ratios)) for ratios in per_repeat])
    if not quick:
        print("decode: no ratio was taken; neither torchcodec nor decord is installed")


def peers() -> tuple[dict[str, Read], dict[str, Read]]:
    """Those that are installed: the quick ones, and imageio's ways, which take so long that they get fewer clips."""
    quick = {"torchcodec": torchcodec, "decord": decord}
    slow = {"imageio, pyav": imageio_pyav, "imageio, ffmpeg": imageio_ffmpeg}
    return installed(quick), installed(slow)


def installed(peers: Mapping[str, Callable[[], Read]]) -> dict[str, Read]:
    """Those that can be imported; says of the others why not."""
    found = {}
    for name, load in peers.items():
        try:
            found[name] = load()
        except (ImportError, OSError, RuntimeError) as error:  # torchcodec: RuntimeError where it finds no FFmpeg.
            print(f"{name}: no ratio is taken, it can't be imported: {str(error).strip().splitlines()[0]}")
    return found


def torchcodec() -> Read:
    from torchcodec.decoders import VideoDecoder

    decoder = partial(VideoDecoder, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
    return lambda path, numbers: decoder(path).get_frames_at(numbers.tolist()).data.numpy()


def decord() -> Read:
    from decord import VideoReader

    return lambda path, numbers: VideoReader(str(path), num_threads=1).get_batch(numbers.tolist()).asnumpy()


def imageio_pyav() -> Read:
    import imageio.v3 as iio

    def read(path: Path, numbers: Numbers) -> Frames:
        with iio.imopen(path, "r", plugin="pyav") as file:
            return np.stack([file.read(index=n, thread_count=1) for n in numbers.tolist()])

    return read


def imageio_ffmpeg() -> Read:
    import imageio
    import imageio_ffmpeg  # noqa: F401, its backend

    one = {"input_params": ["-threads", "1"], "output_params": ["-threads", "1"]}

    def read(path: Path, numbers: Numbers) -> Frames:
        with imageio.get_reader(path, "ffmpeg", **one) as reader:
            return np.stack([reader.get_data(n) for n in numbers.tolist()])

    return read


# ---- measuring


def measure(sides: Mapping[str, Read], jobs: Sequence[tuple[Path, Numbers]], repeats: int) -> list[tuple[str, Result]]:
    """Every side checked on the clips, and then timed in turn; ours is the first."""
    ours = [read_frames(*job) for job in jobs]
    for (path, numbers), frames in zip(jobs, ours, strict=True):
        assert np.array_equal(numbers_in(frames), numbers), f"{path}: ours are other frames"
    checks = {name: check(read, jobs, ours) for name, read in sides.items()}
    taken = [{name: cpu_seconds(read, jobs) for name, read in sides.items()} for _ in range(repeats)]
    fps = {name: FRAMES * len(jobs) / median(seconds[name] for seconds in taken) for name in sides}
    return [(n, Result([s[n] / s["ours"] for s in taken], fps[n], *checks[n])) for n in sides]


def check(read: Read, jobs: Sequence[tuple[Path, Numbers]], ours: Sequence[Frames]) -> tuple[float, int]:
    """The share of the frames that are those asked for, and by how much a pixel of these differs from ours at most."""
    right, difference = [], 0
    for (path, numbers), reference in zip(jobs, ours, strict=True):
        frames = read(path, numbers)
        assert frames.shape == reference.shape and frames.dtype == reference.dtype, path
        same = numbers_in(frames) == numbers
        right.append(same.mean())
        apart = np.abs(frames[same].astype(np.int16) - reference[same])
        difference = max(difference, int(apart.max(initial=0)))
    assert difference <= 16, f"pixels differ by {difference}"  # Rounding, or another way to magnify chroma.
    return float(np.mean(right)), difference


def cpu_seconds(read: Read, jobs: Sequence[tuple[Path, Numbers]]) -> float:
    """CPU time of this process and of its children while they read the clips."""
    read(*jobs[0])  # So that the side before has left nothing in memory that it has to clear away.
    start = used()
    for path, numbers in jobs:
        read(path, numbers)
    return used() - start


def used() -> float:
    both = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def report(found: Mapping[str, Sequence[Result]]) -> None:
    """Two tables: frames per CPU second with our ratio, and exactness."""
    cells = lambda r: [f"{r.fps:.0f}", f"{median(r.ratios):.2f}x"]
    theirs = [name for name in found if name != "ours"]
    header = ["frames per CPU second", "ours", *(cell for name in theirs for cell in (name, "ratio"))]
    rows = [
        [case.name, f"{found['ours'][i].fps:.0f}", *(cell for name in theirs for cell in cells(found[name][i]))]
        for i, case in enumerate(CASES)
    ]
    means = [["", f"{geometric_mean(median(r.ratios) for r in found[name]):.2f}x"] for name in theirs]
    table(header, [*rows, ["geometric mean", "", *(cell for mean in means for cell in mean)]])
    print()
    rows = [[case.name, *(f"{100 * r[i].exact:.1f} %" for r in found.values())] for i, case in enumerate(CASES)]
    most = [str(max(result.difference for result in results)) for results in found.values()]
    table(["frames that were those asked for", *found], [*rows, ["largest difference of a pixel", *most]])
    print()


# ---- the files


def make_clips(folder: Path, case: Case, clips: int) -> list[tuple[Path, Numbers]]:
    """Files of a kind, and frame numbers from random starts."""
    files = [folder / f"{case.name}, {seed}.mp4" for seed in range(FILES)]
    for seed, path in enumerate(files):
        steps = np.random.default_rng(seed).choice([10, 20, 40, 60], LENGTH).tolist() if case.variable_rate else None
        write(path, scene(LENGTH, case.height, case.width, seed), case.keyframe_interval, steps)
    room = LENGTH - FRAMES + 1
    starts = (room * (np.random.default_rng(0).permutation(clips) + 0.5) / clips).astype(int)
    return [(files[n % FILES], start + np.arange(FRAMES)) for n, start in enumerate(starts)]


if __name__ == "__main__":
    main()
