"""Copies between a GPU and the CPU's memory, while the GPU computes."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

AHEAD = 2
"""Copies under way from a device at a time. The originals take memory until they are made."""


@dataclass(frozen=True)
class Copy:
    """A copy that may still be under way."""

    tensor: Tensor
    made: torch.cuda.Event | None

    def wait(self) -> Tensor:
        """The copy, made; for the CPU to work on."""
        if self.made is not None:
            self.made.synchronize()
        return self.tensor

    def before_use(self) -> Tensor:
        """The copy, for the device to work on: its stream waits, the CPU does not."""
        if self.made is not None:
            torch.cuda.current_stream(self.tensor.device).wait_event(self.made)
        return self.tensor


class Copies:
    """Makes copies for one device on a CUDA stream of their own. Where the device is the CPU there is no stream, and
    the originals serve as copies.

    No use is made of ``record_stream``: memory that it guards is free only once the GPU is done with it, and the CPU,
    which is far ahead, would have asked for more by then. Here the stream that computes waits for all but the last
    `AHEAD` copies, and so may have the memory of their originals.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def to_cpu(self, x: Tensor) -> Copy:
        """In pinned memory, which torch keeps and uses again."""
        x = x.detach()
        if self._stream is None:
            return Copy(x, None)
        computing = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(computing)
        with torch.cuda.stream(self._stream):
            copy = x.to("cpu", non_blocking=True)
            made = self._stream.record_event()
        self._leaving.append((x, made))
        while len(self._leaving) > AHEAD:
            _, earlier = self._leaving.popleft()
            computing.wait_event(earlier)
        return Copy(copy, made)

    def pinned(self, x: Tensor) -> Tensor:
        """A tensor on the CPU, in memory that `to_device` copies from without holding up the CPU. (torch rounds such
        memory up to a power of two.)"""
        return x if self._stream is None else x.pin_memory()

    def to_device(self, x: Tensor) -> Copy:
        """x: on the CPU, in pinned memory."""
        if self._stream is None:
            return Copy(x, None)
        copy = torch.empty_like(x, device=self.device, pin_memory=False)  # memory of the stream that computes
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            copy.copy_(x, non_blocking=True)
            return Copy(copy, self._stream.record_event())
