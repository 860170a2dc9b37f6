"""Estimates for people, as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from mutoscope.estimate.advice import RESERVE, Advice, advise
from mutoscope.estimate.cluster import Cluster
from mutoscope.estimate.networks import shapes_of
from mutoscope.estimate.phases import phases
from mutoscope.estimate.plan import plan
from mutoscope.estimate.step import at_largest_bucket, estimate
from mutoscope.recipe import Recipe


def describe(recipe: Recipe, memory: int | None = None, cluster: Cluster | None = None) -> str:
    """The estimate in plain lines. memory: bytes of a GPU, to say whether it suffices and what to do if not; with a
    cluster it is that that says what its GPUs have, and how all of them would do.

    Raises as `estimate`.
    """
    recipe = at_largest_bucket(recipe.model.complete(recipe))
    whole = shapes_of(recipe)
    cost = estimate(recipe, whole=whole)
    shapes = [f"{_shape(cost.clip)} pixels"]
    if cost.latents:
        shapes.append(
            f"{_shape(cost.latents[1:])} of {cost.vocab:,} codes" if cost.vocab else f"{_shape(cost.latents)} latents"
        )
    if cost.tokens:
        shapes.append(f"{cost.tokens:,} tokens")
    total = sum(cost.parameters.values())
    rows = [
        ("clip", " -> ".join(shapes)),
        ("parameters", f"{_count(total)}" + (f", {_count(cost.trainable)} trained" if cost.trainable < total else "")),
        *((f"  {part}", _count(number)) for part, number in cost.parameters.items()),
        ("memory", f"{_bytes(cost.peak_bytes)} at the peak of a training step ({_settings(recipe)})"),
        *((f"  {part}", _bytes(size)) for part, size in sorted(cost.peak_parts.items(), key=lambda item: -item[1])),
        *_phase_rows(recipe, whole),
        ("disk", f"{_bytes(cost.checkpoint_bytes)} for a checkpoint"),
        ("FLOPs", f"{_count(cost.flops_step)} an optimizer step: 3 × {_count(cost.flops_forward)} of the forward pass"),
    ]
    if cost.flops_recomputed:
        rows.append(("  recomputed", f"{_count(cost.flops_recomputed)} more, by activation checkpointing"))
    if cost.flops_encode:
        rows.append(("  encoding", f"{_count(cost.flops_encode)} more, by the autoencoder"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}  {value}" for name, value in rows]
    if cluster is not None:
        lines += ["", *plan(recipe, cluster, whole)]
    elif memory is not None:
        lines += ["", *_advice(advise(recipe, memory, whole))]
    return "\n".join(lines)


def _settings(recipe: Recipe) -> str:
    settings = f"batch_size {recipe.batch_size}, {recipe.precision}"
    if recipe.activation_checkpointing:
        settings += ", activation checkpointing"
    moved = [name for name in ("offload_activations", "offload_blocks") if getattr(recipe, name)]
    if moved := moved + ["optim.offload"] * recipe.optim.offload:
        settings += f"; what {' and '.join(moved)} moves to the CPU is not counted"
    return settings


def _phase_rows(recipe: Recipe, whole: nn.Module) -> Iterator[tuple[str, str]]:
    """The peaks of what is not the training step."""
    notes = {
        "encode captions": "the text encoder alone",
        "encode clips": "the autoencoder alone",
        "validate": "the validation loss, beside what training keeps",
        "draw": "samples, beside what training keeps"
        + ("" if recipe.sample_every else "; sample_every = 0 draws none"),
    }
    for phase in phases(recipe, whole=whole):
        yield phase.name, f"{_bytes(phase.peak_bytes)} at the peak: {notes[phase.name]}"


def _advice(advice: Advice) -> Iterator[str]:
    """Whether it fits, and what to do if not."""
    room = f"{_bytes(advice.memory)}, of which {_bytes(RESERVE)} are left to CUDA and to fragments"
    if advice.fits and not advice.steps:
        yield f"fits into {room}: training needs {_bytes(advice.peak)}"
        return
    yield f"does not fit into {room}: training needs {_bytes(advice.peak)}"
    if advice.steps:
        yield "to fit, add one after another:" if advice.fits else "all that can be done about it:"
        width = max(len(step.lever.flags) for step in advice.steps)
        for step in advice.steps:
            yield f"  {step.lever.flags:{width}}  {_bytes(step.peak):>10}  cost in speed: {step.lever.cost}"
    if not advice.fits:
        yield f"nothing gets it below {_bytes(advice.reached)}; take fewer frames or a smaller size"
        if advice.shorter is not None:
            yield f"  with all of these, --data.frames {advice.shorter[0]} needs {_bytes(advice.shorter[1])}"


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
