"""Each rule against its formulas, and what low precision does and doesn't do to AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mutoscope.training import update_rules
from mutoscope.training.low_bit import Bits, Format
from mutoscope.training.update_rules import CAME_BETA3, Group, Rule, State, adamw, came, prodigy

CPU = torch.device("cpu")
GROUP: Group = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}


class Weights:
    """Weights under a rule."""

    def __init__(self, rule: Rule, *weights: Tensor, group: Group = GROUP) -> None:
        self.rule, self.group, self.weights = rule, group, [w.clone() for w in weights]
        self.states: list[State] = [{"step": torch.zeros(())} | rule.new_state(w) for w in self.weights]

    def step(self, *gradients: Tensor) -> None:
        for w, g, state in zip(self.weights, gradients, self.states, strict=True):
            state["step"] += 1
            before = g.clone()
            self.rule.update(w, g, state, self.group)
            assert torch.equal(g, before), "a rule must leave the gradient as it is"
        if self.rule.finish is not None:
            self.rule.finish()


def gradients(shape: tuple[int, ...], steps: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [0.3 + torch.randn(shape, generator=generator) for _ in range(steps)]


# ---------------------------------------------------------------- AdamW


def test_adamw_is_torchs_bit_for_bit() -> None:
    start = torch.randn(37, 11, generator=torch.Generator().manual_seed(1))
    p = torch.nn.Parameter(start.clone())
    reference, ours = torch.optim.AdamW([p], fused=True, **GROUP), Weights(adamw(32, CPU), start)
    for g in gradients((37, 11), 10):
        p.grad = g.clone()
        reference.step()
        ours.step(g)
    assert torch.equal(ours.weights[0], p.detach())
    assert torch.equal(ours.states[0]["exp_avg_sq"], reference.state[p]["exp_avg_sq"])


def rounded(x: Tensor, form: Format) -> Tensor:
    """What a format keeps of a tensor, by searching its table."""
    scale = x.view(-1, form.block).abs().amax(1, keepdim=True)
    scaled = x.view(-1, form.block) / scale
    return (form.values[(scaled[..., None] - form.values).abs().argmin(-1)] * scale).view(x.shape)


@pytest.mark.parametrize("bits", [8, 4])
def test_low_bit_adamw_rounds_the_moments_and_nothing_else(bits: Bits, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is taken with the moments as they are before they are rounded. In chunks, the last of them shorter."""
    monkeypatch.setattr(update_rules, "CHUNK", 2048)
    shape, start = (5, 1024), torch.randn(5, 1024, generator=torch.Generator().manual_seed(1))
    ours, w, m, v = Weights(adamw(bits, CPU), start), start.clone(), torch.zeros(shape), torch.zeros(shape)
    for n, g in enumerate(gradients(shape, 4), 1):
        ours.step(g)
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        w = w - 0.01 * 0.1 * w - 0.01 * (m / (1 - 0.9**n)) / ((v / (1 - 0.99**n)).sqrt() + 1e-6)
        m, v = rounded(m, Format(bits, True, CPU)), rounded(v, Format(bits, False, CPU))
        # A number halfway between two codes may go either way
        assert ((ours.weights[0] - w).abs() > 1e-6).float().mean() < 1e-3
    assert ours.states[0]["exp_avg"].dtype == torch.uint8


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.02), (4, 0.2)])
def test_low_bit_adamw_stays_near_adamw(bits: Bits, bound: float) -> None:
    start = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    low, full = Weights(adamw(bits, CPU), start), Weights(adamw(32, CPU), start)
    for g in gradients((64, 128), 100):
        low.step(g)
        full.step(g)
    moved = (full.weights[0] - start).norm()
    assert (low.weights[0] - full.weights[0]).norm() < bound * moved


