"""What a recipe will cost before it costs anything: parameters, memory and FLOPs of a training step.

A training step is run on fake tensors (`FakeTensorMode`), which have shapes and no memory: a model that no machine
could hold takes seconds on any. What runs is what training runs: the optimizers, the recomputation of blocks, the
copies to the CPU and back. Every storage is counted while it lives. What no operator returns is left out: kernels'
scratch space (but for the copies that convolutions make on a CPU), the allocator's fragments, CUDA's own half a
gigabyte, the interpreter and its libraries; and torch.compile, which needs less memory where it changes anything.
`benchmarks/estimate_memory.py` compares the result with real training.
"""

from __future__ import annotations

import math
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mutoscope.autoencoders.pretrained import load_autoencoder
from mutoscope.build import frame_rate, latent_spec, model_io
from mutoscope.data.dataset import Clips
from mutoscope.data.store import LatentStats, StoredClips
from mutoscope.encoder import Encoder
from mutoscope.estimate.networks import measure, shapes_of, watch
from mutoscope.estimate.tracker import HOST, CudaAutocast, Device, HostCopies, Tracker, backward
from mutoscope.loading import load_recipe
from mutoscope.randomness import Draw
from mutoscope.recipe import Recipe, TextConfig
from mutoscope.text.t5 import T5
from mutoscope.training.ema import EMA
from mutoscope.training.offload import place
from mutoscope.training.optimizers import build_optimizers, cast_trained, clip_gradients, gradient_norms
from mutoscope.training.quantize import quantize_frozen
from mutoscope.types import Cond


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
    """What lives at the moment when most does: weights, autoencoder, text encoder, optimizer, ema, gradients and
    activations. Among the last is all that comes and goes: the batch, autocast's copies of weights, gradients of
    activations."""
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


def estimate(recipe: Recipe, device: Device = "cuda", whole: nn.Module | None = None) -> Estimate:
    """The cost of an optimizer step of this recipe.

    device: of training. On a GPU what is offloaded does not count, and autocast takes norms in fp32.
    whole: `shapes_of` the recipe, where it is at hand already.

    Raises ValueError as building the model does; FileNotFoundError or ConfigError where the recipe of its autoencoder
    is not there.
    """
    recipe = at_largest_bucket(recipe.model.complete(recipe))
    data = recipe.data
    whole = shapes_of(recipe) if whole is None else whole
    fake = FakeTensorMode()
    with torch.random.fork_rng(devices=[]), fake:
        frozen = frozen_parts(recipe)
    account = measure(recipe, whole, partial(_train, frozen), device, fake)
    clip = (data.frames, data.height, data.width)
    spec = latent_spec(recipe.autoencoder) if recipe.autoencoder else getattr(whole, "spec", None)  # of autoencoders
    grid: tuple[int, int, int] | None = getattr(whole, "grid", None)  # of models over patches
    parameters: Counter[str] = Counter()
    for name, p in whole.named_parameters():
        parameters[name.partition(".")[0]] += p.numel()
    return Estimate(
        parameters=dict(parameters),
        trainable=sum(p.numel() for p in whole.parameters() if p.requires_grad),
        clip=clip,
        latents=(spec.channels, *spec.latent_shape(*clip)) if spec else None,
        vocab=spec.vocab if spec else None,
        tokens=math.prod(grid) if grid else None,
        # Where a GPU trains, a checkpoint's copies are in the CPU's memory
        peak_parts=account.peak() | ({"checkpoint": account.kept.total()} if device == "cpu" else {}),
        checkpoint_bytes=account.kept.total(),
        flops_forward=account.flops["forward"] * recipe.accumulate,
        flops_recomputed=account.flops["recomputed"] * recipe.accumulate,
        flops_encode=account.flops["encode"] * recipe.accumulate,
    )


def prepared(recipe: Recipe, model: nn.Module, tracker: Tracker) -> HostCopies:
    """Make of a network of fake tensors what training makes of it, and tell the tracker of its weights."""
    cast_trained(model, recipe.weights)
    if recipe.quantize != "none":
        quantize_frozen(model, recipe.quantize, torch.device("cpu"))
    copies = HostCopies(tracker)
    for block in getattr(model, "blocks", ()):
        block.forward = partial(tracker.forward_of, block.forward)
    with tracker:  # what is kept on the host is known from its making
        place(model, replace(recipe, compile=False), torch.device("cpu"), copies=copies)
    watch(model, recipe, tracker)
    tracker.tell("weights", [*model.parameters(), *model.buffers()])
    return copies


def fake_encoder(recipe: Recipe, frozen: nn.Module | None) -> Encoder:
    """The recipe's encoder, whose captions cost nothing: embeddings are made before, or by a table."""
    channels = model_io(recipe).channels
    return Encoder(
        frozen if recipe.autoencoder is None else lambda: frozen,  # type: ignore[arg-type, return-value]
        spec=latent_spec(recipe.autoencoder),
        stats=LatentStats(mean=(0.0,) * channels, std=(1.0,) * channels),
        text=partial(_fake_text, recipe.text) if recipe.text else None,
        first_frame=recipe.first_frame,
        window=recipe.data.latent_window,
        fps=frame_rate(recipe),
    )


