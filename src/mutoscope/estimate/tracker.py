"""Counts the bytes of storages that live, while a step runs on fake tensors.

All fake tensors are a CPU's, because torch without CUDA lets no others pass through autograd; those that a real run
keeps in the CPU's memory are told apart as the part "host", which does not count. `HostCopies` makes them so, in place
of `training.copies.Copies`: all that moves memory runs here as it does in training.
"""

from __future__ import annotations

import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mutoscope.estimate.allocator import Block, CachingAllocator
from mutoscope.training.copies import AHEAD, Copies, Copy

aten = torch.ops.aten
Device = Literal["cuda", "cpu"]
HOST = "host"
"""What lies in the CPU's memory, beside a GPU."""


@dataclass
class Account:
    """What a step took. It is linear in the number of a network's blocks, segment by segment."""

    segments: dict[str, Counter[str]] = field(default_factory=dict)
    """Bytes by part at the moment when most lived, for each segment of the step."""
    flops: Counter[str] = field(default_factory=Counter)
    """By phase; "recomputed" apart from the backward pass; and "in bf16" those of all phases that are."""
    kept: Counter[str] = field(default_factory=Counter)
    """Bytes of what a checkpoint holds, by part."""

    def moved(self, smaller: Account, times: float) -> Account:
        """This account and `times` the difference to a smaller one's, for what both have."""
        both = [name for name in self.segments if name in smaller.segments]
        return Account(
            {name: _moved(self.segments[name], smaller.segments[name], times) for name in both},
            _moved(self.flops, smaller.flops, times),
            _moved(self.kept, smaller.kept, times),
        )

    def peak(self, phase: str = "") -> dict[str, int]:
        """Bytes by part in the segment (of this phase) where most lived."""
        found = [parts for name, parts in self.segments.items() if name.startswith(phase)]
        largest = max(found, key=lambda parts: parts.total())
        return {part: size for part, size in largest.items() if size > 0}


def _moved(large: Counter[str], small: Counter[str], times: float) -> Counter[str]:
    return Counter({k: round(large[k] + times * (large[k] - small[k])) for k in large.keys() | small.keys()})


class Tracker(TorchDispatchMode):
    """Counts the bytes of living storages by part and segment, and FLOPs by phase.

    A storage is an activation until `tell` tells otherwise; what is computed from host memory stays there.

    allocator: told of every storage that is not on the host, as it comes and goes, to know what would be reserved.
    """

    def __init__(self, device: Device, allocator: CachingAllocator | None = None) -> None:
        super().__init__()
        self._allocator = allocator
        self._blocks: dict[int, Block | None] = {}
        self.account = Account()
        self.segment = ""
        self.device = device
        self._phase = ""
        self._again = False
        self._living: Counter[str] = Counter()
        self._total = 0
        self._highest: dict[str, int] = {}
        self._new_part: str | None = None
        self._storages: dict[int, tuple[weakref.ref[Any], int, str]] = {}
        self._hosts: set[int] = set()

    def forget(self) -> None:
        """Of peaks; what lives still counts."""
        self.account.segments.clear()
        self._highest.clear()

    def tell(self, part: str, tensors: Iterable[Tensor | None]) -> None:
        """These tensors are of that part, where they are not on the host."""
        for tensor in tensors:
            assert tensor is not None
            key = self._seen(tensor, part)
            reference, size, before = self._storages[key]
            if HOST not in (part, before) or (part == HOST and before != HOST):
                self._storages[key] = reference, size, part
                self._count(before, -size)
                self._count(part, size)
                if part == HOST:
                    self._hosts.add(key)
                    self._release(key)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is made inside the block is of that part."""
        before, self._new_part = self._new_part, name
        try:
            yield
        finally:
            self._new_part = before

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """FLOPs inside the block are of that phase, and its peak is found by itself."""
        self._phase = name
        self.enter("")
        yield
        self._phase = ""
        self.enter("")

    def forward_of(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the forward pass of a block. In the backward pass that is a recomputation."""
        self._again = self._phase == "backward"
        try:
            return forward(*args, **kwargs)
        finally:  # recomputing ends with an exception, too
            self._again = False

    def enter(self, segment: str) -> None:
        """A segment of the phase begins."""
        self.segment = f"{self._phase} {segment}"
        self._note_peak()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            out = (_fake_bincount if func is aten.bincount.default else func)(*args, **kwargs)
        except DataDependentOutputException:
            # What code reads out of a tensor, to choose its way by: all is finite, and numbers do no harm
            return bool(args[0].dtype == torch.bool)
        part = self._new_part or (HOST if self._hosts and self._on_host(args) else "activations")
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._seen(leaf, part)
        if func is aten.convolution_backward.default and self.device == "cpu":
            self._note_peak(scratch=sum(t.nbytes for t in args[:2] if not _is_channels_last(t)))
        if (formula := _FLOPS.get(func.overloadpacket) or flop_registry.get(func.overloadpacket)) is not None:
            count = formula(*args, **kwargs, out_val=out)
            self.account.flops["recomputed" if self._again else self._phase] += count
            if args[0].dtype == torch.bfloat16:
                self.account.flops["in bf16"] += count
        return out

    def _on_host(self, args: Any) -> bool:
        return any(isinstance(x, Tensor) and x.untyped_storage()._cdata in self._hosts for x in tree_leaves(args))

    def _seen(self, tensor: Tensor, part: str) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            size = storage.nbytes()
            self._storages[key] = weakref.ref(storage, lambda _: self._freed(key)), size, part
            if part == HOST:
                self._hosts.add(key)
            elif self._allocator is not None:
                self._blocks[key] = self._allocator.malloc(size)
            self._count(part, size)
            self._note_peak()
        return key

    def _count(self, part: str, size: int) -> None:
        if part != HOST:
            self._living[part] += size
            self._total += size

    def _note_peak(self, scratch: int = 0) -> None:
        if self._total + scratch > self._highest.get(self.segment, -1):
            self._highest[self.segment] = self._total + scratch
            self.account.segments[self.segment] = self._living + Counter(activations=scratch)

    def _freed(self, key: int) -> None:
        _, size, part = self._storages.pop(key)
        self._hosts.discard(key)
        self._count(part, -size)
        self._release(key)

    def _release(self, key: int) -> None:
        if self._allocator is not None and key in self._blocks:
            self._allocator.free(self._blocks.pop(key))


