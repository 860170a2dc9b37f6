"""Encoder and the encode job: one path, so that what is stored is what would have been made on the fly."""

import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mutoscope import encode_job
from mutoscope.autoencoders.conv import ConvAutoencoder
from mutoscope.autoencoders.pretrained import load_autoencoder
from mutoscope.data.dataset import VideoDataset
from mutoscope.data.shards import ShardWriter, StoreError
from mutoscope.data.store import LatentStats, LatentStore
from mutoscope.data.video import write_video
from mutoscope.encode import Encoder, open_source
from mutoscope.encode_job import encode
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.randomness import Draw
from mutoscope.recipe import Autoencoder, Data, Recipe
from mutoscope.text.encoders import HashedWords
from mutoscope.toml import dump_toml
from mutoscope.types import NO_LABEL, ModelIO
from mutoscope.weights import save_weights

KL = ConvAutoencoder(bottleneck="kl", encoder_channels=(8,), decoder_channels=(8, 8))
FSQ = replace(KL, bottleneck="fsq", latent_channels=3, fsq_levels=(8, 5, 5))


def make_run(folder: Path, data: Data, model: ConvAutoencoder = KL, seed: int = 0) -> Autoencoder:
    """A run directory as training leaves it, of an autoencoder with random weights."""
    recipe = Recipe(data=data, model=model, objective=Diffusion(), steps=1, batch_size=1)
    torch.manual_seed(seed)
    module = model.build(ModelIO(channels=3, grid=(data.frames, data.height, data.width)))
    folder.mkdir()
    (folder / "recipe.toml").write_text(dump_toml(recipe))
    save_weights(folder / "final" / "model.safetensors", module.state_dict())
    return Autoencoder(path=str(folder), recipe="quickstart.autoencoder")


