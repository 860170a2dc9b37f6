"""What the blocks of a network keep on a GPU: their weights, what they compute, or little of either.

    recomputed    Of a block's activations only its inputs are kept; the backward pass computes the others again.
    parked        Those inputs wait on the CPU, and are back before the backward pass gets to their block.
    BlockOffload  Frozen weights of the last blocks lie on the CPU; a block's come while the one before it computes.

`place` puts them around a model's blocks in the one order that works. Copies are made on a stream of their own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mutoscope.models.cogvideox import CogVideoXModel
from mutoscope.recipe import Recipe
from mutoscope.training.copies import Copies, Copy
from mutoscope.training.feed_forward import chunk_feed_forwards

Forward = Callable[..., Any]

SMALLEST = 1 << 20
"""Bytes; smaller activations are not worth a copy."""


def check_offload(recipe: Recipe, device: torch.device) -> None:
    """Raise ValueError where this device can't do what the recipe asks, before anything is loaded."""
    asked = {
        "offload_activations": recipe.offload_activations,
        "offload_blocks": recipe.offload_blocks,
        "optim.offload": recipe.optim.offload,
    }
    for name in asked if device.type != "cuda" else ():
        if asked[name]:
            raise ValueError(f"{name}: moves memory from a GPU to the CPU, and this process computes on the "
                             f"{device.type} itself; leave it out here")  # fmt: skip


def check_blocks(model: nn.Module, recipe: Recipe) -> None:
    """Raise ValueError where the network, which may be shapes alone, has not the blocks that the recipe speaks of."""
    count = len(getattr(model, "blocks", ()))
    if not count and (recipe.activation_checkpointing or recipe.compile):
        raise ValueError(f"{type(model).__name__} has no blocks to recompute, compile or offload; set "
                         "activation_checkpointing and compile to false")  # fmt: skip
    if recipe.offload_blocks > count:
        raise ValueError(f"offload_blocks = {recipe.offload_blocks}: {type(model).__name__} has {count} blocks")


def place(
    model: nn.Module, recipe: Recipe, device: torch.device, *, move: bool = True, copies: Copies | None = None
) -> None:
    """Move a model to the device, its blocks compiled, recomputed and offloaded as the recipe asks. Parameters keep
    their names, and those that are trained their identity. move: False where the engine moves it, a block at a time.

    copies: what moves memory in an estimate, which is on the device already, and only counts what would be moved.

    Raises ValueError as `check_offload`; where there are no blocks to do that to; and as `BlockOffload`.
    """
    estimating = copies is not None
    if not estimating:
        check_offload(recipe, device)
    check_blocks(model, recipe)
    blocks = list(getattr(model, "blocks", ()))
    copies = copies or Copies(device)
    parking = Parking(copies, SMALLEST)
    weights = BlockOffload(model, blocks, recipe.offload_blocks, copies) if recipe.offload_blocks else None
    if weights is not None and not estimating:
        weights.move(model, device)
    elif move and not estimating:
        model.to(device)
    # Inside a compiled block, the recomputation leaves out by itself what the backward pass does not look at
    inside = (recipe.compile and recipe.activation_checkpointing
              and weights is None and not recipe.offload_activations)  # fmt: skip
    if recipe.activation_checkpointing and not inside:
        chunk_feed_forwards(model)
    if recipe.compile:
        # One compilation for each shape, and another without gradients: more are a mistake, and stop the run
        torch._dynamo.config.recompile_limit = max(8, 2 * len(recipe.data.shapes(1)) + 2)
        for block in blocks:  # innermost, where memory is moved: dynamo compiles nothing that does that
            forward = recomputed_inside(block.forward) if inside else block.forward
            block.forward = torch.compile(forward, dynamic=False, fullgraph=True)
        if isinstance(model, CogVideoXModel):
            model.compiled_blocks = True
    for i, block in enumerate(blocks):
        if weights is not None:
            block.forward = weights.fetched(i, block.forward)
        if recipe.activation_checkpointing and not inside:
            block.forward = recomputed(block.forward)
        if recipe.offload_activations:
            block.forward = parking.parked(block.forward)


def recomputed(forward: Forward) -> Forward:
    """Activation checkpointing of a function.

    torch's looks at positional arguments only when it restores a GPU's random state (another dropout would go into the
    gradient otherwise, unnoticed) and when it lets hooks move what it keeps. So all arguments become positional.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        call = partial(_with_names, forward, tuple(kwargs))
        return checkpoint(call, *args, *kwargs.values(), use_reentrant=False)

    return run


def recomputed_inside(forward: Forward) -> Forward:
    """Activation checkpointing to be compiled with the function itself. The backward pass then recomputes only what it
    needs: of a frozen network's last layer, for one, nothing."""
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _with_names(forward: Forward, names: tuple[str, ...], *values: Any) -> Any:
    """Call a function with the last values as its keyword arguments."""
    count = len(values) - len(names)
    return forward(*values[:count], **dict(zip(names, values[count:], strict=True)))


# ---------------------------------------------------------------- activations


class _Parked:
    """A tensor on the CPU, on its way there or back."""

    def __init__(self, host: Copy, place: _Place) -> None:
        self.host, self.place = host, place
        self.coming: Copy | None = None


class _Place:
    """What one call of one block has parked, and the call before it, whose turn in the backward pass is next."""

    def __init__(self, before: _Place | None) -> None:
        self.before = before
        self.parked: list[weakref.ref[_Parked]] = []  # weak: autograd decides how long they live