class HostCopies(Copies):
    """Copies between two memories that are none."""

    def __init__(self, tracker: Tracker) -> None:
        super().__init__(torch.device("cpu"))
        self._tracker = tracker
        self._originals: deque[Tensor] = deque(maxlen=AHEAD)

    def to_cpu(self, x: Tensor) -> Copy:
        """On the host; the last few originals live on, as the real ones do until they are copied."""
        self._originals.append(x.detach())
        return Copy(self.pinned(x.detach()), None)

    def pinned(self, x: Tensor) -> Tensor:
        """On the host."""
        with self._tracker.part(HOST):
            return x.clone()

    def to_device(self, x: Tensor) -> Copy:
        """On the device again."""
        with self._tracker.part("activations"):
            return Copy(x.clone(), None)


class CudaAutocast(TorchFunctionMode):
    """Makes a CPU's autocast that of a GPU in the one way that memory knows of: norms and softmax are taken in fp32,
    which is twice the memory for what they keep and return."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FP32 and torch.is_autocast_enabled("cpu"):
            args = [_fp32(x) for x in args]
            kwargs = {name: _fp32(x) for name, x in kwargs.items()}
        return func(*args, **kwargs)


_FP32 = (F.layer_norm, F.group_norm, F.softmax, torch.layer_norm, torch.group_norm, torch.softmax, Tensor.softmax)


def backward(loss: Tensor) -> None:
    """As `Tensor.backward`, which takes function modes to be about itself, and leaves them out of what is computed
    again in its course."""
    ones = (torch.ones_like(loss),)
    _engine_run_backward((loss,), ones, False, False, (), allow_unreachable=True, accumulate_grad=True)


def _fp32(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Two matrix products, whatever the mask: (n, d)·(d, m) and (n, m)·(m, e)."""
    return 2 * query.shape[:-1].numel() * key.shape[-2] * (key.shape[-1] + value.shape[-1])


def _attention_backward_flops(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Four matrix products. A kernel has a fifth, of what it did not keep, that model FLOPs do not count."""
    return 2 * _attention_flops(query, key, value)


# torch's counter does not know the CPU's attention, and so sees none of it there
_FLOPS: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def _is_channels_last(x: Tensor) -> bool:
    """Whether a convolution takes this tensor as it is; a CPU's kernels copy what lies otherwise."""
    return x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)


def _fake_bincount(values: Tensor, weights: None = None, minlength: int = 0) -> Tensor:
    """As long as it is told to be; its largest value, which could make it longer, is not known."""
    return torch.empty(minlength, dtype=torch.int64)
