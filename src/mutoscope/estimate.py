"""What a recipe will cost before it costs anything: parameters, memory and FLOPs of a training step.

A training step is run on fake tensors (`FakeTensorMode`), which have shapes and no memory: a model that no machine
could hold takes seconds on any. Every storage is counted while it lives. What no operator returns is left out (but for
the copies that convolutions make): kernels' scratch space, DDP's buckets, the interpreter and its libraries. The
operators are a CPU's, without compilation.
`benchmarks/estimate_memory.py` compares the result with real training.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.flop_counter import flop_registry

from mutoscope.autoencoders.pretrained import load_autoencoder
from mutoscope.build import frame_rate, latent_spec, model_io
from mutoscope.data.dataset import Clips
from mutoscope.data.store import LatentStats, StoredClips
from mutoscope.encoder import Encoder
from mutoscope.loading import load_recipe
from mutoscope.randomness import Draw
from mutoscope.recipe import Recipe, TextConfig
from mutoscope.training.ema import EMA
from mutoscope.training.lora import add_lora
from mutoscope.training.optimizers import build_optimizers, cast_trained
from mutoscope.training.quantize import quantize_frozen
from mutoscope.types import Cond, LatentSpec, ModelIO

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one process needs for an optimizer step, in numbers of parameters, bytes and FLOPs (a multiply-add is 2)."""

    parameters: dict[str, int]
    """By part of the model, as its attributes are called."""
    trainable: int
    """Parameters that are trained."""
    clip: tuple[int, int, int]
    """(T, H, W) of a clip in pixels."""
    latents: tuple[int, int, int, int] | None
    """(c, t, h, w) of a clip's latents, or of the vectors that its codes stand for; None without an autoencoder."""
    vocab: int | None
    """Number of codes; None where latents are continuous."""
    tokens: int | None
    """Length of the sequence that a transformer makes of a clip; None for other networks."""
    peak_parts: dict[str, int]
    """What lives at the moment when most does: weights, autoencoder, optimizer, ema, gradients and activations. Among
    the last is all that comes and goes: the batch, autocast's copies of weights, gradients of activations."""
    checkpoint_bytes: int
    """Size of a checkpoint on disk."""
    flops_forward: int
    """Of the model's forward passes."""
    flops_recomputed: int
    """Of what activation checkpointing computes twice."""
    flops_encode: int
    """Of the autoencoder before the model, where clips are encoded on the fly."""

    @property
    def peak_bytes(self) -> int:
        """Memory at the moment when most is in use."""
        return sum(self.peak_parts.values())

    @property
    def flops_step(self) -> int:
        """What model FLOPs utilisation (MFU) counts: a backward pass is as much as two forward passes."""
        return 3 * self.flops_forward

    @property
    def flops_executed(self) -> int:
        """What hardware FLOPs utilisation (HFU) counts: what is computed twice, too."""
        return self.flops_step + self.flops_recomputed


def estimate(recipe: Recipe) -> Estimate:
    """The cost of an optimizer step of this recipe.

    Raises ValueError as building the model does; FileNotFoundError or ConfigError where the recipe of its autoencoder
    is not there.
    """
    recipe = _at_largest_bucket(recipe.model.complete(recipe))
    io, data = model_io(recipe), recipe.data
    fake = FakeTensorMode()
    with torch.random.fork_rng(devices=[]):
        model = _network(recipe, io, fake)
    with fake, torch.random.fork_rng(devices=[]):
        cast_trained(model, recipe.weights)
        if recipe.quantize != "none":
            quantize_frozen(model, recipe.quantize, torch.device("cpu"))
        frozen = _frozen_autoencoder(recipe)
        tracker = _Tracker()
        tracker.tell("weights", [*model.parameters(), *model.buffers()])
        tracker.tell("autoencoder", [*frozen.parameters(), *frozen.buffers()] if frozen else [])
        stats = LatentStats(mean=(0.0,) * io.channels, std=(1.0,) * io.channels)
        encoder = Encoder(
            frozen if recipe.autoencoder is None else lambda: frozen,  # type: ignore[arg-type, return-value]
            spec=latent_spec(recipe.autoencoder),
            stats=stats,
            text=partial(_fake_text, recipe.text) if recipe.text else None,
            first_frame=recipe.first_frame,
            window=recipe.data.latent_window,
            fps=frame_rate(recipe),
        )
        with tracker:
            _train_step(recipe, model, encoder, _fake_clips(recipe, encoder), tracker)

    clip = (data.frames, data.height, data.width)
    spec: LatentSpec | None = getattr(frozen or model, "spec", None)  # of autoencoders
    grid: tuple[int, int, int] | None = getattr(model, "grid", None)  # of models over patches
    frozen_names = {name for name, p in model.named_parameters() if not p.requires_grad}
    parameters: Counter[str] = Counter()
    for name, p in model.named_parameters():
        parameters[name.partition(".")[0]] += p.numel()
    return Estimate(
        parameters=dict(parameters),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        clip=clip,
        latents=(spec.channels, *spec.latent_shape(*clip)) if spec else None,
        vocab=spec.vocab if spec else None,
        tokens=math.prod(grid) if grid else None,
        peak_parts={part: size for part, size in tracker.peak.items() if size},
        checkpoint_bytes=sum(t.nbytes for name, t in model.state_dict().items() if name not in frozen_names)
        + tracker.peak["optimizer"]
        + tracker.peak["ema"],
        flops_forward=tracker.flops["forward"] * recipe.accumulate,
        flops_recomputed=tracker.flops["recomputed"] * recipe.accumulate,
        flops_encode=tracker.flops["encode"] * recipe.accumulate,
    )


