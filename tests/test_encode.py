"""The encode job: killed and resumed without a trace, broken clips named, other stores refused."""

import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import encode_cases
import pytest
import torch
from encode_cases import files_of, make_videos
from tiny_runs import KL, make_recipe, make_run
from torch import Tensor

from mutoscope import encode_shards
from mutoscope.autoencoders.pretrained import load_autoencoder
from mutoscope.data.dataset import VideoDataset
from mutoscope.data.places import Place
from mutoscope.data.shards import ShardWriter, StoreError
from mutoscope.data.store import LatentStore, read_items
from mutoscope.encode import encode
from mutoscope.encode_shards import TRIES, Job, encode_clips, in_this_process
from mutoscope.encoder import Encoder, open_source
from mutoscope.progress import Bars
from mutoscope.recipe import Recipe
from mutoscope.types import NO_LABEL

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for every clip that goes through an autoencoder."""
    calls: list[int] = []
    moments = Encoder.moments

    def count(self: Encoder, video: Tensor) -> Tensor:
        calls.append(len(video))
        return moments(self, video)

    monkeypatch.setattr(Encoder, "moments", count)
    return calls


# ---- what is refused


def test_another_autoencoder_is_refused_with_both_hashes(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    ours = encode(recipe, tmp_path / "store", progress=False).manifest.autoencoder_hash
    other = replace(recipe, autoencoder=make_run(tmp_path / "other", recipe.data, seed=1))
    with pytest.raises(StoreError) as caught:
        encode(other, tmp_path / "store", progress=False)
    theirs = encode(other, tmp_path / "store2", progress=False).manifest.autoencoder_hash
    assert ours != theirs and ours in str(caught.value) and theirs in str(caught.value)
    training = replace(other, text=None, data=replace(other.data, latents=str(tmp_path / "store")))
    with pytest.raises(StoreError, match=theirs):
        open_source(training, Encoder(load_autoencoder(other.autoencoder)), "train")


def test_what_cannot_be_encoded_is_refused_before_work_begins(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    with pytest.raises(ValueError, match="nothing to encode"):
        encode(replace(recipe, autoencoder=None), tmp_path / "store", progress=False)
    with pytest.raises(ValueError, match="random takes other frames each time"):
        encode(replace(recipe, data=replace(recipe.data, window="random")), tmp_path / "store", progress=False)
    with pytest.raises(ValueError, match="height=18 does not fit"):
        encode(replace(recipe, data=replace(recipe.data, height=18)), tmp_path / "store", progress=False)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.tex").touch()
    with pytest.raises(StoreError, match=r"holds other things \(thesis.tex\)"):
        encode(recipe, tmp_path / "store", progress=False)
    with Place.of(tmp_path / "busy").held(print), pytest.raises(ValueError, match="another process is encoding"):
        encode(recipe, tmp_path / "busy", progress=False)


# ---- the job


def test_encoding_again_does_nothing(tmp_path: Path, encoded: list[int]) -> None:
    recipe = make_recipe(tmp_path)
    store = encode(recipe, tmp_path / "store", progress=False)
    assert len(store) == 64 and len(encoded) == 64 and set(encoded) == {1}
    before = files_of(tmp_path / "store")
    encode(recipe, tmp_path / "store", progress=False)
    assert len(encoded) == 64 and files_of(tmp_path / "store") == before


def test_workers_make_the_bytes_that_one_process_makes(tmp_path: Path, small_shards: None) -> None:
    recipe = make_recipe(tmp_path)
    encode(recipe, tmp_path / "alone", progress=False)
    encode(recipe, tmp_path / "together", workers=2, progress=False)
    assert len(files_of(tmp_path / "alone")) == 2 + 2 * 7 + 2 * 7
    assert files_of(tmp_path / "alone") == files_of(tmp_path / "together")


KILLED = """
import functools, pickle, sys, time
from pathlib import Path
import mutoscope.encoder
from mutoscope.data import shards
from mutoscope.encode import encode

shards.COMMIT_SECONDS = 0.0
mutoscope.encoder.Manifest = functools.partial(mutoscope.encoder.Manifest, shard_items=10)
moments, calls = mutoscope.encoder.Encoder.moments, []

def slow(self, video):
    calls.append(1)
    time.sleep(0.01 if len(calls) < 10 else 600)  # a clip that takes long, in which the kill falls
    return moments(self, video)

mutoscope.encoder.Encoder.moments = slow
if __name__ == "__main__":
    encode(pickle.loads(bytes.fromhex(sys.argv[1])), Path(sys.argv[2]), workers=int(sys.argv[3]), progress=False)
