"""From a folder of videos to stored latents, against Hugging Face datasets.

    python -m benchmarks.preparation [--peer .]

The peer is the library `datasets`: ``Dataset.map`` with num_proc=2, one row a video, in the usual lines of PyAV and
torch (resized in floats, as cogvideox-factory and finetrainers do), stored by it as Arrow arrays of a fixed shape.
--peer is accepted for the sake of one form for all benchmarks and not used. Ours is `mutoscope encode` with 2 workers,
which also looks at every file first, hashes it, takes the latents' statistics, syncs what it writes to the disk, and
could be killed and resumed at any moment. Both list a folder and put its clips, at 32x256x256, through the same small
autoencoder with one thread in each process; the stored latents are checked to be the same.

Each run is a job of its own, started anew, from the command to the end of the process, imports and workers' start
included. That costs both sides some seconds, whatever the number of clips: the first row shows how many.
"""

from __future__ import annotations

import argparse
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch.nn.functional import interpolate

from benchmarks.harness import last_line, table
from benchmarks.painted import scene, write
from mutoscope.autoencoders.conv import ConvAutoencoder
from mutoscope.autoencoders.pretrained import load_autoencoder
from mutoscope.data.store import LatentStore
from mutoscope.encode import encode
from mutoscope.encoder import Encoder
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.recipe import Autoencoder, Data, Recipe
from mutoscope.toml import dump_toml
from mutoscope.types import ModelIO
from mutoscope.weights import save_weights

PEER = "Hugging Face datasets.map(num_proc=2)"
FRAMES, SIDE, VIDEOS, WORKERS, REPEATS = 32, 256, 16, 2, 3
MODEL = ConvAutoencoder(bottleneck="kl", strides=(4, 4, 4), encoder_channels=(4,), decoder_channels=(8, 8))


@dataclass(frozen=True)
class Case:
    """A job's clips, all of 32 frames."""

    name: str
    clips: int
    height: int
    width: int