def describe(recipe: Recipe) -> str:
    """The estimate for people, in plain lines."""
    recipe = _at_largest_bucket(recipe)
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


def _train_step(
    recipe: Recipe, model: nn.Module, encoder: Encoder, clips: Clips | StoredClips, tracker: _Tracker
) -> None:
    """What the training loop does in a step that is not the first, which finds no state of optimizers yet."""
    optimizers, ema = build_optimizers(model, recipe.optim), EMA(model, recipe.ema) if recipe.ema else None
    tracker.tell("ema", ema.averages.values() if ema else [])
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p)
        tracker.tell("gradients", [p.grad])
        p.register_post_accumulate_grad_hook(lambda p: tracker.tell("gradients", [] if p.grad is None else [p.grad]))
    for optimizer in optimizers:
        optimizer.step()
        tracker.tell("optimizer", [t for state in optimizer.state.values() for t in state.values()])
        if recipe.accumulate == 1:  # else a micro-step, but the first, finds the gradients of those before it
            optimizer.zero_grad(set_to_none=True)
    if recipe.activation_checkpointing:
        for block in model.blocks:  # type: ignore[union-attr]
            block.forward = partial(recompute, block.forward, use_reentrant=False)

    draw = Draw(recipe.seed, "estimate", clips.samples)
    with tracker.phase("encode"):
        batch = encoder.batch(clips, draw)
    with tracker.phase("forward"), torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
        loss = recipe.objective.loss(model, batch, draw)
    with tracker.phase("backward"):
        (loss.total / recipe.accumulate).backward()
    nn.utils.clip_grad_norm_(trained, recipe.optim.max_grad_norm or float("inf"))
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if ema:
        ema.update(model, 1)


class _Tracker(TorchDispatchMode):
    """Counts the bytes of living storages by part, and FLOPs by phase.

    A storage is an activation until `tell` tells otherwise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.living: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self._phase = ""
        self._storages: dict[int, tuple[weakref.ref[Any], int, str]] = {}

    def tell(self, part: str, tensors: Iterable[Tensor | None]) -> None:
        """These tensors are of that part."""
        for tensor in tensors:
            assert tensor is not None
            key = self._seen(tensor)
            reference, size, before = self._storages[key]
            self._storages[key] = reference, size, part
            self.living[before] -= size
            self.living[part] += size

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """FLOPs inside the block are of that phase."""
        self._phase = name
        yield
        self._phase = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            out = (_fake_bincount if func is aten.bincount.default else func)(*args, **kwargs)
        except DataDependentOutputException:
            return 0  # what code reads out of a tensor, to choose its way by: there is no right answer, and no harm
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._seen(leaf)
        if func is aten.convolution_backward.default:
            self._note_peak(scratch=sum(t.nbytes for t in args[:2] if not _is_channels_last(t)))
        if (formula := _FLOPS.get(func.overloadpacket)) is not None:
            # In the backward pass gradients are on only while activations are computed again
            again = self._phase == "backward" and torch.is_grad_enabled()
            self.flops["recomputed" if again else self._phase] += formula(*args, **kwargs, out_val=out)
        return out

    def _seen(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            size = storage.nbytes()
            self._storages[key] = weakref.ref(storage, lambda _: self._freed(key)), size, "activations"
            self.living["activations"] += size
            self._note_peak()
        return key

    def _note_peak(self, scratch: int = 0) -> None:
        if self.living.total() + scratch > self.peak.total():
            self.peak = self.living + Counter(activations=scratch)

    def _freed(self, key: int) -> None:
        _, size, part = self._storages.pop(key)
        self.living[part] -= size


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Two matrix products, whatever the mask: (n, d)·(d, m) and (n, m)·(m, e)."""
    return 2 * query.shape[:-1].numel() * key.shape[-2] * (key.shape[-1] + value.shape[-1])


