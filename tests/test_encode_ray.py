"""Encoding on a Ray cluster: the store that one process makes, whatever dies."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import encode_cases
import pytest
import s3
from encode_cases import files_of, make_videos
from tiny_runs import make_recipe

from mutoscope import encode_ray
from mutoscope.data.places import Place
from mutoscope.data.shards import StoreError
from mutoscope.encode import encode
from mutoscope.encode_shards import TRIES, Job, ShardEncoder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket, and a cluster of two CPUs whose processes find it and what tests import."""
    with s3.bucket("latents") as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        with encode_ray.cluster(encode_ray.LOCAL, 2):
            yield url


def test_what_actors_make_is_what_one_process_makes(
    tmp_path: Path, bucket: str, small_shards: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a file that can't be decoded costs nothing but itself."""
    root = make_videos(tmp_path / "clips", [f"{i:02d}" for i in range(24)])
    broken = bytearray((tmp_path / "clips" / "07.mp4").read_bytes())
    middle = broken.index(b"mdat") + 1200
    broken[middle : middle + 400] = bytes(400)  # its head and index are whole
    (tmp_path / "clips" / "07.mp4").write_bytes(broken)
    recipe, store = make_recipe(tmp_path, root=root), tmp_path / "store"
    encode(recipe, tmp_path / "whole", progress=False)
    capsys.readouterr()
    encode(recipe, store, workers=2, ray="local", progress=False)
    assert files_of(store) == files_of(tmp_path / "whole")
    told = capsys.readouterr().err
    assert "1 clips could not be encoded" in told and f"(on {os.uname().nodename})" in told
    (tmp_path / "clips" / "07.mp4").unlink()
    (tmp_path / "clips" / "07.txt").unlink()
    monkeypatch.setattr(encode_ray, "on_ray", lambda *job: pytest.fail("there is nothing left to do"))
    assert len(encode(recipe, store, ray="local", progress=False)) == 23


@pytest.mark.slow
def test_the_shard_of_an_actor_that_is_killed_goes_to_another(
    tmp_path: Path, bucket: str, small_shards: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, store = make_recipe(tmp_path), tmp_path / "store"
    encode(recipe, tmp_path / "whole", progress=False)
    monkeypatch.setattr(encode_ray, "_Actor", encode_cases.DyingActor)
    encode_cases.set_deaths(store, TRIES - 1)
    encode(recipe, store, workers=2, ray="local", progress=False)
    assert files_of(store) == files_of(tmp_path / "whole")
    keys = encode_cases.encoded(store)
    assert len(keys) == len(set(keys)) == 64  # what was finished is not done again
    assert "1 shards lost their worker, and go to another" in capsys.readouterr().err


@pytest.mark.slow
def test_actors_write_behind_a_url(tmp_path: Path, bucket: str, small_shards: None) -> None:
    recipe = make_recipe(tmp_path)
    encode(recipe, tmp_path / "whole", progress=False)
    encode(recipe, f"{bucket}/store", ray="local", progress=False)
    away = Place.of(f"{bucket}/store")
    names = files_of(tmp_path / "whole")
    assert {name: away.read(name) for name in names} == names


@pytest.mark.slow
def test_a_shard_over_which_actors_die_is_named(
    tmp_path: Path, bucket: str, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, store = make_recipe(tmp_path), tmp_path / "store"
    encode_cases.set_deaths(store, 100)
    with monkeypatch.context() as patch:
        patch.setattr(encode_ray, "_Actor", encode_cases.DyingActor)
        with pytest.raises(StoreError, match=r"3 workers have died over .* 1 shards:\n  shard 00001, .*its actor died"):
            encode(recipe, store, ray="local", progress=False)
    assert encode_cases.deaths(store) == 100 - TRIES
    assert len(encode(recipe, store, progress=False)) == 64


@pytest.mark.slow
def test_what_an_actor_raises_is_raised(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, store = make_recipe(tmp_path), tmp_path / "store"
    on_ray = encode_ray.on_ray
    elsewhere = lambda job, *rest: on_ray(replace(job, out=Place.of(tmp_path / "elsewhere")), *rest)
    monkeypatch.setattr(encode_ray, "on_ray", elsewhere)
    with pytest.raises(StoreError, match=f"elsewhere: {os.uname().nodename} does not see the store there") as caught:
        encode(recipe, store, ray="local", progress=False)
    assert "in _load" in caught.value.__notes__[0]


def test_a_worker_that_does_not_see_the_store(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    assert recipe.autoencoder is not None
    manifest = encode(recipe, tmp_path / "store", progress=False).manifest
    for out, seen in ((tmp_path / "store", replace(manifest, shard_items=3)), (tmp_path / "none", manifest)):
        job = Job(Place.of(out), seen, recipe.data, recipe.autoencoder, False, False)
        with pytest.raises(StoreError, match="does not see the store there; all machines need one folder"):
            next(ShardEncoder(job).encode((0, []), "cpu"))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nonsense"])
def test_where_there_is_no_cluster(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # of the tests above
    with (
        pytest.raises(ValueError, match=f"--ray {address}: no Ray cluster there: .*(refused|address format)"),
        encode_ray.cluster(address, 0),
    ):
        pass


def test_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r'^--ray: .*; pip install "mutoscope\[ray\]"$'):
        encode(make_recipe(tmp_path), tmp_path / "store", ray="local", progress=False)
    assert not (tmp_path / "store").exists()
