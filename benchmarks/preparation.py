"""From a folder of videos to stored latents, against Hugging Face datasets.

    python -m benchmarks.preparation [--peer .]

The peer is the library `datasets`: ``Dataset.map`` with num_proc=2, one row a video, stored by it as Arrow arrays of a
fixed shape; in two forms. "PyAV": the usual lines of PyAV and torch, resized in floats, as cogvideox-factory and
finetrainers do. "Video": the library's own feature Video, whose rows are torchcodec's decoders (needs torchcodec and
FFmpeg's libraries), resized as bytes, torch's fastest way. --peer is accepted for the sake of one form for all
benchmarks and not used.

Ours is `mutoscope encode --workers 2`, which also looks at every file first, hashes it, takes the latents' statistics,
syncs what it writes to the disk, and could be killed and resumed at any moment. All list a folder and put its clips, at
32x256x256, through the same small autoencoder with one thread in each process; the stored latents are checked to be the
same. A last table shows where the time of a clip goes, on all sides.

Each run is a job of its own, started anew, from the command to the end of the process, imports and workers' start
included. That costs each side some seconds, whatever the number of clips: the first row shows how many.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch.nn.functional import interpolate

from benchmarks.harness import last_line, table
from benchmarks.painted import scene, write
from mutoscope.autoencoders.conv import ConvAutoencoder
from mutoscope.autoencoders.pretrained import load_autoencoder
from mutoscope.data.dataset import Item, read_item, to_pixels
from mutoscope.data.media import Media
from mutoscope.data.sources.layouts import Clip
from mutoscope.data.store import LatentStore
from mutoscope.encoder import Encoder
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.recipe import Autoencoder, Data, Recipe
from mutoscope.toml import dump_toml
from mutoscope.types import ModelIO
from mutoscope.weights import save_weights
from mutoscope.workers import keep_memory

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
        peer_job(side, *map(Path, paths))
        return
    adopt_orphans()
    sides = ["ours", *(["PyAV"] if find_spec("datasets") else []), *(["Video"] if has_torchcodec() else [])]
    rows, parts = [], []
    with tempfile.TemporaryDirectory() as folder:
        save_autoencoder(Path(folder) / "autoencoder")
        for case in CASES:
            make_clips(Path(folder) / case.name, case)
            taken = [{side: run(side, Path(folder), case, n) for side in sides} for n in range(REPEATS)]
            for unit, which in (("CPU seconds", 1), ("seconds", 0)):
                pairs = {side: [(t["ours"][which], t[side][which]) for t in taken] for side in sides}
                rows.append([f"{case.clips} clips of {FRAMES}x{case.height}x{case.width}, {unit}", *cells(pairs)])
            if case.name != "few":
                parts += shares(sides, Path(folder), case)
    table(["", *sides, *(f"{side}, ratio" for side in sides[1:])], rows)
    print()
    table(["a clip, ms of CPU time", "decode, resize", "to floats", "autoencoder"], parts)
    if len(sides) > 1:
        last_line("preparation", f"{PEER}, {sides[-1]}, {CASES[-1].height}x{CASES[-1].width}", pairs[sides[-1]])
    else:
        print("preparation: no ratio was taken; datasets is not installed")


def cells(pairs: dict[str, list[tuple[float, float]]]) -> list[str]:
    """Medians: the seconds of each side, and the ratios of the peers'."""
    taken = [f"{np.median([b for _, b in pair]):.1f}" for pair in pairs.values()]
    return taken + [f"{np.median([b / a for a, b in pair]):.2f}x" for side, pair in pairs.items() if side != "ours"]


def run(side: str, folder: Path, case: Case, number: int) -> tuple[float, float]:
    """Seconds and CPU seconds of a job, all of its processes together. The peer's latents are compared with ours."""
    out = folder / f"{side} {case.name} {number}"
    root, autoencoder = folder / case.name, folder / "autoencoder"
    command = [sys.executable, "-m", "benchmarks.preparation", "--job", side, str(root), str(autoencoder), str(out)]
    if side == "ours":
        (folder / "recipe.toml").write_text(dump_toml(recipe_of(root, autoencoder)))
        command = [sys.executable, "-m", "mutoscope", "encode", str(folder / "recipe.toml"), "--out", str(out)]
        command += ["--workers", str(WORKERS)]
    # A cache of its own for each job: neither side finds what an earlier one has seen of the files.
    environment = {**os.environ, "XDG_CACHE_HOME": f"{out} cache", "HF_HOME": f"{out} cache", "OMP_NUM_THREADS": "1"}
    start, used = time.perf_counter(), children_seconds()
    job = subprocess.run(command, capture_output=True, env=environment)
    seconds = time.perf_counter() - start
    with suppress(ChildProcessError):
        while True:
            os.wait()
    cpu = children_seconds() - used
    if job.returncode:
        raise SystemExit(f"the job failed:\n{job.stderr.decode()}")
    if side != "ours" and number == 0:
        check_equal(LatentStore(folder / f"ours {case.name} {number}"), out, 1e-4 if case.height == SIDE else 0.05)
    return seconds, cpu


