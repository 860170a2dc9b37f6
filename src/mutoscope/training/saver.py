"""Checkpoints are written while training goes on: it stops for as long as it takes to copy the tensors to the CPU."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from mutoscope.training.checkpoint import Tensors, save_checkpoint
from mutoscope.training.engine import Engine


class Saver:
    """Writes one checkpoint at a time, in a thread.

    The copies stay for the next checkpoint: memory that was used before is several times as fast as new memory.
    """

    def __init__(self, folder: Path, engine: Engine, keep_last: int, keep_every: int) -> None:
        self.folder, self.engine, self.keep = folder, engine, (keep_last, keep_every)
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None or self._group is None:  # others may be gone, and would be waited for
            self.wait()

    def save(self, step: int, tensors: Tensors, state: dict[str, int]) -> None:
        """Begin checkpoint `step`, of the tensors as they are now. Raises as `wait`."""
        self.wait()
        copied = self._copied(tensors, "")
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._thread = threading.Thread(target=self._write, args=(step, copied, state), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the checkpoint that was begun last is on the disk. Raises the error that it ended with."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, step: int, tensors: Tensors, state: dict[str, int]) -> None:
        try:
            save_checkpoint(self.folder, step, tensors, state, self.engine, *self.keep, group=self._group)
        except BaseException as error:  # raised where somebody waits for it
            self._error = error

    def _copied(self, tree: Tensors, prefix: str) -> Tensors:
        copied: dict[str, Any] = {}
        for key, value in tree.items():
            name = f"{prefix}{key}"
            copied[key] = self._copied(value, f"{name}.") if isinstance(value, dict) else self._copy(value, name)
        return copied

    def _copy(self, tensor: Tensor, name: str) -> Tensor:
        part = tensor.detach()
        part = part.to_local() if isinstance(part, DTensor) else part
        copy = self._copies.get(name)
        if copy is None or copy.shape != part.shape or copy.dtype != part.dtype:
            copy = self._copies[name] = torch.empty_like(part, device="cpu", pin_memory=part.is_cuda)
        copy.copy_(part, non_blocking=True)
        # from_local would take the copy to the device of the mesh
        return DTensor(copy, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else copy
