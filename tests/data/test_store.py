"""LatentStore: clips and captions read back by id, damage and mismatch refused, .npy files in and out."""

import os
import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mutoscope.data.npy import export_npy, import_npy
from mutoscope.data.shards import ShardWriter, StoreError
from mutoscope.data.store import (
    LatentStats,
    LatentStore,
    Manifest,
    StoredItem,
    StoredSplit,
    Text,
    all_captions,
    read_items,
    read_manifest,
    text_key,
    write_items,
    write_manifest,
)
from mutoscope.types import NO_LABEL, LatentSpec

SPEC = LatentSpec(strides=(1, 4, 4), channels=4)
TOKENS = LatentSpec(strides=(1, 4, 4), channels=4, vocab=5120)
TRANSFORM = {"frames": 2, "height": 16, "width": 16, "fps": None, "resize": "crop", "window": "first"}
MANIFEST = Manifest(
    kind="latents",
    autoencoder_hash="a" * 32,
    spec=SPEC,
    transform=TRANSFORM,
    dtype="bfloat16",
    text=Text(identity="Words(dim=3)", length=5, dim=3),
    stats=LatentStats(mean=(0.0,) * 4, std=(1.0,) * 4),
    shard_items=4,
)


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here cuts the power."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def moments_of(place: int) -> torch.Tensor:
    return torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(place)).bfloat16()