# torch's counter does not know the CPU's attention, and so sees none of it there
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
}


def _is_channels_last(x: Tensor) -> bool:
    """Whether a convolution takes this tensor as it is; a CPU's kernels copy what lies otherwise."""
    return x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)


def _fake_bincount(values: Tensor, weights: None = None, minlength: int = 0) -> Tensor:
    """As long as it is told to be; its largest value, which could make it longer, is not known."""
    return torch.empty(minlength, dtype=torch.int64)


def _network(recipe: Recipe, io: ModelIO, fake: FakeTensorMode) -> nn.Module:
    """The network of fake tensors. With adapters it is made of shapes alone first: PEFT moves what it makes, and fake
    tensors do not let a module be moved."""
    if recipe.lora is None:
        with fake:
            return recipe.model.build(io)
    with torch.device("meta"):
        model = recipe.model.build(io)
        add_lora(model, recipe.lora, recipe.seed)
    with fake:
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                empty = torch.empty(p.shape, dtype=p.dtype, device="cpu")
                module.register_parameter(name, nn.Parameter(empty, requires_grad=p.requires_grad))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu"))
    return model


def _frozen_autoencoder(recipe: Recipe) -> nn.Module | None:
    """The autoencoder that is there while the model trains."""
    config = recipe.autoencoder
    if config is None:
        return None
    if config.recipe is None:  # loaded when it is needed
        return load_autoencoder(config) if recipe.first_frame or recipe.data.latents is None else None
    made = Path(config.path) / "recipe.toml"
    maker = load_recipe(str(made) if made.exists() else config.recipe)
    return maker.model.build(model_io(maker))


def _at_largest_bucket(recipe: Recipe) -> Recipe:
    """The recipe with only that of its buckets whose batch has the most pixels."""
    largest = max(recipe.data.shapes(recipe.batch_size), key=lambda b: b.frames * b.height * b.width * b.batch_size)
    data = replace(
        recipe.data, frames=largest.frames, height=largest.height, width=largest.width, buckets=()
    )  # fmt: skip
    return replace(recipe, data=data, batch_size=largest.batch_size)


def _fake_text(config: TextConfig, captions: list[str]) -> Cond:
    """The condition of so many captions, in fake tensors; a text encoder's weights need not be."""
    text = torch.zeros(len(captions), config.length, config.dim)
    null = torch.zeros_like(text) if config.has_null else None
    return Cond(text=text, text_mask=torch.ones(text.shape[:2], dtype=torch.bool), null_text=null)


def _fake_clips(recipe: Recipe, encoder: Encoder) -> Clips | StoredClips:
    """A micro-batch of the shapes that the recipe's data have."""
    data, size = recipe.data, recipe.batch_size
    ids, samples, captions = [""] * size, list(range(size)), [""] * size
    labels = torch.zeros(size, dtype=torch.int64)
    clip = (data.frames, data.height, data.width)
    if data.latents is None:
        video = torch.zeros(size, *clip, 3, dtype=torch.uint8)
        return Clips(ids=ids, samples=samples, video=video, captions=captions, labels=labels)
    grid = encoder.spec.latent_shape(*clip)
    tokens, moments = (size, *grid), (size, encoder.spec.channels, *grid)
    stored = torch.zeros(tokens, dtype=torch.int64) if encoder.spec.vocab else torch.zeros(moments)
    images = torch.zeros(size, 1, *clip[1:], 3, dtype=torch.uint8) if recipe.first_frame else None
    return StoredClips(
        ids=ids, samples=samples, moments=stored, captions=captions, cond=Cond(), labels=labels, images=images
    )


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
