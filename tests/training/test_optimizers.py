"""The learning rate as a function of the step, which parameters each optimizer gets, and what may go together."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mutoscope.contradictions import validate
from mutoscope.errors import ConfigError
from mutoscope.models.dit import DiT
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.recipe import Data, Lora, Optim, Parallel, Recipe
from mutoscope.training.optimizers import (
    build_optimizers,
    cast_trained,
    clip_gradients,
    gradient_norms,
    lr_scale,
    set_learning_rates,
)
from mutoscope.types import ModelIO

NAMES = get_args(get_type_hints(Optim)["name"])
RATES = {"prodigy": 1.0, "came": 3e-4}


def dit() -> nn.Module:
    torch.manual_seed(0)
    io = ModelIO(channels=2, grid=(2, 4, 4), text_dim=6, num_labels=3)
    return DiT(depth=2, width=16, heads=2).build(io)


def scales(steps: int, **options: Any) -> list[float]:
    return [lr_scale(Optim(**options), step, steps) for step in range(steps)]


# ---------------------------------------------------------------- schedules


def test_warm_up_is_linear_and_reaches_the_peak_with_its_last_step() -> None:
    assert scales(6, warmup_steps=4) == [0.25, 0.5, 0.75, 1, 1, 1]
    assert scales(3) == [1, 1, 1]


def test_decays() -> None:
    assert scales(6, warmup_steps=2, schedule="linear") == [0.5, 1, 1, 0.75, 0.5, 0.25]
    half = math.sqrt(0.5)
    assert scales(6, warmup_steps=2, schedule="cosine") == pytest.approx(
        [0.5, 1, 1, (1 + half) / 2, 0.5, (1 - half) / 2]
    )


def test_decays_end_at_the_final_rate() -> None:
    for schedule in ("linear", "cosine"):
        rates = scales(1000, schedule=schedule, final_lr=0.1, warmup_steps=10)
        assert rates[10] == 1 and rates[-1] == pytest.approx(0.1, abs=1e-3)
        assert rates[10:] == sorted(rates[10:], reverse=True)
        assert lr_scale(Optim(schedule=schedule, final_lr=0.1), 1000, 1000) == pytest.approx(0.1)


def test_a_warm_up_as_long_as_the_run_never_decays() -> None:
    assert scales(4, warmup_steps=4, schedule="cosine") == [0.25, 0.5, 0.75, 1]
    assert scales(2, warmup_steps=4, schedule="cosine") == [0.25, 0.5]


def test_every_group_follows_the_schedule_from_its_own_peak() -> None:
    optim = Optim(name="muon", lr=1e-3, muon_lr=0.02, weight_decay=0.1, schedule="linear")
    optimizers = build_optimizers(dit(), optim)
    for _ in range(2):  # setting it twice is setting it once: rates are not scaled from the last one
        returned = set_learning_rates(optimizers, optim, step=5, steps=10)
        assert returned == pytest.approx(0.5e-3)
        adamw, muon = optimizers
        assert [g["lr"] for g in adamw.param_groups] == pytest.approx([0.5e-3] * 2)
        assert [g["lr"] for g in muon.param_groups] == pytest.approx([0.01])


# ---------------------------------------------------------------- who gets what


def groups(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, tuple[str, float]]:
    """Name of each parameter -> its optimizer and weight decay; fails where a parameter is in two groups."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, tuple[str, float]] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert names[id(p)] not in found
                found[names[id(p)]] = type(optimizer).__name__, group["weight_decay"]
    return found


def test_weight_decay_spares_vectors() -> None:
    model = dit()
    found = groups(model, build_optimizers(model, Optim(weight_decay=0.1)))
    assert found == {name: ("AdamW", 0.1 if p.ndim >= 2 else 0.0) for name, p in model.named_parameters()}


