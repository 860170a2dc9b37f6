"""Drawing tokens from a GPT and training it, against the seed's GPT (nanoGPT) with the same weights.

    python -m benchmarks.gpt_sampling [--peer PATH_TO_A_CHECKOUT_OF_CVLIZATION] [--tokens 256 1024] [--repeats 5]

The seed computes all positions anew for each token, ours only the last, from a cache. Both must draw the same tokens
(greedily), and give the same logits and gradients before training steps are timed. Ours is told to be
nanoGPT: one table of positions, no neighbours, no QK-norm. Time is CPU time of one thread. The last line is about the
longest clip.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cvlization import PEER, gpt
from benchmarks.harness import compare, last_line, table, timing_row
from mutoscope.models.gpt import GPT, GPTModel
from mutoscope.objectives.tokens import NextToken
from mutoscope.randomness import Draw
from mutoscope.recipe import Optim, TokenSampler
from mutoscope.samplers.tokens import sample_tokens
from mutoscope.training.optimizers import build_optimizers, clip_gradients, gradient_norms
from mutoscope.types import Batch, Cond, ModelIO

DEPTH, WIDTH, HEADS, CODES = 4, 384, 6, 1000
TRAIN_BATCH, TRAIN_TOKENS, LR, DROPOUT = 4, 256, 5e-4, 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, help=f"a checkout of {PEER}")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024], help="lengths of clips")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)

    rows = []
    tokens = torch.randint(CODES, (TRAIN_BATCH, *grid(TRAIN_TOKENS)), generator=torch.Generator().manual_seed(1))
    for name, dropout, bf16 in (
        ("fp32 on both sides", 0.0, False),
        (f"fp32, dropout {DROPOUT} (the seed's default)", DROPOUT, False),
        ("ours in bf16, the recipes' precision", 0.0, True),
    ):
        model, peer = both(options.peer, TRAIN_TOKENS, dropout)
        if peer is not None:
            check_equal(model, peer, tokens)
        theirs = peer_step(peer, tokens) if peer is not None else None
        pairs = compare(our_step(model, tokens, bf16), theirs, options.repeats)
        rows.append(timing_row(f"training step, {name}", pairs))
    for length in options.tokens:
        model, peer = both(options.peer, length)
        pairs = draw_both(
            our_clip(model, length), peer_clip(peer, length) if peer is not None else None, options.repeats
        )
        rows.append(timing_row(f"drawing {length} tokens", pairs))
    table([f"depth {DEPTH}, width {WIDTH}, {CODES} codes", "ours ms", "peer ms", "ratio"], rows)
    last_line("gpt_sampling", PEER, pairs)


def draw_both(
    ours: Callable[[], Tensor], theirs: Callable[[], Tensor] | None, repeats: int
) -> list[tuple[float, float]]:
    """`harness.compare` for what takes minutes: the peer's first run is compared and counted, not warmed up."""
    ours()
    pairs = []
    for _ in range(repeats):
        seconds, drawn = _timed(ours)
        their_seconds, expected = _timed(theirs) if theirs is not None else (float("nan"), drawn)
        assert torch.equal(drawn, expected), "greedy tokens differ"
        pairs.append((seconds, their_seconds))
    return pairs


def _timed(draw: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.process_time()
    drawn = draw()
    return time.process_time() - start, drawn


def grid(length: int) -> tuple[int, int, int]:
    """(t, h, w) of a clip of so many tokens."""
    return length // 64, 8, 8


def both(checkout: Path | None, length: int, dropout: float = 0.0) -> tuple[GPTModel, nn.Module | None]:
    """Our model, as if trained, and the seed's with the same weights."""
    config = GPT(
        depth=DEPTH, width=WIDTH, heads=HEADS, dropout=dropout, positions="1d", neighbours=False, qk_norm=False
    )  # fmt: skip
    model = config.build(ModelIO(channels=4, grid=grid(length), vocab=CODES))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.05 + (p.ndim == 1) * p)
        model.inputs.codes.weight[:CODES] = model.head.weight  # the seed's are one tensor
    if checkout is None:
        return model, None
    peer = gpt(checkout, block_size=length, vocab_size=CODES + 1, n_layer=DEPTH, n_head=HEADS, n_embd=WIDTH,
               dropout=dropout)  # fmt: skip
    with torch.no_grad():
        copy_weights(model, peer)
    return model, peer


