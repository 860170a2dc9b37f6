"""Tensors of which each process holds a part (DTensors, as FSDP makes them), seen whole or by their part alone.

A plain tensor is its own part and its own whole, so that callers need not ask which of the two they have.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part; writing into it changes the tensor."""
    return DTensor.to_local(tensor.detach()) if isinstance(tensor, DTensor) else tensor  # type: ignore[arg-type]


def whole(tensor: Tensor) -> Tensor:
    """All of it, gathered from the processes, which call this together."""
    return DTensor.full_tensor(tensor.detach()) if isinstance(tensor, DTensor) else tensor  # type: ignore[arg-type]


def fill(tensor: Tensor, value: Tensor) -> None:
    """Make it `value`, which all processes hold whole."""
    if isinstance(tensor, DTensor):
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
    with torch.no_grad():
        local(tensor).copy_(local(value))


def like(part: Tensor, tensor: Tensor) -> Tensor:
    """A tensor divided as `tensor` is, of which `part` is this process's part; `part` itself where that is plain."""
    if not isinstance(tensor, DTensor):
        return part
    return DTensor.from_local(
        part, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def place(tensor: Tensor) -> tuple[int, ...]:
    """Which part this process holds: a number for each axis of processes that the tensor is divided over."""
    if not isinstance(tensor, DTensor):
        return ()
    mesh = tensor.device_mesh
    return tuple(mesh.get_local_rank(i) for i, p in enumerate(tensor.placements) if p.is_shard())


def sum_over_parts(value: Tensor, tensor: Tensor) -> Tensor:
    """The sum of `value` over the processes that hold parts of `tensor`; for what was worked out of a part."""
    if isinstance(tensor, DTensor):
        value = value.clone()
        for i, placement in enumerate(tensor.placements):
            if placement.is_shard():
                dist.all_reduce(value, group=tensor.device_mesh.get_group(i))
    return value


def is_sharded(tensors: Mapping[str, Tensor]) -> bool:
    """Whether any of them is held in parts."""
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())
