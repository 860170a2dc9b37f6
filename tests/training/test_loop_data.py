"""Training on clips from disk: several shapes, several sets, and files that break on the way."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import make_run

from mutoscope.data.video import write_video
from mutoscope.encode import encode
from mutoscope.models.dit import DiT
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.randomness import seed_of
from mutoscope.recipe import Bucket, ClipSet, Data, Recipe, Sampler
from mutoscope.run import Run
from mutoscope.text.encoders import HashedWords
from mutoscope.training.loop import train
from mutoscope.training.signals import Stopped
from mutoscope.weights import read_weights


def write_clips(folder: Path, count: int, frames: int = 4, height: int = 16, width: int = 16) -> str:
    folder.mkdir(exist_ok=True)
    for i in range(count):
        drawn = np.random.default_rng(seed_of(folder.name, i)).integers(0, 256, (frames, height, width, 3), np.uint8)
        name = folder / f"{frames}x{height}x{width}-{i}"
        write_video(name.with_suffix(".mp4"), drawn, 8, lossless=True)
        name.with_suffix(".txt").write_text(f"noise {i}")
    return str(folder)


@pytest.fixture
def clips(tmp_path: Path) -> str:
    """Eight square clips of 4 frames, six wide ones of 8, and two that are too short."""
    write_clips(tmp_path / "clips", 8)
    write_clips(tmp_path / "clips", 6, frames=8, width=32)
    return write_clips(tmp_path / "clips", 2, frames=2)


def recipe(root: str, **data: object) -> Recipe:
    buckets = (Bucket(frames=4, height=16, width=16, batch_size=4), Bucket(frames=8, height=16, width=32, batch_size=2))
    common = {"root": root, "frames": 4, "height": 16, "width": 16, "buckets": buckets}
    common |= {"short": "drop", "window": "random", "flip": 0.5}
    return Recipe(
        data=Data(**common | data),
        text=HashedWords(width=8, max_length=4),
        model=DiT(depth=2, width=16, heads=2, patch=(2, 8, 8)),
        objective=Diffusion(),
        sampler=Sampler(steps=1),
        steps=12,
        batch_size=2,
        log_every=1,
        validate_every=6,
        sample_every=6,
        save_every=5,
        num_samples=2,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_weights(Run(folder).weights)


def test_buckets_train_resume_exactly_and_tell_what_they_left_out(
    tmp_path: Path, clips: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = recipe(clips)
    train(ours, tmp_path / "whole")
    told = capsys.readouterr().err
    assert "at 4x16x16" in told and "at 8x16x32" in told and "clips left out" in told and "too short: 2 frames" in told
    import mutoscope.training.saver as saver

    save, seen = saver.save_checkpoint, []

    def stop_after(folder: Path, step: int, *rest: object, group: None) -> Path:
        path = save(folder, step, *rest)  # type: ignore[arg-type]
        seen.append(json.loads((path / "state.json").read_text()))
        if step == 5:
            raise Stopped(15, "as if by SIGTERM")
        return path

    monkeypatch.setattr(saver, "save_checkpoint", stop_after)
    with pytest.raises(Stopped):
        train(ours, tmp_path / "resumed")
    train(ours, tmp_path / "resumed")
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    both = {"consumed 4x16x16", "consumed 8x16x32"}
    assert both < seen[0].keys() and all(seen[0][name] > 0 for name in both)


def test_stored_latents_train_as_the_clips_themselves_do(tmp_path: Path, clips: str) -> None:
    """Buckets, sets and the choice among captions included."""
    other = write_clips(tmp_path / "other", 4)
    for i in range(4):
        kinds = {"captions": {"short": [f"n{i}", f"m{i}"], "long": f"a noise called {i}"}}
        (tmp_path / f"other/4x16x16-{i}.json").write_text(json.dumps(kinds))
    table = tmp_path / "table.jsonl"
    rows = [{"video": f"clips/4x16x16-{i}.mp4", "short": [f"n{i}", f"m{i}"], "long": f"noise {i}"} for i in range(8)]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ours = recipe(
        str(table), caption_columns=("short", "long"), window="first", flip=0.0,
        mix=(ClipSet(root=other, repeats=2, id_token="tok"),),
    )  # fmt: skip
    ours = replace(ours, autoencoder=make_run(tmp_path / "ae", ours.data),
                   model=DiT(depth=2, width=16, heads=2, patch=(1, 4, 4)))  # fmt: skip
    encode(ours, tmp_path / "store", progress=False)
    stored = replace(ours, data=replace(ours.data, latents=str(tmp_path / "store")))
    train(replace(ours, sample_every=0), tmp_path / "clips_run")
    train(replace(stored, sample_every=0), tmp_path / "stored_run")
    a, b = weights(tmp_path / "clips_run"), weights(tmp_path / "stored_run")
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    captions = {c for line in (tmp_path / "store/items.jsonl").read_text().splitlines()
                for _, group in json.loads(line)["captions"] for c in group}  # fmt: skip
    assert {"n0", "m0", "noise 7", "tok noise 1"} <= captions


def test_a_clip_that_breaks_on_the_way_is_quarantined_and_the_run_goes_on(
    tmp_path: Path, clips: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One truncated mp4 among 16 ends a run of cogvideox-factory; Cosmos takes another clip at random, in silence."""
    from mutoscope.data import dataset

    ours = replace(recipe(clips, workers=0), sample_every=0, validate_every=0)
    listed = dataset.inspect

    def then_break(*args: object) -> object:
        infos = listed(*args)  # type: ignore[arg-type]
        (Path(clips) / "4x16x16-1.mp4").write_bytes(b"\0" * 100)
        return infos

    shutil.copytree(clips, tmp_path / "copy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "inspect", then_break)
        train(ours, tmp_path / "run")
    (line,) = (tmp_path / "run/quarantine.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert entry["id"] == "4x16x16-1" and "4x16x16-1.mp4" in entry["reason"] and entry["step"] >= 1
    assert "a clip is broken and left out (1 so far)" in capsys.readouterr().err
    assert Run(tmp_path / "run").weights.exists()

    shutil.rmtree(clips)
    shutil.copytree(tmp_path / "copy", clips)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "inspect", then_break)
        with pytest.raises(ValueError, match=r"1 clips are broken, data\.max_broken=0 may be"):
            train(replace(ours, data=replace(ours.data, max_broken=0)), tmp_path / "strict")
