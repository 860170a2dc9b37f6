"""Checkpoints: written aside, hashed, synced and renamed; verified before anything is read from them.

    checkpoints/00000500/   .metadata and *.distcp   tensors, by torch.distributed.checkpoint (any number of processes)
                            state.json               the step, and what else is a few numbers
                            manifest.json            xxh3-128 of every other file

torch.distributed.checkpoint keeps its index in a pickle, which would run code when read, and none of the common formats
notices a flipped byte. So the manifest is checked first, and the index is read by an unpickler that knows only the
names that a tensors-only checkpoint needs.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from mutoscope.files import sync_folder
from mutoscope.training.engine import Engine

# Said of every checkpoint of a single process. For all time: filters are no thread's own.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

Tensors = dict[str, Any]
"""A tree of dicts whose leaves are tensors."""


class DamagedCheckpoint(ValueError):
    """A checkpoint that is incomplete, or not what was written."""


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Tensors,
    state: dict[str, int],
    engine: Engine,
    keep_last: int = 2,
    keep_every: int = 0,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write checkpoint `step` under `folder` from all processes, then drop all but the newest `keep_last` and those of
    steps that `keep_every` divides.

    group: of all processes, for messages of this thread's own; those of the default group must not cross the trainer's.

    A kill, or a full disk, at any moment leaves the checkpoints of earlier steps as they were. Raises ValueError where
    a leaf of `tensors` is not a tensor.
    """
    _leaves(tensors)
    final, aside = folder / f"{step:08d}", folder / f".{step:08d}.tmp"
    if engine.main:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*.tmp"):  # of a process that was killed
            shutil.rmtree(leftover)
        aside.mkdir()
    _barrier(group)
    try:
        writer = FileSystemWriter(aside, sync_files=True)
        _dcp(lambda alone: dcp_save(tensors, storage_writer=writer, no_dist=alone, process_group=group))
        hashes = _gather({p.name: _hash_file(p) for p in aside.glob(f"__{engine.rank}_*")}, group)
        if engine.main:
            _write_json(aside / "state.json", {"step": step, **state})
            hashes |= {name: _hash_file(aside / name) for name in (".metadata", "state.json")}
            _write_json(aside / "manifest.json", {"xxh3_128": dict(sorted(hashes.items()))})
            sync_folder(aside)
            if final.exists():
                _drop(final)
            os.rename(aside, final)
            sync_folder(folder)
            # Checkpoints of later steps are there only where training fell back past them: they are damaged.
            earlier = [path for path in list_checkpoints(folder) if path.name <= final.name]
            kept = earlier[-keep_last:] + [path for path in earlier if keep_every and int(path.name) % keep_every == 0]
            for path in list_checkpoints(folder):
                if path not in kept:
                    _drop(path)
    except BaseException:
        if engine.main:
            shutil.rmtree(aside, ignore_errors=True)  # on a full disk, make room
        raise
    _barrier(group)
    return final


def _barrier(group: dist.ProcessGroup | None) -> None:
    if dist.is_initialized():
        dist.barrier(group)


def _gather(mine: dict[str, str], group: dist.ProcessGroup | None) -> dict[str, str]:
    """The entries of all processes."""
    if not dist.is_initialized():
        return mine
    everyone: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine, group=group)
    return {name: value for one in everyone for name, value in one.items()}


def _drop(path: Path) -> None:
    """Delete a checkpoint, renamed first: a kill leaves no half of one in the list."""
    dropped = path.with_name(f".{path.name}.dropped.tmp")
    os.rename(path, dropped)
    shutil.rmtree(dropped)


def list_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    return sorted(p for p in folder.glob("*") if re.fullmatch(r"\d{8}", p.name))


