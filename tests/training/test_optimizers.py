"""The learning rate as a function of the step, and which parameters each optimizer gets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mutoscope.models.dit import DiT
from mutoscope.recipe import Optim
from mutoscope.training.optimizers import build_optimizers, lr_scale, set_learning_rates
from mutoscope.types import ModelIO


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


# ---------------------------------------------------------------- what a step does


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
