"""GPUs and the links between them, by their data sheets; and what a collective costs, by NCCL's own model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

BASE_LATENCY, WITHIN_LATENCY, BETWEEN_LATENCY = 8.4e-6, 3.4e-6, 14e-6
"""Seconds: of a collective, and of each of its steps over NVLink and over the network (NCCL's own model, protocol
Simple, the larger of rings and trees: src/graph/tuning.cc)."""
TREE_SPEED = 0.92
"""Of a tree, beside a ring; likewise."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """So many GPUs, and what they and the links between them can do at most; bytes and FLOPs a second, per GPU."""

    gpus: int = 1
    """Processes."""
    per_node: int = 8
    """GPUs of a node."""
    memory: int
    """Bytes of a GPU, as torch sees it."""
    bf16: float
    """FLOP/s of dense matrix products in bf16."""
    fp32: float
    """FLOP/s in fp32; torch does not use TF32 unless it is told to, and it is not."""
    within: float
    """To the other GPUs of a node, one way."""
    between: float
    """To other nodes, one way."""
    host: float
    """To the CPU's memory, one way."""
    host_memory: float
    """Of the CPU's memory, a GPU's share of it."""
    hfu: float = 0.45
    """What GPUs reach of their peak while they compute, what is recomputed counted in. Published runs of video
    transformers have an MFU of 0.36 (arXiv:2505.10584) to 0.48 (arXiv:2503.12964)."""
    reached: float = 0.8
    """What transfers reach of a link. An assumption: NCCL's ring within a node measures more, networks often less."""

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.per_node < 1:
            raise ValueError(f"{self.gpus} GPUs, {self.per_node} in a node: there must be at least 1")
        if self.gpus > self.per_node and self.gpus % self.per_node:
            raise ValueError(f"{self.gpus} GPUs do not make up whole nodes of {self.per_node}; give --gpus-per-node")
        if min(self.memory, self.bf16, self.fp32, self.within, self.between, self.host, self.host_memory) <= 0:
            raise ValueError("a GPU's memory, its FLOP/s and the GB/s of its links must be above 0")
        if not 0 < self.hfu <= 1 or not 0 < self.reached <= 1:
            raise ValueError(f"a share of the peak of {self.hfu:g} or of a link of {self.reached:g}: must be above 0 "
                             "and at most 1")  # fmt: skip

    @property
    def nodes(self) -> int:
        """Machines."""
        return -(-self.gpus // self.per_node)


# Memory as torch reports it; the rest from NVIDIA's data sheets of the SXM modules, and of the DGX systems around them
# for network (a port for each GPU), PCIe and the CPUs' memory (A100: 16 channels of DDR4-3200; H: of DDR5-4800)
CLUSTERS = {
    "a100": Cluster(memory=int(79.1 * 2**30), bf16=312e12, fp32=19.5e12, within=300e9, between=25e9,
                    host=32e9, host_memory=51e9),
    "h100": Cluster(memory=int(79.1 * 2**30), bf16=989e12, fp32=67e12, within=450e9, between=50e9,
                    host=64e9, host_memory=77e9),
    "h200": Cluster(memory=int(139.7 * 2**30), bf16=989e12, fp32=67e12, within=450e9, between=50e9,
                    host=64e9, host_memory=77e9),
}  # fmt: skip
"""By GPU."""


def cluster_of(
    gpu: str,
    *,
    gpus: int,
    per_node: int = Cluster.per_node,
    hfu: float = Cluster.hfu,
    memory: int | None = None,
    bf16: float | None = None,
    within: float | None = None,
    between: float | None = None,
) -> Cluster:
    """So many GPUs of those in `CLUSTERS`, and other figures than theirs. Raises ValueError as `Cluster`."""
    figures = {"memory": memory, "bf16": bf16, "within": within, "between": between}
    given = {name: value for name, value in figures.items() if value is not None}
    return replace(CLUSTERS[gpu], gpus=gpus, per_node=per_node, hfu=hfu, **given)  # type: ignore[arg-type]


# ---------------------------------------------------------------- collectives


@dataclass(frozen=True)
class Sent:
    """What a GPU sends, which is what it receives."""

    within: float = 0.0
    """Bytes to GPUs of its node."""
    between: float = 0.0
    """Bytes to other nodes."""
    seconds: float = 0.0

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.within + other.within, self.between + other.between, self.seconds + other.seconds)

    def __mul__(self, times: float) -> Sent:
        return Sent(self.within * times, self.between * times, self.seconds * times)


def ring(size: float, members: int, stride: int, passes: int, cluster: Cluster) -> Sent:
    """A collective over `members` processes, each `stride` ranks after the one before, of `size` bytes altogether.

    passes: 1 for all-gather and reduce-scatter, which send (N−1)/N of the size, 2 for all-reduce, which is one after
    the other (Patarasuk and Yuan 2009, doi:10.1016/j.jpdc.2008.09.002). Of a ring's links one in each node leaves it,
    and NCCL has as many rings as there are network ports, so that every port carries its share. An all-reduce goes
    through a tree where that is sooner done.
    """
    if members == 1 or not size:
        return Sent()
    local = max(1, min(members, cluster.per_node // stride))
    nodes = members // local
    sent = passes * (members - 1) / members * size
    between = sent / local if nodes > 1 else 0.0
    hops_between = passes * (nodes - 1)
    hops_within = passes * (members - 1) - hops_between
    slowest = max((sent - between) / cluster.within, between / cluster.between) / cluster.reached
    seconds = slowest + hops_within * WITHIN_LATENCY + hops_between * BETWEEN_LATENCY
    if passes == 2:  # up a tree of nodes and down again: as many bytes, and fewer steps
        up = (local - 1) * WITHIN_LATENCY + math.log2(nodes) * BETWEEN_LATENCY
        seconds = min(seconds, slowest / TREE_SPEED + 2 * up)
    return Sent(sent - between, between, BASE_LATENCY + seconds)
