"""The only file that knows about processes, with `deepspeed.py` beside it, and `models/ulysses.py` under networks.

    ddp      a replica of the model on every process, gradients averaged in the backward pass
    fsdp2    weights, gradients and optimizer state in parts, one for each process (or for each of a group of processes:
             HSDP); a block's weights are gathered while it computes

Under both, groups of `parallel.context` processes may share the tokens of each sample. To all else they are processes
like any other: gradients are averaged over them too (`models/ulysses.py` says why that is right).

Started by torchrun, a recipe with ``strategy = "none"`` becomes DDP: processes that train unsynchronised replicas
beside each other are never what is meant. gloo serves CPUs, nccl GPUs.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.nn.parallel import DistributedDataParallel

from mutoscope.models.ulysses import ContextGroup, share_sequence
from mutoscope.recipe import Parallel
from mutoscope.sharded import is_sharded, local
from mutoscope.training.quantize import QuantizedLinear

T = TypeVar("T")


@dataclass(frozen=True)
class Engine:
    """This process's place among the processes of a run."""

    rank: int
    world: int
    device: torch.device
    parallel: Parallel = field(default_factory=Parallel)
    mesh: DeviceMesh | None = None
    """Of fsdp2: (copies, parts of a copy)."""
    context: ContextGroup | None = None
    """The processes that share this one's samples, where there are any: those of neighbouring ranks."""
    meeting: str = ""
    """What the keys of these processes begin with, in the store that they met by."""

    @staticmethod
    def start(parallel: Parallel) -> Engine:
        """Join the other processes, where there are any.

        Raises ValueError where the recipe asks for several processes and there is no launcher, for a mesh or groups
        that they do not make, and for offloading where there is no GPU.
        """
        world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        if (parallel.strategy != "none" or parallel.context > 1) and "WORLD_SIZE" not in os.environ:
            asked = f"context = {parallel.context}" if parallel.context > 1 else f'strategy = "{parallel.strategy}"'
            raise ValueError(
                f"parallel.{asked} needs a launcher: torchrun --nproc-per-node N -m mutoscope train ... "
                "(or parallel.strategy = none and parallel.context = 1)"
            )
        cuda = torch.cuda.is_available()
        if parallel.strategy == "fsdp2" and parallel.offload != "none" and not cuda:
            raise ValueError(f'parallel.offload = "{parallel.offload}": moves memory from GPUs to the CPU, and there '
                             'is no GPU here; set it to "none"')  # fmt: skip
        shape = _mesh_shape(parallel, world) if parallel.strategy == "fsdp2" else None
        _check_context(parallel, world if shape is None else shape[1])
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        meeting = ""
        if world > 1 or parallel.strategy != "none":
            # gloo beside nccl: checkpoints, and gradients that were offloaded, are on the CPU
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            timeout = timedelta(seconds=parallel.timeout)
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                store, meeting = _meet(rank, world, timeout)
                dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
            else:
                dist.init_process_group(backend, timeout=timeout)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard")) if shape else None
        context = None
        if (size := parallel.context) > 1:
            group, _ = dist.new_subgroups(size, timeout=timedelta(seconds=parallel.timeout))
            context = ContextGroup(group, rank % size, size)
        return Engine(
            rank=rank, world=world, device=device, parallel=parallel, mesh=mesh, context=context, meeting=meeting
        )

    @property
    def main(self) -> bool:
        """Whether this process writes the logs."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether processes hold a model in parts, so that all of them must call it together."""
        return self.mesh is not None or self._zero3

    @property
    def _zero3(self) -> bool:
        return self.parallel.strategy == "deepspeed" and self.parallel.zero == 3

    @property
    def data_rank(self) -> int:
        """Which of the shares of the samples is this process's: its own, or its context group's."""
        return self.rank // self.parallel.context

    @property
    def data_world(self) -> int:
        """Shares that the samples of a step are divided into."""
        return self.world // self.parallel.context

    @property
    def replica(self) -> int:
        """Which of the sets of processes that call the model together this one is of: those that have the parts of one
        copy of it, or of a sample."""
        if self.mesh is not None:
            return self.mesh.get_local_rank("replicate")
        return 0 if self._zero3 else self.data_rank

    @property
    def replicas(self) -> int:
        """How many of these there are."""
        if self.mesh is not None:
            return self.mesh.size(0)
        return 1 if self._zero3 else self.data_world

    @property
    def leads(self) -> bool:
        """Whether this process writes for those that it calls the model with."""
        if self.mesh is not None:
            return self.mesh.get_local_rank("shard") == 0
        return self.main if self._zero3 else self._first_of_context

    @property
    def _first_of_context(self) -> bool:
        return self.context is None or self.context.leads

    # ---- the model

    def wrap(self, model: nn.Module, precision: str = "fp32") -> nn.Module:
        """The model to train, whose backward pass averages gradients over the processes. fsdp2 divides the model
        itself, whose parameters are others afterwards: optimizers come later.

        Raises RuntimeError as `check_in_sync`, ValueError as `share_sequence`.
        """
        self.check_in_sync(model)
        share_sequence(model, self.context)
        if self.mesh is not None:
            _shard(model, self.mesh, self.parallel, precision, self.device)
            return model
        if not dist.is_initialized():
            return model
        # Torch 2.13 wants another name for it, which 2.11 does not know
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        return DistributedDataParallel(
            model,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            broadcast_buffers=False,  # buffers change in after_step only, from all-reduced numbers
        )

    def accumulating(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around the forward and backward pass of a micro-step: gradients are exchanged in the last one only."""
        if isinstance(model, DistributedDataParallel) and not last:
            return model.no_sync()
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    def at_hand(self, model: nn.Module, do: Callable[[], T]) -> T:
        """Call `do` so that it may use parts of the model by themselves, and not only ``model(...)``. Processes that
        hold a model together call this together, and must do the same."""
        if not isinstance(model, FSDPModule):
            return do()
        within: Any = model._within
        done: T = within(do)
        return done

    def settle(self, model: nn.Module) -> None:
        """After calls without a backward pass: let go of gathered weights, which would not follow the model's."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def in_step(self, items: Iterable[T]) -> Iterator[tuple[T, bool]]:
        """The items, each with True. Where processes hold a model together all of them get as many: those that have
        fewer get their last one again, with False."""
        if not self.sharded:
            yield from ((item, True) for item in items)
            return
        item, rest = None, iter(items)
        while True:
            new = next(rest, None)
            if not self.any(new is not None):
                return
            if (item := new if new is not None else item) is None:
                raise ValueError(f"process {self.rank} has nothing to take part with")
            yield item, new is not None

    # ---- other processes

    def sum(self, value: Tensor) -> Tensor:
        """The sum over processes, once for those that share samples; the same tensor where there is one process."""
        if dist.is_initialized():
            value = value.clone()
            dist.all_reduce(value)
        return value if self.context is None else value / self.context.size

    def mean(self, value: Tensor) -> Tensor:
        """The mean over processes."""
        return self.sum(value) / self.data_world

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

    def gather_rows(self, rows: Tensor) -> Tensor:
        """(b, d) of each process -> (world · b, d): this process's own rows first, then those of the ranks after it.
        Gradients go back to where rows are from, summed over processes."""
        if not dist.is_initialized():
            return rows
        gathered: Tensor = _GatherRows.apply(rows)
        return gathered

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
        """Raise RuntimeError unless all processes hold the same weights, or the same parts of them.

        A mis-configured launcher otherwise trains unsynchronised replicas without a word.
        """
        if not dist.is_initialized():
            return
        digest = xxhash.xxh3_64()
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}  # read from the same files
        state = {name: value for name, value in model.state_dict().items() if name not in frozen}
        for name, value in sorted(state.items(), key=lambda item: item[0]):
            digest.update(name.encode())
            digest.update(local(value.detach()).cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        mine = torch.tensor([digest.intdigest() >> 1], dtype=torch.int64, device=self.device)
        all_ranks = [torch.zeros_like(mine) for _ in range(self.world)]
        dist.all_gather(all_ranks, mine)
        parts = self.mesh.size(1) if self.mesh is not None and is_sharded(state) else 1
        different = [rank for rank, other in enumerate(all_ranks) if not torch.equal(other, all_ranks[rank % parts])]
        if different:
            raise RuntimeError(f"processes {different} hold other weights than process 0; the run would not be one run")

    def check_apart(self, samples: Sequence[int]) -> None:
        """Raise RuntimeError where two processes that do not share samples train on the same ones, and so with the same
        noise."""
        seen = Counter(self.gather([str(sample) for sample in samples] if self._first_of_context else []))
        if twice := [sample for sample, times in seen.items() if times > 1]:
            raise RuntimeError(f"samples {', '.join(twice[:5])} are trained on by two processes at once")

    def check_shared(self, ids: Sequence[str], samples: Sequence[int]) -> None:
        """Raise RuntimeError where the processes that share samples have not all got the same: one of them could not
        read a clip that the others could, and has another in its place."""
        if self.context is None:
            return
        digest = xxhash.xxh3_64_intdigest(repr((list(ids), list(samples))).encode()) >> 1
        mine = torch.tensor([digest], dtype=torch.int64, device=self.device)
        everyone = [torch.zeros_like(mine) for _ in range(self.context.size)]
        dist.all_gather(everyone, mine, group=self.context.group)
        if any(not torch.equal(other, mine) for other in everyone):
            raise RuntimeError(f"process {self.rank} would train on {', '.join(ids[:5])}, and those that share its "
                               "samples (parallel.context) on others: a clip can be read by some of them only. Start "
                               "again, or mend it")  # fmt: skip

    def stop(self) -> None:
        """Leave the other processes."""
        if dist.is_initialized():
            dist.destroy_process_group()


class _GatherRows(torch.autograd.Function):
    """See `Engine.gather_rows`. (torch.distributed.nn's is deprecated in torch 2.13, for one in a private module.)"""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts).roll(-dist.get_rank() * len(rows), 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        size, rank = len(gradient) // dist.get_world_size(), dist.get_rank()
        gradient = gradient.roll(rank * size, 0)
        dist.all_reduce(gradient)
        return gradient[rank * size : (rank + 1) * size]


def _meet(rank: int, world: int, timeout: timedelta) -> tuple[Store, str]:
    """A part of torchrun's store that no process wrote to before these, and its prefix.

    torchrun has one store for all of its restarts (as of torch 2.13), so that processes would look for each other where
    those before them were. Each says who it is; process 0 answers with all of them until each has found itself there.
    """
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)
    mine, give_up = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    store.set(f"here {rank}", mine)
    while time.monotonic() < give_up:
        if rank == 0:
            store.set("all", " ".join(store.get(f"here {r}").decode() for r in range(world)))
        everyone = store.get("all").decode()
        meeting = xxhash.xxh3_128_hexdigest(everyone.encode())
        if mine in everyone:
            store.set(f"{meeting} {rank}", "")
        if rank == 0 and store.check([f"{meeting} {r}" for r in range(world)]):
            store.set(f"{meeting} begins", "")
        if mine in everyone and store.check([f"{meeting} begins"]):
            return PrefixStore(meeting, store), meeting
        time.sleep(0.05)
    raise TimeoutError(f"process {rank} of {world} did not meet the others in {timeout}")