def newest_checkpoint(folder: Path, engine: Engine, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is what was written, the same on all processes; None where there are none at all.

    A damaged one is passed over with a warning. Raises DamagedCheckpoint where all of them are: training must not start
    afresh over a run's folder without being told to.
    """
    choice: list[str | None] = [None]
    if engine.main:
        checkpoints = list_checkpoints(folder)
        for path in reversed(checkpoints):
            try:
                verify(path)
            except DamagedCheckpoint as error:
                warn(f"{error}; falling back to the checkpoint before")
                continue
            choice = [str(path)]
            break
        else:
            choice = ["damaged"] if checkpoints else [None]
    if dist.is_initialized():
        dist.broadcast_object_list(choice, src=0)
    if choice[0] == "damaged":
        raise DamagedCheckpoint(f"every checkpoint in {folder} is damaged; move them away to start afresh")
    return Path(choice[0]) if choice[0] is not None else None


def verify(path: Path) -> None:
    """Raise DamagedCheckpoint, naming the file, unless every file has the hash that was written."""
    try:
        expected = dict(json.loads((path / "manifest.json").read_text())["xxh3_128"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{path / 'manifest.json'}: unreadable ({type(error).__name__}: {error})") from None
    present = {p.name for p in path.iterdir()} - {"manifest.json"}
    for name in sorted(set(expected) | present):
        if name not in expected:
            raise DamagedCheckpoint(f"{path / name}: not in the manifest")
        if name not in present:
            raise DamagedCheckpoint(f"{path / name}: missing")
        try:
            found = _hash_file(path / name)
        except OSError as error:
            raise DamagedCheckpoint(f"{path / name}: unreadable ({error})") from None
        if found != expected[name]:
            raise DamagedCheckpoint(f"{path / name}: damaged: its hash is not the manifest's")


def load_checkpoint(path: Path, tensors: Tensors) -> dict[str, int]:
    """Fill `tensors` in place from a verified checkpoint and return its state.

    Raises ValueError naming the keys that either side lacks, or that differ in shape or dtype; nothing is filled then.
    """
    reader = _TensorReader(path)
    index = reader.read_metadata().state_dict_metadata
    saved = {
        k: f"{list(v.size)} {v.properties.dtype}" for k, v in index.items() if isinstance(v, TensorStorageMetadata)
    }
    wanted = {k: f"{list(v.shape)} {v.dtype}" for k, v in _leaves(tensors).items()}
    if saved.keys() != wanted.keys():
        lacks, extra = sorted(wanted.keys() - saved.keys())[:5], sorted(saved.keys() - wanted.keys())[:5]
        raise ValueError(
            f"{path} is not of this recipe: it lacks {lacks or 'nothing'} and holds {extra or 'nothing'} more"
        )
    for key in wanted:
        if saved[key] != wanted[key]:
            raise ValueError(f"{path} is not of this recipe: {key} is {saved[key]} in it, {wanted[key]} here")
    _dcp(lambda alone: dcp_load(tensors, storage_reader=reader, no_dist=alone))
    state: dict[str, int] = json.loads((path / "state.json").read_text())
    return state


class _TensorReader(FileSystemReader):
    """A reader whose index may hold tensors only, and is read without running code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata: Metadata = _IndexUnpickler(file).load()
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


_INDEX_CLASSES = {
    *(("torch", name) for name in ("Size", "float64", "float32", "float16", "bfloat16", "bool")),
    *(("torch", name) for name in ("int64", "int32", "int16", "int8", "uint8")),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("pathlib", "PosixPath"),
}
"""All that the index of a checkpoint of tensors names. Objects that are no tensors are BytesStorageMetadata in it, and
would be unpickled without limits later on: that class is not among these."""


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = "pathlib" if module == "pathlib._local" else module  # as Python 3.13 names it
        if (module, name) not in _INDEX_CLASSES:
            raise DamagedCheckpoint(f"the checkpoint's index asks for {module}.{name}; refused, it could run code")
        return super().find_class(module, name)


def _dcp(call: Callable[[bool], Any]) -> None:
    """Call torch.distributed.checkpoint, with or without a process group, and raise the first process's own error."""
    try:
        call(not dist.is_initialized())
    except CheckpointException as error:  # a BaseException, which nobody's `except Exception` would catch
        cause, _ = next(iter(error.failures.values()))
        raise cause from None


def _leaves(tree: Tensors, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a tree by their path, as torch.distributed.checkpoint names them."""
    leaves: dict[str, Tensor] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            leaves[f"{prefix}{key}"] = value
        else:
            raise ValueError(f"a checkpoint holds tensors only, and {prefix}{key} is {type(value).__name__}")
    return leaves


def _hash_file(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with open(path, "w") as file:
        json.dump(value, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