def copy_weights(model: Any, peer: Any) -> None:
    """Give the seed's model our weights; its start token is the one behind the codes, which it never draws."""
    body, inputs = peer.transformer, model.inputs
    body.wte.weight[:CODES] = model.head.weight
    body.wte.weight[CODES] = inputs.codes.weight[CODES + 1]
    body.wpe.weight.copy_(inputs.tables[0].weight)
    for ours, theirs in zip(model.blocks, body.h, strict=True):
        attention, mlp = ours.attention, ours.mlp
        theirs.attn.c_attn.weight.copy_(torch.cat([attention.query.weight, attention.key_value.weight]))
        theirs.attn.c_attn.bias.copy_(torch.cat([attention.query.bias, attention.key_value.bias]))
        for target, source in (
            (theirs.attn.c_proj, attention.out), (theirs.mlp.c_fc, mlp.up), (theirs.mlp.c_proj, mlp.down),
            (theirs.ln_1, ours.norm1), (theirs.ln_2, ours.norm2),
        ):  # fmt: skip
            target.weight.copy_(source.weight)
            target.bias.copy_(source.bias)
    body.ln_f.weight.copy_(model.norm.weight)
    body.ln_f.bias.copy_(model.norm.bias)


# ---------------------------------------------------------------- drawing


def our_clip(model: GPTModel, length: int) -> Callable[[], Tensor]:
    """Draws a clip, greedily, as `mutoscope sample` does."""
    model.eval()
    sampler = TokenSampler(temperature=0)

    def draw() -> Tensor:
        with torch.inference_mode():
            return sample_tokens(model, sampler, Cond(), grid(length), Draw(0, "a", [0])).flatten()

    return draw


def peer_clip(peer: Any, length: int) -> Callable[[], Tensor]:
    """Draws a clip as the seed's loop does, with top_k = 1. (It may draw its start token as well; then the tokens
    differ, and the run stops.)"""
    peer.eval()
    start = torch.tensor([[CODES]])
    return lambda: peer.generate(start, max_new_tokens=length, top_k=1)[0, 1:]


# ---------------------------------------------------------------- training


def our_loss(model: GPTModel, tokens: Tensor) -> Tensor:
    """The objective's, in windows of the whole clip."""
    samples = list(range(len(tokens)))
    batch = Batch(ids=[str(n) for n in samples], samples=samples, cond=Cond(), tokens=tokens)
    return NextToken().loss(model, batch, Draw(0, "train", samples)).total


def peer_loss(peer: nn.Module, tokens: Tensor) -> Tensor:
    """The seed's, of the start token and all codes but the last."""
    flat = tokens.flatten(1)
    loss: Tensor = peer(torch.cat([torch.full_like(flat[:, :1], CODES), flat[:, :-1]], dim=1), flat)[1]
    return loss


def our_step(model: GPTModel, tokens: Tensor, bf16: bool) -> Callable[[], None]:
    """A step of our loop."""
    model.train()
    optimizers = build_optimizers(model, Optim(lr=LR, betas=(0.9, 0.99), weight_decay=0.1))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = our_loss(model, tokens)
        loss.backward()
        clip_gradients(optimizers, gradient_norms(optimizers), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def peer_step(peer: Any, tokens: Tensor) -> Callable[[], None]:
    """A step of the seed's loop."""
    peer.train()
    optimizer = peer.configure_optimizers(0.1, LR, (0.9, 0.99), "cpu")

    def step() -> None:
        peer_loss(peer, tokens).backward()
        nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def check_equal(model: Any, peer: Any, tokens: Tensor) -> None:
    """Raise AssertionError unless both sides give the same logits and gradients (but for the tied table's, and with the
    start token's logit left out)."""
    model.eval(), peer.eval()
    flat = tokens.flatten(1)
    idx = torch.cat([torch.full_like(flat[:, :1], CODES), flat[:, :-1]], dim=1)
    ours, theirs = model(tokens, Cond()), peer.lm_head(peer.forward_features(idx))[..., :CODES]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for logits in (ours, theirs):
        nn.functional.cross_entropy(logits.flatten(0, 1), flat.flatten()).backward()
    for block, other in zip(model.blocks, peer.transformer.h, strict=True):
        torch.testing.assert_close(block.mlp.up.weight.grad, other.mlp.c_fc.weight.grad, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(block.attention.out.weight.grad, other.attn.c_proj.weight.grad, rtol=1e-3, atol=1e-5)
    for module in (model, peer):
        module.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
