"""Training a sparse GPT against the same GPT with full attention: 16×16×16 tokens, what a step costs, what it learns.

    python -m benchmarks.sparse_context [--steps 400] [--seeds 3] [--peer PATH_TO_A_CHECKOUT_OF_CVLIZATION]

Tokens are those of Flying MNIST in grey, 16 frames of 64×64: each 4×4 patch is one of 16 codes, which of its quarters
are bright. Both models have 4 blocks of width 64 and 4 heads, and take turns: a step of one, a step of the other, on
the same clips with the same optimizer, from several seeds. The times are CPU times of one thread. The last line is of
those very steps; it is an error if the sparse one's validation loss is, on average, more than 2 % above the other's.
minisora's GPT (nanoGPT), of the same size, is only timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.cvlization import PEER, gpt
from benchmarks.harness import compare, cpu_seconds, last_line, table
from mutoscope.data.flying_mnist import Preset, Split, render
from mutoscope.models.gpt import GPT
from mutoscope.models.sparse_context import Nearest
from mutoscope.models.sparse_gpt import SparseGPT
from mutoscope.objectives.tokens import NextToken
from mutoscope.randomness import Draw
from mutoscope.recipe import Optim
from mutoscope.training.cpu_memory import keep_freed_memory
from mutoscope.training.optimizers import build_optimizers, set_learning_rates
from mutoscope.types import Batch, Cond, ModelIO

GRID, CODES = (16, 16, 16), 16
CLIPS = Preset(
    name="sparse", size=64, frames=16, fps=8, glyph=(24, 32), speeds=(2.0, 3.0, 4.0), palette=("white",),
    variants=64, digits=(1, 2), train=2000, val=24,
)  # fmt: skip
DEPTH, WIDTH, HEADS = 4, 64, 4
CONTEXT = 9
"""The nearest known tokens: those that touch a position's cell by a side or an edge."""
OPTIM = Optim(lr=3e-3, betas=(0.9, 0.99), warmup_steps=20, schedule="cosine", final_lr=0.05)
MOST = 1.02
"""Of the full attention's validation loss."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--peer", type=Path, help=f"a checkout of {PEER}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as training does

    losses, pairs = [], []
    for seed in range(options.seeds):
        found, times = train_both(seed, options.steps)
        losses.append(found)
        pairs += times
    full, sparse = (mean(side) for side in zip(*losses, strict=True))

    tokens = GRID[0] * GRID[1] * GRID[2]
    row = lambda name, seconds, loss="-": [name, f"{seconds / tokens * 1e6:.1f}", loss]
    rows = [row("all before it", median(f for _, f in pairs), f"{full:.4f}")]
    rows.append(row(f"{CONTEXT} nearest", median(o for o, _ in pairs), f"{sparse:.4f}"))
    for context in (32, 64, 128):
        timed = compare(partial(step_of(build(context), options.steps), 0), None, repeats=3)
        rows.append(row(f"{context} nearest", median(ours for ours, _ in timed)))
    for dropout in (0.0, 0.2) if options.peer else ():
        timed = compare(peer_step(options.peer, dropout), None, repeats=3)
        rows.append(row(f"all before it, minisora's GPT, dropout {dropout}", median(theirs for theirs, _ in timed)))
    table(["a position sees", "µs per token", "validation, nats per token"], rows)
    print(f"validation loss: {sparse / full:.4f} of full attention's after {options.steps} steps, "
          f"mean of {options.seeds} seeds")  # fmt: skip
    if sparse > MOST * full:
        raise SystemExit(f"sparse_context: the validation loss is more than {MOST} of full attention's")
    blocks = [pairs[i::5] for i in range(min(5, len(pairs)))]  # each of steps from all runs
    last_line("sparse_context", "full attention", [(mean(o for o, _ in b), mean(f for _, f in b)) for b in blocks])


def train_both(seed: int, steps: int) -> tuple[tuple[float, float], list[tuple[float, float]]]:
    """((full attention's, the sparse one's) validation loss, (the sparse one's, full attention's) seconds of steps)."""
    full, sparse = build(None, seed), build(CONTEXT, seed)
    compare(lambda: loss_of(sparse, "val", [0]), lambda: loss_of(full, "val", [0]), repeats=1)  # tables, first touch
    turns, pairs = [step_of(model, steps) for model in (sparse, full)], []
    for step in range(steps):
        pairs.append((cpu_seconds(partial(turns[0], step)), cpu_seconds(partial(turns[1], step))))
    found = validation(full), validation(sparse)
    print(f"seed {seed}: {median(o for o, _ in pairs) * 1e3:.0f} ms and {median(f for _, f in pairs) * 1e3:.0f} ms a "
          f"step; validation loss {found[1]:.4f} and {found[0]:.4f}", flush=True)  # fmt: skip
    return found, pairs


def build(context: int | None, seed: int = 0) -> nn.Module:
    """A GPT with full attention, or one that sees so many of the nearest tokens."""
    torch.manual_seed(seed)
    io = ModelIO(channels=3, grid=GRID, vocab=CODES)
    if context is None:
        return GPT(depth=DEPTH, width=WIDTH, heads=HEADS).build(io)
    return SparseGPT(depth=DEPTH, width=WIDTH, heads=HEADS, context=Nearest(tokens=context)).build(io)


def step_of(model: nn.Module, steps: int) -> Callable[[int], None]:
    """A training step on one clip, as in our loop."""
    optimizers = build_optimizers(model, OPTIM)

    def step(number: int) -> None:
        set_learning_rates(optimizers, OPTIM, number, steps)
        loss_of(model, "train", [number]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def peer_step(checkout: Path, dropout: float) -> Callable[[], None]:
    """A step of minisora's loop."""
    model = gpt(checkout, block_size=GRID[0] * GRID[1] * GRID[2], vocab_size=CODES + 1, n_layer=DEPTH, n_head=HEADS,
                n_embd=WIDTH, dropout=dropout).train()  # fmt: skip
    optimizer = model.configure_optimizers(0.1, OPTIM.lr, OPTIM.betas, "cpu")  # type: ignore[operator]
    codes = tokens_of("train", 0).flatten()[None]
    known = torch.cat([torch.full_like(codes[:, :1], CODES), codes[:, :-1]], dim=1)

    def step() -> None:
        model(known, codes)[1].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def loss_of(model: nn.Module, split: Split, clips: list[int]) -> Tensor:
    tokens = torch.stack([tokens_of(split, clip) for clip in clips])
    batch = Batch(ids=[str(clip) for clip in clips], samples=clips, cond=Cond(), tokens=tokens)
    return NextToken().loss(model, batch, Draw(0, "train", clips)).total


@torch.no_grad()
def validation(model: nn.Module) -> float:
    return mean(loss_of(model, "val", [clip]).item() for clip in range(CLIPS.val))


def tokens_of(split: Split, clip: int) -> Tensor:
    """(16, 16, 16): the codes of a clip."""
    grey = render(CLIPS, split, clip).frames[..., 0].astype(np.float32) / 255
    quarters = grey.reshape(16, 16, 2, 2, 16, 2, 2).mean((3, 6)) > 0.4  # (t, h, 2, w, 2)
    return torch.from_numpy((quarters * np.array([1, 2, 4, 8]).reshape(2, 1, 2)).sum((2, 4)))


if __name__ == "__main__":
    main()
