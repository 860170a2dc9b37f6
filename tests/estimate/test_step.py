"""The estimate against what is known otherwise: parameters by counting, FLOPs by hand, memory by torch's profiler."""

from __future__ import annotations

import gc
import math
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mutoscope.autoencoders.presets import preset
from mutoscope.build import model_io
from mutoscope.estimate.report import describe
from mutoscope.estimate.step import estimate
from mutoscope.models.dit import DiT
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.objectives.reconstruction import Reconstruction
from mutoscope.recipe import Autoencoder, Data, Optim, Recipe
from mutoscope.text.encoders import HashedWords
from mutoscope.training.log import console
from mutoscope.training.loop import train

DATA = Data(root="flying-mnist://tiny", frames=4, height=32, width=32, num_labels=10)
MODEL = DiT(depth=2, width=64, heads=2, patch=(1, 4, 4))
DIT = Recipe(data=DATA, model=MODEL, objective=Diffusion(), steps=2, batch_size=2)
LENGTH, TEXT_DIM = 8, 16
CAPTIONED = replace(DIT, text=HashedWords(width=TEXT_DIM, max_length=LENGTH), model=replace(MODEL, attention="joint"))
VQ = Recipe(data=DATA, model=preset("s4t4_b_vq"), objective=Reconstruction(), steps=2, batch_size=2)


@pytest.mark.parametrize("recipe", [DIT, CAPTIONED, VQ], ids=["factorised", "joint with captions", "vq"])
def test_parameters_are_those_of_the_model(recipe: Recipe) -> None:
    model = recipe.model.build(model_io(recipe))
    cost = estimate(recipe)
    assert cost.trainable == sum(cost.parameters.values()) == sum(p.numel() for p in model.parameters())
    assert cost.parameters == {
        name: number for name, part in model.named_children() if (number := sum(p.numel() for p in part.parameters()))
    }


def test_shapes_go_from_pixels_over_latents_to_tokens(tmp_path) -> None:
    latent = replace(
        DIT,
        data=replace(DATA, frames=8),
        autoencoder=Autoencoder(path=str(tmp_path / "none"), recipe="minisora.vae_tiny"),
        model=replace(MODEL, patch=(1, 2, 2)),
    )
    cost = estimate(latent)
    assert (cost.clip, cost.latents, cost.vocab, cost.tokens) == ((8, 32, 32), (4, 2, 8, 8), None, 2 * 4 * 4)
    assert cost.peak_parts["autoencoder"] > 0 and cost.flops_encode > 0
    codes = estimate(VQ)
    assert (codes.clip, codes.latents, codes.vocab, codes.tokens) == ((4, 32, 32), (4, 1, 8, 8), 5120, None)