"""


def kill_midway(recipe: Recipe, store: Path, workers: int, at: int) -> int:
    """Start encoding in another process, kill it when `at` clips are stored, and say how many are."""
    script = store.parent / "killed.py"
    script.write_text(KILLED)
    argv = [sys.executable, str(script), pickle.dumps(recipe).hex(), str(store), str(workers)]
    process = subprocess.Popen(argv, start_new_session=True)
    stored = lambda: sum(path.read_bytes().count(b"\n") for path in (store / "video").glob("*.jsonl"))
    while stored() < at:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while any(group == process.pid for group in running_groups()):
        assert time.monotonic() < deadline, "a worker outlived the job"
        time.sleep(0.01)
    return stored()


def running_groups() -> Iterator[int]:
    """The process groups of all processes that run; not of zombies, which a container's init may never reap."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
            if state != "Z":
                yield int(group)


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_resumed_is_uninterrupted_and_nothing_is_redone(
    tmp_path: Path, encoded: list[int], small_shards: None, workers: int
) -> None:
    recipe = make_recipe(tmp_path)
    encode(recipe, tmp_path / "whole", progress=False)
    encoded.clear()
    done = 9 * max(workers, 1)
    assert kill_midway(recipe, tmp_path / "killed", workers, at=done) == done
    with pytest.raises(StoreError, match="not encoded yet"):
        LatentStore(tmp_path / "killed")
    encode(recipe, tmp_path / "killed", progress=False)
    assert len(encoded) == 64 - done
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_broken_clips_are_named_and_left_out(
    tmp_path: Path, encoded: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_videos(tmp_path / "clips", [f"{i}" for i in range(8)])
    (tmp_path / "clips" / "3.mp4").write_bytes(b"not a video")
    (tmp_path / "clips" / "5.mp4").write_bytes(b"")
    recipe = make_recipe(tmp_path, root=root)
    with pytest.raises(ValueError, match=r"2 of 7 clips are broken, data\.max_broken=1") as caught:
        encode(replace(recipe, data=replace(recipe.data, max_broken=1)), tmp_path / "store", progress=False)
    assert f"{root}/3.mp4" in str(caught.value) and f"{root}/5.mp4" in str(caught.value)
    store = encode(recipe, tmp_path / "store", progress=False)
    assert len(store) == len(encoded) == 6
    told = "".join(capsys.readouterr().err.split())
    assert f"{root}/3.mp4" in told and f"{root}/5.mp4" in told
    (tmp_path / "clips" / "3.mp4").unlink()
    (tmp_path / "clips" / "3.txt").unlink()
    shutil.copy(tmp_path / "clips" / "0.mp4", tmp_path / "clips" / "5.mp4")  # mended: one content under two ids
    store = encode(recipe, tmp_path / "store", progress=False)
    assert len(store) == 7 and len(encoded) == 6
    where = {item.id: index for index, item in enumerate(store.items)}
    assert torch.equal(store.read(where["5"]).moments, store.read(where["0"]).moments)
    assert store.read(where["5"]).captions == [(1.0, ("video 5",))] and store.read(where["5"]).label == NO_LABEL


def test_clips_that_come_later_are_appended(tmp_path: Path, encoded: list[int]) -> None:
    root = make_videos(tmp_path / "clips", ["b", "d", "f"])
    recipe = make_recipe(tmp_path, root=root)
    first = encode(recipe, tmp_path / "store", progress=False)
    before = files_of(tmp_path / "store")
    make_videos(tmp_path / "clips", ["b", "d", "f", "a", "e"])
    (tmp_path / "clips" / "d.txt").write_text("another caption")
    store = encode(recipe, tmp_path / "store", progress=False)
    after = files_of(tmp_path / "store")
    assert sorted(item.id for item in store.items) == ["a", "b", "d", "e", "f"] and len(encoded) == 3 + 2
    for name in ("video/00000.bin", "video/00000.jsonl", "text/00000.bin", "text/00000.jsonl"):
        assert after[name].startswith(before[name]) and len(after[name]) > len(before[name])
    old, new = ({clip.id: clip for clip in map(s.read, range(len(s)))} for s in (first, store))
    assert all(torch.equal(new[name].moments, clip.moments) for name, clip in old.items())
    assert new["d"].captions == [(1.0, ("another caption",))]
    assert store.text("another caption").shape == (2, 8)
    assert store.manifest.stats == first.manifest.stats  # frozen: models were trained on it


def test_text_can_be_added_to_a_store_but_not_left_out(tmp_path: Path, encoded: list[int]) -> None:
    root = make_videos(tmp_path / "clips", ["a", "b", "c"])
    recipe = make_recipe(tmp_path, root=root)
    silent = replace(recipe, text=None)
    assert encode(silent, tmp_path / "store", progress=False).cond(["video a"]).text is None
    assert encode(recipe, tmp_path / "store", progress=False).text("video a").shape == (2, 8)
    assert len(encode(silent, tmp_path / "store", progress=False)) == 3 and len(encoded) == 3
    (tmp_path / "clips" / "a.txt").write_text("new")
    with pytest.raises(StoreError, match=r"holds text by HashedWords\(.*no text encoder to add 1 captions"):
        encode(silent, tmp_path / "store", progress=False)


def test_windows_are_clips_in_the_order_of_training_from_files(tmp_path: Path) -> None:
    root = make_videos(tmp_path / "clips", ["a", "a!", "b", "c"], frames=12)
    recipe = make_recipe(tmp_path, replace(KL, strides=(1, 4, 4)), root)
    recipe = replace(recipe, data=replace(recipe.data, window="all", frames=1))
    store = encode(recipe, tmp_path / "store", progress=False)
    assert len(store) == 4 * 12 and not torch.equal(store.read(0).moments, store.read(1).moments)
    for split in ("train", "val"):  # "a#2" before "a#10", and "a#0" before "a!#0"
        assert store.ids(split) == [item.id for item in VideoDataset(recipe.data, split, 0).items]


def test_latents_that_overflow_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(tmp_path)
    assert recipe.autoencoder is not None
    recipe = replace(recipe, autoencoder=replace(recipe.autoencoder, dtype="fp16"),
                     data=replace(recipe.data, max_broken=0))  # fmt: skip
    moments, calls = Encoder.moments, iter(range(100))
    scale = lambda: 1e6 if next(calls) == 9 else 1.0
    monkeypatch.setattr(Encoder, "moments", lambda self, video: (moments(self, video).float() * scale()).half())
    with pytest.raises(StoreError, match=r"1 of 64 .*\n.*train/00009: its latents are not finite in fp16"):
        encode(recipe, tmp_path / "store", progress=False)


def test_the_shard_of_a_worker_that_dies_goes_to_another(
    tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, store = make_recipe(tmp_path), tmp_path / "store"
    encode(recipe, tmp_path / "whole", progress=False)
    monkeypatch.setattr(encode_shards, "ShardEncoder", encode_cases.Dying)
    encode_cases.set_deaths(store, TRIES - 1)
    encode(recipe, store, workers=2, progress=False)
    assert files_of(store) == files_of(tmp_path / "whole")
    keys = encode_cases.encoded(store)
    assert len(keys) == len(set(keys)) == 64  # what was finished is not done again
    assert "1 shards lost their worker, and go to another" in capsys.readouterr().err


def test_a_shard_over_which_workers_die_is_named(
    tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, store = make_recipe(tmp_path), tmp_path / "store"
    encode_cases.set_deaths(store, 100)
    with monkeypatch.context() as patch:
        patch.setattr(encode_shards, "ShardEncoder", encode_cases.Dying)
        with pytest.raises(StoreError, match="3 workers have died over each of 1 shards") as caught:
            encode(recipe, store, workers=2, progress=False)
    told = r"shard 00001, first clip that is not stored: .*: the process that worked on it died: Killed \(signal 9\)"
    assert re.search(told, str(caught.value))
    assert len(set(encode_cases.encoded(store))) == 54 + 5 + 2  # a clip more for each worker, and the other shards
    assert len(encode(recipe, store, progress=False)) == 64


def test_workers_that_all_die_are_not_started_for_ever(
    tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_shards, "ShardEncoder", encode_cases.Doomed)
    with pytest.raises(StoreError, match=r"(?s)each of 7 shards:.*exit code 7.*not begun"):
        encode(make_recipe(tmp_path), tmp_path / "store", workers=1, progress=False)


def test_first_frames_that_a_kill_has_lost_are_made_again(tmp_path: Path, small_shards: None) -> None:
    recipe, store = make_recipe(tmp_path), tmp_path / "store"
    manifest = encode(recipe, store, progress=False).manifest
    assert recipe.autoencoder is not None
    job = Job(Place.of(store), manifest, recipe.data, recipe.autoencoder, first_frame=True, trust_code=False)
    found = [item for split in ("train", "val") for item in VideoDataset(recipe.data, split, 0).items]
    work = list(zip(read_items(store), found, strict=True))
    make = lambda: encode_clips(job, work, partial(in_this_process, job), Bars(False))
    assert make() == {}
    whole = files_of(store)
    assert len(whole) == 2 + 2 * 7 * 3
    index = store / "image" / "00001.jsonl"
    index.write_bytes(b"".join(index.read_bytes().splitlines(keepends=True)[:7]))
    assert make() == {} and files_of(store) == whole


def test_what_a_worker_raises_is_raised(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    encode(recipe, tmp_path / "store", progress=False)
    (tmp_path / "store" / "video" / "00000.jsonl").unlink()
    (tmp_path / "store" / "video" / "00000.bin").unlink()
    with (
        ShardWriter(tmp_path / "store" / "video", 0),
        pytest.raises(StoreError, match="another process is writing this shard") as caught,
    ):
        encode(recipe, tmp_path / "store", workers=1, progress=False)
    assert "in shard_writer" in caught.value.__notes__[0]  # where, for --debug
    assert len(encode(recipe, tmp_path / "store", progress=False)) == 64  # as the cure of a damaged shard says
