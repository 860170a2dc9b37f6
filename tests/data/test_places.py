"""Stores behind URLs: the same bytes as here, resumed, locked, cached and checked."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import s3
import torch
from encode_cases import files_of
from tiny_runs import make_recipe

from mutoscope.data import places, shards
from mutoscope.data.npy import export_npy
from mutoscope.data.places import Place
from mutoscope.data.shards import Shards, ShardWriter, StoreError, shard_writer
from mutoscope.data.store import LatentStore
from mutoscope.encode import encode
from mutoscope.encoder import Encoder


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3.bucket("latents") as url:
        yield url


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A folder behind a URL, where nothing is yet; what is read of it is kept in a folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    top = "memory://latents" if request.param == "memory" else request.getfixturevalue("bucket")
    return f"{top}/{tmp_path.name}"


def records(count: int) -> list[tuple[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [(f"clip {i}", torch.randn(4, 5, generator=draw).to(torch.bfloat16)) for i in range(count)]


def objects(url: str) -> dict[str, bytes]:
    """All that lies there, by name, but the lock."""
    system, path = fsspec.url_to_fs(url)
    system.invalidate_cache()
    found = {name[len(path) + 1 :]: system.cat_file(name) for name in system.find(path)}
    return {name: content for name, content in sorted(found.items()) if name != places.LOCK}


# ---- a folder


def test_files_are_written_whole_and_listed(url: str, tmp_path: Path) -> None:
    for place in (Place.of(url), Place.of(tmp_path / "here"), Place.of(f"file://{tmp_path}/there/")):
        assert place.names() == []
        place.write("b", b"1")
        place.write("b", b"22")
        (place / "in").write("a", b"333")
        assert place.names() == ["b", "in"] and (place / "in").names() == ["a"]
        assert place.read("b") == b"22" and place.read_all(["b", "in/a"]) == [b"22", b"333"]
        with pytest.raises(FileNotFoundError):
            place.read("c")
    assert Place.of(f"file://{tmp_path}/there").path == tmp_path / "there"


def test_what_can_not_be_reached_is_told(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    with pytest.raises(ValueError, match="nosuch://x/y: can't be reached: ValueError: Protocol not known: nosuch"):
        encode(recipe, "nosuch://x/y", progress=False)
    with pytest.raises(ValueError, match="memory://x: is in this process's memory, where workers can't write"):
        encode(recipe, "memory://x", workers=1, progress=False)
    with pytest.raises(FileNotFoundError, match="memory://none: no latent store here"):
        LatentStore("memory://none")


# ---- shards


def test_a_shard_behind_a_url_is_that_of_a_folder(url: str, tmp_path: Path) -> None:
    whole = records(6)
    with ShardWriter(tmp_path / "here", 3) as writer:
        for key, tensor in whole:
            writer.append(key, tensor)
    for part in (whole[:2], whole[2:5], [], whole[5:]):
        with shard_writer(Place.of(url), 3) as writer:
            for key, tensor in part:
                writer.append(key, tensor)
    assert objects(url) == files_of(tmp_path / "here")
    read = Shards(url)
    assert all(torch.equal(read.read(key), tensor) for key, tensor in whole)


def test_a_kill_loses_what_was_not_sent(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "COMMIT_SECONDS", 0.0)
    whole = records(6)
    with shard_writer(Place.of(url), 0) as writer:
        for key, tensor in whole[:3]:
            writer.append(key, tensor)
        assert objects(url) == {}  # it is not a minute yet
        monkeypatch.setattr(shards, "SEND_SECONDS", 0.0)
        writer.append(*whole[3])
        left = objects(url)  # by a kill now
    for name, content in left.items():
        Place.of(url).write(name, content)
    assert list(Shards(url)) == [key for key, _ in whole[:4]]
    with shard_writer(Place.of(url), 0) as writer:
        for key, tensor in whole[len(writer.keys) :]:
            writer.append(key, tensor)
    with ShardWriter(tmp_path / "here", 0) as writer:
        for key, tensor in whole:
            writer.append(key, tensor)
    assert objects(url) == files_of(tmp_path / "here")


def test_what_is_read_is_kept_and_checked(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = records(4)
    with shard_writer(Place.of(url), 0) as writer:
        for key, tensor in whole:
            writer.append(key, tensor)
    parts: list[tuple[Any, ...]] = []
    read_part = Place.read_part
    monkeypatch.setattr(Place, "read_part", lambda place, *part: parts.append(part) or read_part(place, *part))
    for _ in range(2):
        for key, tensor in reversed(whole):
            assert torch.equal(Shards(url).read(key), tensor)
    assert parts == [("00000.bin", 40 * k, 40 * k + 40) for k in (3, 2, 1, 0)]  # once each
    cache = Place.of(url).cache
    assert cache is not None
    kept = bytearray((cache / "00000.bin").read_bytes())
    kept[50] ^= 1
    (cache / "00000.bin").write_bytes(kept)
    assert all(torch.equal(Shards(url).read(key), tensor) for key, tensor in whole)
    assert parts[4:] == [("00000.bin", 40, 80)]  # what was damaged here is fetched again
    data = bytearray(objects(url)["00000.bin"])
    data[50] ^= 1
    Place.of(url).write("00000.bin", bytes(data))
    (cache / "00000.bin").unlink()
    with pytest.raises(StoreError, match=f"{url}/00000.bin: record 'clip 1' .* is damaged: remove 00000.bin and"):
        Shards(url).read("clip 1")
    assert torch.equal(Shards(url).read("clip 2"), whole[2][1])
    Place.of(url).write("00000.bin", bytes(data[:130]))
    with pytest.raises(StoreError, match="cut short: 130 bytes, record 'clip 3' ends at 160"):
        Shards(url).read("clip 3")


def test_without_room_for_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with shard_writer(Place.of("memory://no-room"), 0) as writer:
        writer.append("a", torch.ones(3))
    (tmp_path / "mutoscope").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(StoreError, match="what is read of memory://no-room is kept there; set XDG_CACHE_HOME"):
        Shards("memory://no-room").read("a")


# ---- whole stores


def test_a_store_behind_a_url_is_that_of_a_folder(url: str, tmp_path: Path, small_shards: None) -> None:
    recipe = make_recipe(tmp_path)
    here = encode(recipe, tmp_path / "store", progress=False)
    moments, seen = Encoder.moments, []

    def interrupted(self: Encoder, video: torch.Tensor) -> torch.Tensor:
        seen.append(1)
        if len(seen) == 15:
            raise KeyboardInterrupt
        return moments(self, video)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoder, "moments", interrupted)
        with pytest.raises(KeyboardInterrupt):
            encode(recipe, url, progress=False)
        assert len(Shards(f"{url}/video")) == 14
        with pytest.raises(StoreError, match="50 clips or captions are not encoded yet"):
            LatentStore(url)
        away = encode(recipe, url, progress=False)
    assert len(seen) == 15 + 50  # what was finished is not done again
    assert objects(url) == files_of(tmp_path / "store")
    assert places.LOCK not in Place.of(url).names()
    assert all(torch.equal(away.read(k).moments, here.read(k).moments) for k in range(len(here)))
    export_npy(LatentStore(url), tmp_path / "away.npy")
    export_npy(here, tmp_path / "here.npy")
    assert (tmp_path / "away.npy").read_bytes() == (tmp_path / "here.npy").read_bytes()


# ---- locks


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "RENEW", 0.2)


def test_two_jobs_do_not_write_one_store(url: str, quick: None) -> None:
    place, told = Place.of(url), list[str]()
    refused = f"{url}: another process is encoding into it: .*{os.getpid()}"
    with place.held(print), pytest.raises(ValueError, match=refused), place.held(told.append):
        pass
    assert "seeing for 0.4 s whether it lives" in told[0]
    assert place.names() == []


def test_the_lock_of_a_dead_job_is_taken_over(url: str, quick: None) -> None:
    place, told = Place.of(url), list[str]()
    place.write(places.LOCK, b"another-host 7 0123 5")
    with place.held(told.append):
        assert str(os.getpid()) in place.read(places.LOCK).decode()
    assert "another-host (process 7)" in told[0]
    place.write(places.LOCK, b"")  # as a copied folder has it
    with place.held(told.append):
        assert len(told) == 2
    child = os.spawnlp(os.P_NOWAIT, "true", "true")
    os.waitpid(child, 0)
    place.write(places.LOCK, f"{os.uname().nodename} {child} 0123 5".encode())
    with place.held(told.append):
        pass
    assert len(told) == 2  # on this machine nothing has to be waited for


def test_a_lock_that_another_has_taken_over_is_left_alone(url: str, quick: None) -> None:
    place = Place.of(url)
    with place.held(print):
        time.sleep(0.5)
        assert place.read(places.LOCK).decode().split()[3] != "0"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(places, "RENEW", 60.0)
            time.sleep(0.3)
            place.write(places.LOCK, b"another-host 7 0123 5")
    assert place.read(places.LOCK) == b"another-host 7 0123 5"
