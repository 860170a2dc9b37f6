"""A training step on many GPUs, on paper: what each of them holds, sends and waits for, by strategy.

These are formulas of sizes alone, wherever the sizes come from: `estimate.work` measures those of a recipe's own model
on fake tensors, `benchmarks/cosmos_on_paper.py` has those of a model that there is no code of. `Parallel` is a
recipe's, and the formulas follow what the engine does with it: torch 2.13's DDP and FSDP2, and DeepSpeed 0.19's ZeRO
with our JSON.

Time: GPUs compute at `Cluster.hfu` of their peak. What a strategy may send while it computes costs only what it takes
longer than that; kernels are not slowed down by it. Left out: the optimizer's kernels, the loader, launching kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mutoscope.estimate.cluster import Cluster, Sent, ring
from mutoscope.parallel import Parallel

FP32 = 4
"""Bytes of a number."""
DDP_BUCKET = 25 * 2**20
"""Bytes that DDP sends at a time: torch's bucket_cap_mb."""
ZERO_BUCKET = 500_000_000
"""Numbers that DeepSpeed sends at a time, and has a buffer for: its reduce_bucket_size."""
ZERO_LIVE = 1_000_000_000
"""Numbers that ZeRO-3 keeps gathered at most: its stage3_max_live_parameters."""
ADAM_BYTES = 28
"""That AdamW reads and writes for a weight: weight, gradient and two moments in, all but the gradient out."""


