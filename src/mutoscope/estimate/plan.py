"""Which strategy to train a recipe with on so many GPUs: a row for each, and the fastest that fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from mutoscope.contradictions import validate
from mutoscope.errors import ConfigError
from mutoscope.estimate.advice import RESERVE, Advice, advise
from mutoscope.estimate.cluster import Cluster
from mutoscope.estimate.networks import shapes_of
from mutoscope.estimate.strategies import Step, step
from mutoscope.estimate.work import work_of
from mutoscope.parallel import Parallel
from mutoscope.recipe import Recipe

SAME = 1.01
"""Of two strategies whose steps take the same time within this factor, the simpler one is taken."""
PARTS = ("weights", "gradients", "optimizer", "ema", "gathered", "activations", "autoencoder", "text encoder")
"""What memory is told by, in this order."""


@dataclass(frozen=True)
class Choice:
    """A strategy, and what is expected of it."""

    parallel: Parallel
    step: Step

    def fits(self, memory: int) -> bool:
        """Into so many bytes, with some to spare for CUDA and fragments."""
        return self.step.peak + RESERVE <= memory


def ways(cluster: Cluster) -> list[Parallel]:
    """All strategies for these GPUs, the simpler ones first."""
    found = [Parallel(strategy="ddp"), Parallel(strategy="fsdp2"), Parallel(strategy="fsdp2", reshard=False)]
    if cluster.nodes > 1:
        found += [Parallel(strategy="fsdp2", replicate=cluster.nodes, reshard=again) for again in (True, False)]
    found.append(Parallel(strategy="fsdp2", offload="all"))
    found += [Parallel(strategy="deepspeed", zero=1), Parallel(strategy="deepspeed", zero=2)]
    found += [Parallel(strategy="deepspeed", zero=3), Parallel(strategy="deepspeed", zero=2, offload="optimizer")]
    return [*found, Parallel(strategy="deepspeed", zero=3, offload="all")]


def allowed(recipe: Recipe, cluster: Cluster) -> tuple[list[Parallel], list[str]]:
    """Those that this recipe may have, and lines about the others, which say why not."""
    found, refused = list[Parallel](), dict[str, list[str]]()
    for parallel in ways(cluster):
        try:
            validate(replace(recipe, parallel=parallel))
            found.append(parallel)
        except ConfigError as error:
            refused.setdefault(error.problems[0], []).append(name_of(parallel))
    return found, [f"not for this recipe: {'; '.join(names)}: {why}" for why, names in refused.items()]


def fastest(found: Sequence[Choice], memory: int) -> Choice | None:
    """Of those that fit into so many bytes, the one whose step is expected to take least time."""
    fitting = [choice for choice in found if choice.fits(memory)]
    least = min((choice.step.seconds for choice in fitting), default=0.0)
    return next((choice for choice in fitting if choice.step.seconds <= SAME * least), None)


def least_memory(recipe: Recipe, cluster: Cluster, whole: nn.Module | None = None) -> int:
    """Bytes of a GPU under the strategy that needs least."""
    work = work_of(recipe, whole=whole)
    return min(step(work, parallel, cluster).peak for parallel in allowed(recipe, cluster)[0])


def name_of(parallel: Parallel) -> str:
    """fsdp2, replicate 8"""
    return ", ".join([parallel.strategy, *(f"{key} {value}" for key, value in _given(parallel))])


def flags_of(parallel: Parallel) -> str:
    """What to type."""
    return " ".join(f"--parallel.{key} {value}" for key, value in [("strategy", parallel.strategy), *_given(parallel)])


def _given(parallel: Parallel) -> Iterator[tuple[str, str]]:
    """What differs from the strategy alone; ZeRO's stage is always said."""
    for key in ("replicate", "reshard", "zero", "offload"):
        value = getattr(parallel, key)
        if value != getattr(Parallel, key) or (key == "zero" and parallel.strategy == "deepspeed"):
            yield key, str(value).lower()


# ---------------------------------------------------------------- for people


def plan(recipe: Recipe, cluster: Cluster, whole: nn.Module | None = None) -> list[str]:
    """Lines that tell all this. Raises as `estimate`."""
    whole = shapes_of(recipe) if whole is None else whole
    work, (may, refused) = work_of(recipe, whole=whole), allowed(recipe, cluster)
    found = [Choice(parallel, step(work, parallel, cluster)) for parallel in may]
    if (context := recipe.parallel.context) > 1:
        refused.append(f"parallel.context = {context} is not in this table, whose processes hold whole samples")
    lines = [*about(cluster), "", *aligned([header(found), *rows(found, cluster.memory)]), *refused, ""]
    if (best := fastest(found, cluster.memory)) is None:
        return [*lines, *_advice(advise(recipe, cluster.memory, whole, lambda r, w: least_memory(r, cluster, w)))]
    took = best.step
    return [*lines, f"fastest that fits: {flags_of(best.parallel)}", f"  {figure(took.seconds)} s for a step "
            f"of {took.samples} samples, {figure(took.samples / took.seconds)} a second"]  # fmt: skip


def about(cluster: Cluster) -> list[str]:
    """The assumptions."""
    gpus = f"{cluster.gpus} GPUs of {cluster.memory / 2**30:.4g} GiB on {cluster.nodes} node{'s' * (cluster.nodes > 1)}"
    return [
        f"{gpus}, {RESERVE / 2**20:.0f} MiB of each left free; a training step, without validation and samples",
        f"expected, not measured: {cluster.hfu:.0%} of {cluster.bf16 / 1e12:g} TFLOP/s in bf16 "
        f"({cluster.fp32 / 1e12:g} in fp32) while GPUs compute; links at {cluster.reached:.0%} of "
        f"{cluster.within / 1e9:g} GB/s in a node and {cluster.between / 1e9:g} GB/s to others",
    ]


def header(found: Sequence[Choice]) -> list[str]:
    """Of a table: memory by part in GiB, what a GPU sends in a step in GB, and how long it does not compute."""
    ends = ["peak GiB", "GB in node", "GB to others", "step s", "waits s", "samples/s", "MFU", "fits"]
    return ["strategy", *_parts(found), *ends]


def rows(found: Sequence[Choice], memory: int) -> list[list[str]]:
    """The rows that go with it."""
    return [
        [
            name_of(choice.parallel),
            *(f"{done.memory.get(part, 0) / 2**30:.2f}" for part in _parts(found)),
            f"{done.peak / 2**30:.2f}",
            f"{done.sent.within / 1e9:.2f}",
            f"{done.sent.between / 1e9:.2f}",
            figure(done.seconds),
            figure(done.seconds - done.computing),
            figure(done.samples / done.seconds),
            f"{done.mfu:.1%}",
            "yes" if choice.fits(memory) else "no",
        ]
        for choice in found
        for done in [choice.step]
    ]


def figure(number: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _parts(found: Sequence[Choice]) -> list[str]:
    return [part for part in PARTS if any(part in choice.step.memory for choice in found)]


def aligned(table: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines with the first column to the left, and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = [cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        yield "  ".join(cells).rstrip()


def _advice(advice: Advice) -> Iterator[str]:
    yield "none fits; " + ("one does with these, one after another:" if advice.fits else "all that can be done is:")
    width = max((len(lever.lever.flags) for lever in advice.steps), default=0)
    for pulled in advice.steps:
        yield f"  {pulled.lever.flags:{width}}  {pulled.peak / 2**30:.2f} GiB  cost in speed: {pulled.lever.cost}"
    if not advice.fits:
        yield f"nothing gets it below {advice.reached / 2**30:.2f} GiB; take fewer frames or a smaller size"