def adopt_orphans() -> None:
    """Become the parent of what the jobs' processes leave behind, so that its CPU time is counted, too."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def shares(sides: list[str], folder: Path, case: Case) -> list[list[str]]:
    """Milliseconds of a clip's steps, in this process, warm and in turn: what does not depend on how a side starts and
    stores."""
    keep_memory()
    data, encoder = recipe_of(folder / case.name, folder / "autoencoder").data, encoder_of(folder / "autoencoder")
    taken: dict[str, list[Any]] = {side: [] for side in sides}
    for path in sorted((folder / case.name).glob("*.mp4"))[:VIDEOS]:
        for side in sides:
            marks = [time.process_time()]
            if side == "ours":
                clip = Clip(id=path.stem, media=Media(str(path)), split="train")
                frames = read_item(Item(clip=clip), data, 0, 0, augment=False)
            else:
                frames = pyav_frames(str(path)) if side == "PyAV" else video_frames(decoder_of(path))
            marks.append(time.process_time())
            if side == "ours":
                pixels = to_pixels(frames[None])
            else:
                pixels = (frames if frames.is_floating_point() else frames.float() / 127.5 - 1).transpose(0, 1)[None]
            marks.append(time.process_time())
            encoder.moments(pixels)
            marks.append(time.process_time())
            taken[side].append(1e3 * np.diff(marks))
    size = f"{case.height}x{case.width}"
    return [[f"{size}: {side}", *(f"{ms:.1f}" for ms in np.median(taken[side], axis=0))] for side in sides]


def check_equal(store: LatentStore, out: Path, tolerance: float) -> None:
    """Both sides have stored the same latents of the same clips. Pixels that we resize are rounded to bytes."""
    from datasets import Dataset, concatenate_datasets

    theirs = concatenate_datasets([Dataset.from_file(str(file)) for file in sorted(out.glob("*.arrow"))])
    theirs = theirs.with_format("numpy")
    assert [Path(path).stem for path in theirs["path"]] == [item.id for item in store.items]
    for n, row in enumerate(theirs):
        np.testing.assert_allclose(store.read(n).moments.numpy(), row["latents"], rtol=0, atol=tolerance)


# ---- the jobs


def recipe_of(root: Path, autoencoder: Path) -> Recipe:
    data = Data(root=str(root), frames=FRAMES, height=SIDE, width=SIDE, resize="squash", val_fraction=0)
    trained = Autoencoder(path=str(autoencoder), recipe="the run's own")
    return Recipe(data=data, autoencoder=trained, model=MODEL, objective=Diffusion(), steps=1, batch_size=1)


def peer_job(side: str, root: Path, autoencoder: Path, out: Path) -> None:
    from datasets import Array4D, Dataset, Features, Value, Video, disable_progress_bars

    disable_progress_bars()
    out.mkdir()
    spec = encoder_of(autoencoder).spec
    moments = (2 * spec.channels, *spec.latent_shape(FRAMES, SIDE, SIDE))
    files = sorted(map(str, root.glob("*.mp4")))
    rows, steps = Dataset.from_dict({"path": files}), pyav_row
    if side == "Video":
        rows, steps = Dataset.from_dict({"path": files, "video": files}).cast_column("video", Video()), video_row
    rows.map(
        steps, fn_kwargs={"autoencoder": autoencoder}, num_proc=WORKERS, cache_file_name=str(out / "latents.arrow"),
        features=Features({"path": Value("string"), "latents": Array4D(moments, "float32")}), new_fingerprint="latents",
        remove_columns=rows.column_names[1:],
    )  # fmt: skip


def pyav_row(row: dict[str, Any], autoencoder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    video = pyav_frames(row["path"])
    return {"latents": encoder_of(autoencoder).moments(video.transpose(0, 1)[None])[0].numpy()}


def pyav_frames(path: str) -> Float[torch.Tensor, "t 3 h w"]:
    with av.open(path) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    video = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    if video.shape[2:] != (SIDE, SIDE):
        video = interpolate(video, (SIDE, SIDE), mode="bilinear", antialias=True)
    return video


def video_row(row: dict[str, Any], autoencoder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    video = video_frames(row["video"]).float() / 127.5 - 1
    return {"latents": encoder_of(autoencoder).moments(video.transpose(0, 1)[None])[0].numpy()}


def video_frames(decoder: Any) -> UInt8[torch.Tensor, "t 3 h w"]:
    frames: torch.Tensor = decoder.get_frames_in_range(0, FRAMES).data
    if frames.shape[2:] != (SIDE, SIDE):
        frames = interpolate(frames, (SIDE, SIDE), mode="bilinear", antialias=True)
    return frames


def decoder_of(path: Path) -> Any:
    """What the feature Video makes of a file."""
    from torchcodec.decoders import VideoDecoder

    return VideoDecoder(str(path))


def has_torchcodec() -> bool:
    if not (find_spec("datasets") and find_spec("torchcodec")):
        return False
    try:
        import torchcodec.decoders  # noqa: F401
    except (OSError, RuntimeError):  # It finds no FFmpeg, or not the torch that it was built for.
        return False
    return True


@lru_cache
def encoder_of(autoencoder: Path) -> Encoder:
    """The autoencoder, loaded once in each process."""
    return Encoder(load_autoencoder(Autoencoder(path=str(autoencoder), recipe="the run's own")))


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