# ---------------------------------------------------------------- work


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A parameter: FSDP divides its first dimension."""

    rows: int
    """First dimension."""
    columns: int
    """Product of the others."""
    kept: int = FP32
    """Bytes of a number at rest."""
    gathered: int = FP32
    """Bytes of a number where it computes."""
    trained: bool = True

    def part(self, parts: int) -> int:
        """Numbers of the largest part, which is the first process's and what all parts are padded to."""
        return -(-self.rows // parts) * self.columns


Unit = Sequence[Weight]
"""What is gathered at once: a block, or all that is in none."""


@dataclass(frozen=True)
class Moment:
    """A time at which activations are many."""

    backward: bool
    activations: int
    """Bytes of all that comes and goes, but for weights, gradients and what is communicated."""
    done: float = 0.0
    """Share of the blocks whose backward pass is over."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one process has to hold and to compute for a micro-step, were it alone; bytes and FLOPs."""

    blocks: tuple[Unit, ...]
    rest: Unit
    undivided: dict[str, int] = field(default_factory=dict)
    """Bytes that no strategy divides, by part: buffers and scales are of the weights, and there are encoders."""
    optimizer: float = 8.0
    """Bytes of the optimizer's state for each weight that is trained."""
    ema: int = 0
    """Bytes of averages, likewise."""
    moments: tuple[Moment, ...]
    """Of a process whose weights are in the precision that they are gathered in."""
    replica: dict[str, int]
    """Bytes by part at the peak of a process that has all to itself, under DDP."""
    batch_size: int
    accumulate: int = 1
    flops_forward: float
    flops_backward: float
    flops_recomputed: float = 0
    flops_encode: float = 0
    bf16: bool
    """Whether matrices are multiplied in bf16."""

    @property
    def units(self) -> tuple[Unit, ...]:
        """Blocks, and what is in none."""
        return (*self.blocks, self.rest)

    @property
    def numbers(self) -> int:
        """Weights."""
        return numbers(self.units)

    @property
    def trained(self) -> int:
        """Those of them that are trained."""
        return numbers(self.units, trained=True)


def numbers(units: Iterable[Unit], trained: bool = False, parts: int = 1) -> int:
    """Numbers of the largest part of units, all of them or those that are trained."""
    return sum(w.part(parts) for unit in units for w in unit if w.trained or not trained)


def at_rest(units: Iterable[Unit], parts: int, trained: bool = False) -> int:
    """Bytes of the largest part of units."""
    return sum(w.kept * w.part(parts) for unit in units for w in unit if w.trained or not trained)


def gathered(units: Iterable[Unit], parts: int, trained: bool = False) -> int:
    """Bytes of units that are gathered from so many parts, padding included."""
    return sum(w.gathered * w.part(parts) * parts for unit in units for w in unit if w.trained or not trained)


def reduced(units: Iterable[Unit], parts: int) -> int:
    """Bytes of units' gradients in fp32, as they are sent, padding included."""
    return FP32 * parts * numbers(units, trained=True, parts=parts)


# ---------------------------------------------------------------- memory


def parts_of(parallel: Parallel, cluster: Cluster) -> int:
    """In how many parts a copy of the model is."""
    if parallel.strategy == "fsdp2":
        return parallel.shard or cluster.gpus // (parallel.replicate or 1)
    return cluster.gpus if parallel.strategy == "deepspeed" else 1


def memory(work: Work, parallel: Parallel, cluster: Cluster) -> dict[str, int]:
    """Bytes by part of a GPU at the moment when most is in use."""
    if parallel.strategy == "fsdp2":
        found = _fsdp(work, parallel, cluster)
    elif parallel.strategy == "deepspeed":
        found = [_zero(work, parallel, cluster, moment) for moment in work.moments]
    else:
        found = [work.replica]
    peak = max(found, key=lambda parts: sum(parts.values()))
    return {part: size for part, size in peak.items() if size}


def resident(work: Work, parallel: Parallel, cluster: Cluster) -> dict[str, int]:
    """Bytes by part that fsdp2 has in a process between two steps; gradients as the step finds them."""
    parts = parts_of(parallel, cluster)
    state = numbers(work.units, trained=True, parts=parts)
    divided = {
        "weights": at_rest(work.units, parts),
        "optimizer": round(work.optimizer * state),
        "ema": work.ema * state,
        "gradients": at_rest(work.units, parts, trained=True),
    }
    return _added(dict.fromkeys(divided, 0) if parallel.offload == "all" else divided, work.undivided)


def _fsdp(work: Work, parallel: Parallel, cluster: Cluster) -> list[dict[str, int]]:
    """At each moment, as torch's FSDP2 allocates (_fsdp_param_group.py).

    The rest of the model is gathered as long as anything computes. A block is there as weights, and in the buffer that
    they came in: in the forward pass its own, in the backward pass that of the block to come. Gradients are whole until
    their block is through, and then in the buffer that is sent, until the next block is through. In earlier micro-steps
    nothing is sent, and they stay, whole and in fp32.
    """
    parts, before = parts_of(parallel, cluster), work.accumulate > 1
    lasting = resident(work, parallel, cluster)
    largest = max(work.blocks, key=lambda unit: gathered([unit], parts), default=())
    whole, root = reduced(work.units, parts) if before else 0, gathered([work.rest], parts)
    block, blocks, send = gathered([largest], parts), gathered(work.blocks, parts), reduced([largest], parts)
    if parallel.replicate > 1:
        send += send // parts  # what copies add up, kept until the next block's
    found = []
    for moment in work.moments:
        left = whole + round(moment.done * (lasting["gradients"] - whole))
        if moment.backward:
            there = 2 * block if parallel.reshard else round((1 - moment.done) * blocks)
            there += gathered([work.rest, largest], 1, trained=True) + send
        else:
            there = (block if parallel.reshard else blocks) + (block or root)
        found.append(lasting | {"gradients": left, "gathered": root + there, "activations": moment.activations})
    rest = root + gathered([work.rest], 1, trained=True) + reduced([work.rest], parts)
    return [*found, lasting | {"gathered": rest + send}]


def _zero(work: Work, parallel: Parallel, cluster: Cluster, moment: Moment) -> dict[str, int]:
    """At a moment, as ZeRO has it (arXiv:1910.02054 §5 and §7) with DeepSpeed's buffers (runtime/zero/stage*.py)."""
    n, zero, on_gpu = cluster.gpus, parallel.zero, parallel.offload == "none"
    weights, gradients = gathered(work.units, 1), gathered(work.units, 1, trained=True)
    state = -(-work.trained // n)
    half = gradients < FP32 * work.trained  # then there are masters, and gradients are added up in fp32
    live = min(weights, ZERO_LIVE * weights // work.numbers) if zero == 3 else 0
    parts = {
        "weights": weights if zero < 3 else weights // n if parallel.offload != "all" else 0,
        "optimizer": (round(work.optimizer * state) + FP32 * state * half) if on_gpu else 0,
        "gradients": FP32 * work.trained if zero == 1 else FP32 * state if on_gpu else 0,
        "gathered": ZERO_BUCKET * gradients // work.trained + live,
        "activations": moment.activations,
    }
    return _added(parts, work.undivided)


def _added(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    return {part: a.get(part, 0) + b.get(part, 0) for part in {**a, **b}}


# ---------------------------------------------------------------- communication


NOTHING = Sent()


@dataclass(frozen=True)
class Exchanges:
    """What is sent in an optimizer step: the first three in each micro-step, the others in the last of them alone."""

    first: Sent = NOTHING
    """Before anything can be computed."""
    forward: Sent = NOTHING
    """While the forward pass computes."""
    backward: Sent = NOTHING
    """While the backward pass computes."""
    gradients: Sent = NOTHING
    """While the backward pass of the last micro-step computes."""
    last: Sent = NOTHING
    """When there is nothing left to compute."""

    def total(self, accumulate: int) -> Sent:
        """Of an optimizer step."""
        return (self.first + self.forward + self.backward) * accumulate + self.gradients + self.last


def exchanges(work: Work, parallel: Parallel, cluster: Cluster) -> Exchanges:
    """What a GPU sends under a strategy."""
    if cluster.gpus == 1:
        return Exchanges()
    if parallel.strategy == "fsdp2":
        return _fsdp_exchanges(work, parallel, cluster)
    everyone = lambda size, passes: ring(size, cluster.gpus, 1, passes, cluster)
    if parallel.strategy == "deepspeed":
        each = gathered(work.units, 1, trained=True) / work.trained
        buckets = [each * count for count in _chunks(work.trained, ZERO_BUCKET)]
        weights = _sum(everyone(bucket, 1) for bucket in buckets)
        if parallel.zero < 3:  # gradients by all-reduce (use_multi_rank_bucket_allreduce), nothing meanwhile
            reduce = _sum(everyone(bucket, 2) for bucket in buckets)
            return Exchanges(last=reduce * (1 if parallel.zero == 1 else work.accumulate) + weights)
        gathers = [everyone(gathered([unit], 1), 1) for unit in work.units]
        return Exchanges(gathers[-1], _sum(gathers[:-1]), _sum(gathers) + weights)  # gradients' parts are as large
    sizes = _chunks(sum(w.kept * w.part(1) for unit in work.units for w in unit if w.trained), DDP_BUCKET)
    # The last bucket has nothing to hide behind
    return Exchanges(gradients=_sum(everyone(size, 2) for size in sizes[:-1]), last=everyone(sizes[-1], 2))


def _fsdp_exchanges(work: Work, parallel: Parallel, cluster: Cluster) -> Exchanges:
    """Weights are gathered within a copy, for the forward pass and, where they were let go of, for the backward pass;
    the rest of the model once. Gradients are divided within a copy, in fp32, and then added up over copies."""
    parts = parts_of(parallel, cluster)
    copies = cluster.gpus // parts
    gathers = [ring(gathered([unit], parts), parts, 1, 1, cluster) for unit in work.units]
    reduces = [
        ring(reduced([unit], parts), parts, 1, 1, cluster)
        + ring(reduced([unit], parts) / parts, copies, parts, 2, cluster)
        for unit in work.units
    ]
    first = gathers[-1] + (gathers[0] if work.blocks else NOTHING)
    return Exchanges(
        first=first,
        forward=_sum(gathers[1:-1]),
        backward=_sum(gathers[:-1]) if parallel.reshard else NOTHING,
        gradients=_sum(reduces[:-1]),
        last=reduces[-1],
    )


def _sum(sent: Iterable[Sent]) -> Sent:
    return sum(sent, NOTHING)


def _chunks(size: int, most: int) -> list[int]:
    """A size in pieces."""
    return [most] * ((size - 1) // most) + [(size - 1) % most + 1] if size else [0]


# ---------------------------------------------------------------- time


@dataclass(frozen=True)
class Step:
    """What is expected of an optimizer step."""

    memory: dict[str, int]
    """Bytes by part at a GPU's peak."""
    sent: Sent
    """By a GPU."""
    computing: float
    """Seconds that GPUs compute."""
    seconds: float
    samples: int
    """Of all GPUs."""
    mfu: float
    """Model FLOPs (what is recomputed does not count) over what the GPUs could have done in this time."""

    @property
    def peak(self) -> int:
        """Bytes."""
        return sum(self.memory.values())


def step(work: Work, parallel: Parallel, cluster: Cluster) -> Step:
    """An optimizer step under a strategy: its memory, communication and time."""
    peak = cluster.bf16 if work.bf16 else cluster.fp32
    speed = peak * cluster.hfu
    forward, encode = work.flops_forward / speed, work.flops_encode / speed
    backward = (work.flops_backward + work.flops_recomputed) / speed
    sends = exchanges(work, parallel, cluster)
    hidden = max(forward, sends.forward.seconds)
    micro = encode + sends.first.seconds + hidden
    seconds = work.accumulate * micro + (work.accumulate - 1) * max(backward, sends.backward.seconds)
    seconds += max(backward, sends.backward.seconds + sends.gradients.seconds) + sends.last.seconds
    seconds += _on_host(work, parallel, cluster)
    model = work.accumulate * (work.flops_forward + work.flops_backward)
    return Step(
        memory=memory(work, parallel, cluster),
        sent=sends.total(work.accumulate),
        computing=work.accumulate * (encode + forward + backward),
        seconds=seconds,
        samples=work.batch_size * work.accumulate * cluster.gpus,
        mfu=model / peak / seconds,
    )


def _on_host(work: Work, parallel: Parallel, cluster: Cluster) -> float:
    """Seconds for a step that the CPU takes, and for the copies there and back, none of which is hidden."""
    if parallel.offload == "none":
        return 0.0
    parts = parts_of(parallel, cluster)
    state = numbers(work.units, trained=True, parts=parts)
    copied = FP32 * state + gathered(work.units, 1, trained=True) // parts  # gradients go, weights come back
    if parallel.offload == "all":  # these at each gathering
        kept = at_rest(work.units, parts) if parallel.strategy == "fsdp2" else gathered(work.units, 1) // parts
        copied = FP32 * state + kept * work.accumulate * (2 if parallel.reshard else 1)
    return copied / (cluster.host * cluster.reached) + ADAM_BYTES * state / (cluster.host_memory * cluster.reached)