# 64 clips are one shard, which is one worker's.
CASES = (Case("few", 16, SIDE, SIDE), Case("same_size", 128, SIDE, SIDE), Case("resized", 128, 480, 720))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, help="not needed: the peer is an installed library")
    parser.add_argument("--job", nargs=4, help=argparse.SUPPRESS)  # A run of a side, which this script starts.
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.job:
        side, *paths = arguments.job
        {"ours": our_job, "peer": peer_job}[side](*map(Path, paths))
        return
    sides = ["ours", "peer"] if find_spec("datasets") else ["ours"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        save_autoencoder(Path(folder) / "autoencoder")
        for case in CASES:
            make_clips(Path(folder) / case.name, case)
            taken = [{side: run(side, Path(folder), case, n) for side in sides} for n in range(REPEATS)]
            for unit, which in (("CPU seconds", 1), ("seconds", 0)):
                pairs = [(t["ours"][which], t["peer"][which] if "peer" in t else float("nan")) for t in taken]
                rows.append([f"{case.clips} clips of {FRAMES}x{case.height}x{case.width}, {unit}", *cells(pairs)])
    table(["", "ours", "peer", "ratio"], rows)
    if "peer" in sides:
        last_line("preparation", PEER, pairs)
    else:
        print("preparation: no ratio was taken; datasets is not installed")


def cells(pairs: list[tuple[float, float]]) -> list[str]:
    ours, peer, ratio = (float(np.median(column)) for column in zip(*((a, b, b / a) for a, b in pairs), strict=True))
    return [f"{ours:.1f}", f"{peer:.1f}" if peer == peer else "-", f"{ratio:.2f}x" if peer == peer else "-"]


def run(side: str, folder: Path, case: Case, number: int) -> tuple[float, float]:
    """Seconds and CPU seconds of a job, all of its processes together. The peer's latents are compared with ours."""
    out = folder / f"{side} {case.name} {number}"
    command = [sys.executable, "-m", "benchmarks.preparation", "--job", side]
    # A cache of its own for each job: neither side finds what an earlier one has seen of the files.
    environment = {**os.environ, "XDG_CACHE_HOME": f"{out} cache", "HF_HOME": f"{out} cache", "OMP_NUM_THREADS": "1"}
    paths = map(str, (folder / case.name, folder / "autoencoder", out))
    start, used = time.perf_counter(), children_seconds()
    job = subprocess.run([*command, *paths], capture_output=True, env=environment)
    seconds = time.perf_counter() - start, children_seconds() - used
    if job.returncode:
        raise SystemExit(f"the job failed:\n{job.stderr.decode()}")
    if side == "peer" and number == 0:
        check_equal(LatentStore(folder / f"ours {case.name} {number}"), out, 1e-4 if case.height == SIDE else 0.05)
    return seconds


def children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def check_equal(store: LatentStore, out: Path, tolerance: float) -> None:
    """Both sides have stored the same latents of the same clips. Pixels that we resize are rounded to bytes."""
    from datasets import Dataset, concatenate_datasets

    theirs = concatenate_datasets([Dataset.from_file(str(file)) for file in sorted(out.glob("*.arrow"))])
    theirs = theirs.with_format("numpy")
    assert [Path(path).stem for path in theirs["path"]] == [item.id for item in store.items]
    for n, row in enumerate(theirs):
        np.testing.assert_allclose(store.read(n).moments.numpy(), row["latents"], rtol=0, atol=tolerance)


# ---- the jobs


def our_job(root: Path, autoencoder: Path, out: Path) -> None:
    data = Data(root=str(root), frames=FRAMES, height=SIDE, width=SIDE, resize="squash", val_fraction=0)
    trained = Autoencoder(path=str(autoencoder), recipe="none")
    recipe = Recipe(data=data, autoencoder=trained, model=MODEL, objective=Diffusion(), steps=1, batch_size=1)
    encode(recipe, out, workers=WORKERS, progress=False)


def peer_job(root: Path, autoencoder: Path, out: Path) -> None:
    from datasets import Array4D, Dataset, Features, Value, disable_progress_bars

    disable_progress_bars()
    out.mkdir()
    spec = encoder_of(autoencoder).spec
    moments = (2 * spec.channels, *spec.latent_shape(FRAMES, SIDE, SIDE))
    paths = Dataset.from_dict({"path": sorted(map(str, root.glob("*.mp4")))})
    paths.map(
        peer_row, fn_kwargs={"autoencoder": autoencoder}, num_proc=WORKERS, cache_file_name=str(out / "latents.arrow"),
        features=Features({"path": Value("string"), "latents": Array4D(moments, "float32")}), new_fingerprint="latents",
    )  # fmt: skip


def peer_row(row: dict[str, Any], autoencoder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    with av.open(row["path"]) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    video = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    if video.shape[2:] != (SIDE, SIDE):
        video = interpolate(video, (SIDE, SIDE), mode="bilinear", antialias=True)
    return {"latents": encoder_of(autoencoder).moments(video.transpose(0, 1)[None])[0].numpy()}


@lru_cache
def encoder_of(autoencoder: Path) -> Encoder:
    """The autoencoder, loaded once in each process."""
    return Encoder(load_autoencoder(Autoencoder(path=str(autoencoder), recipe="none")))


# ---- what they work on


def save_autoencoder(folder: Path) -> None:
    """A run directory as training leaves it, of an autoencoder with random weights."""
    data = Data(root="none", frames=FRAMES, height=SIDE, width=SIDE)
    torch.manual_seed(0)
    module = MODEL.build(ModelIO(channels=3, grid=(FRAMES, SIDE, SIDE)))
    folder.mkdir()
    recipe = Recipe(data=data, model=MODEL, objective=Diffusion(), steps=1, batch_size=1)
    (folder / "recipe.toml").write_text(dump_toml(recipe))
    save_weights(folder / "final" / "model.safetensors", module.state_dict())


def make_clips(folder: Path, case: Case) -> None:
    """Videos; they repeat themselves, but each file has other bytes, for we would encode the same file only once."""
    folder.mkdir()
    for n in range(min(case.clips, VIDEOS)):
        write(folder / f"{n:05d}.mp4", scene(FRAMES, case.height, case.width, n), 250)
    for n in range(VIDEOS, case.clips):
        content = (folder / f"{n % VIDEOS:05d}.mp4").read_bytes()
        free = struct.pack(">I4sI", 12, b"free", n)  # A box of the mp4 that means nothing.
        (folder / f"{n:05d}.mp4").write_bytes(content + free)


if __name__ == "__main__":
    main()
