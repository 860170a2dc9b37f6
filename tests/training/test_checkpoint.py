"""Checkpoints under kills, full disks, flipped bits and forged files.

Run as a program, this file saves checkpoints in a folder, and its children are killed at it.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from mutoscope.training.checkpoint import (
    DamagedCheckpoint,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    verify,
)
from mutoscope.training.engine import Engine

ALONE = Engine(rank=0, world=1, device=torch.device("cpu"))


def tree(step: int, size: int = 5) -> dict[str, Any]:
    """Tensors of several dtypes and depths, all of them functions of `step`."""
    numbers = torch.arange(size) + 1000.0 * step
    return {
        "model": {"blocks.0.weight": numbers.reshape(-1, 1).clone(), "bias": numbers.bfloat16(), "scalar": numbers[0]},
        "optimizer": {"blocks.0.weight": {"step": torch.tensor(float(step)), "exp_avg": numbers.double().sqrt()}},
        "ema": {"counts": torch.full((3,), step), "mask": torch.tensor([True, False])},
    }


def blank(size: int = 5) -> dict[str, Any]:
    return fill(tree(0, size), torch.zeros_like)


def fill(values: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {k: fill(v, change) if isinstance(v, dict) else change(v) for k, v in values.items()}


def flat(values: dict[str, Any]) -> dict[str, Tensor]:
    pairs = ((k, v) for k, v in values.items())
    return dict(itertools.chain.from_iterable(flat(v).items() if isinstance(v, dict) else [(k, v)] for k, v in pairs))


def save(folder: Path, step: int, size: int = 5) -> Path:
    return save_checkpoint(folder, step, tree(step, size), {"samples": 8 * step}, ALONE)


def check(path: Path, size: int = 5) -> int:
    """Verify and load a checkpoint; its step, after every number was compared with what was saved."""
    verify(path)
    found = blank(size)
    state = load_checkpoint(path, found)
    expected = flat(tree(state["step"], size))
    assert all(torch.equal(value, expected[name]) for name, value in flat(found).items())
    assert state == {"step": int(path.name), "samples": 8 * int(path.name)}
    return state["step"]


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    warnings: list[str] = []
    return newest_checkpoint(folder, ALONE, warnings.append), warnings


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def rehash(path: Path) -> None:
    """Make the manifest's hashes those of the files, as a forger would."""
    hashes = {p.name: xxhash.xxh3_128(p.read_bytes()).hexdigest() for p in path.iterdir() if p.name != "manifest.json"}
    (path / "manifest.json").write_text(json.dumps({"xxh3_128": hashes}))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of the scenes below, all played in one process of its own, and what it says of them."""
    folder = tmp_path_factory.mktemp("scenes")
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


# ---------------------------------------------------------------- saved and loaded


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    path = save(tmp_path, 500)
    assert path == tmp_path / "00000500"
    assert names(path) == [".metadata", "__0_0.distcp", "manifest.json", "state.json"]
    assert check(path) == 500


def test_tensors_are_filled_in_place(tmp_path: Path) -> None:
    path, weights = save(tmp_path, 1), blank()
    pointers = {name: value.data_ptr() for name, value in flat(weights).items()}
    load_checkpoint(path, weights)
    assert {name: value.data_ptr() for name, value in flat(weights).items()} == pointers


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 300):
        save(tmp_path, step)
    assert names(tmp_path) == ["00000010", "00000300"]
    assert newest(tmp_path) == (tmp_path / "00000300", [])
    assert [check(path) for path in list_checkpoints(tmp_path)] == [10, 300]


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / "state.json").write_text("{}")
    check(save(tmp_path, 2))
    assert names(tmp_path) == ["00000001", "00000002"]


def test_a_checkpoint_can_be_moved(tmp_path: Path) -> None:
    path = save(tmp_path / "here", 3)
    check(path.rename(tmp_path / "00000003"))


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert newest(tmp_path) == (None, [])
    assert newest(tmp_path / "nowhere") == (None, [])


def test_what_is_no_tensor_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tensors only, and optimizer\.step is int"):
        save_checkpoint(tmp_path, 1, {"optimizer": {"step": 3}}, {}, ALONE)
    assert names(tmp_path) == []


# ---------------------------------------------------------------- checkpoints of something else


def test_keys_that_either_side_lacks_are_named(tmp_path: Path) -> None:
    path, other = save(tmp_path, 1), blank()
    del other["ema"]
    other["model"]["extra"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"lacks \['model\.extra'\] and holds \['ema\.counts', 'ema\.mask'\] more"):
        load_checkpoint(path, other)
    assert all(not value.any() for value in flat(other).values())


@pytest.mark.parametrize("wrong", [torch.zeros(6, 1), torch.zeros(5), torch.zeros(5, 1, dtype=torch.float64)])
def test_another_shape_or_dtype_is_named(tmp_path: Path, wrong: Tensor) -> None:
    path, other = save(tmp_path, 1), blank()
    other["model"]["blocks.0.weight"] = wrong
    with pytest.raises(ValueError, match=r"model\.blocks\.0\.weight is \[5, 1\] torch\.float32 in it") as error:
        load_checkpoint(path, other)
    assert f"{list(wrong.shape)} {wrong.dtype} here" in str(error.value)
    assert all(not value.any() for value in flat(other).values())


# ---------------------------------------------------------------- damage


def test_two_hundred_flipped_bits_are_all_noticed(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    rng = random.Random(0)
    files = sorted(path.iterdir())
    for file in rng.choices(files, k=200):
        whole = file.read_bytes()
        torn = bytearray(whole)
        torn[rng.randrange(len(torn))] ^= 1 << rng.randrange(8)
        file.write_bytes(torn)
        with pytest.raises(DamagedCheckpoint) as error:
            verify(path)
        assert file.name in str(error.value) or file.name == "manifest.json"  # a manifest's bit accuses another file
        file.write_bytes(whole)
    check(path)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "state.json", "manifest.json"])
def test_files_that_are_missing_cut_or_grown_are_named(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 7)
    file, whole = path / name, (path / name).read_bytes()
    for torn in (None, b"", whole[:-1], whole + b"!"):
        file.unlink() if torn is None else file.write_bytes(torn)
        with pytest.raises(DamagedCheckpoint, match=name):
            verify(path)
    file.write_bytes(whole)
    check(path)


def test_files_that_were_not_written_are_named(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    (path / "__1_0.distcp").write_bytes(b"")
    with pytest.raises(DamagedCheckpoint, match=r"__1_0\.distcp: not in the manifest"):
        verify(path)
    (path / "__1_0.distcp").unlink()
    (path / "state.json").unlink()
    (path / "state.json").mkdir()
    with pytest.raises(DamagedCheckpoint, match=r"state\.json: unreadable"):
        verify(path)


@pytest.mark.parametrize("manifest", ["", "[]", "null", "{}", '{"xxh3_128": null}', '{"xxh3_128": 3}', "\xff"])
def test_a_manifest_that_is_none_is_named(tmp_path: Path, manifest: str) -> None:
    path = save(tmp_path, 7)
    (path / "manifest.json").write_text(manifest, encoding="latin-1")
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json"):
        verify(path)


def test_a_damaged_newest_falls_back_and_says_so(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / "__0_0.distcp").write_bytes(b"")
    path, warnings = newest(tmp_path)
    assert path is not None and check(path) == 1
    assert len(warnings) == 1 and "00000002/__0_0.distcp" in warnings[0] and "falling back" in warnings[0]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_afresh(tmp_path: Path) -> None:
    for step in (1, 2):
        (save(tmp_path, step) / "state.json").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"every checkpoint .* is damaged"):
        newest(tmp_path)


def test_what_training_fell_back_past_is_not_counted_among_the_last_two(tmp_path: Path) -> None:
    save(tmp_path, 10)
    (save(tmp_path, 20) / "state.json").unlink()
    save(tmp_path, 15)
    assert names(tmp_path) == ["00000010", "00000015"]
    save(tmp_path, 25)
    assert [check(path) for path in list_checkpoints(tmp_path)] == [15, 25]


# ---------------------------------------------------------------- forgery


class Command:
    """Pickled, a shell command that runs when it is read."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def by_dotted_name(command: str) -> bytes:
    """os.system, reached through an allowed module: protocol 4 follows dots in names."""
    word = lambda s: b"\x8c" + bytes([len(s)]) + s.encode()
    return b"\x80\x04" + word("torch") + word("serialization.os.system") + b"\x93" + word(command) + b"\x85R."


