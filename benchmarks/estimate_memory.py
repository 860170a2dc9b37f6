"""The estimate of a training step's memory against what training takes.

    python -m benchmarks.estimate_memory

Each recipe is trained for real, by `mutoscope.training.loop.train`, for two steps. On a CPU that is done in a fresh
process that has trained a step of one clip before, so that libraries are loaded, and the measure is the growth of
resident memory at its peak: it is what a machine runs out of, and holds all that the estimate leaves out, such as
kernels' scratch space. glibc is told to give freed memory back at once, because what it would keep hangs on what ran
before. On a GPU the measure is `torch.cuda.max_memory_allocated`.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.harness import peak_memory, table
from mutoscope.autoencoders.presets import preset
from mutoscope.estimate.step import estimate
from mutoscope.estimate.tracker import Device
from mutoscope.models.dit import DiT
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.objectives.reconstruction import Reconstruction
from mutoscope.recipe import Data, Lora, Optim, Recipe
from mutoscope.text.encoders import HashedWords
from mutoscope.training.log import console
from mutoscope.training.loop import train

CLIPS = Data(root="flying-mnist://small", frames=16, height=64, width=64, num_labels=10)
TINY = DiT(depth=2, width=32, heads=2, patch=(4, 16, 16))
BASE = Recipe(data=CLIPS, model=TINY, objective=Diffusion(), steps=2, batch_size=1, validate_every=0, sample_every=0)

RECIPES = {
    "VQ-VAE, fp32": replace(BASE, model=preset("s4t4_b_vq"), objective=Reconstruction(), batch_size=12),
    "factorised DiT, fp32, EMA": replace(
        BASE, model=DiT(depth=6, width=512, heads=8, patch=(2, 4, 4)), batch_size=2, ema=0.999
    ),
    "joint DiT, bf16, Muon, captions, checkpointing, 2 micro-steps": replace(
        BASE,
        text=HashedWords(),
        model=DiT(depth=8, width=512, heads=8, patch=(2, 4, 4), attention="joint"),
        optim=Optim(name="muon"),
        batch_size=2,
        accumulate=2,
        precision="bf16",
        activation_checkpointing=True,
    ),
    "joint DiT, LoRA over int8, checkpointing": replace(
        BASE,
        model=DiT(depth=12, width=768, heads=12, patch=(2, 4, 4), attention="joint"),
        lora=Lora(rank=32, targets="attention"),
        quantize="int8",
        activation_checkpointing=True,
    ),
}


def main() -> None:
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # for the processes to come
    rows, errors = [], []
    device: Device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, recipe in RECIPES.items():
        cost = estimate(recipe, device)
        step = cost.peak_bytes - cost.peak_parts.get("checkpoint", 0)
        estimated, measured = step / 2**20, measure(recipe)
        errors.append(estimated / measured - 1)
        rows.append([name, f"{estimated:.0f}", f"{measured:.0f}", f"{errors[-1]:+.1%}"])
    table(["training step", "estimate MiB", "measured MiB", "error"], rows)
    where = "a GPU" if torch.cuda.is_available() else "a CPU"
    print(
        f"estimate_memory: within {max(map(abs, errors)):.1%} of the measured peak on {where} ({len(errors)} recipes)"
    )


def measure(recipe: Recipe) -> float:
    """MiB that training this recipe takes at its peak."""
    if not torch.cuda.is_available():
        return peak_memory(training, recipe)
    torch.cuda.reset_peak_memory_stats()
    training(recipe)()
    return torch.cuda.max_memory_allocated() / 2**20


def training(recipe: Recipe) -> Callable[[], object]:
    """Training this recipe, after a step of one clip."""
    console.quiet = True
    run(replace(recipe, batch_size=1, accumulate=1, steps=1))
    gc.collect()  # of what that step leaves, so that it is not there to be used again
    return partial(run, recipe)


def run(recipe: Recipe) -> None:
    """Train and throw the run away."""
    with tempfile.TemporaryDirectory() as folder:
        train(recipe, Path(folder) / "run")


if __name__ == "__main__":
    main()