def _train(frozen: dict[str, nn.Module], recipe: Recipe, model: nn.Module, tracker: Tracker) -> None:
    """What the training loop does in a step that is not the first, which finds no state of optimizers yet."""
    copies = prepared(recipe, model, tracker)
    for part, module in frozen.items():
        tracker.tell(part, [*module.parameters(), *module.buffers()])
    encoder = fake_encoder(recipe, frozen.get("autoencoder"))
    with tracker:
        optimizers, ema = resident_state(recipe, model, tracker, copies)
        # DDP keeps gradients once more, in the order that they are sent in
        trained = [p for p in model.parameters() if p.requires_grad]
        buckets = [torch.empty_like(p) for p in trained if recipe.parallel.strategy == "ddp"]
        tracker.tell("gradients", buckets)
        train_step(recipe, model, encoder, optimizers, ema, tracker)
    frozen_names = {name for name, p in model.named_parameters() if not p.requires_grad}
    tracker.account.kept["weights"] = sum(
        t.nbytes for name, t in model.state_dict().items() if not frozen_names or name not in frozen_names
    )
    tracker.account.kept["ema"] = sum(t.nbytes for t in ema.averages.values()) if ema else 0


def train_step(
    recipe: Recipe,
    model: nn.Module,
    encoder: Encoder,
    optimizers: list[torch.optim.Optimizer],
    ema: EMA | None,
    tracker: Tracker,
) -> None:
    """An optimizer step, the last micro-step alone. Called inside of the tracker, which forgets earlier peaks."""
    for p in (p for p in model.parameters() if p.requires_grad):
        p.register_post_accumulate_grad_hook(partial(_tell_gradient, tracker))
    micro_step(recipe, model, encoder, tracker)
    with tracker.phase("step"):
        clip_gradients(optimizers, gradient_norms(optimizers), recipe.optim.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if ema:
            ema.update(model, 1)


def micro_step(recipe: Recipe, model: nn.Module, encoder: Encoder, tracker: Tracker) -> None:
    """Batch, forward and backward pass. Called inside of the tracker, which forgets earlier peaks."""
    tracker.forget()
    clips = fake_clips(recipe, encoder)
    draw = Draw(recipe.seed, "estimate", clips.samples)
    autocast = recipe.precision == "bf16"
    with ExitStack() as stack:
        if autocast and tracker.device == "cuda":
            stack.enter_context(CudaAutocast())
        with tracker.phase("encode"):
            batch = encoder.batch(clips, draw)
        with tracker.phase("forward"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = recipe.objective.loss(model, batch, draw)
        with tracker.phase("backward"):
            backward(loss.total / recipe.accumulate)


def resident_state(
    recipe: Recipe, model: nn.Module, tracker: Tracker, copies: HostCopies
) -> tuple[list[torch.optim.Optimizer], EMA | None]:
    """Optimizers after their first step, and averages. Gradients are left where a micro-step finds earlier ones'."""
    optimizers = build_optimizers(model, recipe.optim, copies=copies)
    ema = EMA(model, recipe.ema) if recipe.ema else None
    tracker.tell("ema", ema.averages.values() if ema else [])
    for p in (p for p in model.parameters() if p.requires_grad):
        p.grad = torch.zeros_like(p)
        tracker.tell("gradients", [p.grad])
    for optimizer in optimizers:
        optimizer.step()
        state = [t for state in optimizer.state.values() for t in state.values()]
        tracker.tell(HOST if recipe.optim.offload else "optimizer", state)
        tracker.account.kept["optimizer"] += sum({id(t): t.nbytes for t in state}.values())
        if recipe.accumulate == 1:  # else a micro-step, but the first, finds the gradients of those before it
            optimizer.zero_grad(set_to_none=True)
    return optimizers, ema


def _tell_gradient(tracker: Tracker, p: Tensor) -> None:
    tracker.tell("gradients", [] if p.grad is None else [p.grad])


def frozen_parts(recipe: Recipe) -> dict[str, nn.Module]:
    """What is there beside the model while it trains, by part: where clips are encoded on the way, their encoders."""
    found = {"autoencoder": frozen} if (frozen := _frozen_autoencoder(recipe)) is not None else {}
    if isinstance(recipe.text, T5) and recipe.data.latents is None:
        found["text encoder"] = recipe.text.build_without_tokenizer()
    return found


def _frozen_autoencoder(recipe: Recipe) -> nn.Module | None:
    config = recipe.autoencoder
    if config is None:
        return None
    if config.recipe is None:  # loaded when it is needed
        return load_autoencoder(config) if recipe.first_frame or recipe.data.latents is None else None
    made = Path(config.path) / "recipe.toml"
    maker = load_recipe(str(made) if made.exists() else config.recipe)
    return maker.model.build(model_io(maker))


def at_largest_bucket(recipe: Recipe) -> Recipe:
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


def fake_clips(recipe: Recipe, encoder: Encoder) -> Clips | StoredClips:
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