def _mesh_shape(parallel: Parallel, world: int) -> tuple[int, int]:
    """(copies, parts of a copy). Raises ValueError where these do not make up all processes."""
    shard, replicate = parallel.shard, parallel.replicate
    shard = shard or world // (replicate or 1)
    replicate = replicate or world // shard
    if shard * replicate != world:
        raise ValueError(f"parallel.replicate = {parallel.replicate} and parallel.shard = {parallel.shard} (0: what "
                         f"the other leaves) do not make up {world} processes; their product must")  # fmt: skip
    return replicate, shard


def _check_context(parallel: Parallel, together: int) -> None:
    """Raise ValueError where so many processes, all or those of a copy, do not make up groups of `parallel.context`."""
    if together % parallel.context:
        whose = "processes of a copy (parallel.shard)" if parallel.strategy == "fsdp2" else "processes"
        raise ValueError(f"parallel.context = {parallel.context} does not divide the {together} {whose}; it must")


def _shard(model: nn.Module, mesh: DeviceMesh, parallel: Parallel, precision: str, device: torch.device) -> None:
    """Divide each block's parameters over the processes of a copy, and the others together. They go to the device one
    block at a time, so that there is never room needed for the whole model."""
    # Inputs stay fp32: times up to 1000 do not survive bf16
    mixed = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    offload = CPUOffloadPolicy() if parallel.offload == "all" else OffloadPolicy()
    # Scales of quantised weights are small, and would lose bits to `param_dtype`
    scales = {module.scale for module in model.modules() if isinstance(module, QuantizedLinear)}
    for scale in scales:
        scale.data = scale.data.to(device)
    mesh = mesh if mesh.size(0) > 1 else mesh["shard"]
    # Said of every block that ends in a reshape. No block of ours is followed by a change in place of what it returns.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh, reshard_after_forward=parallel.reshard, mp_policy=mixed, offload_policy=offload,
                    ignored_params=scales)  # fmt: skip
    # torch keeps the root's from forward to backward pass unless it is told not to: they are needed again at once
    fully_shard(model, mesh=mesh, reshard_after_forward=None if parallel.reshard else False, mp_policy=mixed,
                offload_policy=offload, ignored_params=scales)  # fmt: skip
    model._within = lambda do: do()  # type: ignore[assignment]
    register_fsdp_forward_method(model, "_within")