def test_muon_gets_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    model = dit()
    found = groups(model, build_optimizers(model, Optim(name="muon", weight_decay=0.1)))
    assert found.keys() == dict(model.named_parameters()).keys()
    muon = {name for name, (optimizer, _) in found.items() if optimizer == "Muon"}
    assert muon == {name for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2}
    assert {"blocks.0.attention.query.weight", "blocks.1.mlp.down.weight"} <= muon
    assert {"head.weight", "embed.weight", "label.weight", "time.up.weight"} & muon == set()
    assert all(found[name][1] == (0.1 if p.ndim >= 2 else 0.0) for name, p in model.named_parameters())


def test_frozen_parameters_are_left_out() -> None:
    model = dit()
    model.get_submodule("blocks").requires_grad_(False)
    found = groups(model, build_optimizers(model, Optim()))
    assert found.keys() == {name for name, _ in model.named_parameters() if not name.startswith("blocks.")}


def test_models_with_nothing_to_train_are_refused() -> None:
    with pytest.raises(ValueError, match="no trainable parameters"):
        build_optimizers(dit().requires_grad_(False), Optim())
    with pytest.raises(ValueError, match="no matrices in its blocks"):
        build_optimizers(nn.Linear(2, 2), Optim(name="muon"))


def test_each_name_is_that_optimizer() -> None:
    """By what it keeps of a matrix of the blocks."""
    kept: dict[str, set[str]] = {}
    for name in NAMES:
        model = dit()
        optimizers = build_optimizers(model, Optim(name=name))
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        for optimizer in optimizers:
            optimizer.step()
        weight = model.get_parameter("blocks.0.mlp.up.weight")
        kept[name] = next(set(o.state[weight]) for o in optimizers if weight in o.state)
    assert kept["adamw"] == {"step", "exp_avg", "exp_avg_sq"}
    assert kept["muon"] == {"momentum_buffer"}
    assert kept["prodigy"] == {"step", "exp_avg", "exp_avg_sq", "s", "p0", "d", "numerator"}
    assert "exp_avg_res_row" in kept["came"]


def test_weights_that_are_trained_are_cast_and_others_not() -> None:
    model = dit()
    model.register_buffer("table", torch.zeros(2))
    model.get_submodule("blocks").requires_grad_(False)
    before = list(model.parameters())
    cast_trained(model, "bf16")
    dtypes = {name.partition(".")[0]: p.dtype for name, p in model.named_parameters()}
    assert dtypes.pop("blocks") == torch.float32 == model.get_buffer("table").dtype
    assert set(dtypes.values()) == {torch.bfloat16}
    assert all(p is q for p, q in zip(before, model.parameters(), strict=True))
    cast_trained(model, "fp32")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_what_the_weights_do_not_allow_is_refused() -> None:
    with pytest.raises(ValueError, match="there is nothing to round"):
        build_optimizers(dit(), Optim(stochastic_rounding=True))
    with pytest.raises(ValueError, match="muon trains fp32 weights"):
        build_optimizers(dit().bfloat16(), Optim(name="muon"))
    with pytest.raises(ValueError, match=r"must be fp32 or bf16, this model has torch\.float16"):
        build_optimizers(dit().half(), Optim())


# ---------------------------------------------------------------- the norm of the gradients


@pytest.mark.parametrize("name", NAMES)
def test_clipping_is_torchs(name: str) -> None:
    model, plain = dit(), dit()
    optimizers = build_optimizers(model, Optim(name=name))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    norms = gradient_norms(optimizers)
    assert norms.keys() == set(model.parameters())
    assert torch.equal(
        clip_gradients(optimizers, norms, 0.5).sort().values, nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    )
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True))  # type: ignore[arg-type]


def test_norms_of_bf16_gradients_are_fp32_and_without_a_limit_nothing_is_scaled() -> None:
    p = nn.Parameter(torch.ones(1000, 7, dtype=torch.bfloat16))
    model = nn.Module()
    model.weight = p
    optimizers = build_optimizers(model, Optim())
    p.grad = torch.full_like(p, 3.0)
    norm = clip_gradients(optimizers, gradient_norms(optimizers), 0.0)
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(3 * 7000**0.5, rel=1e-5)
    assert torch.equal(p.grad, torch.full_like(p, 3.0))