@pytest.mark.parametrize(
    "forge", [lambda command: pickle.dumps(Command(command)), by_dotted_name], ids=["name", "dots"]
)
def test_a_forged_index_does_not_run(tmp_path: Path, forge: Callable[[str], bytes]) -> None:
    path, ran = save(tmp_path, 1), tmp_path / "ran"
    forged = forge(f"touch {ran}")
    (path / ".metadata").write_bytes(forged)
    rehash(path)
    assert newest(tmp_path)[0] == path  # the hashes are in order
    with pytest.raises(DamagedCheckpoint, match=r"asks for .*\.system; refused"):
        load_checkpoint(path, blank())
    assert not ran.exists()
    pickle.loads(forged)
    assert ran.exists()  # anyone else would have run it


def test_forged_tensors_do_not_run(tmp_path: Path) -> None:
    path, ran = save(tmp_path, 1), tmp_path / "ran"
    forged = io.BytesIO()
    torch.save(Command(f"touch {ran}"), forged, _use_new_zipfile_serialization=False)
    data = path / "__0_0.distcp"
    data.write_bytes(forged.getvalue().ljust(data.stat().st_size, b"\0"))
    rehash(path)
    with pytest.raises(pickle.UnpicklingError):
        load_checkpoint(path, blank())
    assert not ran.exists()


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    """What is no tensor is a pickle in a data file: torch.distributed.checkpoint would read it without limits."""
    path = save(tmp_path, 1)
    shutil.rmtree(path)
    objects = {"model": {"a": torch.zeros(1), "b": Command("true")}}
    with pytest.warns(UserWarning, match="uninitialized"):
        dcp_save(objects, storage_writer=FileSystemWriter(path), no_dist=True)
    rehash(path)
    with pytest.raises(DamagedCheckpoint, match="BytesStorageMetadata; refused"):
        load_checkpoint(path, {"model": {"a": torch.zeros(1), "b": torch.zeros(1)}})


