"""The part of a recipe that says how the work is spread over processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How the work is spread over processes (start them with torchrun)."""

    strategy: Literal["none", "ddp", "fsdp2", "deepspeed"] = "none"
    """none: one process. ddp: a replica on every process; under torchrun, none becomes ddp. fsdp2: every process holds
    a part of the weights, gradients and optimizer state, and gathers the weights of a block when it computes.
    deepspeed: ZeRO, for those who have its JSON."""
    shard: int = 0
    """fsdp2: processes that hold one copy of the model together; 0 takes all that `replicate` leaves."""
    replicate: int = 0
    """fsdp2: copies of the model (HSDP); best as many as there are nodes. 0 follows from `shard`, or is 1."""
    reshard: bool = True
    """fsdp2: let go of a block's weights after its forward pass, and gather them again for the backward pass (ZeRO-3).
    false keeps them from one to the other (ZeRO-2): a third less to communicate, and the memory of all weights."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What is kept on the CPU, where steps are then taken: of deepspeed the optimizer's state, or with zero = 3 the
    weights as well; of fsdp2 all or none, on GPUs only."""
    zero: Literal[1, 2, 3] = 2
    """deepspeed: what is divided: the optimizer's state; gradients as well; weights as well."""
    deepspeed_config: str | None = None
    """deepspeed: a JSON file of its own. Its "auto" is filled in from the recipe, which it must not contradict."""
    context: int = 1
    """ddp, fsdp2: processes that share the tokens of each sample, for long videos; it divides the number of processes,
    that of a copy's with fsdp2, and the model's attention heads. The others, by groups of so many, have other samples.
    """
    timeout: float = 1800.0
    """Seconds that a process waits for the others before it gives up."""
    stall: float = 300.0
    """Seconds without a step, or whatever else is done, after which a process says where it stands; 0 never."""
