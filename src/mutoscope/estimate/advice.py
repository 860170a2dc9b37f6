"""What to do where a GPU's memory is too small: which levers to pull, those first that cost least speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from mutoscope.build import latent_spec
from mutoscope.contradictions import validate
from mutoscope.errors import ConfigError
from mutoscope.estimate.networks import shapes_of
from mutoscope.estimate.phases import Phase, phases
from mutoscope.estimate.step import Estimate, at_largest_bucket, estimate
from mutoscope.models.cogvideox import CogVideoX
from mutoscope.recipe import Recipe

RESERVE = 3 * 2**28
"""Bytes that are left free: CUDA's own (about half a gigabyte) and the allocator's fragments."""
WORTH = 0.01
"""A lever that saves less of the peak is not pulled."""
STORE = "runs/latents"
"""Where advice supposes latents to be."""


PeakOf = Callable[[Recipe, nn.Module | None], int]
"""Bytes that training a recipe takes at its peak, by its network's shapes, where they are at hand."""


@dataclass(frozen=True)
class Lever:
    """A way to less memory."""

    flags: str
    """What to type."""
    cost: str
    """What it costs in speed."""
    pull: Callable[[Recipe], Recipe]


@dataclass(frozen=True)
class Step:
    """A lever, and the peak with it and those before."""

    lever: Lever
    recipe: Recipe
    peak: int


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Whether a recipe fits into a memory, and what to do if not."""

    memory: int
    peak: int
    """Of the recipe as it is."""
    steps: tuple[Step, ...]
    """Levers to pull one after another; empty where it fits, or where none helps."""
    shorter: tuple[int, int] | None
    """Where all levers are too little: a number of frames that is about half, and the peak with it."""

    @property
    def reached(self) -> int:
        """The peak with all levers of `steps`."""
        return self.steps[-1].peak if self.steps else self.peak

    @property
    def fits(self) -> bool:
        """Whether the memory suffices, with all levers of `steps`."""
        return self.reached + RESERVE <= self.memory


def advise(recipe: Recipe, memory: int, whole: nn.Module | None = None, peak_of: PeakOf | None = None) -> Advice:
    """What it takes to train this recipe in so many bytes of a GPU. whole: as for `estimate`, which is the source of
    errors. peak_of: what is to become small enough; None takes `training_peak`."""
    peak_of = peak_of or training_peak
    recipe = at_largest_bucket(recipe.model.complete(recipe))
    whole = shapes_of(recipe) if whole is None else whole
    peak, steps = peak_of(recipe, whole), []
    now, least = recipe, peak
    for lever in levers(recipe, len(getattr(whole, "blocks", ()))):
        if least + RESERVE <= memory:
            break
        pulled = lever.pull(now)
        if pulled == now or not _allowed(pulled):
            continue
        reached = peak_of(pulled, whole if pulled.model == recipe.model else None)
        if reached < (1 - WORTH) * least:
            steps.append(Step(lever, pulled, reached))
            now, least = pulled, reached
    steps = _needed(recipe, steps, memory, whole, peak_of)
    least = steps[-1].peak if steps else peak
    shorter = _shorter(steps[-1].recipe if steps else recipe, peak_of) if least + RESERVE > memory else None
    return Advice(memory=memory, peak=peak, steps=tuple(steps), shorter=shorter)


def training_peak(recipe: Recipe, whole: nn.Module | None = None) -> int:
    """The most that a run of `mutoscope train` needs at a time: of its steps, its validation and its samples."""
    return max(p.peak_bytes for p in run_phases(recipe, whole))


def run_phases(recipe: Recipe, whole: nn.Module | None = None) -> list[Phase | Estimate]:
    """What happens in a run of `mutoscope train`."""
    whole = shapes_of(recipe) if whole is None else whole
    due = {"validate": recipe.validate_every, "draw": recipe.sample_every}
    return [estimate(recipe, whole=whole), *(p for p in phases(recipe, whole=whole, only=[n for n in due if due[n]]))]


def levers(recipe: Recipe, blocks: int) -> Iterator[Lever]:
    """All levers that this recipe may have, those first that cost least speed, but for those that make numbers much
    coarser. Some come twice, where one before makes them possible."""
    changed = lambda **fields: lambda r: replace(r, **fields)
    optim = lambda **fields: lambda r: replace(r, optim=replace(r.optim, **fields))
    if recipe.autoencoder is not None:
        latents = lambda r: r if r.data.latents else replace(r, data=replace(r.data, latents=STORE))
        yield Lever(f"--data.latents {STORE}", "none: faster, once they are made by mutoscope encode", latents)
    if recipe.lora is None and blocks:
        yield _half(recipe)
    yield Lever("--optim.name adamw8bit", "next to none", lambda r: _optimizer(r, "adamw8bit"))
    if recipe.lora is None:
        yield Lever("--optim.stochastic-rounding true", "next to none", optim(stochastic_rounding=True))
        yield Lever("--optim.release-gradients true --optim.max-grad-norm 0", "none, but gradients are not clipped",
                    optim(release_gradients=True, max_grad_norm=0.0))  # fmt: skip
    parked = Lever("--offload-activations true", "little: copies are made while the GPU computes",
                   changed(offload_activations=True))  # fmt: skip
    if blocks:
        yield parked
    if recipe.batch_size > 1:
        many = recipe.batch_size * recipe.accumulate
        yield Lever(f"--batch-size 1 --accumulate {many}", "little with long clips, much with short ones",
                    changed(batch_size=1, accumulate=many))  # fmt: skip
    if recipe.lora is not None:
        yield Lever("--quantize int8", "some per cent: weights are unpacked", changed(quantize="int8"))
    if blocks:
        again = changed(activation_checkpointing=True)
        yield Lever("--activation-checkpointing true", "a quarter to a third more time", again)
        yield parked
    if recipe.lora is not None:
        yield Lever("--quantize nf4", "some per cent more, and coarser weights", changed(quantize="nf4"))
        for count in (blocks // 2, blocks):
            yield Lever(f"--offload-blocks {count}", "a tenth to a quarter more time", changed(offload_blocks=count))
    else:
        yield Lever("--optim.name adamw4bit", "next to none, and coarser state", lambda r: _optimizer(r, "adamw4bit"))
    yield Lever("--optim.offload true", "the CPU takes the steps: seconds for each billion of trained weights",
                lambda r: replace(r, optim=replace(r.optim, offload=True, stochastic_rounding=False,
                                                   release_gradients=False)))  # fmt: skip


def _half(recipe: Recipe) -> Lever:
    """bf16 weights, for networks that compute in the precision of their weights and for those that do not."""
    cost = "none: faster; the optimizer completes them to fp32"
    if isinstance(recipe.model, CogVideoX):
        model = replace(recipe.model, weights="bf16")
        return Lever("--model.weights bf16 --weights bf16 --precision fp32", cost,
                     lambda r: replace(r, model=model, weights="bf16", precision="fp32"))  # fmt: skip
    return Lever("--weights bf16 --precision bf16", cost, lambda r: replace(r, weights="bf16", precision="bf16"))


def _optimizer(recipe: Recipe, name: Any) -> Recipe:
    if recipe.optim.name not in ("adamw", "adamw8bit"):
        return recipe
    return replace(recipe, optim=replace(recipe.optim, name=name))


def _allowed(recipe: Recipe) -> bool:
    try:
        validate(recipe)
    except ConfigError:
        return False
    return True


def _needed(recipe: Recipe, steps: list[Step], memory: int, whole: nn.Module, peak_of: PeakOf) -> list[Step]:
    """Without those levers that the last ones have made superfluous; the dearest are tried first."""
    if not steps or steps[-1].peak + RESERVE > memory:
        return steps
    for dropped in reversed(steps[:-1]):
        found, now = [], recipe
        for step in steps:
            if step is not dropped:
                now = step.lever.pull(now)
                found.append((step.lever, now))
        same = now.model == recipe.model
        if _allowed(now) and peak_of(now, whole if same else None) + RESERVE <= memory:
            kept = [Step(lever, r, peak_of(r, whole if r.model == recipe.model else None)) for lever, r in found]
            return _needed(recipe, kept, memory, whole, peak_of)
    return steps


def _shorter(recipe: Recipe, peak_of: PeakOf) -> tuple[int, int] | None:
    """About half the frames, as the model takes them, and the peak with them."""
    data, spec = recipe.data, latent_spec(recipe.autoencoder)
    latents = spec.latent_shape(data.frames, data.height, data.width)[0]
    for count in range(latents // 2, 0, -1):
        frames = spec.pixel_shape(count, 1, 1)[0]
        try:
            return frames, peak_of(replace(recipe, data=replace(data, frames=frames)), None)
        except ValueError:  # the model says which it takes
            continue
    return None