def test_parameters_without_a_gradient_have_no_norm() -> None:
    model = dit()
    optimizers = build_optimizers(model, Optim(name="adamw8bit"))
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    assert list(gradient_norms(optimizers)) == [first]


# ---------------------------------------------------------------- what a step does


@pytest.mark.parametrize(
    ("name", "weights"), [(n, w) for n in NAMES for w in ("fp32", "bf16") if (n, w) != ("muon", "bf16")]
)
def test_training_lowers_the_loss(name: str, weights: str) -> None:
    """With a schedule, which no optimizer may pass over (cogvideox-factory's offloaded one had none)."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.blocks = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    cast_trained(model, weights)
    steps = 150 if name == "prodigy" else 60  # a hundred to find the rate
    optim = Optim(name=name, lr=RATES.get(name, 3e-3), muon_lr=0.03, warmup_steps=5, schedule="cosine")
    optimizers = build_optimizers(model, optim)
    x, dtype = torch.randn(64, 64), model.blocks[0].weight.dtype
    losses = []
    for step in range(steps):
        set_learning_rates(optimizers, optim, step, steps)
        loss = F.mse_loss(model.blocks(x.to(dtype)).float(), x.roll(1, 1))
        loss.backward()
        clip_gradients(optimizers, gradient_norms(optimizers), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    weight = model.blocks[0].weight
    before = weight.detach().clone()
    set_learning_rates(optimizers, replace(optim, schedule="linear"), 60, 60)  # where the rate is 0
    weight.grad = torch.ones_like(weight)
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(weight, before)


def adamw(p: Tensor, grads: list[Tensor], optim: Optim, decay: float) -> Tensor:
    """arXiv:1711.05101 algorithm 2, in fp64."""
    p, m, v = p.double(), torch.zeros_like(p).double(), torch.zeros_like(p).double()
    for n, g in enumerate(grads, 1):
        m = optim.betas[0] * m + (1 - optim.betas[0]) * g
        v = optim.betas[1] * v + (1 - optim.betas[1]) * g**2
        m_hat, v_hat = m / (1 - optim.betas[0] ** n), v / (1 - optim.betas[1] ** n)
        p = p - optim.lr * decay * p - optim.lr * m_hat / (v_hat.sqrt() + optim.eps)
    return p


def test_adamw_against_its_formula() -> None:
    optim = Optim(lr=0.03, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2)
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    nn.init.normal_(model.bias)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = {name: [torch.randn_like(p) for _ in range(4)] for name, p in before.items()}
    (optimizer,) = build_optimizers(model, optim)
    for i in range(4):
        for name, p in model.named_parameters():
            p.grad = grads[name][i].clone()
        optimizer.step()
    for name, p in model.named_parameters():
        expected = adamw(before[name], grads[name], optim, 0.2 if name == "weight" else 0.0)
        torch.testing.assert_close(p.double(), expected, atol=1e-6, rtol=1e-5)


def test_muon_steps_are_orthogonal() -> None:
    """Jordan et al. 2024, "Muon": whatever the gradient's singular values, those of the step are near each other."""
    model = dit()
    weight = model.get_parameter("blocks.0.attention.query.weight")
    before = weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    gradient = weight.grad
    assert gradient is not None
    assert torch.linalg.cond(gradient) > 10
    for optimizer in build_optimizers(model, Optim(name="muon", muon_lr=0.02)):
        optimizer.step()
    step = torch.linalg.svdvals(before - weight.detach()) / 0.02
    assert step.min() > 0.4 and step.max() < 1.3
    cosine = torch.cosine_similarity((before - weight.detach()).flatten(), gradient.flatten(), 0)
    assert cosine > 0.5  # and it still goes down the gradient


# ---------------------------------------------------------------- what may go together

