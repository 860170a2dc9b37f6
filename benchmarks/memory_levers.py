"""What each memory lever saves, and what it costs in time.

    python -m benchmarks.memory_levers [--recipe cogvideox.t2v_lora]

Without a recipe, a DiT of 34 million parameters, trained whole and under LoRA. A recipe's network is built from its
configuration with random weights, on which neither memory nor time depends, and gets random latents and captions; its
levers are those of full tuning, or of LoRA where it has adapters.

The bytes are counted tensor by tensor: weights, state of the optimizer, gradients at the moment when most lie about,
and activations that autograd keeps on the device from the forward pass to the backward pass. On a GPU the peak of the
steps is measured, too (`torch.cuda.max_memory_allocated`: without fragmentation), and levers that move memory to the
CPU are among the rows; on a CPU they would move it nowhere. The time is that of a step, the median of three: CPU time
of one thread, or wall time with a GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import table
from mutoscope.build import build_model, model_io
from mutoscope.contradictions import validate
from mutoscope.loading import load_recipe
from mutoscope.models.cogvideox import CogVideoX
from mutoscope.models.dit import DiT
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.randomness import Draw
from mutoscope.recipe import Data, Lora, Recipe
from mutoscope.training.lora import add_lora
from mutoscope.training.offload import place
from mutoscope.training.optimizers import build_optimizers, cast_trained, clip_gradients, gradient_norms
from mutoscope.training.quantize import quantize_frozen
from mutoscope.types import Batch, Cond

STEPS = 3
SMALL = Recipe(  # 8 frames of 8 × 8 patches: 512 tokens
    data=Data(root="", frames=8, height=32, width=32, num_labels=10),
    model=DiT(depth=8, width=512, heads=8, patch=(1, 4, 4)),
    objective=Diffusion(),
    precision="bf16",
    steps=1,
    batch_size=2,
)


@dataclass(frozen=True)
class Row:
    """What a lever was measured at: bytes and seconds."""

    weights: int
    optimizer: int
    gradients: int
    activations: int
    peak: int
    """0 on a CPU."""
    seconds: float

    @property
    def states(self) -> int:
        """All that hangs on the number of weights."""
        return self.weights + self.optimizer + self.gradients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", help="measure this recipe's network instead of a small DiT")
    recipe = load_recipe(name) if (name := parser.parse_args().recipe) else None
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipes = [recipe.model.complete(recipe)] if recipe else [SMALL, replace(SMALL, lora=Lora(rank=16))]
    for base in recipes:
        rows = {name: measured(lever, device) for name, lever in levers(base, device).items()}
        show(rows, device)
    ratios = [row.states / next(iter(rows.values())).states for row in rows.values() if row is not None]
    kind = "adapters over a quantised base" if recipes[-1].lora else "full tuning"
    print(f"memory_levers: weights, gradients and optimizer of {kind} in 1/{1 / min(ratios):.1f} of the memory")


def show(rows: dict[str, Row | None], device: torch.device) -> None:
    """Print what was measured."""
    mib = lambda size: f"{size / 2**20:.1f}"
    lines = []
    for name, row in rows.items():
        if row is None:
            lines.append([name, *["-"] * 5, "out of memory"])
            continue
        sizes = [mib(x) for x in (row.weights, row.optimizer, row.gradients, row.activations)]
        lines.append([name, *sizes, mib(row.peak) if row.peak else "-", f"{row.seconds * 1e3:.0f} ms"])
    table([f"MiB on the {device.type}", "weights", "optimizer", "gradients", "activations", "peak", "step"], lines)
    print()


def levers(base: Recipe, device: torch.device) -> dict[str, Recipe]:
    """The recipe under each lever that it can have on this device."""
    gpu = device.type == "cuda"
    return adapter_levers(base, gpu) if base.lora else tuning_levers(base, gpu)


def tuning_levers(base: Recipe, gpu: bool) -> dict[str, Recipe]:
    """Of full tuning."""
    native = "fp32" if isinstance(base.model, CogVideoX) else "bf16"  # others compute in bf16 by autocast alone
    half = replace(base, weights="bf16", precision=native)
    optim = lambda recipe, **changes: replace(recipe, optim=replace(recipe.optim, **changes))
    low = optim(half, name="adamw8bit", stochastic_rounding=True)
    found = {"AdamW, fp32 weights": base, "AdamW, bf16 weights": half}
    others = {"adamw8bit": "AdamW 8 bit", "adamw4bit": "AdamW 4 bit", "came": "CAME", "prodigy": "Prodigy"}
    for name, called in others.items():
        found[f"{called}, bf16 weights"] = optim(half, name=name, lr=1.0 if name == "prodigy" else base.optim.lr)
    found["AdamW 8 bit, bf16, rounded stochastically"] = low
    found["    and gradients released"] = released = optim(low, release_gradients=True, max_grad_norm=0.0)
    if not base.activation_checkpointing:
        found["    and blocks recomputed"] = replace(released, activation_checkpointing=True)
    if gpu:
        off = optim(replace(half, activation_checkpointing=True), offload=True)
        found["AdamW, bf16, offloaded, recomputed"] = off
        found["    and activations offloaded"] = replace(off, offload_activations=True)
    return found


def adapter_levers(base: Recipe, gpu: bool) -> dict[str, Recipe]:
    """Of LoRA."""
    kept = replace(base, activation_checkpointing=False)
    found = {"LoRA": kept, "LoRA, blocks recomputed": (base := replace(base, activation_checkpointing=True))}
    found |= {f"    over {kind}": replace(base, quantize=kind) for kind in ("int8", "fp8", "nf4")}
    if gpu:
        found["    activations offloaded"] = replace(base, offload_activations=True)
        found["    half the blocks offloaded"] = replace(base, offload_blocks=len(random_network(base).blocks) // 2)  # type: ignore[arg-type]
        found["    over int8, activations offloaded"] = replace(base, quantize="int8", offload_activations=True)
    return found


def random_network(recipe: Recipe, device: torch.device | None = None) -> nn.Module:
    """The recipe's network as its configuration has it, with random weights; without a device, without weights."""
    with torch.device("meta"):
        model = build_model(recipe)
    if device is None:
        return model
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for x in (*model.parameters(), *model.buffers()):
            x.normal_(std=0.02, generator=generator)
    return model