class Parking:
    """Keeps the large tensors that a function saves for the backward pass on the CPU, where they need a gradient.

    Others, such as tables of positions, are the same for all blocks, and would be copied for each. One Parking is for
    all blocks of a model: they are fetched in the opposite order.
    """

    def __init__(self, copies: Copies, smallest: int = SMALLEST) -> None:
        self._copies, self._smallest = copies, smallest
        self._latest: Callable[[], _Place | None] = lambda: None

    def parked(self, forward: Forward) -> Forward:
        """The function, whose saved tensors wait on the CPU; under `recomputed` these are its inputs."""

        def run(*args: Any, **kwargs: Any) -> Any:
            place = _Place(self._latest())
            self._latest = weakref.ref(place)
            with saved_tensors_hooks(lambda x: self._park(x, place), self._fetched):
                return forward(*args, **kwargs)

        return run

    def _park(self, x: Tensor, place: _Place) -> Tensor | _Parked:
        if not x.requires_grad or x.is_leaf or x.nbytes < self._smallest:
            return x
        parked = _Parked(self._copies.to_cpu(x), place)
        place.parked.append(weakref.ref(parked))
        return parked

    def _fetched(self, saved: Tensor | _Parked) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        self._request(saved)
        for one in saved.place.before.parked if saved.place.before is not None else ():
            if (earlier := one()) is not None:
                self._request(earlier)
        assert saved.coming is not None
        x, saved.coming = saved.coming.before_use(), None
        return x

    def _request(self, parked: _Parked) -> None:
        if parked.coming is None:
            parked.coming = self._copies.to_device(parked.host.tensor)


# ---------------------------------------------------------------- weights


@dataclass(frozen=True)
class _Slot:
    """A frozen parameter or buffer of a block, and where its bytes are among the block's."""

    owner: dict[str, Any]
    """The module's parameters or buffers."""
    name: str
    is_parameter: bool
    start: int
    stop: int
    dtype: torch.dtype
    shape: torch.Size

    def of(self, memory: Tensor) -> Tensor:
        """Its part of the block's bytes."""
        return memory[self.start : self.stop].view(self.dtype).view(self.shape)

    def fill(self, memory: Tensor) -> None:
        """Make it what lies in this memory, by a new tensor: one that autograd has saved stays as it is."""
        x = self.of(memory)
        self.owner[self.name] = nn.Parameter(x, requires_grad=False) if self.is_parameter else x


class BlockOffload:
    """Keeps the frozen weights and buffers of the last `count` blocks on the CPU, a block's in one piece.

    While a block computes the weights of the next are on their way, forwards and, under `recomputed`, backwards.
    Weights are never written back, and what is trained stays on the device.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], count: int, copies: Copies) -> None:
        """Raises ValueError where there are fewer blocks, or nothing in them is frozen."""
        if count > len(blocks):
            raise ValueError(f"offload_blocks = {count}: {type(model).__name__} has {len(blocks)} blocks")
        self._copies = copies
        self._slots = {i: _frozen(blocks[i]) for i in range(len(blocks) - count, len(blocks))}
        if not all(self._slots.values()):
            raise ValueError(f"offload_blocks = {count}: nothing in these blocks is frozen, all of it is trained; set "
                             "offload_blocks = 0")  # fmt: skip
        self._host: dict[int, Tensor] = {}
        self._coming: dict[int, Copy] = {}
        for i, slots in self._slots.items():
            memory = torch.zeros(slots[-1].stop, dtype=torch.uint8)
            for slot in slots:
                slot.of(memory).copy_(slot.owner[slot.name].detach())
            self._host[i] = copies.pinned(memory)
            self._fill(i, self._host[i])
        # DDP would broadcast them, and take them to be on the GPU
        lying = {id(slot.owner[slot.name]) for slots in self._slots.values() for slot in slots}
        tensors = [*model.named_parameters(), *model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            model, [name for name, x in tensors if id(x) in lying]
        )

    def _fill(self, i: int, memory: Tensor) -> None:
        for slot in self._slots[i]:
            slot.fill(memory)

    def move(self, model: nn.Module, device: torch.device) -> None:
        """Move the model to the device, but for what is kept on the CPU."""
        for slots in self._slots.values():
            for slot in slots:
                slot.owner[slot.name] = None
        model.to(device)
        for i, memory in self._host.items():
            self._fill(i, memory)

    def fetched(self, i: int, forward: Forward) -> Forward:
        """The forward pass of block `i`, with its weights on the device."""

        def run(*args: Any, **kwargs: Any) -> Any:
            in_backward = torch._C._current_graph_task_id() != -1  # as torch's own checkpointing tells
            with self._on_device(i):
                self._request(i - 1 if in_backward else i + 1)
                return forward(*args, **kwargs)

        return run

    @contextmanager
    def _on_device(self, i: int) -> Iterator[None]:
        if i not in self._host:
            yield
            return
        self._request(i)
        self._fill(i, self._coming.pop(i).before_use())
        try:
            yield
        finally:  # recomputing ends with an exception, too
            self._fill(i, self._host[i])

    def _request(self, i: int) -> None:
        if i in self._host and i not in self._coming:
            self._coming[i] = self._copies.to_device(self._host[i])


def _frozen(block: nn.Module) -> list[_Slot]:
    """All that a block has and does not train; each begins where any dtype may."""
    slots: list[_Slot] = []
    for module in block.modules():
        for owner in (module._parameters, module._buffers):
            for name, x in owner.items():
                if x is not None and not x.requires_grad:
                    start = -(-slots[-1].stop // 256) * 256 if slots else 0
                    is_parameter = owner is module._parameters
                    slots.append(_Slot(owner, name, is_parameter, start, start + x.nbytes, x.dtype, x.shape))
    return slots
