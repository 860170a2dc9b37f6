"""The only file that knows about processes: one process, or a replica of the model on each (DDP).

Started by torchrun, a recipe with ``strategy = "none"`` becomes DDP: processes that train unsynchronised replicas
beside each other are never what is meant. gloo serves CPUs, nccl GPUs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mutoscope.recipe import Parallel


@dataclass(frozen=True)
class Engine:
    """This process's place among the processes of a run."""

    rank: int
    world: int
    device: torch.device

    @staticmethod
    def start(parallel: Parallel) -> Engine:
        """Join the other processes, where there are any.

        Raises ValueError where the recipe asks for several processes and there is no launcher.
        """
        world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        if parallel.strategy == "ddp" and "WORLD_SIZE" not in os.environ:
            raise ValueError(
                'parallel.strategy = "ddp" needs a launcher: '
                "torchrun --nproc-per-node N -m mutoscope train ... (or parallel.strategy = none)"
            )
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        if world > 1 or parallel.strategy == "ddp":
            dist.init_process_group("nccl" if cuda else "gloo")
        return Engine(rank=rank, world=world, device=device)

    @property
    def main(self) -> bool:
        """Whether this process writes the logs."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose backward pass averages gradients over the processes."""
        if not dist.is_initialized():
            return model
        return DistributedDataParallel(
            model,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            broadcast_buffers=False,  # buffers change in after_step only, from all-reduced numbers
        )

    def accumulating(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around the forward and backward pass of a micro-step: gradients are exchanged in the last one only."""
        if isinstance(model, DistributedDataParallel) and not last:
            return model.no_sync()
        return contextlib.nullcontext()

    def sum(self, value: Tensor) -> Tensor:
        """The sum over processes, the same tensor where there is one process."""
        if dist.is_initialized():
            value = value.clone()
            dist.all_reduce(value)
        return value

    def mean(self, value: Tensor) -> Tensor:
        """The mean over processes."""
        return self.sum(value) / self.world

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process; all of them get the same answer."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0) if dist.is_initialized() else flag

    def gather(self, texts: list[str]) -> list[str]:
        """The texts of all processes, in the order of ranks."""
        if not dist.is_initialized():
            return texts
        everyone: list[list[str]] = [[] for _ in range(self.world)]
        dist.all_gather_object(everyone, texts)
        return [text for texts in everyone for text in texts]

    def barrier(self) -> None:
        """Wait for all processes."""
        if dist.is_initialized():
            dist.barrier()

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Let process 0 through the block before the others."""
        if not self.main:
            self.barrier()
        yield
        if self.main:
            self.barrier()

    def check_in_sync(self, model: nn.Module) -> None:
        """Raise RuntimeError unless all processes hold the same weights.

        A mis-configured launcher otherwise trains unsynchronised replicas without a word.
        """
        if not dist.is_initialized():
            return
        digest = xxhash.xxh3_64()
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}  # read from the same files
        for name, value in sorted(model.state_dict().items(), key=lambda item: item[0]):
            if name in frozen:
                continue
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        mine = torch.tensor([digest.intdigest() >> 1], dtype=torch.int64, device=self.device)
        all_ranks = [torch.zeros_like(mine) for _ in range(self.world)]
        dist.all_gather(all_ranks, mine)
        different = [rank for rank, other in enumerate(all_ranks) if not torch.equal(other, all_ranks[0])]
        if different:
            raise RuntimeError(f"processes {different} hold other weights than process 0; the run would not be one run")

    def stop(self) -> None:
        """Leave the other processes."""
        if dist.is_initialized():
            dist.destroy_process_group()
