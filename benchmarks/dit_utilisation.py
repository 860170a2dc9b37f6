"""How much of a CPU core's own speed at matrix products a DiT's training step reaches.

    python -m benchmarks.dit_utilisation

The step is the training loop's: loss, backward pass, clipping, AdamW. Its FLOPs are three times those of the forward
pass (model FLOPs, as in MFU), which `mutoscope.estimate` counts with attention's formula. The core's speed is the best
of several large products, in the step's precision, measured between the steps. All times are CPU times of one thread.
Blocks are alike, so that a few of them stand for a model of any depth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from torch import nn

from benchmarks.harness import cpu_seconds, table
from mutoscope.build import build_model
from mutoscope.estimate.step import estimate
from mutoscope.models.dit import DiT
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.randomness import Draw
from mutoscope.recipe import Data, Recipe
from mutoscope.training.optimizers import build_optimizers
from mutoscope.types import Batch, Cond

REPEATS = 5
PRODUCTS = ((1024, 1024, 1024), (2048, 2048, 2048), (2048, 768, 3072), (4096, 1024, 1024))
"""(m, k, n) of (m × k) times (k × n)."""
LATTE_B = DiT(depth=4, width=768, heads=12)
BASE = Recipe(  # 8 frames of 16 × 16 patches: 2048 tokens
    data=Data(root="", frames=8, height=32, width=32, num_labels=10),
    model=LATTE_B,
    objective=Diffusion(),
    steps=1,
    batch_size=1,
)
JOINT = replace(BASE.data, frames=2)  # 512 tokens that all see each other, four times

HEADLINE = "Latte-B, factorised, fp32"
RECIPES = {
    "width 512, factorised, fp32": replace(BASE, model=DiT(depth=4, width=512, heads=8)),
    HEADLINE: BASE,
    "Latte-B, joint, fp32": replace(BASE, data=JOINT, batch_size=4, model=replace(LATTE_B, attention="joint")),
    "Latte-L, factorised, fp32": replace(BASE, model=DiT(depth=4, width=1024, heads=16)),
    "Latte-B, factorised, bf16": replace(BASE, precision="bf16"),
}


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for name, recipe in RECIPES.items():
        dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
        flops, step = estimate(recipe).flops_step, training_step(recipe)
        step()
        pairs = [(flops / cpu_seconds(step), product_peak(dtype)) for _ in range(REPEATS)]
        shares = [reached / peak for reached, peak in pairs]
        reached, peak = (median(side) / 1e9 for side in zip(*pairs, strict=True))
        rows.append([name, f"{flops / 1e9:.0f}", f"{reached:.0f}", f"{peak:.0f}", f"{median(shares):.0%}"])
        if name == HEADLINE:
            spread = f"median of {REPEATS}, min {min(shares):.0%}, max {max(shares):.0%}"
            headline = f"dit_utilisation: {median(shares):.0%} of the core's GEMM peak, {name} ({spread})"
    table(["training step", "GFLOP", "GFLOP/s", "GEMM peak", "share"], rows)
    print(headline)


def training_step(recipe: Recipe) -> Callable[[], None]:
    """A step of the training loop on random pixels, with its model and optimizers."""
    model, data, size = build_model(recipe), recipe.data, recipe.batch_size
    optimizers = build_optimizers(model, recipe.optim)
    video = torch.randn(size, 3, data.frames, data.height, data.width)
    cond = Cond(label=torch.zeros(size, dtype=torch.int64))
    batch = Batch(ids=[""] * size, samples=list(range(size)), cond=cond, latents=video)

    def step() -> None:
        draw = Draw(recipe.seed, "train", batch.samples)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
            loss = recipe.objective.loss(model, batch, draw)
        loss.total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def product_peak(dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of the products."""
    speeds = []
    for m, k, n in PRODUCTS:
        product = partial(torch.mm, torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype))
        product()
        speeds.append(2 * m * k * n / min(cpu_seconds(product) for _ in range(3)))
    return max(speeds)


if __name__ == "__main__":
    main()