# ---------------------------------------------------------------- kills and full disks


def test_killed_before_every_operation_on_files(scenes: tuple[Path, dict[str, Any]]) -> None:
    said = scenes[1]["operations"]
    assert said["kills"] >= 20
    assert 0 < said["new"] < said["kills"]  # it was killed both before and after the rename that makes a checkpoint


def test_killed_at_random_moments(scenes: tuple[Path, dict[str, Any]]) -> None:
    said = scenes[1]["moments"]
    assert said["kills"] == 15 and said["amid"] >= 5


def test_a_full_disk_leaves_the_old_checkpoint_and_no_rubbish(scenes: tuple[Path, dict[str, Any]]) -> None:
    folder = scenes[0] / "full"
    assert names(folder) == ["00000001"]
    assert check(folder / "00000001") == 1
    assert scenes[1]["full"] == "refused"
    check(save(folder, 2))


def play_operations(folder: Path) -> dict[str, int]:
    """Kill save after save, each before its next operation on files, going on from what is left, until one finishes."""
    save(folder, 1)
    kills = new = 0
    while True:
        step = check(list_checkpoints(folder)[-1])
        if (child := os.fork()) == 0:
            sys.addaudithook(executioner(kills))
            save(folder, step + 1)
            os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        path, warnings = newest(folder)
        assert path is not None and not warnings
        assert check(path) in ((step, step + 1) if killed else (step + 1,))
        for other in list_checkpoints(folder):
            check(other)
        if not killed:
            return {"kills": kills, "new": new}
        kills, new = kills + 1, new + (int(path.name) > step)


def executioner(spared: int) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that spares so many operations on files, and kills this process before the next."""
    left = itertools.count(spared, -1)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def play_moments(folder: Path) -> dict[str, int]:
    """Kill processes that save without end."""
    size, rng = 200_000, random.Random(0)
    save(folder, 1, size)
    amid = 0
    for _ in range(15):
        step = check(list_checkpoints(folder)[-1], size)
        if (child := os.fork()) == 0:
            for later in itertools.count(step + 1):
                save(folder, later, size)
        time.sleep(rng.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        amid += any(name.startswith(".") for name in names(folder))
        for path in list_checkpoints(folder):
            check(path, size)
    return {"kills": 15, "amid": amid}


def play_full(folder: Path) -> str:
    """Save on a disk where files cannot grow beyond 100 kB; plays last, there is no way back."""
    save(folder, 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        save(folder, 2, 100_000)
    except (OSError, RuntimeError):
        return "refused"
    return "saved"


if __name__ == "__main__":
    root = Path(sys.argv[1])
    plays = {"operations": play_operations, "moments": play_moments, "full": play_full}
    print(json.dumps({name: play(root / name) for name, play in plays.items()}))