PLAIN = Recipe(
    data=Data(root="flying-mnist://tiny", frames=4, height=16, width=16),
    model=DiT(depth=2, width=16, heads=2, patch=(2, 8, 8)),
    objective=Diffusion(),
    steps=1,
    batch_size=1,
)
FULL = replace(PLAIN, weights="bf16", precision="bf16")
ADAPTERS = replace(PLAIN, lora=Lora(), activation_checkpointing=True)


@pytest.mark.parametrize(
    ("recipe", "problem"),
    [
        (replace(FULL, lora=Lora()), "recipe.weights: LoRA's weights are always fp32"),
        (replace(FULL, precision="fp32"), "recipe.precision: over bf16 weights .* set precision = bf16"),
        (replace(FULL, optim=Optim(name="muon")), "recipe.optim.name: muon trains fp32 weights"),
        (replace(PLAIN, quantize="int8"), "recipe.quantize: quantised weights cannot be trained; set recipe.lora"),
        (replace(ADAPTERS, quantize="int8", lora=Lora(dora=True)), "recipe.quantize: DoRA computes with the weights"),
        (replace(PLAIN, activation_checkpointing=True, offload_blocks=1), "recipe.offload_blocks: is for frozen"),
        (replace(PLAIN, offload_activations=True), "recipe.offload_activations: goes with activation checkpointing"),
        (replace(ADAPTERS, offload_blocks=1, activation_checkpointing=False), "recipe.offload_blocks: goes with"),
        (replace(ADAPTERS, offload_blocks=-1), "recipe.offload_blocks: must be at least 0, got -1"),
        (replace(PLAIN, optim=Optim(stochastic_rounding=True)), "stochastic_rounding: fp32 weights need no rounding"),
        (replace(FULL, optim=Optim(stochastic_rounding=True, offload=True)), "stochastic_rounding: saves memory that"),
        (replace(PLAIN, optim=Optim(name="muon", offload=True)), "recipe.optim.offload: muon's products"),
        (replace(PLAIN, optim=Optim(name="prodigy")), "recipe.optim.lr: Prodigy .* 0.0001 stops it; set lr = 1"),
        (replace(PLAIN, optim=Optim(name="came", eps=1e-6)), "recipe.optim.eps: came has floors of its own"),
    ],
)  # fmt: skip
def test_contradictions(recipe: Recipe, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as error:
        validate(recipe)
    assert len(error.value.problems) == 1


@pytest.mark.parametrize(
    ("changes", "optim", "problem"),
    [
        ({}, {"max_grad_norm": 1.0}, "set optim.max_grad_norm = 0"),
        ({"accumulate": 2}, {}, "set accumulate = 1"),
        ({"parallel": Parallel(strategy="ddp")}, {}, "set parallel.strategy = none"),
        ({}, {"offload": True}, "optim.offload takes gradients off the GPU already"),
        ({}, {"name": "prodigy", "lr": 1.0}, "prodigy is not for single gradients"),
        ({}, {"name": "muon"}, "muon is not for single gradients"),
    ],
)
def test_contradictions_of_released_gradients(changes: dict[str, Any], optim: dict[str, Any], problem: str) -> None:
    recipe = replace(PLAIN, optim=Optim(release_gradients=True, max_grad_norm=0.0))
    validate(recipe)
    with pytest.raises(ConfigError, match=f"recipe.optim.release_gradients: .*{problem}") as error:
        validate(replace(recipe, optim=replace(recipe.optim, **optim), **changes))
    assert len(error.value.problems) == 1


def test_levers_that_go_together() -> None:
    full = Optim(name="adamw8bit", stochastic_rounding=True, release_gradients=True, max_grad_norm=0.0)
    validate(replace(FULL, optim=full))
    validate(replace(FULL, optim=Optim(name="adamw4bit", offload=True), accumulate=4))
    validate(replace(ADAPTERS, quantize="nf4", offload_blocks=1, offload_activations=True, optim=Optim(name="came")))
