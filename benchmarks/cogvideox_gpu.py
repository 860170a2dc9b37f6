"""CogVideoX at full size on a GPU: peak memory, seconds a step and MFU, beside the estimate and what others published.

    python -m benchmarks.cogvideox_gpu                  # all rows, on a GPU of 80 GB or more: minutes
    python -m benchmarks.cogvideox_gpu --only 5b,int8   # those whose names have all of these words
    python -m benchmarks.cogvideox_gpu --tiny           # the same path on a CPU with a tiny model: proves nothing

Networks of the published configurations with random weights, on which neither memory nor time depends; latents of 49
frames of 480×720; a warm-up step and three that are timed. "peak" is `torch.cuda.max_memory_allocated`, which is what
the estimate is of; "reserved" what `max_memory_reserved` says, which is what published figures are. MFU counts
what the step must do: the forward pass, and the backward pass of activations, and that of weights where they are
trained. It is against the dense bf16 peak of the card, where that is known.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace

import torch

from benchmarks.harness import table
from benchmarks.memory_levers import Bench
from mutoscope.estimate.step import estimate
from mutoscope.loading import load_recipe
from mutoscope.models.cogvideox import CogVideoX
from mutoscope.recipe import Lora, Recipe

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "4090": 165e12, "L40S": 362e12}
"""Dense bf16 FLOP/s of cards, by a word of their names (NVIDIA's data sheets)."""
STEPS = 3


@dataclass(frozen=True)
class Case:
    """A setting, what it is to reach, and what others need for it, in GiB (0: none was published)."""

    recipe: Recipe
    goal: float = 0.0
    published: float = 0.0


def cases(tiny: bool) -> dict[str, Case]:
    """All rows, by name."""
    lora, full = load_recipe("cogvideox.t2v_lora"), load_recipe("cogvideox.t2v_full")
    if tiny:
        lora, full = load_recipe("cogvideox.t2v_lora_tiny"), load_recipe("cogvideox.t2v_full_tiny")
    on = lambda recipe, size, weights: recipe if tiny else replace(
        recipe, model=CogVideoX(path=f"THUDM/CogVideoX-{size}", weights=weights))  # fmt: skip
    rank = lambda size, r: replace(on(lora, size, "bf16"), lora=Lora(rank=4 if tiny else r))
    half = replace(on(full, "5b", "fp32" if tiny else "bf16"), weights="fp32" if tiny else "bf16", precision="fp32",
                   activation_checkpointing=True)  # fmt: skip
    low = replace(half.optim, name="adamw8bit", stochastic_rounding=not tiny, release_gradients=True, max_grad_norm=0.0)
    r64, r128 = rank("5b", 64), rank("5b", 128)
    found = {
        "2b LoRA 64": Case(rank("2b", 64), published=13.0),
        "2b LoRA 64, activations kept": Case(
            replace(rank("2b", 64), activation_checkpointing=False), published=44.3),
        "5b LoRA 64": Case(r64, published=20.8),
        "5b LoRA 128": Case(r128, published=20.7),
        "5b LoRA 128, compiled": Case(replace(r128, compile=True)),
        "5b LoRA 128, activations offloaded": Case(replace(r128, offload_activations=True), goal=16),
        "5b LoRA 128, int8": Case(replace(r128, quantize="int8")),
        "5b LoRA 128, int8, activations offloaded": Case(
            replace(r128, quantize="int8", offload_activations=True), goal=11, published=18),
        "5b LoRA 128, nf4, half the blocks offloaded": Case(
            replace(r128, quantize="nf4", offload_activations=True, offload_blocks=1 if tiny else 21)),
        "2b full, AdamW, fp32 weights": Case(on(full, "2b", "fp32"), published=33.9),
        "5b full, AdamW 8 bit, bf16, released": Case(replace(half, optim=low), goal=36, published=52.8),
        "5b full, AdamW, bf16, offloaded": Case(
            replace(half, optim=replace(half.optim, offload=True)), published=39.4),
    }  # fmt: skip
    if not torch.cuda.is_available():  # a CPU offloads to nowhere
        moved = lambda r: r.offload_activations or r.offload_blocks or r.optim.offload
        found = {name: case for name, case in found.items() if not moved(case.recipe)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="words that a row's name must have, with commas between")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on a CPU too")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    if not gpu and not args.tiny:
        parser.exit(2, "cogvideox_gpu: needs CUDA, and torch sees no GPU here; --tiny runs the same path on a CPU\n")
    chosen = {n: c for n, c in cases(args.tiny).items() if all(word in n for word in args.only.split(",") if word)}
    rows, misses = [], 0
    for name, case in chosen.items():
        row, peak = measured(case)
        rows.append([name, *row])
        misses += bool(case.goal and peak > case.goal)
        print(f"{name}: {', '.join(row)}", flush=True)
    where = torch.cuda.get_device_name() if gpu else "a CPU"
    table([where, "peak GiB", "reserved", "estimate", "goal", "published", "s/step", "MFU"], rows)
    goals = f"{misses} of {sum(c.goal > 0 for c in chosen.values())} goals missed on {where}"
    print(f"cogvideox_gpu: {goals if gpu and not args.tiny else 'the path was run; nothing was measured'}")


def measured(case: Case) -> tuple[list[str], float]:
    """The row's figures, and the peak in GiB."""
    recipe = case.recipe.model.complete(case.recipe)
    recipe = replace(recipe, data=replace(recipe.data, latents="random", cache=False))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cost = estimate(recipe, "cuda" if device.type == "cuda" else "cpu")
    told = [f"{cost.peak_bytes / 2**30:.2f}", f"{case.goal:g}" if case.goal else "-",
            f"{case.published:g}" if case.published else "-"]  # fmt: skip
    try:
        peak, reserved, seconds = run(recipe, device)
    except torch.cuda.OutOfMemoryError:
        return ["out of memory", "-", *told, "-", "-"], float("inf")
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    # Without gradients of weights a backward pass is as much as the forward pass; with them, twice that
    flops = cost.flops_forward * (2 if recipe.lora else 3)
    best = next((flop_s for word, flop_s in PEAKS.items()
                 if device.type == "cuda" and word in torch.cuda.get_device_name()), None)  # fmt: skip
    mfu = f"{flops / seconds / best:.1%}" if best else "-"
    return [f"{peak:.2f}", f"{reserved:.2f}", *told, f"{seconds:.2f}", mfu], peak


def run(recipe: Recipe, device: torch.device) -> tuple[float, float, float]:
    """(peak GiB, reserved GiB, seconds a step)."""
    bench = Bench(recipe, device)
    bench.step()
    start = time.perf_counter()
    for _ in range(STEPS):
        bench.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / STEPS
    if device.type == "cpu":
        return 0.0, 0.0, seconds
    return torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30, seconds


if __name__ == "__main__":
    main()
