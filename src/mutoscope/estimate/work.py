"""What a recipe's training step is to one GPU of many, by its own model on fake tensors: the sizes for `strategies`.

A block computes with gathered weights, in the precision that the engine gathers them in. So a micro-step is run with a
model that has them so, without an optimizer, and with gradients that vanish as they come; the weights, by their shapes,
the gradients and the optimizer's state are what the formulas add to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mutoscope.estimate.networks import measure, shapes_of
from mutoscope.estimate.step import at_largest_bucket, estimate, fake_encoder, frozen_parts, micro_step, prepared
from mutoscope.estimate.strategies import FP32, Moment, Unit, Weight, Work
from mutoscope.estimate.tracker import Account, Device, Tracker
from mutoscope.parallel import Parallel
from mutoscope.recipe import Recipe
from mutoscope.training.quantize import QuantizedLinear


@dataclass
class _Found:
    """What a model is made of, once training has made of it what it does."""

    blocks: list[Unit] = field(default_factory=list)
    rest: Unit = ()
    undivided: list[int] = field(default_factory=list)
    """Bytes of each block's buffers and scales, which are whole on every process."""
    undivided_rest: int = 0
    """Those outside of blocks."""


def work_of(recipe: Recipe, device: Device = "cuda", whole: nn.Module | None = None) -> Work:
    """The work of a recipe, whatever its strategy. Arguments and errors as for `estimate`."""
    recipe = at_largest_bucket(recipe.model.complete(recipe))
    recipe = replace(recipe, offload_blocks=0, parallel=Parallel())
    whole = shapes_of(recipe) if whole is None else whole
    alone = replace(recipe, parallel=Parallel(strategy="ddp"), optim=replace(recipe.optim, release_gradients=False))
    replica = estimate(alone, device, whole)
    found, fake = _Found(), FakeTensorMode()
    with torch.random.fork_rng(devices=[]), fake:
        frozen = frozen_parts(recipe)
    account = measure(recipe, whole, partial(_gathered, frozen, found), device, fake)
    count = len(getattr(whole, "blocks", ()))
    encoders = {part: account.peak().get(part, 0) for part in frozen}
    return Work(
        blocks=tuple((found.blocks * count)[:count]),  # where a few were enough, all are alike
        rest=found.rest,
        undivided={"weights": sum((found.undivided * count)[:count]) + found.undivided_rest} | encoders,
        optimizer=replica.peak_parts.get("optimizer", 0) / replica.trainable,
        ema=FP32 if recipe.ema else 0,
        moments=tuple(_moments(account, count)),
        replica=replica.peak_parts,
        batch_size=recipe.batch_size,
        accumulate=recipe.accumulate,
        flops_forward=account.flops["forward"],
        flops_backward=account.flops["backward"],
        flops_recomputed=account.flops["recomputed"],
        flops_encode=account.flops["encode"],
        bf16=2 * account.flops["in bf16"] > account.flops["forward"] + account.flops["backward"],
    )


def _gathered(frozen: dict[str, nn.Module], found: _Found, recipe: Recipe, model: nn.Module, tracker: Tracker) -> None:
    """A micro-step with weights as they are gathered. The model with most blocks tells of its weights."""
    prepared(recipe, model, tracker)
    scales = {id(module.scale) for module in model.modules() if isinstance(module, QuantizedLinear)}
    blocks = list(getattr(model, "blocks", ()))
    in_blocks = {id(p) for block in blocks for p in block.parameters()}
    if len(blocks) >= len(found.blocks):
        found.blocks = [_unit(list(block.parameters()), scales, recipe) for block in blocks]
        found.rest = _unit([p for p in model.parameters() if id(p) not in in_blocks], scales, recipe)
        divided = {id(p) for p in model.parameters()} - scales
        of = lambda module: sum(x.nbytes for x in [*module.buffers(), *module.parameters()] if id(x) not in divided)
        found.undivided = [of(block) for block in blocks]
        found.undivided_rest = of(model) - sum(found.undivided)
    for p in model.parameters():
        if recipe.precision == "bf16" and p.is_floating_point() and id(p) not in scales:
            p.data = p.data.bfloat16()
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(_forget_gradient)
    tracker.tell("weights", [*model.parameters(), *model.buffers()])
    for part, module in frozen.items():
        tracker.tell(part, [*module.parameters(), *module.buffers()])
    with tracker:
        micro_step(recipe, model, fake_encoder(recipe, frozen.get("autoencoder")), tracker)


def _forget_gradient(p: Tensor) -> None:
    p.grad = None


def _unit(parameters: list[nn.Parameter], scales: set[int], recipe: Recipe) -> Unit:
    """What FSDP gathers at once (`engine._shard`): under mixed precision in bf16, but for codes; scales never."""
    half = recipe.precision == "bf16"
    return tuple(
        Weight(
            rows=p.shape[0] if p.ndim else 1,
            columns=p.numel() // p.shape[0] if p.ndim else 1,
            kept=p.element_size(),
            gathered=2 if half and p.is_floating_point() else p.element_size(),
            trained=p.requires_grad,
        )
        for p in parameters
        if id(p) not in scales
    )


def _moments(account: Account, count: int) -> list[Moment]:
    """Of each segment of the forward and of the backward pass."""
    moments = []
    for name, parts in account.segments.items():
        phase, _, label = name.partition(" ")
        if phase in ("forward", "backward"):
            backward = phase == "backward"
            moments.append(Moment(backward, parts["activations"], _done(label, count) if backward else 0.0))
    return moments


def _done(label: str, count: int) -> float:
    """The share of the blocks that the backward pass is through with, in a segment of `networks.watch`."""
    kind, _, place = label.partition(" ")
    if kind != "resident":
        return 0.0
    if not place:  # of those between the first two and the last two, the one whose turn is first
        return 2 / count
    at = int(place)
    return (-at - 1 if at < 0 else count - 1 - at) / count
