"""Every lever changes the estimate in the right place by the right amount: by the bytes of real tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mutoscope.build import build_trainee
from mutoscope.estimate import networks
from mutoscope.estimate.step import estimate
from mutoscope.estimate.tracker import CudaAutocast, backward
from mutoscope.models.dit import DiT
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.recipe import Data, Lora, Optim, Parallel, Recipe
from mutoscope.training.ema import EMA
from mutoscope.training.offload import recomputed
from mutoscope.training.optimizers import build_optimizers, cast_trained
from mutoscope.training.quantize import quantize_frozen

DIT = Recipe(
    data=Data(root="flying-mnist://tiny", frames=4, height=32, width=32),
    model=DiT(depth=3, width=64, heads=2, patch=(1, 4, 4), attention="joint"),
    objective=Diffusion(),
    steps=1,
    batch_size=2,
)
TOKENS = 2 * 4 * 8 * 8
LORA = replace(DIT, lora=Lora(rank=4), activation_checkpointing=True)
HALF = replace(DIT, weights="bf16", precision="bf16")


def nbytes(tensors: Any) -> int:
    return sum(x.nbytes for x in {x.untyped_storage().data_ptr(): x for x in tensors}.values())


def real(recipe: Recipe) -> nn.Module:
    model = build_trainee(recipe)
    cast_trained(model, recipe.weights)
    if recipe.quantize != "none":
        quantize_frozen(model, recipe.quantize, torch.device("cpu"))
    return model


def real_state(recipe: Recipe) -> list[Tensor]:
    model = real(recipe)
    optimizers = build_optimizers(model, recipe.optim)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    for optimizer in optimizers:
        optimizer.step()
    return [x for o in optimizers for kept in o.state.values() for x in kept.values()]


OPTIMIZERS = {
    "AdamW": (DIT, {}),
    "AdamW over LoRA": (LORA, {}),
    "8 bit": (DIT, {"name": "adamw8bit"}),
    "4 bit": (DIT, {"name": "adamw4bit"}),
    "CAME": (DIT, {"name": "came"}),
    "Prodigy": (DIT, {"name": "prodigy", "lr": 1.0}),
    "Muon": (DIT, {"name": "muon"}),
    "bf16 and the rest of fp32": (HALF, {}),
    "bf16, rounded stochastically": (HALF, {"name": "adamw8bit", "stochastic_rounding": True}),
    "released": (HALF, {"release_gradients": True, "max_grad_norm": 0.0}),
}


@pytest.mark.parametrize("case", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_optimizers_and_weights_are_those_of_real_ones(case: tuple[Recipe, dict[str, Any]]) -> None:
    recipe = replace(case[0], optim=Optim(**case[1]))
    parts = estimate(recipe).peak_parts
    assert parts["optimizer"] == nbytes(real_state(recipe))
    model = real(recipe)
    assert parts["weights"] == nbytes([*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4"])
def test_quantised_weights_are_as_large_as_real_ones(kind: Any) -> None:
    recipe = replace(LORA, quantize=kind)
    model = real(recipe)
    assert estimate(recipe).peak_parts["weights"] == nbytes([*model.parameters(), *model.buffers()])


def test_averages_dora_and_replicas() -> None:
    recipe = replace(DIT, ema=0.9)
    assert estimate(recipe).peak_parts["ema"] == nbytes(EMA(real(recipe), 0.9).averages.values())
    dora = replace(LORA, lora=Lora(rank=4, dora=True))
    trained = lambda r: sum(p.numel() for p in real(r).parameters() if p.requires_grad)
    assert estimate(dora).trainable == trained(dora) > trained(LORA)
    alone, replica = estimate(DIT), estimate(replace(DIT, parallel=Parallel(strategy="ddp")))
    weights = sum(p.nbytes for p in real(DIT).parameters())
    assert replica.peak_bytes == pytest.approx(alone.peak_bytes + weights, rel=0.02)


def test_an_offloaded_optimizer_takes_state_and_gradients_along() -> None:
    kept, gone = estimate(LORA), estimate(replace(LORA, optim=Optim(offload=True)))
    assert "optimizer" not in gone.peak_parts
    assert kept.peak_bytes - gone.peak_bytes >= kept.peak_parts["optimizer"]
    assert gone.checkpoint_bytes == kept.checkpoint_bytes


def test_released_gradients_never_lie_about_together() -> None:
    wide = replace(HALF, batch_size=1, model=DiT(depth=6, width=256, heads=2, patch=(2, 16, 16)))  # gradients matter
    released = Optim(release_gradients=True, max_grad_norm=0.0)
    kept, gone = estimate(wide), estimate(replace(wide, optim=released))
    weights = sum(p.nbytes for p in real(wide).parameters())
    assert kept.peak_bytes - gone.peak_bytes > 0.5 * weights


def test_offloaded_activations_are_the_inputs_of_blocks() -> None:
    deep = replace(LORA, model=replace(LORA.model, depth=12), batch_size=32)  # type: ignore[type-var]
    kept, gone = estimate(deep), estimate(replace(deep, offload_activations=True))
    one = 16 * TOKENS * 64 * 4  # the input of a block, 2 MiB
    saved = (kept.peak_bytes - gone.peak_bytes) / one
    assert 12 - 6 <= saved <= 12, "all but the block at work, the next one, and those under way"
    assert kept.flops_executed == gone.flops_executed


def test_offloaded_blocks_leave_but_for_two() -> None:
    deep = replace(LORA, model=replace(LORA.model, depth=12))  # type: ignore[type-var]
    block = sum(p.nbytes for p in real(deep).blocks[0].parameters() if not p.requires_grad)  # type: ignore[union-attr,index]
    kept = estimate(deep)
    for count in (3, 9, 12):
        gone = estimate(replace(deep, offload_blocks=count))
        assert kept.peak_parts["weights"] - gone.peak_parts["weights"] == pytest.approx(count * block, rel=0.01)
        left = gone.peak_bytes - (kept.peak_bytes - count * block)
        assert 0 <= left <= 2.1 * block, "the block at work and the one under way"


@pytest.mark.parametrize("offloaded", [0, 9])
@pytest.mark.parametrize("attention", ["joint", "factorised"])
def test_few_blocks_tell_of_all(attention: Any, offloaded: int, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = replace(LORA, model=replace(LORA.model, depth=18, attention=attention), offload_blocks=offloaded)  # type: ignore[type-var]
    few = estimate(deep)
    monkeypatch.setattr(networks, "FEW", 100)
    assert estimate(deep) == few


def test_norms_are_taken_in_fp32_on_a_gpu() -> None:
    seen: list[torch.dtype] = []
    norm = nn.LayerNorm(4, dtype=torch.bfloat16)

    def block(x: Tensor) -> Tensor:
        y = norm(x)
        seen.append(y.dtype)
        return y.sin()

    x = torch.randn(2, 4, dtype=torch.bfloat16, requires_grad=True)
    with CudaAutocast():
        with torch.autocast("cpu", torch.bfloat16):
            y = recomputed(block)(x)
        backward(y.sum())
        block(x)
    assert seen == [torch.float32, torch.float32, torch.bfloat16], "recomputed likewise; and only under autocast"
    gpu, cpu = (estimate(DIT, device) for device in ("cuda", "cpu"))
    assert gpu.flops_forward == cpu.flops_forward
    assert gpu.peak_parts | {"checkpoint": gpu.checkpoint_bytes} == cpu.peak_parts
