"""`mutoscope encode` by one process, by two, and on a Ray cluster of this machine, and a plain Ray Data pipeline.

    python -m benchmarks.encode [--clips 640] [--few 128] [--repeats 1] [--peer .]

All encode the same clips with the same autoencoder (CogVideoX's, tiny, in fp32), with one thread in each process. The
clips are distinct mp4 files of 9x64x96. The peer is Ray Data as its documentation has it: a pool of two actors that
load the model once, a row for each file, a .npy file for each clip; it decodes by our decoder, so that only the
pipelines differ. It has no captions, no hashes, no list of clips and no index. --peer is accepted for the sake of one
form for all benchmarks and not used.

The stores that ours make have to be equal in all bytes, and the peer's arrays equal to them. Each run is a command,
timed from its start to its end. A run over fewer clips beside each shows what starting costs: "a clip" is the time of
the clips that the larger run has more, without it. At the end each side is given a file that is cut short.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.harness import table
from benchmarks.painted import scene, write
from benchmarks.preparation import adopt_orphans, children_seconds
from mutoscope.build import encoder_of
from mutoscope.data.dataset import Item, read_item, to_pixels
from mutoscope.data.media import Media
from mutoscope.data.sources.layouts import Clip
from mutoscope.data.store import LatentStore
from mutoscope.loading import load_recipe
from mutoscope.recipe import Recipe
from mutoscope.toml import dump_toml

FRAMES, HEIGHT, WIDTH = 9, 64, 96
WORKERS, SHARD = 2, 64
"""Processes, and clips of a shard, which one of them encodes."""
OURS = {
    "1 process": ["--workers", "1"],
    "2 processes": ["--workers", "2"],
    "Ray, 2 actors": ["--ray", "local", "--workers", "2"],
}
PEER = "plain Ray Data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=640, help="of the larger run")
    parser.add_argument("--few", type=int, default=128, help="of the smaller run")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--peer", type=Path, help="not needed: the peer is an installed library")
    parser.add_argument("--plain", nargs=2, type=Path, help=argparse.SUPPRESS)  # The peer's run, which this starts.
    arguments = parser.parse_args()
    if arguments.plain:
        return plain(*arguments.plain)
    clips, few = arguments.clips, arguments.few
    if clips <= few or clips % (WORKERS * SHARD) or few % (WORKERS * SHARD):
        parser.error(
            f"--clips {clips} --few {few}: multiples of {WORKERS * SHARD}, or a worker idles; the first larger"
        )
    adopt_orphans()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in (few, clips):
            make_clips(folder / f"clips-{count}", count)
        taken: dict[str, list[tuple[float, float, float]]] = {side: [] for side in (*OURS, PEER)}
        for _ in range(arguments.repeats):
            for side, results in taken.items():
                start, _ = run(side, folder, few)
                wall, cpu = run(side, folder, clips)
                results.append((wall, cpu, (wall - start) / (clips - few)))
            check_equal(folder, clips)
        report(clips, taken)
        broken_file(folder)


def report(clips: int, taken: dict[str, list[tuple[float, float, float]]]) -> None:
    rows = []
    for side, results in taken.items():
        wall, cpu, clip = (median(column) for column in zip(*results, strict=True))
        rows.append([side, f"{wall:.1f}", f"{cpu:.1f}", f"{1e3 * clip:.0f}", f"{wall - clips * clip:.1f}"])
    table([f"{clips} clips", "seconds", "CPU seconds", "ms a clip", "seconds to start"], rows)
    print()
    for name, slow, fast in (
        ("2 processes vs 1", "1 process", "2 processes"),
        ("2 actors vs 2 processes, time", "Ray, 2 actors", "2 processes"),
        ("2 actors vs plain Ray Data", PEER, "Ray, 2 actors"),
    ):
        for what, which in (("whole command", 0), ("a clip, without the start", 2)):
            ratios = [a[which] / b[which] for a, b in zip(taken[slow], taken[fast], strict=True)]
            spread = f"median of {len(ratios)}, min {min(ratios):.2f}, max {max(ratios):.2f}"
            print(f"encode: {median(ratios):.2f}x {name}, {what} ({spread})")


def recipe_of(root: Path) -> Recipe:
    recipe = load_recipe("cogvideox.t2v_lora_tiny")
    data = replace(recipe.data, root=str(root), frames=FRAMES, height=HEIGHT, width=WIDTH, cache=False, val_fraction=0)
    return replace(recipe, data=data)


def make_clips(folder: Path, count: int) -> None:
    folder.mkdir()
    for number in range(count):
        write(folder / f"{number:05d}.mp4", scene(FRAMES, HEIGHT, WIDTH, seed=number), keyframe_interval=FRAMES)
        (folder / f"{number:05d}.txt").write_text("a wall")


def run(side: str, folder: Path, count: int) -> tuple[float, float]:
    """Seconds and CPU seconds of a command, all of its processes together."""
    out = folder / side
    shutil.rmtree(out, ignore_errors=True)
    start, used = time.perf_counter(), children_seconds()
    job = command(side, folder / f"clips-{count}", out)
    seconds = time.perf_counter() - start
    with suppress(ChildProcessError):
        while True:
            os.wait()
    if job.returncode:
        raise SystemExit(f"{side} failed:\n{job.stdout.decode()}")
    return seconds, children_seconds() - used


def command(side: str, root: Path, out: Path) -> subprocess.CompletedProcess[bytes]:
    if side == PEER:
        words = ["benchmarks.encode", "--plain", str(root), str(out)]
    else:
        recipe = out.with_name("recipe.toml")
        recipe.write_text(dump_toml(recipe_of(root)))
        words = ["mutoscope", "encode", str(recipe), "--out", str(out), *OURS[side]]
    # No run finds what an earlier one has remembered of the files; the tiny checkpoint stays.
    shutil.rmtree(out.with_name("cache") / "mutoscope" / "clips", ignore_errors=True)
    environment = {**os.environ, "XDG_CACHE_HOME": str(out.with_name("cache")), "OMP_NUM_THREADS": "1"}
    environment["RAY_worker_niceness"] = "0"  # the peer's workers, too, have the priority of other processes
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run([sys.executable, "-m", *words], env=environment, **output)


def check_equal(folder: Path, count: int) -> None:
    """All sides have stored the same latents of the same clips, ours to the byte."""
    stores = [folder / side for side in OURS]
    contents = [{str(p.relative_to(s)): p.read_bytes() for p in s.rglob("*") if p.is_file()} for s in stores]
    assert contents[0] == contents[1] == contents[2]
    store = LatentStore(stores[0])
    assert len(store) == count == len(list((folder / PEER).glob("*.npy")))
    for k, item in enumerate(store.items):
        assert np.array_equal(store.read(k).moments.numpy(), np.load(folder / PEER / f"{item.id}.npy"))


def broken_file(folder: Path) -> None:
    root = folder / "clips-broken"
    make_clips(root, 9)
    whole = (root / "00004.mp4").read_bytes()
    (root / "00004.mp4").write_bytes(whole[: len(whole) // 2])
    for side in (*OURS, PEER):
        out = folder / f"broken, {side}"
        job = command(side, root, out)
        stored = (len(LatentStore(out)) if job.returncode == 0 else 0) if side in OURS else len(list(out.glob("*.npy")))
        print(f"1 of 9 files cut short, {side}: exit code {job.returncode}, {stored} clips stored")


# ---- the peer


def plain(root: Path, out: Path) -> None:
    import ray
    import ray.data

    out.mkdir()
    ray.init("local", num_cpus=WORKERS, include_dashboard=False)
    files = ray.data.from_items([{"path": str(path)} for path in sorted(root.glob("*.mp4"))])
    files.map(Plain, fn_constructor_args=(root, out), concurrency=WORKERS).materialize()


class Plain:
    """The model, loaded once in each actor, and what is done to a row."""

    def __init__(self, root: Path, out: Path) -> None:
        import torch

        torch.set_num_threads(1)
        recipe = recipe_of(root)
        recipe = recipe.model.complete(recipe)
        self.out, self.data = out, recipe.data
        self.encoder = encoder_of(recipe.autoencoder, torch.device("cpu"))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        path = Path(row["path"])
        clip = Clip(id=path.stem, media=Media(str(path)), split="train")
        video = read_item(Item(clip=clip), self.data, 0, 0, augment=False)
        moments = self.encoder.moments(to_pixels(video[None]))[0]
        np.save(self.out / f"{path.stem}.npy", moments.numpy())
        return {"path": str(path)}


if __name__ == "__main__":
    main()
