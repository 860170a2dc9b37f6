"""Whole training steps of Latte and of STDiT with IDDPM, against the seed's.

    python -m benchmarks.diffusion_step [--peer PATH_TO_A_CHECKOUT_OF_CVLIZATION]

Both sides get the same weights, and must predict the same before anything is timed. (There the seed's GELU is
exchanged for the exact one, which ours has; it is timed with its own.) The seed trains in fp32 on CPUs; ours does in
that, too, and in the bf16 of its recipes. Widths, heads, patches, losses and grids are those of the seed's commands. Of
Latte there are two blocks, of STDiT one: what is left out is more of the same. A step is what the loops do: times,
noise, the loss with its variational bound, gradients, clipping, Adam. Time is CPU time of one thread. The last line is
STDiT's or Latte's, whichever gains less.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks import cvlization_diffusion as seed
from benchmarks.cvlization import PEER
from benchmarks.harness import compare, last_line, table, timing_row
from mutoscope.models.dit import DiT, DiTModel
from mutoscope.models.layers import Attention
from mutoscope.models.stdit import STDiT, STDiTModel
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.randomness import Draw
from mutoscope.recipe import Optim
from mutoscope.training.optimizers import build_optimizers
from mutoscope.types import Batch, Cond, ModelIO

OBJECTIVE = Diffusion(schedule="ddpm_linear", prediction="eps", learned_variance=True)
CHANNELS, LR = 4, 1e-4
LATTE_GRID, STDIT_GRID = (4, 64, 64), (8, 64, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, help=f"a checkout of {PEER}")
    checkout: Path | None = parser.parse_args().peer
    torch.set_num_threads(1)
    measured = {}
    for bf16, precision in ((False, "fp32 on both sides"), (True, "ours in bf16, as in the recipes")):
        measured[f"Latte, 2 blocks of S/2, 4x4x64x64, {precision}"] = latte(checkout, bf16)
        measured[f"STDiT, 1 block of 768, 3 heads, 4x8x64x64, {precision}"] = stdit(checkout, bf16)
    table(["one clip", "ours ms", "peer ms", "ratio"], [timing_row(name, pairs) for name, pairs in measured.items()])
    gain = lambda pairs: median(theirs / ours for ours, theirs in pairs)
    last_line("diffusion_step", PEER, min(measured.values(), key=gain))


def latte(checkout: Path | None, bf16: bool) -> list[tuple[float, float]]:
    """(ours, peer's) seconds of Latte's steps."""
    torch.manual_seed(0)
    io = ModelIO(channels=CHANNELS, out_channels=2 * CHANNELS, grid=LATTE_GRID)
    ours = DiT(depth=2, width=384, heads=6, qk_norm=False).build(io)
    frames, size, _ = LATTE_GRID
    peer = None
    if checkout is not None:
        theirs = seed.latte(checkout, input_size=size, patch_size=2, in_channels=CHANNELS, hidden_size=384, depth=2,
                            num_heads=6, num_frames=frames, extras=1)  # fmt: skip
        shake(ours)
        copy_latte(ours, theirs)
        check_equal(ours, lambda x, t: theirs(x.transpose(1, 2), t).transpose(1, 2), theirs, LATTE_GRID)
        peer = peer_step(theirs, seed.iddpm(checkout, 2), (1, frames, CHANNELS, size, size))
    return compare(our_step(ours, LATTE_GRID, bf16), peer)


def stdit(checkout: Path | None, bf16: bool) -> list[tuple[float, float]]:
    """(ours, peer's) seconds of STDiT's steps."""
    torch.manual_seed(0)
    io = ModelIO(channels=CHANNELS, out_channels=2 * CHANNELS, grid=STDIT_GRID)
    ours = STDiT(version=1, depth=1, width=768, heads=3).build(io)
    peer = None
    if checkout is not None:
        theirs = seed.stdit(
            checkout, input_size=STDIT_GRID, in_channels=CHANNELS, hidden_size=768, depth=1, num_heads=3
        )
        shake(ours)
        copy_stdit(ours, theirs)
        check_equal(ours, theirs, theirs, STDIT_GRID)
        peer = peer_step(theirs, seed.iddpm(checkout, 1), (1, CHANNELS, *STDIT_GRID))
    return compare(our_step(ours, STDIT_GRID, bf16), peer)


def our_step(model: nn.Module, grid: tuple[int, int, int], bf16: bool) -> Callable[[], None]:
    """A step of our loop."""
    [optimizer] = build_optimizers(model, Optim(lr=LR))
    latents = torch.randn(1, CHANNELS, *grid, generator=torch.Generator().manual_seed(1))
    batch = Batch(ids=["0"], samples=[0], cond=Cond(), latents=latents)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = OBJECTIVE.loss(model, batch, Draw(0, "train", [0])).total
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peer_step(model: nn.Module, diffusion: seed.Any, shape: tuple[int, ...]) -> Callable[[], None]:
    """A step of the seed's loops (iddpm.py: Adam; train_dit.py: AdamW, whose arithmetic costs the same)."""
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=LR)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def step() -> None:
        t = torch.randint(0, diffusion.num_timesteps, (1,))
        diffusion.training_losses(model=model, x_start=latents, t=t, model_kwargs=None)["loss"].mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def shake(model: nn.Module) -> None:
    """Numbers in what starts as zero, so that a difference shows."""
    for p in model.parameters():
        nn.init.normal_(p, std=0.05)


@torch.no_grad()
def check_equal(
    ours: nn.Module, theirs: Callable[[Tensor, Tensor], Tensor], module: nn.Module, grid: tuple[int, int, int]
) -> None:
    """Raise AssertionError unless both sides predict the same."""
    acts = [m for m in module.modules() if isinstance(m, nn.GELU)]
    x, t = torch.randn(1, CHANNELS, *grid, generator=torch.Generator().manual_seed(2)), torch.tensor([321])
    for act in acts:
        act.approximate = "none"
    expected = theirs(x, t)
    for act in acts:
        act.approximate = "tanh"
    found = ours(x, t.float(), Cond())
    torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)


