"""Estimates for people, as lines of text."""

from __future__ import annotations

from collections.abc import Sequence

from mutoscope.estimate.step import at_largest_bucket, estimate
from mutoscope.recipe import Recipe


def describe(recipe: Recipe) -> str:
    """The estimate for people, in plain lines."""
    recipe = at_largest_bucket(recipe)
    cost = estimate(recipe)
    shapes = [f"{_shape(cost.clip)} pixels"]
    if cost.latents:
        shapes.append(
            f"{_shape(cost.latents[1:])} of {cost.vocab:,} codes" if cost.vocab else f"{_shape(cost.latents)} latents"
        )
    if cost.tokens:
        shapes.append(f"{cost.tokens:,} tokens")
    total = sum(cost.parameters.values())
    settings = f"batch_size {recipe.batch_size}, {recipe.precision}"
    if recipe.activation_checkpointing:
        settings += ", activation checkpointing"
    moved = [name for name in ("offload_activations", "offload_blocks") if getattr(recipe, name)]
    if moved := moved + ["optim.offload"] * recipe.optim.offload:
        settings += f"; what {' and '.join(moved)} would move to the CPU is counted in"
    rows = [
        ("clip", " -> ".join(shapes)),
        ("parameters", f"{_count(total)}" + (f", {_count(cost.trainable)} trained" if cost.trainable < total else "")),
        *((f"  {part}", _count(number)) for part, number in cost.parameters.items()),
        ("memory", f"{_bytes(cost.peak_bytes)} at the peak of a training step ({settings})"),
        *((f"  {part}", _bytes(size)) for part, size in sorted(cost.peak_parts.items(), key=lambda item: -item[1])),
        ("disk", f"{_bytes(cost.checkpoint_bytes)} for a checkpoint"),
        ("FLOPs", f"{_count(cost.flops_step)} an optimizer step: 3 × {_count(cost.flops_forward)} of the forward pass"),
    ]
    if cost.flops_recomputed:
        rows.append(("  recomputed", f"{_count(cost.flops_recomputed)} more, by activation checkpointing"))
    if cost.flops_encode:
        rows.append(("  encoding", f"{_count(cost.flops_encode)} more, by the autoencoder"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def _shape(sizes: Sequence[int]) -> str:
    return " × ".join(map(str, sizes))


def _count(number: float) -> str:
    """2340000 -> 2.34 M"""
    for unit in ("", " k", " M", " G", " T", " P"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} E"


def _bytes(number: float) -> str:
    """1572864 -> 1.5 MiB"""
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
