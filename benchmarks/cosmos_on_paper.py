"""Cosmos-Predict1-7B Video2World, post-trained whole, on 8, 64 and 512 H100s: on paper.

    python -m benchmarks.cosmos_on_paper

There is no Cosmos among our models yet. Its sizes are NVIDIA's (nvidia-cosmos/cosmos-predict1: config/base/net.py,
FADITV2 7B, whose parameters diffusers' CosmosTransformer3DModel has as well); what a block computes with is measured on
one of diffusers' blocks, of fake tensors. All else are the formulas of `mutoscope show --gpus`. Nothing is measured on
a GPU. It prints tables in Markdown, which docs/cluster.md holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from mutoscope.estimate.cluster import Cluster, cluster_of
from mutoscope.estimate.networks import make_fake
from mutoscope.estimate.plan import Choice, about, fastest, figure, flags_of, header, rows, ways
from mutoscope.estimate.strategies import FP32, Moment, Unit, Weight, Work, parts_of, step
from mutoscope.estimate.tracker import Account, CudaAutocast, Tracker, backward

CLIP = (121, 704, 1280)
LATENTS = (16, 16, 88, 160)
"""Channels, and a clip by 8 in each direction, the first frame alone."""
TOKENS = 16 * 44 * 80
"""Patches of 1 × 2 × 2."""
BLOCKS, WIDTH, HEADS, MLP, ADALN, TEXT, WORDS = 28, 4096, 32, 4, 256, 1024, 512
GPUS = (8, 64, 512)
SAVE_EVERY = 30 * 60
"""Seconds between checkpoints."""
DISKS = (2e9, 10e9, 40e9)
"""Bytes a second that a file system takes from all nodes together."""
FRAMES_PER_CORE = 418 * 480 * 720 / (704 * 1280)
"""A second: `benchmarks.decode`, 480 × 720 with a key frame in 250 (docs/benchmarks.md), by the number of pixels."""


def weight(rows: int, columns: int = 1) -> Weight:
    """Kept in fp32, gathered in bf16."""
    return Weight(rows=rows, columns=columns, kept=FP32, gathered=2)


def modulation(times: int) -> list[Weight]:
    """AdaLN-LoRA: from the time to shifts, scales and gates by way of a few numbers."""
    return [weight(ADALN, WIDTH), weight(times * WIDTH, ADALN)]


def block() -> Unit:
    """Self-attention, cross-attention and feed-forward layer, none with biases; norms of queries and keys."""
    square, norm = weight(WIDTH, WIDTH), weight(WIDTH // HEADS)
    attention = [square] * 4 + [norm] * 2
    cross = [square, weight(WIDTH, TEXT), weight(WIDTH, TEXT), square, norm, norm]
    return attention + cross + [weight(MLP * WIDTH, WIDTH), weight(WIDTH, MLP * WIDTH)] + modulation(3) * 3


def rest() -> Unit:
    """Patches of 16 latents, the mask of known frames and that of padding; positions; time; the way out."""
    positions = [weight(size, WIDTH) for size in (128, 120, 120)]
    time = [weight(WIDTH), weight(WIDTH, WIDTH), weight(3 * WIDTH, WIDTH)]
    return [weight(WIDTH, 18 * 4), *positions, *time, *modulation(2), weight(16 * 4, WIDTH)]


def forward_flops() -> int:
    """Of a clip: 2 for each multiply-add of the matrix products; 14 width² weights a block that all tokens pass."""
    of_tokens = 2 * TOKENS * (14 * WIDTH**2 + 2 * (TOKENS + WORDS) * WIDTH)
    return BLOCKS * (of_tokens + 2 * WORDS * 2 * TEXT * WIDTH) + 2 * TOKENS * WIDTH * (18 + 16) * 4


def in_a_block() -> Account:
    """What the forward and the backward pass of a checkpointed block take; its gradients vanish as they come."""
    from diffusers.models.transformers.transformer_cosmos import CosmosTransformerBlock

    with torch.device("meta"):
        made = CosmosTransformerBlock(HEADS, WIDTH // HEADS, TEXT, float(MLP), ADALN, qk_norm="rms_norm").bfloat16()
    tracker, half = Tracker("cuda"), torch.bfloat16
    with FakeTensorMode():
        make_fake(made)
        tracker.tell("weights", made.parameters())
        for p in made.parameters():
            p.register_post_accumulate_grad_hook(_forget)
        x = torch.empty(1, TOKENS, WIDTH, dtype=half, requires_grad=True)
        text, time = torch.empty(1, WORDS, TEXT, dtype=half), torch.empty(1, WIDTH, dtype=half)
        shared, turns = torch.empty(1, 3 * WIDTH, dtype=half), torch.empty(TOKENS, WIDTH // HEADS)
        call = partial(made, embedded_timestep=time, temb=shared, image_rotary_emb=(turns, turns), extra_pos_emb=x)
        with tracker, CudaAutocast():
            with tracker.phase("forward"), torch.autocast("cpu", half):
                y = checkpoint(call, x, text, use_reentrant=False)
            with tracker.phase("backward"):
                backward(y.sum())
    return tracker.account


def _forget(p: Tensor) -> None:
    p.grad = None


def work() -> Work:
    """Of a clip on each GPU: bf16 over fp32 weights, AdamW, a moving average, activation checkpointing, latents and
    embeddings that were made before."""
    blocks, kept = (block(),) * BLOCKS, 2 * TOKENS * WIDTH
    alone = in_a_block()
    forward, again = (alone.peak(phase)["activations"] for phase in ("forward", "backward"))
    all_kept = (BLOCKS - 1) * kept
    count = sum(w.part(1) for unit in (*blocks, rest()) for w in unit)
    flops = forward_flops()
    return Work(
        blocks=blocks,
        rest=rest(),
        ema=FP32,
        moments=(
            Moment(False, all_kept + forward),
            Moment(True, all_kept + again),
            Moment(True, again, (BLOCKS - 1) / BLOCKS),
        ),
        # Under DDP gradients are there twice, and autocast has copies of the weights in bf16
        replica={"weights": 4 * count, "gradients": 8 * count, "optimizer": 8 * count, "ema": 4 * count,
                 "activations": again + 2 * count},
        batch_size=1,
        flops_forward=flops,
        flops_backward=2 * flops,
        flops_recomputed=flops,
        bf16=True,
    )  # fmt: skip


def strategies(work: Work, cluster: Cluster) -> list[Choice]:
    """All that the engine has with a moving average."""
    return [Choice(p, step(work, p, cluster)) for p in ways(cluster) if p.strategy != "deepspeed"]


def report() -> list[str]:
    """All tables, in Markdown."""
    made = work()
    clusters = [cluster_of("h100", gpus=gpus) for gpus in GPUS]
    found = [strategies(made, cluster) for cluster in clusters]
    best = [fastest(choices, cluster.memory) for choices, cluster in zip(found, clusters, strict=True)]
    state = (FP32 + 8 + made.ema) * made.trained
    lines = [
        f"{made.numbers / 1e9:.3f} billion weights, {TOKENS:,} tokens of {' × '.join(map(str, CLIP))}, batch size 1 "
        f"for each GPU, {made.flops_forward / 1e12:,.0f} TFLOP forward and as much recomputed: "
        f"{4 * made.flops_forward / 1e15:.1f} PFLOP executed in a step, {3 * made.flops_forward / 1e15:.1f} of them "
        "model FLOPs.",
    ]
    for cluster, choices in zip(clusters, found, strict=True):
        lines += ["", *(f"{line[0].upper()}{line[1:]}." for line in about(cluster)), ""]
        lines += markdown([header(choices), *rows(choices, cluster.memory)])
    lines += ["", "Fastest that fits:", ""]
    lines += [f"- {c.gpus} GPUs: `{flags_of(b.parallel)}`" for c, b in zip(clusters, best, strict=True) if b]
    chosen = [(c, b) for c, b in zip(clusters, best, strict=True) if b is not None]
    lines += ["", *checkpoints(made, state, chosen), "", *loading(chosen)]
    return lines


def checkpoints(made: Work, state: int, chosen: Sequence[tuple[Cluster, Choice]]) -> Iterator[str]:
    """What saving takes: size, copies, time on file systems of several speeds."""
    yield (
        f"A checkpoint is {state / 1e9:.1f} GB (fp32 weights, two moments, the average), whatever the number of GPUs; "
        f"one every {SAVE_EVERY // 60} minutes is {state / SAVE_EVERY / 1e6:.0f} MB/s on average. Training waits for "
        "the copy to the CPU, and for no more if the checkpoint before is written by then."
    )
    yield ""
    writing = [f"written at {speed / 1e9:g} GB/s" for speed in DISKS]
    table = [["GPUs", "parts of a copy", "GB a process copies", "seconds it waits", "GB in a node's memory", *writing]]
    for cluster, choice in chosen:
        mine = state / parts_of(choice.parallel, cluster)
        waits = mine / (cluster.host * cluster.reached)
        table.append(
            [
                str(cluster.gpus),
                str(parts_of(choice.parallel, cluster)),
                f"{mine / 1e9:.2f}",
                f"{waits:.2f}",
                f"{mine * min(cluster.per_node, cluster.gpus) / 1e9:.0f}",
                *(f"{state / speed:.0f} s" for speed in DISKS),
            ]
        )
    yield from markdown(table)


def loading(chosen: Sequence[tuple[Cluster, Choice]]) -> Iterator[str]:
    """What a node's clips take, decoded or as latents."""
    channels, *grid = LATENTS
    stored = 2 * (channels * grid[0] * grid[1] * grid[2] + WORDS * TEXT)
    yield (
        f"A core decodes {FRAMES_PER_CORE:.0f} frames a second of this size; latents and embeddings of a clip are "
        f"{stored / 1e6:.1f} MB in 16 bits."
    )
    yield ""
    table = [["GPUs", "clips/s", "clips/s of a node", "frames/s", "cores that decode", "MB/s of latents", "MFU"]]
    for cluster, choice in chosen:
        clips = choice.step.samples / choice.step.seconds
        node = clips / cluster.nodes
        frames = node * CLIP[0]
        table.append(
            [
                str(cluster.gpus),
                figure(clips),
                figure(node),
                figure(frames),
                f"{frames / FRAMES_PER_CORE:.2f}",
                figure(node * stored / 1e6),
                f"{choice.step.mfu:.1%}",
            ]
        )
    yield from markdown(table)


def markdown(table: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table's lines, the first row its header."""
    for i, row in enumerate(table):
        yield f"| {' | '.join(row)} |"
        if i == 0:
            yield "|---" * len(row) + "|"


def main() -> None:
    print("\n".join(report()))
    print("cosmos_on_paper: no ratio was taken; formulas, not measurements")


if __name__ == "__main__":
    main()