def flops_by_hand(recipe: Recipe) -> int:
    """2 for each multiply-add of a DiT's matrix products, attention's two included."""
    model, data, batch = recipe.model, recipe.data, recipe.batch_size
    assert isinstance(model, DiT)
    t, h, w = (s // p for s, p in zip((data.frames, data.height, data.width), model.patch, strict=True))
    n, d, hidden, patch_dim = t * h * w, model.width, int(model.mlp_ratio * model.width), 3 * math.prod(model.patch)
    total = n * patch_dim * d + 256 * d + d * d + d * 2 * d + n * d * patch_dim  # embed, time, modulation, head
    for i in range(model.depth):
        seen = n if model.attention == "joint" else h * w if i % 2 == 0 else t
        total += d * 6 * d + 4 * n * d * d + 2 * n * seen * d + 2 * n * d * hidden
        if recipe.text:
            total += 2 * n * d * d + 2 * LENGTH * TEXT_DIM * d + 2 * n * LENGTH * d
    return 2 * batch * total


@pytest.mark.parametrize("recipe", [DIT, CAPTIONED], ids=["factorised", "joint with captions"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_flops_are_those_of_the_formula(recipe: Recipe, precision) -> None:
    cost = estimate(replace(recipe, precision=precision))
    assert cost.flops_forward == flops_by_hand(recipe)
    assert cost.flops_step == 3 * cost.flops_forward == cost.flops_executed
    assert cost.flops_encode == 0


def test_checkpointing_trades_memory_for_flops() -> None:
    deep = replace(DIT, model=replace(MODEL, depth=8))
    kept, again = estimate(deep), estimate(replace(deep, activation_checkpointing=True))
    assert again.peak_bytes < 0.6 * kept.peak_bytes
    assert again.flops_forward == kept.flops_forward
    # all but the embedding, the time, the head (and within a block, what nothing in the backward pass waits for)
    assert 0.8 * kept.flops_forward < again.flops_recomputed < kept.flops_forward
    assert again.flops_executed == again.flops_step + again.flops_recomputed


def test_parts_that_can_be_counted() -> None:
    recipe = replace(DIT, ema=0.99, accumulate=3)
    model = recipe.model.build(model_io(recipe))
    weights = sum(p.nbytes for p in model.parameters())
    cost = estimate(recipe)
    assert cost.peak_parts["weights"] == weights + sum(b.nbytes for b in model.buffers())
    assert cost.peak_parts["ema"] == cost.peak_parts["gradients"] == weights  # gradients of the micro-steps before
    assert cost.peak_parts["optimizer"] == pytest.approx(2 * weights, rel=0.01)  # and a counter for each tensor
    assert cost.checkpoint_bytes == pytest.approx(4 * weights, rel=0.01)
    assert cost.peak_bytes == sum(cost.peak_parts.values())
    once = estimate(replace(recipe, accumulate=1))
    assert cost.flops_step == 3 * once.flops_step
    assert once.peak_parts.get("gradients", 0) < weights / 2


MEASURED = {
    "factorised": replace(DIT, model=replace(MODEL, width=128, depth=4), ema=0.9),
    "joint, bf16, captions, checkpointing, Muon, micro-steps": replace(
        CAPTIONED,
        model=replace(MODEL, width=128, depth=4, attention="joint"),
        optim=Optim(name="muon"),
        precision="bf16",
        activation_checkpointing=True,
        accumulate=2,
    ),
    "vq": replace(VQ, batch_size=4),
    "causal": replace(VQ, data=replace(DATA, frames=1), model=preset("causal_s8t4"), batch_size=4),
}


@pytest.mark.slow  # measures the whole process, so that it wants one to itself
@pytest.mark.parametrize("recipe", MEASURED.values(), ids=MEASURED.keys())
def test_memory_is_what_training_allocates(recipe: Recipe, tmp_path, monkeypatch) -> None:
    """Within 3 % of the peak of torch's allocator over a run of the real loop, a checkpoint's copies included."""
    monkeypatch.setattr(console, "quiet", True)
    recipe = replace(recipe, validate_every=0, sample_every=0, save_every=1, steps=3)
    gc.collect()  # what earlier tests left would be freed on the way, and be taken off the peak
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train(recipe, tmp_path / "run")
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    used = torch.tensor([event.nbytes() for event in events if event.name() == "[memory]"]).cumsum(0)
    assert estimate(recipe, "cpu").peak_bytes == pytest.approx(int(used.max()), rel=0.03)


def test_describe_tells_what_a_reader_asks() -> None:
    lines = describe(replace(DIT, model=replace(MODEL, depth=4), activation_checkpointing=True)).splitlines()
    told = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}
    assert told["clip"] == "4 × 32 × 32 pixels -> 256 tokens"
    assert told["memory"].endswith("at the peak of a training step (batch_size 2, fp32, activation checkpointing)")
    assert {"parameters", "blocks", "weights", "optimizer", "activations", "disk", "FLOPs", "recomputed"} <= told.keys()
    assert not any(line != line.rstrip() or "#" in line for line in lines)


def test_the_estimate_leaves_no_trace() -> None:
    """Neither in torch's generator nor in memory: a model of 50 GB is nothing to it."""
    state = torch.get_rng_state()
    cost = estimate(replace(DIT, model=DiT(depth=4, width=16_384, heads=64, patch=(1, 4, 4), attention="joint")))
    assert cost.peak_bytes > 50e9
    assert torch.equal(torch.get_rng_state(), state)
