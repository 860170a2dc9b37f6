"""Weights: hashed, written whole, checked when read, and loaded with every key accounted for."""

import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mutoscope.weights import hash_weights, load_file, load_strict, read_weights, save_weights


def network(width: int = 3, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))


def test_weights_go_through_a_file(tmp_path: Path) -> None:
    path, ours, fresh = tmp_path / "final" / "model.safetensors", network(), network(seed=1)
    digest = save_weights(path, ours.state_dict(), {"step": "7"})
    state = read_weights(path)
    report = load_strict(fresh, state, str(path))
    assert hash_weights(fresh) == digest == hash_weights(ours) == hash_weights(state)
    assert report.matched == list(ours.state_dict()) and not report.missing and not report.unexpected
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]


def test_the_hash_sees_values_names_shapes_and_dtypes() -> None:
    state = {"a": torch.zeros(2, 2), "b": torch.ones(3)}
    others = [
        state | {"b": torch.tensor([1, 1, 1.0000001])},
        state | {"a": torch.zeros(4)},
        state | {"a": torch.zeros(2, 2, dtype=torch.int32)},
        {"a": state["a"], "c": state["b"]},
        {"a": state["a"]},
    ]
    assert len({hash_weights(s) for s in [state, *others]}) == 6
    assert hash_weights(dict(reversed(state.items()))) == hash_weights(state)
    assert hash_weights({"a": torch.arange(4.0).view(2, 2).T}) == hash_weights({"a": torch.tensor([[0.0, 2], [1, 3]])})


def test_the_same_weights_are_the_same_file(tmp_path: Path) -> None:
    path, written = tmp_path / "w.safetensors", set()
    for _ in range(10):
        save_weights(path, network().state_dict(), {"recipe": "DiT", "note": 'naïve "中文" / \n'})
        written.add(path.read_bytes())
    assert len(written) == 1


def test_tied_weights_are_written_twice(tmp_path: Path) -> None:
    tied = torch.randn(3)
    save_weights(tmp_path / "w.safetensors", {"a": tied, "b": tied})
    assert torch.equal(read_weights(tmp_path / "w.safetensors")["b"], tied)


def test_every_flipped_bit_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, network().state_dict())
    whole, rng = path.read_bytes(), random.Random(0)
    for _ in range(200):
        bit = rng.randrange(8 * len(whole))
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            state = read_weights(path)
            load_strict(network(), state, str(path))
        except ValueError as error:
            assert str(path) in str(error)
        else:  # in the metadata's other keys, or the padding behind the header
            assert hash_weights(state) == hash_weights(network())
    os.truncate(path, 100)
    with pytest.raises(ValueError, match="damaged, or not a safetensors file"):
        read_weights(path)


def test_files_of_others_carry_no_hash_and_are_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "w.safetensors")
    assert read_weights(tmp_path / "w.safetensors")["a"].tolist() == [1, 1]
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_weights(tmp_path / "v.safetensors")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, network().state_dict())
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_weights(path, network(seed=1).state_dict())
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_keys_that_do_not_match_are_named_and_nothing_is_loaded() -> None:
    module, state = network(), network(seed=1).state_dict()
    before = hash_weights(module)
    state["0.extra"] = state.pop("0.bias")
    state["0.weight"] = torch.zeros(5, 2)
    with pytest.raises(ValueError, match="FILE: these weights are not of this Sequential: 5 of 7 keys match") as caught:
        load_strict(module, state, "FILE")
    told = str(caught.value)
    assert "1 missing: 0.bias" in told and "1 unexpected: 0.extra" in told and "0.weight [5, 2] for [3, 2]" in told
    assert hash_weights(module) == before


def test_allowed_keys_are_reported_and_an_empty_match_is_an_error() -> None:
    module, state = network(), network(seed=1).state_dict()
    state["0.extra"] = state.pop("0.bias")
    report = load_strict(module, state, "FILE", allow_missing=["0.bias"], allow_unexpected=["0.extra"])
    assert report.missing == ["0.bias"] and report.unexpected == ["0.extra"] and len(report.matched) == 6
    with pytest.raises(ValueError, match="0 of 7 keys match"):
        load_strict(
            module, {"x": torch.zeros(1)}, "FILE", allow_missing=list(module.state_dict()), allow_unexpected=["x"]
        )


def test_a_file_is_loaded_a_tensor_at_a_time_as_strictly(tmp_path: Path) -> None:
    path, source = tmp_path / "w.safetensors", network(seed=1)
    save_weights(path, source.state_dict())
    module = network()
    before = hash_weights(module)
    assert len(load_file(module, path).matched) == 7 and hash_weights(module) == hash_weights(source) != before
    save_file({"0.weight": torch.zeros(3, 2), "x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors: these weights are not of this Sequential: 1 of 7 keys"):
        load_file(module, tmp_path / "other.safetensors")
    assert hash_weights(module) == hash_weights(source)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"w.safetensors: damaged: its tensors hash to"):
        load_file(module, path)
    os.truncate(path, 100)
    with pytest.raises(ValueError, match="damaged, or not a safetensors file"):
        load_file(module, path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_file(module, tmp_path / "v.safetensors")