def copy_linear(theirs: nn.Module, *ours: nn.Linear) -> None:
    theirs.weight.copy_(torch.cat([layer.weight for layer in ours]).reshape(theirs.weight.shape))  # type: ignore[operator, union-attr, arg-type]
    theirs.bias.copy_(torch.cat([layer.bias for layer in ours]))  # type: ignore[operator, union-attr]


def copy_attention(theirs: nn.Module, ours: Attention) -> None:
    copy_linear(theirs.qkv, ours.query, ours.key_value)  # type: ignore[arg-type]
    copy_linear(theirs.proj, ours.out)  # type: ignore[arg-type]


def copy_head(theirs: nn.Module, ours: nn.Linear) -> None:
    """A patch's channels are outermost in ours, innermost in theirs."""
    order = torch.arange(4 * 2 * CHANNELS).reshape(2 * CHANNELS, 4).T.flatten()
    theirs.weight.copy_(ours.weight[order])  # type: ignore[operator, union-attr]
    theirs.bias.copy_(ours.bias[order])  # type: ignore[operator, union-attr]


@torch.no_grad()
def copy_latte(ours: DiTModel, theirs: seed.Any) -> None:
    """Give the seed's Latte our weights."""
    copy_linear(theirs.x_embedder.proj, ours.embed)
    copy_linear(theirs.t_embedder.mlp[0], ours.time.up)
    copy_linear(theirs.t_embedder.mlp[2], ours.time.down)
    for block, other in zip(ours.blocks, theirs.blocks, strict=True):
        copy_linear(other.adaLN_modulation[1], block.modulation)
        copy_attention(other.attn, block.attention)
        copy_linear(other.mlp.fc1, block.mlp.up)
        copy_linear(other.mlp.fc2, block.mlp.down)
    copy_linear(theirs.final_layer.adaLN_modulation[1], ours.final_modulation)
    copy_head(theirs.final_layer.linear, ours.head)


@torch.no_grad()
def copy_stdit(ours: STDiTModel, theirs: seed.Any) -> None:
    """Give the seed's STDiT our weights."""
    copy_linear(theirs.x_embedder.proj, ours.embed)
    copy_linear(theirs.t_embedder.mlp[0], ours.time.up)
    copy_linear(theirs.t_embedder.mlp[2], ours.time.down)
    copy_linear(theirs.t_block[1], ours.modulation)
    for block, other in zip(ours.blocks, theirs.blocks, strict=True):
        other.scale_shift_table.copy_(block.table[0])
        copy_attention(other.attn, block.attention)
        copy_attention(other.attn_temp, block.attention_time)
        copy_linear(other.mlp.fc1, block.mlp.up)
        copy_linear(other.mlp.fc2, block.mlp.down)
    theirs.final_layer.scale_shift_table.copy_(ours.final_table[0])
    copy_head(theirs.final_layer.linear, ours.head)


if __name__ == "__main__":
    main()