def random_batch(recipe: Recipe, device: torch.device) -> Batch:
    """Latents, captions and what else the network takes."""
    io, size = model_io(recipe), recipe.batch_size
    video = torch.randn(size, io.channels, *io.grid, device=device)
    cond = Cond(label=torch.zeros(size, dtype=torch.int64, device=device)) if io.num_labels else Cond()
    if recipe.text is not None:
        text = torch.randn(size, recipe.text.length, recipe.text.dim, device=device)
        cond = replace(cond, text=text, text_mask=torch.ones(text.shape[:2], dtype=torch.bool, device=device))
    if recipe.first_frame:
        cond = replace(cond, known=torch.zeros_like(video))
    return Batch(ids=[""] * size, samples=list(range(size)), cond=cond, latents=video)


def measured(recipe: Recipe, device: torch.device) -> Row | None:
    """Steps of the training loop, without the loop; None where memory does not suffice."""
    try:
        return Bench(recipe, device).run()
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


class Bench:
    """A network under the recipe's levers, its optimizer and a batch."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        validate(replace(recipe, data=replace(recipe.data, root="clips", latents=None)))
        self.recipe, self.device = recipe, device
        self.model = random_network(recipe, device)
        if recipe.lora is not None:
            add_lora(self.model, recipe.lora, seed=0)
        cast_trained(self.model, recipe.weights)
        if recipe.quantize != "none":
            quantize_frozen(self.model, recipe.quantize, device)
        place(self.model, recipe, device)
        self.optimizers = build_optimizers(self.model, recipe.optim)
        self.batch = random_batch(recipe, device)
        self.gradients = 0
        self.activations = 0

    def run(self) -> Row:
        self.step()  # the state of torch's optimizers comes with the first
        for p in self.model.parameters():
            if p.requires_grad:
                p.register_hook(lambda g: self.note_gradients(g))
        times = [self.timed() for _ in range(STEPS)]
        state = [x for o in self.optimizers for kept in o.state.values() for x in kept.values()]
        return Row(
            weights=self.on_device(self.model.state_dict().values()),
            optimizer=self.on_device(state),
            gradients=self.gradients,
            activations=self.activations,
            peak=torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0,
            seconds=median(times),
        )

    def timed(self) -> float:
        clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        start = clock()
        self.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    def step(self) -> None:
        recipe = self.recipe
        draw = Draw(recipe.seed, "train", self.batch.samples, self.device)
        with self.counted(), torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            loss = recipe.objective.loss(self.model, self.batch, draw)
        loss.total.backward()
        clip_gradients(self.optimizers, gradient_norms(self.optimizers), recipe.optim.max_grad_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def note_gradients(self, new: Tensor) -> None:
        """A gradient has been made; those before it may have gone."""
        there = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.gradients = max(self.gradients, new.nbytes + self.on_device(there))

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Adds up what autograd keeps. What is parked on the CPU, or recomputed, does not come by here."""
        weights = {x.untyped_storage().data_ptr() for x in self.model.state_dict().values()}
        kept: dict[int, int] = {}

        def note(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in weights and x.device == self.device:
                kept[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            yield
        self.activations = sum(kept.values())

    def on_device(self, tensors: Any) -> int:
        """Bytes of tensors, those on the device."""
        return sum(x.nbytes for x in tensors if x.device.type == self.device.type and x.ndim)


if __name__ == "__main__":
    main()