def make_store(root: Path, count: int = 10, manifest: Manifest = MANIFEST) -> LatentStore:
    root.mkdir()
    items = [
        StoredItem(
            id=f"../../clip {i:03d}",
            key=f"key{i}",
            place=i,
            split="val" if i % 5 == 0 else "train",
            captions=[(1.0, (["", "a red 3", "naïve 中文\n"][i % 3],))],
            label=i % 2 or NO_LABEL,
        )
        for i in range(count)
    ]
    for item in items:
        with ShardWriter(root / "video", item.place // manifest.shard_items) as writer:
            writer.append(item.key, moments_of(item.place))
    with ShardWriter(root / "text", 0) as writer:
        for length, caption in enumerate(dict.fromkeys(all_captions(items, False))):
            writer.append(text_key(caption), torch.full((length, 3), float(length)).bfloat16())
    write_items(root, items)
    write_manifest(root, manifest)
    return LatentStore(root)


def test_clips_are_read_back_in_order(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    assert len(store) == 10
    assert store.ids("val") == ["../../clip 000", "../../clip 005"]
    clip = store.read(7)
    assert (clip.id, clip.captions, clip.label) == ("../../clip 007", [(1.0, ("a red 3",))], 1)
    assert clip.moments.dtype == torch.bfloat16 and torch.equal(clip.moments, moments_of(7))
    assert store.manifest == MANIFEST


def test_no_name_of_a_clip_becomes_a_path(tmp_path: Path) -> None:
    make_store(tmp_path / "store")  # its ids climb two folders up
    assert sorted(p.name for p in (tmp_path / "store").rglob("*") if p.is_file()) == sorted(
        ["manifest.json", "items.jsonl", "00000.bin", "00000.jsonl"]
        + [f"{shard:05d}.{kind}" for shard in range(3) for kind in ("bin", "jsonl")]
    )
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


def test_captions_share_their_embeddings_and_are_padded(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    cond = store.cond(["naïve 中文\n", "", "a red 3"])
    assert cond.text is not None and cond.text_mask is not None
    assert cond.text.dtype == torch.float32 and cond.text.shape == (3, 5, 3)
    assert cond.text_mask.sum(1).tolist() == [2, 0, 1]
    assert torch.equal(cond.text[0], torch.tensor([2.0, 2, 0, 0, 0])[:, None].expand(5, 3))
    with pytest.raises(StoreError, match="no record"):
        store.text("a caption that no clip has")


def test_a_split_is_a_data_set_that_crosses_processes(tmp_path: Path) -> None:
    split = StoredSplit(make_store(tmp_path / "store"), "train", 0)
    split[0, 0]  # maps a shard, which must not hinder the journey
    split = pickle.loads(pickle.dumps(split))
    clips = split.collate([split[0, 70], split[3, 71]])
    assert len(split) == 8
    assert clips.ids == ["../../clip 001", "../../clip 004"] and clips.samples == [70, 71]
    assert torch.equal(clips.moments, torch.stack([moments_of(1), moments_of(4)]))
    assert clips.captions == ["a red 3", "a red 3"] and clips.labels.tolist() == [1, NO_LABEL]
    with pytest.raises(ValueError, match="no clips in test"):
        StoredSplit(split.store, "test", 0)


def test_an_unfinished_store_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "store"
    make_store(root)
    (root / "video" / "00002.jsonl").write_bytes(b"")
    with pytest.raises(StoreError, match=r"2 clips or captions are not encoded yet \(first: ../../clip 008\)"):
        LatentStore(root)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no latent store here"):
        LatentStore(tmp_path / "empty")
    other = tmp_path / "other"
    make_store(other)
    write_manifest(other, replace(MANIFEST, stats=None))
    with pytest.raises(StoreError, match="no statistics yet"):
        LatentStore(other)


@pytest.mark.parametrize("name", ["manifest.json", "items.jsonl"])
def test_every_flipped_bit_of_manifest_and_items_is_found(tmp_path: Path, name: str) -> None:
    make_store(tmp_path / "store")
    path = tmp_path / "store" / name
    whole, rng = path.read_bytes(), random.Random(0)
    for _ in range(150):
        bit = rng.randrange(8 * (len(whole) - 1))  # the manifest's last byte is an idle newline
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            harmless = read_manifest(path.parent) == MANIFEST and len(read_items(path.parent)) == 10
        except StoreError as error:
            assert str(path) in str(error)
        else:
            assert harmless and name == "manifest.json" and chr(whole[bit // 8]).isspace()  # one space for another


def test_two_hundred_flipped_bits_of_a_whole_store_are_found(tmp_path: Path) -> None:
    """Wherever they are: what is read of the store is right, or its file is named."""
    make_store(tmp_path / "store")
    files = sorted(p for p in (tmp_path / "store").rglob("*") if p.is_file() and p.name != "manifest.json")
    rng, wholes = random.Random(1), {path: path.read_bytes() for path in files}

    def read_all() -> None:
        store = LatentStore(tmp_path / "store")
        for place in range(10):
            assert torch.equal(store.read(place).moments, moments_of(place))
        store.cond(["naïve 中文\n", "", "a red 3"])

    read_all()
    for path in rng.choices(files, weights=[len(whole) for whole in wholes.values()], k=200):
        damaged = bytearray(wholes[path])
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(StoreError) as error:
            read_all()
        assert str(path.with_suffix("")) in str(error.value)  # a record is told by its shard, whose index may be it
        path.write_bytes(wholes[path])
    read_all()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"autoencoder_hash": "b" * 32}, ["a" * 32, "b" * 32]),
        ({"transform": TRANSFORM | {"height": 32}}, ["height: 16 in the store, 32 asked for"]),
        ({"transform": TRANSFORM | {"window": "all"}}, ["window: first in the store, all asked for"]),
        ({"spec": replace(SPEC, strides=(2, 4, 4))}, ["strides=(1, 4, 4)", "strides=(2, 4, 4)"]),
        ({"dtype": "float16"}, ["dtype: bfloat16 in the store, float16 asked for"]),
        ({"text": Text(identity="Words(dim=4)", length=5, dim=4)}, ["Words(dim=3)", "Words(dim=4)"]),
    ],
)
def test_a_store_made_otherwise_is_refused_with_both_sides(
    tmp_path: Path, change: dict[str, object], told: list[str]
) -> None:
    store = make_store(tmp_path / "store", count=1)
    store.check(replace(MANIFEST, stats=None))
    store.check(replace(MANIFEST, text=None))
    with pytest.raises(StoreError) as caught:
        store.check(replace(MANIFEST, **change))  # type: ignore[arg-type]
    assert all(words in str(caught.value) for words in told)


# ---- statistics


def test_statistics_are_those_of_what_is_sampled() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(20, 3, 2, 8, 8, generator=generator) * torch.tensor([1.0, 5.0, 0.0])[:, None, None, None] + 2
    logvar = torch.tensor([-30.0, 0.0, 0.0])[:, None, None, None].expand_as(mean)  # the third has collapsed
    moments = torch.cat([mean, logvar], dim=1)
    stats = LatentStats.fit(moments, 3)
    by_channel = mean.double().movedim(1, 0).flatten(1)
    assert stats.mean == pytest.approx(by_channel.mean(1).tolist(), rel=1e-6)
    variance = by_channel.var(1, correction=0) + torch.tensor([0.0, 1.0, 1.0])
    assert stats.std == pytest.approx(variance.sqrt().tolist(), rel=1e-6)
    assert LatentStats.fit(mean, 3).std[2] == pytest.approx(1e-6)  # means alone: nothing to divide by
    with pytest.raises(ValueError, match="no train clips"):
        LatentStats.fit([], 3)


# ---- .npy


def npy(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


def imported(path: Path, root: Path, spec: LatentSpec, **more: object) -> LatentStore:
    return import_npy(path, root, spec=spec, autoencoder_hash="a" * 32, transform=TRANSFORM, **more)  # type: ignore


def test_latents_go_through_a_store_unchanged(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(2, 3, (70, 4, 2, 4, 4)).astype(np.float32)
    labels = [i % 10 for i in range(70)]
    store = imported(npy(tmp_path / "in.npy", array), tmp_path / "store", SPEC, labels=labels, captions=["a"] * 70)
    assert len(store) == 70 and store.read(3).id == "in/000003" and store.read(13).label == 3
    assert store.cond(["a"]).text is None
    assert store.manifest.stats is not None
    assert store.manifest.stats.std == pytest.approx(array.std(axis=(0, 2, 3, 4)).tolist(), rel=1e-5)
    export_npy(store, tmp_path / "out.npy")
    out = np.load(tmp_path / "out.npy")
    assert out.dtype == np.float32 and np.array_equal(out, array)


@pytest.mark.parametrize(("vocab", "dtype"), [(5120, torch.uint16), (65536, torch.uint16), (65537, torch.uint32)])
def test_tokens_go_through_a_store_unchanged_in_a_quarter_of_the_space(
    tmp_path: Path, vocab: int, dtype: torch.dtype
) -> None:
    array = np.random.default_rng(0).integers(0, vocab, (5, 2, 4, 4))
    array[0, 0, 0, :2] = 0, vocab - 1
    path = npy(tmp_path / "in.npy", array)
    store = imported(path, tmp_path / "store", replace(TOKENS, vocab=vocab))
    assert store.read(0).moments.dtype == torch.int64
    assert (tmp_path / "store" / "video" / "00000.bin").stat().st_size == array.size * dtype.itemsize
    export_npy(store, tmp_path / "out.npy")
    out = np.load(tmp_path / "out.npy")
    assert out.dtype == np.int64 and np.array_equal(out, array)


def test_exported_posteriors_are_their_means(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    export_npy(store, tmp_path / "out.npy", "val")
    expected = torch.stack([moments_of(0)[:4], moments_of(5)[:4]]).float().numpy()
    assert np.array_equal(np.load(tmp_path / "out.npy"), expected)


def test_a_failed_export_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path / "store")
    (tmp_path / "out.npy").write_bytes(b"old")
    with pytest.raises(ValueError, match="no 'test' clips"):
        export_npy(store, tmp_path / "out.npy", "test")
    records = store._video.records
    monkeypatch.setitem(records, "key9", records["key9"]._replace(shape=(8, 1, 8, 4)))
    with pytest.raises(ValueError, match=r"clip 009 is \[4, 1, 8, 4\], the clips before it \[4, 2, 4, 4\]"):
        export_npy(store, tmp_path / "out.npy")
    assert (tmp_path / "out.npy").read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.npy", "store"]


@pytest.mark.parametrize(
    ("array", "spec", "told"),
    [
        (np.zeros((2, 3, 2, 4, 4), np.float32), SPEC, r"floats \(N, 4, T, H, W\), found float32 \[2, 3, 2, 4, 4\]"),
        (np.zeros((2, 2, 4, 4), np.float32), TOKENS, "tokens must be integers"),
        (np.full((2, 2, 4, 4), 5120), TOKENS, "clip 0 holds tokens from 5120 to 5120, the vocabulary is 0 to 5119"),
        (np.full((2, 2, 4, 4), -1), TOKENS, "clip 0 holds tokens from -1"),
        (np.full((1, 4, 2, 4, 4), np.nan, np.float32), SPEC, "clip 0 holds NaN"),
        (np.zeros((0, 2, 4, 4), np.int64), TOKENS, "no clips in it"),
        (np.array([{"run": "code"}], dtype=object), TOKENS, "not an array that can be imported"),
    ],
)
def test_an_array_that_is_not_what_it_should_be_is_refused(
    tmp_path: Path, array: np.ndarray, spec: LatentSpec, told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        imported(npy(tmp_path / "in.npy", array), tmp_path / "store", spec)


def test_an_import_that_was_killed_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = npy(tmp_path / "in.npy", np.random.default_rng(0).normal(size=(70, 4, 2, 4, 4)).astype(np.float32))
    append: Callable[..., None] = ShardWriter.append
    appended: list[str] = []

    def fail_at_67(writer: ShardWriter, key: str, tensor: torch.Tensor) -> None:
        if len(appended) == 67:
            raise KeyboardInterrupt
        appended.append(key)
        append(writer, key, tensor)

    monkeypatch.setattr(ShardWriter, "append", fail_at_67)
    with pytest.raises(KeyboardInterrupt):
        imported(path, tmp_path / "store", SPEC)
    with pytest.raises(FileNotFoundError):
        LatentStore(tmp_path / "store")
    monkeypatch.setattr(ShardWriter, "append", append)
    assert len(imported(path, tmp_path / "store", SPEC)) == 70
    with pytest.raises(FileExistsError, match="there is a store already"):
        imported(path, tmp_path / "store", SPEC)
    other = npy(tmp_path / "other.npy", np.zeros((70, 4, 2, 4, 4), np.float32))
    (tmp_path / "store" / "manifest.json").unlink()
    with pytest.raises(StoreError, match="holds the start of another import"):
        imported(other, tmp_path / "store", SPEC)
