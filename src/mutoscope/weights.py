"""Weights in safetensors files: written whole or not at all, checked when read, and loaded strictly.

A flipped byte in a safetensors file loads silently, and a key that does not match is easily passed over. Our files
carry a hash of their own tensors, and `load_strict` fails on every key that is not accounted for.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mutoscope.files import replacing
from mutoscope.sharded import whole

HASH = "mutoscope_xxh3_128"
"""The key of the file's metadata that holds the hash of its tensors."""

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
"""Of dtypes in safetensors."""


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What a strict load did."""

    matched: list[str]
    """Keys that were loaded."""
    missing: list[str]
    """Keys of the module that the file lacks, all of them allowed."""
    unexpected: list[str]
    """Keys of the file that the module lacks, all of them allowed."""


def hash_weights(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """xxh3-128 over the state dict's names, dtypes, shapes and bytes, in the order of names; on any device the same."""
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    digest = xxhash.xxh3_128()
    for name in sorted(state):
        _update(digest, name, state[name])
    return digest.hexdigest()


def _update(digest: xxhash.xxh3_128, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    digest.update(_bytes(tensor))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def save_weights(
    path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, write: bool = True
) -> str:
    """Write a state dict as safetensors, with its hash; returns the hash.

    One tensor at a time leaves its device: there is no second copy of the model. Where processes hold tensors in parts,
    all of them call this together, and one with `write`; the others only give their parts, and return "".
    """
    names = sorted(state, key=lambda name: (-state[name].element_size(), name))  # the format's order: all are aligned
    if not write:
        for name in names:
            whole(state[name])
        return ""
    about = {"format": "pt", **(metadata or {}), HASH: "0" * 32}
    header: dict[str, Any] = {"__metadata__": dict(sorted(about.items()))}
    end = 0
    for name in names:
        tensor = state[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        with open(aside, "wb") as file:
            _write_header(file, header)
            for name in names:
                file.write(_bytes(whole(state[name])))
        digest = xxhash.xxh3_128()
        with safe_open(aside, framework="pt") as written:
            for name in sorted(names):
                _update(digest, name, written.get_tensor(name))
        header["__metadata__"][HASH] = digest.hexdigest()
        with open(aside, "r+b") as file:
            _write_header(file, header)
    return digest.hexdigest()


def _write_header(file: BinaryIO, header: dict[str, Any]) -> None:
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict of a safetensors file, on the CPU.

    Raises FileNotFoundError, or ValueError where the file is cut short or its tensors are not those that were written
    (files that others wrote carry no hash, and only their form is checked).
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            expected = (file.metadata() or {}).get(HASH)
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it has no __iter__)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged, or not a safetensors file: {error}") from None
    if expected is not None and hash_weights(state) != expected:
        raise ValueError(f"{path}: damaged: its tensors hash to {hash_weights(state)}, written were {expected}")
    return state


def load_strict(
    module: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    *,
    allow_missing: Collection[str] = (),
    allow_unexpected: Collection[str] = (),
) -> LoadReport:
    """Load a state dict into a module, every key accounted for.

    Raises ValueError naming `source` and the first keys that are missing from it, unexpected in it, or of another
    shape, save those that are allowed; the module is then unchanged.
    """
    shapes = {key: list(tensor.shape) for key, tensor in state.items()}
    report = _account(module, shapes, source, allow_missing, allow_unexpected)
    module.load_state_dict({k: state[k] for k in report.matched}, strict=False)
    return report


def load_file(module: nn.Module, path: Path) -> LoadReport:
    """Load a safetensors file into a module as `read_weights` and `load_strict` would, but a tensor at a time: there is
    no second copy of the weights.

    Raises as those two; a module whose file turns out to be damaged holds what was read of it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    digest, state = xxhash.xxh3_128(), module.state_dict()
    try:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            expected = (file.metadata() or {}).get(HASH)
            shapes = {name: list(file.get_slice(name).get_shape()) for name in sorted(file.keys())}
            report = _account(module, shapes, str(path))
            for name in shapes:
                tensor = file.get_tensor(name)
                _update(digest, name, tensor)
                state[name].copy_(tensor)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged, or not a safetensors file: {error}") from None
    if expected is not None and digest.hexdigest() != expected:
        raise ValueError(f"{path}: damaged: its tensors hash to {digest.hexdigest()}, written were {expected}")
    return report


def _account(
    module: nn.Module,
    shapes: Mapping[str, list[int]],
    source: str,
    allow_missing: Collection[str] = (),
    allow_unexpected: Collection[str] = (),
) -> LoadReport:
    """What loading tensors of these shapes would do; raises ValueError as `load_strict` where it must not be done."""
    wanted = {key: list(tensor.shape) for key, tensor in module.state_dict().items()}
    report = LoadReport(
        matched=[k for k in wanted if k in shapes],
        missing=[k for k in wanted if k not in shapes],
        unexpected=[k for k in shapes if k not in wanted],
    )
    misshapen = [f"{k} {shapes[k]} for {wanted[k]}" for k in report.matched if shapes[k] != wanted[k]]
    faults = {
        "missing": [k for k in report.missing if k not in allow_missing],
        "unexpected": [k for k in report.unexpected if k not in allow_unexpected],
        "of another shape": misshapen,
    }
    if any(faults.values()) or not report.matched:
        told = "".join(
            f"\n  {len(keys)} {what}: {', '.join(keys[:5])}{' ...' if len(keys) > 5 else ''}"
            for what, keys in faults.items()
            if keys
        )
        raise ValueError(
            f"{source}: these weights are not of this {type(module).__name__}: "
            f"{len(report.matched) - len(misshapen)} of {len(wanted)} keys match{told}"
        )
    return report