def make_recipe(folder: Path, model: ConvAutoencoder = KL, root: str = "flying-mnist://tiny") -> Recipe:
    data = Data(root=root, frames=4, height=16, width=16, val_fraction=0.25, num_labels=10)
    return Recipe(
        data=data,
        autoencoder=make_run(folder / "autoencoder", data, model),
        text=HashedWords(width=8, max_length=10),
        model=KL,
        objective=Diffusion(),
        steps=1,
        batch_size=4,
    )


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def make_videos(folder: Path, names: list[str], frames: int = 4) -> str:
    for seed, name in enumerate(names):
        noise = np.random.default_rng(seed).integers(0, 256, (frames, 16, 16, 3), np.uint8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(folder / f"{name}.mp4", noise, fps=4)
        (folder / f"{name}.txt").write_text(f"video {name}")
    return str(folder)


def files_of(store: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*")) if p.name != ".lock" and p.is_file()
    }


# ---- Encoder


def build_encoder(recipe: Recipe) -> Encoder:
    assert recipe.autoencoder is not None and recipe.text is not None
    autoencoder = load_autoencoder(recipe.autoencoder)
    return Encoder(autoencoder, text=recipe.text.build(), dtype=recipe.autoencoder.dtype)


@pytest.mark.parametrize("model", [KL, FSQ], ids=["moments", "tokens"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_stored_is_on_the_fly_bit_for_bit(tmp_path: Path, model: ConvAutoencoder, dtype: str) -> None:
    recipe = make_recipe(tmp_path, model)
    assert recipe.autoencoder is not None
    recipe = replace(recipe, autoencoder=replace(recipe.autoencoder, dtype=dtype))
    encode(recipe, tmp_path / "store", progress=False)
    live, stored = build_encoder(recipe), build_encoder(recipe)
    batches = [[(3, 100), (0, 101), (3, 102)], [(47, 7)]]  # of one size and another
    from_files = open_source(recipe, live, "train").loader(batches)
    from_store = open_source(
        replace(recipe, data=replace(recipe.data, latents=str(tmp_path / "store"))), stored, "train"
    )
    assert live.stats == stored.stats and (live.stats is None) == (model is FSQ)
    for a, b in zip(from_files, from_store.loader(batches), strict=True):
        ours, theirs = (e.batch(c, Draw(0, "train", c.samples)) for e, c in ((live, a), (stored, b)))
        assert ours.ids == theirs.ids and ours.samples == theirs.samples
        for name in ("latents", "tokens", "video"):
            x, y = getattr(ours, name), getattr(theirs, name)
            assert (x is None) == (y is None) and (x is None or (torch.equal(x, y) and x.dtype == y.dtype))
        for name in ("text", "text_mask", "label"):
            assert torch.equal(getattr(ours.cond, name), getattr(theirs.cond, name))
    if model is KL:  # one clip in two places of the stream: one posterior, two draws
        twice = next(from_store.loader(batches))
        assert torch.equal(twice.moments[0], twice.moments[2])
        latents = stored.batch(twice, Draw(0, "train", twice.samples)).latents
        assert latents is not None and not torch.equal(latents[0], latents[2])


def test_a_clip_is_encoded_alike_in_any_company(tmp_path: Path) -> None:
    encoder = build_encoder(make_recipe(tmp_path))
    video = torch.rand(5, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    together = encoder.moments(video)
    assert all(torch.equal(encoder.moments(video[i : i + 1]), together[i : i + 1]) for i in range(5))


def test_latents_are_normalised_and_decode_undoes_it(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    encoder = build_encoder(recipe)
    source = open_source(recipe, encoder, "train")
    clips = next(source.loader([[(i, i) for i in range(48)]]))
    latents = encoder.batch(clips, Draw(0, "train", clips.samples)).latents
    assert latents is not None and latents.dtype == torch.float32
    by_channel = latents.movedim(1, 0).flatten(1)
    assert by_channel.mean(1).abs().max() < 0.1 and (by_channel.std(1) - 1).abs().max() < 0.1
    video = torch.rand(2, 3, 4, 16, 16) * 2 - 1
    moments = encoder.moments(video)
    assert encoder.autoencoder is not None
    expected = encoder.autoencoder.decode(moments[:, :4]).clamp(-1, 1)  # type: ignore[operator]
    assert torch.allclose(encoder.decode(encoder.latents(moments)), expected, atol=1e-5)
    with pytest.raises(ValueError, match="mean and standard deviation are not known"):
        build_encoder(recipe).latents(moments)


def test_a_draw_is_from_the_posterior() -> None:
    class Wide(torch.nn.Module):
        spec = replace(KL.build(ModelIO(channels=3, grid=(4, 16, 16))).spec, channels=1)  # type: ignore[type-var]

    encoder = Encoder(Wide(), stats=LatentStats(mean=(1.0,), std=(2.0,)))
    moments = torch.cat([torch.full((1, 1, 10, 50, 50), 5.0), torch.full((1, 1, 10, 50, 50), math.log(36.0))], dim=1)
    drawn = encoder.latents(moments, Draw(0, "train", [3]))
    assert drawn.mean().item() == pytest.approx((5 - 1) / 2, abs=0.1)
    assert drawn.std().item() == pytest.approx(6 / 2, abs=0.1)
    assert torch.equal(encoder.latents(moments), torch.full((1, 1, 10, 50, 50), 2.0))


def test_without_an_autoencoder_all_is_pixels() -> None:
    data = Data(root="flying-mnist://tiny", frames=4, height=16, width=16)
    recipe = Recipe(data=data, model=KL, objective=Diffusion(), steps=1, batch_size=4)
    encoder = Encoder()
    source = open_source(recipe, encoder, "val")
    clips = next(source.loader([[(0, 0), (1, 1)]]))
    batch = encoder.batch(clips)
    assert batch.video is not None and batch.latents is batch.video and batch.cond.text is None
    assert batch.video.shape == (2, 3, 4, 16, 16) and -1 <= batch.video.min() < batch.video.max() <= 1
    assert torch.equal(encoder.decode(batch.video), batch.video)
    assert torch.equal(source.videos([0, 1]), clips.video)


@pytest.mark.parametrize("model", [KL, FSQ], ids=["moments", "tokens"])
def test_a_store_shows_its_clips_through_the_autoencoder(tmp_path: Path, model: ConvAutoencoder) -> None:
    recipe = make_recipe(tmp_path, model)
    encode(recipe, tmp_path / "store", progress=False)
    recipe = replace(recipe, data=replace(recipe.data, latents=str(tmp_path / "store")))
    videos = open_source(recipe, build_encoder(recipe), "val").videos(range(3))
    assert videos.shape == (3, 4, 16, 16, 3) and videos.dtype == torch.uint8


# ---- what is refused


def test_another_autoencoder_is_refused_with_both_hashes(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    ours = encode(recipe, tmp_path / "store", progress=False).manifest.autoencoder_hash
    other = replace(recipe, autoencoder=make_run(tmp_path / "other", recipe.data, seed=1))
    with pytest.raises(StoreError) as caught:
        encode(other, tmp_path / "store", progress=False)
    theirs = encode(other, tmp_path / "store2", progress=False).manifest.autoencoder_hash
    assert ours != theirs and ours in str(caught.value) and theirs in str(caught.value)
    training = replace(other, data=replace(other.data, latents=str(tmp_path / "store")))
    with pytest.raises(StoreError, match=theirs):
        open_source(training, build_encoder(training), "train")


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
    with encode_job._locked(tmp_path / "busy"), pytest.raises(StoreError, match="another process is encoding"):
        encode(recipe, tmp_path / "busy", progress=False)


# ---- the job


def test_encoding_again_does_nothing(tmp_path: Path, encoded: list[int]) -> None:
    recipe = make_recipe(tmp_path)
    store = encode(recipe, tmp_path / "store", progress=False)
    assert len(store) == 64 and len(encoded) == 64 and set(encoded) == {1}
    before = files_of(tmp_path / "store")
    encode(recipe, tmp_path / "store", progress=False)
    assert len(encoded) == 64 and files_of(tmp_path / "store") == before


def test_workers_make_the_bytes_that_one_process_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(tmp_path)
    small = encode_job.Manifest
    monkeypatch.setattr("mutoscope.encode.Manifest", lambda **fields: small(**fields, shard_items=10))
    encode(recipe, tmp_path / "alone", progress=False)
    encode(recipe, tmp_path / "together", workers=2, progress=False)
    assert len(files_of(tmp_path / "alone")) == 2 + 2 * 7 + 2 * 7
    assert files_of(tmp_path / "alone") == files_of(tmp_path / "together")


KILLED = """
import pickle, sys, time
from pathlib import Path
from mutoscope.data import shards
from mutoscope.encode import Encoder
from mutoscope.encode_job import encode
shards.COMMIT_SECONDS = 0.0
moments = Encoder.moments
def slow(self, video):
    time.sleep(0.02)
    return moments(self, video)
Encoder.moments = slow
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
    return stored()


def test_killed_and_resumed_is_uninterrupted_and_nothing_is_redone(tmp_path: Path, encoded: list[int]) -> None:
    recipe = make_recipe(tmp_path)
    encode(recipe, tmp_path / "whole", progress=False)
    encoded.clear()
    done = kill_midway(recipe, tmp_path / "killed", workers=0, at=20)
    assert 20 <= done < 64
    with pytest.raises(StoreError, match="not encoded yet"):
        LatentStore(tmp_path / "killed")
    encode(recipe, tmp_path / "killed", progress=False)
    assert len(encoded) == 64 - done
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


@pytest.mark.slow
def test_workers_die_with_a_job_that_is_killed(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, root="flying-mnist://demo")
    done = kill_midway(recipe, tmp_path / "killed", workers=2, at=300)
    time.sleep(1)
    settled = files_of(tmp_path / "killed")
    time.sleep(1)
    assert files_of(tmp_path / "killed") == settled and done < 8400
    encode(recipe, tmp_path / "killed", workers=2, progress=False)
    encode(recipe, tmp_path / "whole", progress=False)
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_a_broken_clip_is_named_after_the_others_are_stored(tmp_path: Path, encoded: list[int]) -> None:
    root = make_videos(tmp_path / "clips", [f"{i}" for i in range(8)])
    (tmp_path / "clips" / "3.mp4").write_bytes(b"not a video")
    (tmp_path / "clips" / "5.mp4").write_bytes(b"")
    recipe = make_recipe(tmp_path, root=root)
    with pytest.raises(StoreError, match="2 of 8 clips could not be encoded") as caught:
        encode(recipe, tmp_path / "store", progress=False)
    assert f"{root}/3.mp4" in str(caught.value) and f"{root}/5.mp4" in str(caught.value)
    assert len(encoded) == 6
    with pytest.raises(StoreError, match="not encoded yet"):
        LatentStore(tmp_path / "store")
    (tmp_path / "clips" / "3.mp4").unlink()
    (tmp_path / "clips" / "3.txt").unlink()
    shutil.copy(tmp_path / "clips" / "0.mp4", tmp_path / "clips" / "5.mp4")  # mended: one content under two ids
    store = encode(recipe, tmp_path / "store", progress=False)
    assert len(store) == 7 and len(encoded) == 6
    where = {item.id: index for index, item in enumerate(store.items)}
    assert torch.equal(store.read(where["5"]).moments, store.read(where["0"]).moments)
    assert store.read(where["5"]).caption == "video 5" and store.read(where["5"]).label == NO_LABEL


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
    assert new["d"].caption == "another caption"
    assert store.text("another caption").shape == (2, 8)
    assert store.manifest.stats == first.manifest.stats  # frozen: models were trained on it


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
    recipe = replace(recipe, autoencoder=replace(recipe.autoencoder, dtype="fp16"))
    moments, calls = Encoder.moments, iter(range(100))
    scale = lambda: 1e6 if next(calls) == 9 else 1.0
    monkeypatch.setattr(Encoder, "moments", lambda self, video: (moments(self, video).float() * scale()).half())
    with pytest.raises(StoreError, match=r"1 of 64 .*\n.*train/00009: its latents are not finite in fp16"):
        encode(recipe, tmp_path / "store", progress=False)


def die(*arguments: object) -> None:
    os._exit(9)


def test_a_worker_that_dies_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_job, "_work", die)
    with pytest.raises(RuntimeError, match="a worker process ended with exit code 9"):
        encode(make_recipe(tmp_path), tmp_path / "store", workers=1, progress=False)


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
    assert "in encode_shards" in caught.value.__notes__[0]  # where, for --debug
    assert len(encode(recipe, tmp_path / "store", progress=False)) == 64  # as the cure of a damaged shard says
