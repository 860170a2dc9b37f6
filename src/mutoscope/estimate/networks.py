"""Networks of fake tensors, and how few of their blocks tell of all.

Memory and FLOPs are linear in the number of blocks that are alike. So a deep network is measured with six or seven of
them and with two fewer, and the rest is arithmetic: exact, and as quick for 42 blocks as for seven. It is done segment
by segment (`Account`), because the moment when most memory lives may be another one in a shallow network.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from mutoscope.build import model_io
from mutoscope.estimate.tracker import Account, Device, Tracker
from mutoscope.recipe import Recipe
from mutoscope.training.lora import add_lora

FEW = 6
"""Blocks that are enough; an even number is left out, because blocks of two kinds may take turns."""


def shapes_of(recipe: Recipe) -> nn.Module:
    """The recipe's network, adapters included, on the meta device: shapes alone. Raises ValueError as building it."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = recipe.model.build(model_io(recipe))
        if recipe.lora is not None:
            add_lora(model, replace(recipe.lora, init_from=None, init_alpha=None), recipe.seed)
    return model


Run = Callable[[Recipe, nn.Module, Tracker], None]
"""Does on a network of fake tensors what is to be measured."""


def measure(recipe: Recipe, whole: nn.Module, run: Run, device: Device, fake: FakeTensorMode) -> Account:
    """What `run`, called inside of `fake`, takes with the whole network of `shapes_of`."""
    blocks = list(getattr(whole, "blocks", ()))
    offloaded = min(recipe.offload_blocks, len(blocks))
    counts = (len(blocks) - offloaded, offloaded)
    few = _few(counts[0]), _few(counts[1])
    if not _alike(blocks) or few == counts:
        return _run(recipe, whole, counts, run, device, fake)
    account = base = _run(recipe, whole, few, run, device, fake)
    for i in range(2):
        if few[i] < counts[i]:
            fewer = (few[0] - 2 * (i == 0), few[1] - 2 * (i == 1))
            smaller = _run(recipe, whole, fewer, run, device, fake)
            # `account` has what was added for the other kind; the difference is of this kind alone
            account = account.moved(_shifted(account, base, smaller), (counts[i] - few[i]) / 2)
    return account


def _shifted(account: Account, base: Account, smaller: Account) -> Account:
    """An account that differs from `account` as `smaller` does from `base`."""
    if account is base:
        return smaller
    segments = {}
    for name in account.segments.keys() & base.segments.keys() & smaller.segments.keys():
        parts = account.segments[name].copy()
        parts.subtract(base.segments[name])
        parts.update(smaller.segments[name])
        segments[name] = parts
    shifted = Account(segments, account.flops.copy(), account.kept.copy())
    for mine, less, more in ((shifted.flops, base.flops, smaller.flops), (shifted.kept, base.kept, smaller.kept)):
        mine.subtract(less)
        mine.update(more)
    return shifted


def _few(count: int) -> int:
    return count if count <= FEW + 1 else FEW + count % 2


def _alike(blocks: Sequence[nn.Module]) -> bool:
    """Whether all blocks have the same parameters and buffers, and are of one tower where a model has several."""

    def about(block: nn.Module) -> list[object]:
        state = block.state_dict(keep_vars=True)
        return [getattr(block, "tower", None), *((name, x.shape, x.dtype) for name, x in state.items())]

    return all(type(b) is type(blocks[0]) and about(b) == about(blocks[0]) for b in blocks)


def _run(
    recipe: Recipe, whole: nn.Module, counts: tuple[int, int], run: Run, device: Device, fake: FakeTensorMode
) -> Account:
    """Measure with so many blocks that stay on the device, and so many that are offloaded."""
    resident, offloaded = counts
    model = _part(whole, resident, offloaded)
    tracker = Tracker(device)
    with fake, torch.random.fork_rng(devices=[]):
        make_fake(model)
        run(replace(recipe, offload_blocks=offloaded), model, tracker)
    return tracker.account


def _part(whole: nn.Module, resident: int, offloaded: int) -> nn.Module:
    """A copy with the first `resident` and the last `offloaded` blocks."""
    blocks = list(getattr(whole, "blocks", ()))
    dropped = blocks[resident : len(blocks) - offloaded]
    model = copy.deepcopy(whole, {id(block): None for block in dropped})
    if dropped:
        kept = [block for block in model.blocks if block is not None]  # type: ignore[union-attr]
        model.blocks._modules.clear()  # type: ignore[union-attr]
        model.blocks.extend(kept)  # type: ignore[union-attr, operator]
    return model


def make_fake(model: nn.Module) -> None:
    """Put fake tensors on the CPU in the place of shapes."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(_empty(p), requires_grad=p.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, _empty(buffer))
        for name, x in vars(module).items():
            if isinstance(x, Tensor) and x.is_meta:
                setattr(module, name, _empty(x))


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device="cpu")


def watch(model: nn.Module, recipe: Recipe, tracker: Tracker) -> None:
    """Have the tracker tell a network's blocks apart, in the forward pass and in the backward pass."""
    blocks = list(getattr(model, "blocks", ()))
    offloaded = recipe.offload_blocks
    labels = _labels("resident", len(blocks) - offloaded) + _labels("offloaded", offloaded)
    for i, (block, label) in enumerate(zip(blocks, labels, strict=True)):
        following = "" if i + 1 < len(blocks) else "head"
        block.forward = partial(_watched, block.forward, label, following, tracker)


def _labels(kind: str, count: int) -> list[str]:
    """The first two and the last two blocks by themselves, and those between, which never need more than these do."""
    ends = [f"{kind} {i}" if i < 2 else f"{kind} -{count - i}" if count - i <= 2 else kind for i in range(count)]
    return ends


def _watched(
    forward: Callable[..., Any], label: str, following: str, tracker: Tracker, *args: Any, **kwargs: Any
) -> Any:
    tracker.enter(label)
    out = forward(*args, **kwargs)
    if following:
        tracker.enter(following)
    for x in tree_leaves(out):
        if isinstance(x, Tensor) and x.requires_grad:
            x.register_hook(lambda _: tracker.enter(label))
    return out