def test_weights_whose_gradient_pauses_do_not_run_away() -> None:
    """Beside much larger ones in the same block. With a zero among the codes of second moments, as in bitsandbytes and
    torchao (0.18: 147 after these steps), the first moment is divided by epsilon alone."""
    group = GROUP | {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    start = torch.zeros(16, 256)
    low, full = Weights(adamw(8, CPU), start, group=group), Weights(adamw(32, CPU), start, group=group)
    for n, g in enumerate(gradients((16, 256), 60)):
        g = (g - 0.3) * torch.tensor([1.0] + [3e-4 * (n < 50)] * 255)
        low.step(g)
        full.step(g)
    assert low.weights[0].abs().max() < 1.5 * full.weights[0].abs().max() < 0.1


@pytest.mark.parametrize(
    ("rule", "size"),
    [
        (lambda: adamw(32, CPU), 8),
        (lambda: adamw(8, CPU), 2 + 8 / 256),
        (lambda: adamw(4, CPU), 1 + 8 / 128),
        (lambda: came(CPU), 4 + 16 / 256),
        (lambda: prodigy(CPU), 16),
    ],
)
def test_bytes_of_state_for_each_number(rule: Callable[[], Rule], size: float) -> None:
    state = rule().new_state(torch.zeros(256, 256))
    assert sum(x.nbytes for x in state.values() if x.numel() > 1) / 256**2 == size


def test_small_weights_keep_their_moments_in_full() -> None:
    state = adamw(8, CPU).new_state(torch.zeros(63, 65))
    assert state.keys() == {"exp_avg", "exp_avg_sq"} and state["exp_avg"].dtype == torch.float32


# ---------------------------------------------------------------- CAME


def came_reference(w: Tensor, grads: list[Tensor], group: Group) -> Tensor:
    """arXiv:2307.02047, algorithm 2, with the authors' clipping, in fp64; matrices only."""
    (beta1, beta2), lr, w = group["betas"], group["lr"], w.double()
    m, (r, c), (res_r, res_c) = torch.zeros_like(w), *2 * [(w.new_zeros(len(w)), w.new_zeros(w.shape[1]))]
    for g in grads:
        g = g.double()
        squares = g**2 + 1e-30
        r, c = beta2 * r + (1 - beta2) * squares.mean(1), beta2 * c + (1 - beta2) * squares.mean(0)
        u = g / (r[:, None] * c[None] / r.mean()).sqrt()
        u = u / max(1.0, float(u.norm()) / math.sqrt(u.numel()))
        m = beta1 * m + (1 - beta1) * u
        instability = (u - m) ** 2 + 1e-16
        res_r = CAME_BETA3 * res_r + (1 - CAME_BETA3) * instability.mean(1)
        res_c = CAME_BETA3 * res_c + (1 - CAME_BETA3) * instability.mean(0)
        w = w - lr * group["weight_decay"] * w - lr * m / (res_r[:, None] * res_c[None] / res_r.mean()).sqrt()
    return w


def test_came_against_its_algorithm() -> None:
    start = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
    ours, grads = Weights(came(CPU), start), gradients((6, 10), 20)
    for g in grads:
        ours.step(g)
    torch.testing.assert_close(ours.weights[0].double(), came_reference(start, grads, GROUP), atol=1e-5, rtol=1e-5)


def test_came_takes_vectors_and_convolutions() -> None:
    """Vectors have a second moment in full and no instability; convolutions are many matrices."""
    vector, kernel = torch.randn(5), torch.randn(2, 3, 4, 5)
    ours = Weights(came(CPU), vector, kernel)
    grads = gradients((2, 3, 4, 5), 3)
    for g in grads:
        ours.step(g[0, 0, 0], g)
    assert ours.states[1]["exp_avg_sq_row"].shape == (2, 3, 4)
    g, lr = grads[0][0, 0, 0], GROUP["lr"]
    one = Weights(came(CPU), vector)
    one.step(g)
    u = g / (0.01 * g**2).sqrt()  # 1 − β₂ = 0.01
    u = u / max(1.0, float(u.norm()) / math.sqrt(5))
    torch.testing.assert_close(one.weights[0], vector * (1 - lr * 0.1) - lr * 0.1 * u)


# ---------------------------------------------------------------- Prodigy


def prodigy_reference(weights: list[Tensor], steps: list[list[Tensor]], group: Group) -> tuple[list[Tensor], float]:
    """arXiv:2306.06101, algorithm 4, in fp64, with prodigyopt 1.1's use_bias_correction and safeguard_warmup."""
    (beta1, beta2), lr, eps, d = group["betas"], group["lr"], group["eps"], 1e-6
    beta3, numerator = math.sqrt(beta2), 0.0
    w = [x.double() for x in weights]
    m, v, s = ([torch.zeros_like(x) for x in w] for _ in range(3))
    start = [x.clone() for x in w]
    for n, grads in enumerate(steps, 1):
        rate = d * lr * math.sqrt(1 - beta2**n) / (1 - beta1**n)
        numerator *= beta3
        for i, g in enumerate(x.double() for x in grads):
            numerator += float(d / 1e-6 * rate * (g * (start[i] - w[i])).sum())
            m[i] = beta1 * m[i] + (1 - beta1) * d * g
            v[i] = beta2 * v[i] + (1 - beta2) * d**2 * g**2
            s[i] = beta3 * s[i] + d / 1e-6 * d * g
            w[i] = w[i] - rate * group["weight_decay"] * w[i] - rate * m[i] / (v[i].sqrt() + d * eps)
        d = max(d, numerator / float(sum(x.abs().sum() for x in s)))
    return w, d


def test_prodigy_against_its_algorithm() -> None:
    group = GROUP | {"lr": 1.0}
    generator = torch.Generator().manual_seed(1)
    start = [1e-3 * torch.randn(6, 10, generator=generator), torch.zeros(4)]  # small: the first steps are 1e-6
    ours = Weights(prodigy(CPU), *start, group=group)
    steps = [
        [1 + 0.2 * a, 0.2 * b - 1] for a, b in zip(gradients((6, 10), 50), gradients((4,), 50, seed=3), strict=True)
    ]
    for grads in steps:
        ours.step(*grads)
    expected, d = prodigy_reference(start, steps, group)
    assert d > 1e-3  # it has found a rate, a thousand times that which it started from
    assert ours.states[0]["d"].item() == pytest.approx(d, rel=1e-3)
    for w, e in zip(ours.weights, expected, strict=True):
        torch.testing.assert_close(w.double(), e, atol=1e-4, rtol=1e-3)


def test_prodigys_estimate_is_one_for_all_weights_and_survives_gradients_of_zero() -> None:
    ours = Weights(prodigy(CPU), torch.zeros(3, 3), torch.zeros(2), group=GROUP | {"lr": 1.0})
    ours.step(torch.zeros(3, 3), torch.zeros(2))
    assert ours.states[0]["d"] is ours.states[1]["d"]
    assert ours.states[0]["d"].item() == pytest.approx(1e-6)
    assert torch.equal(ours.weights[0], torch.zeros(3, 3))
