"""Samplers fed with the exact answer: E[x0 | x_t] of Gaussian mixtures, for which the result is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mutoscope.models.dit import DiT
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.randomness import Draw
from mutoscope.recipe import Sampler
from mutoscope.samplers.diffusion import sample_diffusion
from mutoscope.types import NO_LABEL, Cond, ModelIO

OBJECTIVES = [
    Diffusion(schedule="flow", prediction="velocity"),
    Diffusion(schedule="flow", prediction="v"),
    Diffusion(schedule="flow", prediction="x0"),
    Diffusion(shift=3.0),
    Diffusion(schedule="ddpm_linear", prediction="eps"),
    Diffusion(schedule="ddpm_linear", prediction="v"),
    Diffusion(schedule="ddpm_linear", prediction="x0"),
    Diffusion(schedule="ddpm_cosine", prediction="v"),
    Diffusion(schedule="ddpm_cosine", prediction="x0"),
    Diffusion(schedule="edm", prediction="edm"),
    Diffusion(schedule="edm", prediction="edm", sigma_data=0.5),
]
every_schedule = pytest.mark.parametrize("objective", [OBJECTIVES[i] for i in (0, 4, 7, 9)], ids=lambda o: o.schedule)
every_objective = pytest.mark.parametrize(
    "objective", OBJECTIVES, ids=lambda o: f"{o.schedule}-{o.prediction}-{o.shift:g}-{o.sigma_data:g}"
)
SOLVERS = [{"method": "euler"}, {"method": "heun"}, {"method": "ddim"}, {"method": "ddim", "eta": 1.0},
           {"method": "dpmpp_2m"}, {"method": "dpmpp_2m", "eta": 1.0}, {"method": "ancestral"}]  # fmt: skip
NOTHING = Cond()
SHAPE = (2, 2, 16, 16)
WEIGHTS, MEANS, STDS = (0.3, 0.7), (-1.5, 0.65), (0.1, 0.2)
"""The mixture: every number of a video is drawn from it on its own. Its variance is about 1."""


class Net(nn.Module):
    """A network made of a function, which notes what it was called with."""

    def __init__(self, function: Callable[[Tensor, Tensor, Cond], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.calls: list[tuple[Tensor, Tensor, Cond]] = []

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        self.calls.append((x, time, cond))
        return self.function(x, time, cond)


class Oracle(nn.Module):
    """The network that a perfect training would yield, where every number is drawn from a Gaussian mixture."""

    def __init__(
        self,
        objective: Diffusion,
        weights: tuple[float, ...] = WEIGHTS,
        means: tuple[float, ...] = MEANS,
        stds: tuple[float, ...] = STDS,
    ) -> None:
        super().__init__()
        self.objective, self.calls = objective, 0
        column = lambda values: torch.tensor(values, dtype=torch.float64)[:, None, None, None, None, None]
        self.weights, self.means, self.stds = column(weights), column(means), column(stds)

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        self.calls += 1
        objective, d = self.objective, self.objective.sigma_data
        t = {"flow": time / 1000, "edm": (4 * time.double() / 250).exp()}.get(objective.schedule, time)
        alpha, sigma = (v.double()[:, None, None, None, None] for v in objective.noise_schedule.alpha_sigma(t))
        x = x.double() * ((sigma**2 + d**2).sqrt() if objective.prediction == "edm" else 1)
        x0 = self.posterior_mean(x, alpha, sigma)
        noise = (x - alpha * x0) / sigma
        predicted = {
            "velocity": noise - x0,
            "eps": noise,
            "v": alpha * noise - sigma * x0,
            "x0": x0,
            "edm": (sigma * x0 / d - d * noise) / (sigma**2 + d**2).sqrt(),
        }[objective.prediction]
        return predicted.float()

    def posterior_mean(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | α·x0 + σ·ε = x]."""
        variance = alpha**2 * self.stds**2 + sigma**2
        likelihood = self.weights.log() - variance.log() / 2 - (x - alpha * self.means) ** 2 / (2 * variance)
        means = self.means + alpha * self.stds**2 / variance * (x - alpha * self.means)
        return (likelihood.softmax(0) * means).sum(0)


class StratifiedDraw(Draw):
    """Begins with the quantiles of N(0, 1) in place of a sample of it: errors left are the solver's."""

    begun = False

    def normal(self, *shape: int) -> Tensor:
        if self.begun:
            return super().normal(*shape)
        self.begun = True
        size = len(self.generators) * math.prod(shape)
        return torch.special.ndtri((torch.arange(size) + 0.5) / size).reshape(-1, *shape)


def sample(
    model: nn.Module, objective: Diffusion, draw: Draw | None = None, cond: Cond = NOTHING, **options: Any
) -> Tensor:
    """Two videos, unless `draw` says otherwise."""
    return sample_diffusion(model, objective, Sampler(**options), cond, SHAPE, draw or Draw(0, "sample", range(2)))


def wasserstein(numbers: Tensor) -> float:
    """The mean distance that the sorted numbers lie from the mixture's quantiles."""
    grid = torch.linspace(-4, 4, 8001, dtype=torch.float64)
    cdf = torch.zeros_like(grid)
    for weight, mean, std in zip(WEIGHTS, MEANS, STDS, strict=True):
        cdf += weight * torch.special.ndtr((grid - mean) / std)
    ranks = (torch.arange(numbers.numel(), dtype=torch.float64) + 0.5) / numbers.numel()
    exact = grid[torch.searchsorted(cdf, ranks)]
    return (numbers.flatten().double().sort().values - exact).abs().mean().item()


# ---------------------------------------------------------------- what is drawn


@every_objective
def test_a_perfect_network_draws_the_mixture(objective: Diffusion) -> None:
    drawn = sample(Oracle(objective), objective, StratifiedDraw(0, "sample", range(2)), steps=50)
    assert drawn.shape == (2, *SHAPE) and drawn.dtype == torch.float32
    assert wasserstein(drawn) < 0.03


@every_schedule
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: "-".join(map(str, s.values())))
def test_every_solver_draws_the_mixture(objective: Diffusion, solver: dict[str, Any]) -> None:
    drawn = sample(Oracle(objective), objective, StratifiedDraw(0, "sample", range(8)), steps=50, **solver)
    allowed = (
        0.05
        if "eta" in solver
        else {"euler": 0.03, "ddim": 0.03, "heun": 0.012, "dpmpp_2m": 0.02, "ancestral": 0.05}[solver["method"]]
    )
    assert wasserstein(drawn) < allowed


@every_objective
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_single_point_is_hit_in_any_number_of_steps(objective: Diffusion, steps: int) -> None:
    point = Oracle(objective, weights=(1.0,), means=(0.75,), stds=(1e-6,))
    for solver in SOLVERS:
        drawn = sample(point, objective, steps=steps, **solver)
        torch.testing.assert_close(drawn, torch.full_like(drawn, 0.75), atol=5e-4, rtol=0)


@every_objective
def test_euler_is_ddim_without_noise(objective: Diffusion) -> None:
    euler, ddim = (sample(Oracle(objective), objective, steps=9, method=m, eta=0.0) for m in ("euler", "ddim"))
    assert torch.equal(euler, ddim)


def test_euler_walks_the_straight_path_of_rectified_flow() -> None:
    """x + Δt·v, with a velocity that is no denoiser's."""
    velocity = Net(lambda x, time, cond: torch.sin(3 * x) + time[:, None, None, None, None] / 1000)
    x = Draw(0, "sample", range(2)).normal(*SHAPE).double()
    for i in range(5):
        x = x - 0.2 * (torch.sin(3 * x) + (1 - i / 5))
    drawn = sample(velocity, Diffusion(), steps=5, method="euler")
    torch.testing.assert_close(drawn.double(), x, atol=1e-5, rtol=0)


def test_heun_walks_as_the_algorithm_of_edm() -> None:
    """arXiv:2206.00364 algorithm 1, on its own variables: d = (x − D(x; σ))/σ."""
    objective = Diffusion(schedule="edm", prediction="edm")
    oracle = Oracle(objective)
    sigmas = objective.noise_schedule.grid(6).double()
    denoiser = lambda x, s: oracle.posterior_mean(x, torch.ones(1, 1, 1, 1, 1), s.reshape(1, 1, 1, 1, 1))
    x = sigmas[0] * Draw(0, "sample", range(2)).normal(*SHAPE).double()
    for s, s_next in pairwise(sigmas):
        d = (x - denoiser(x, s)) / s
        x_next = x + (s_next - s) * d
        if s_next > 0:
            x_next = x + (s_next - s) * (d + (x_next - denoiser(x_next, s_next)) / s_next) / 2
        x = x_next
    drawn = sample(oracle, objective, steps=6, method="heun")
    torch.testing.assert_close(drawn.double(), x, atol=2e-4, rtol=0)


def test_full_noise_walks_as_the_ancestral_sampler_of_ddpm() -> None:
    """arXiv:2006.11239 algorithm 2 with σ_t² = β̃_t, through all 1000 steps, for data that are one point."""
    objective = Diffusion(schedule="ddpm_linear", prediction="eps")
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar = torch.cumprod(1 - betas, 0)
    draw = Draw(0, "sample", range(2))
    eps = lambda x, t: (x - abar[t].sqrt() * 0.75) / (1 - abar[t]).sqrt()
    x = draw.normal(*SHAPE).double() * (1 - abar[-1]).sqrt()
    for t in range(999, -1, -1):
        x = (x - betas[t] / (1 - abar[t]).sqrt() * eps(x, t)) / (1 - betas[t]).sqrt()
        if t:
            x = x + ((1 - abar[t - 1]) / (1 - abar[t]) * betas[t]).sqrt() * draw.normal(*SHAPE).double()
    point = Net(lambda x, time, cond: eps(x.double(), int(time[0])).float())
    drawn = sample(point, objective, steps=1000, method="ddim", eta=1.0)
    torch.testing.assert_close(drawn.double(), x, atol=1e-4, rtol=0)


def ode_error(objective: Diffusion, method: str, steps: int) -> float:
    """How far the solver ends from the exact solution of the probability flow, for data of one Gaussian N(m, s²):
    x(t) = α·m + √(α²s² + σ²)·u, with u constant along the way."""
    mean, std = 0.3, 0.7
    drawn = sample(Oracle(objective, (1.0,), (mean,), (std,)), objective, method=method, steps=steps)
    alpha, sigma = (v.double() for v in objective.noise_schedule.alpha_sigma(objective.noise_schedule.grid(steps)[:1]))
    x = sigma * Draw(0, "sample", range(2)).normal(*SHAPE)
    exact = mean + std * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2).sqrt()
    return (drawn - exact).square().mean().sqrt().item()


@every_schedule
def test_orders_of_convergence(objective: Diffusion) -> None:
    """When the steps double, Euler's error falls to a half and Heun's to a quarter. On ddpm, Heun falls somewhat short:
    its last step is Euler's, and begins at a σ that falls with the square root of the step."""
    euler = ode_error(objective, "euler", 20) / ode_error(objective, "euler", 40)
    heun = ode_error(objective, "heun", 20) / ode_error(objective, "heun", 40)
    assert euler == pytest.approx(2, abs=0.1)
    assert heun > 3 if "ddpm" in objective.schedule else heun == pytest.approx(4, abs=0.5)
    assert ode_error(objective, "heun", 40) < ode_error(objective, "euler", 80) / 2
    assert ode_error(objective, "dpmpp_2m", 40) < ode_error(objective, "euler", 40) / 3, "at the same cost"


# ---------------------------------------------------------------- guidance


def by_label(x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """A network that says 3 for label 1, and -1 without a label."""
    assert cond.label is not None
    return torch.zeros_like(x) + torch.where(cond.label == 1, 3.0, -1.0)[:, None, None, None, None]


LABELS = Cond(label=torch.tensor([1, 1]))


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5, 7.0])
def test_guidance_goes_from_the_unconditional_guess_through_the_conditional_one(scale: float) -> None:
    """arXiv:2207.12598 eq. 6, on x̂0: null + scale·(conditional − null)."""
    net = Net(by_label)
    drawn = sample(net, Diffusion(schedule="flow", prediction="x0"), cond=LABELS, steps=1, guidance_scale=scale)
    torch.testing.assert_close(drawn, torch.full_like(drawn, -1 + scale * 4))
    assert len(net.calls) == (1 if scale == 1 else 2)


@pytest.mark.parametrize("objective", [OBJECTIVES[0], OBJECTIVES[5], OBJECTIVES[9]], ids=lambda o: o.prediction)
def test_guidance_of_the_prediction_and_of_the_clean_sample_are_one(objective: Diffusion) -> None:
    """x̂0 is linear in the prediction, so that guiding one or the other is the same."""
    guided = Net(lambda x, time, cond: torch.full_like(x, -1 + 2.5 * 4))
    for solver in SOLVERS:
        torch.testing.assert_close(
            sample(Net(by_label), objective, cond=LABELS, steps=4, guidance_scale=2.5, **solver),
            sample(guided, objective, cond=LABELS, steps=4, **solver),
            rtol=1e-4, atol=1e-3,
        )  # fmt: skip


def test_the_unconditional_guess_sees_nothing_of_the_condition() -> None:
    text = Draw(0, "text", range(2)).normal(3, 4)
    cond = Cond(text=text, text_mask=torch.ones(2, 3, dtype=torch.bool), label=torch.tensor([1, 0]))
    net = Net(lambda x, time, cond: x)
    sample(net, Diffusion(), cond=cond, steps=2, method="heun", guidance_scale=3.0)
    assert len(net.calls) == 2 * 3  # two guesses in the predictor, the corrector, and the last step, which has none
    for (x, time, asked), (x_null, time_null, null) in zip(net.calls[::2], net.calls[1::2], strict=True):
        assert torch.equal(x, x_null) and torch.equal(time, time_null)
        assert asked is cond
        assert null.text is not None and null.text.eq(0).all()
        assert null.text_mask is not None and not null.text_mask.any()
        assert null.label is not None and null.label.tolist() == [NO_LABEL, NO_LABEL]


# ---------------------------------------------------------------- samples on their own


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: "-".join(map(str, s.values())))
def test_a_video_is_the_same_in_any_company(solver: dict[str, Any]) -> None:
    objective = OBJECTIVES[0]
    draw = lambda *videos: sample(
        Oracle(objective), objective, Draw(3, "sample", videos), steps=6, guidance_scale=2.0, **solver
    )
    together = draw(4, 7, 2, 9, 0)
    assert torch.equal(draw(2), together[2:3])
    assert torch.equal(draw(0, 2, 4), together[[4, 2, 0]])


def test_a_video_of_a_transformer_is_the_same_in_any_company() -> None:
    torch.manual_seed(0)
    dit = DiT(depth=2, width=32, heads=2, patch=(1, 4, 4)).build(ModelIO(channels=2, grid=SHAPE[1:], num_labels=4))
    for p in dit.parameters():
        nn.init.normal_(p, std=0.1)
    labels = torch.arange(4)
    options: dict[str, Any] = {"steps": 4, "guidance_scale": 2.0, "method": "ddim", "eta": 1.0}
    together = sample(dit, Diffusion(), Draw(0, "sample", range(4)), Cond(label=labels), **options)
    assert (together[0] - together[1]).abs().max() > 0.1
    for i in range(4):
        alone = sample(dit, Diffusion(), Draw(0, "sample", [i]), Cond(label=labels[i : i + 1]), **options)
        torch.testing.assert_close(alone, together[i : i + 1], atol=1e-5, rtol=1e-5)


def test_progress_is_told_after_each_step() -> None:
    told: list[int] = []
    oracle = Oracle(OBJECTIVES[0])
    draw = Draw(0, "sample", range(2))
    sample_diffusion(
        oracle, OBJECTIVES[0], Sampler(steps=3), NOTHING, SHAPE, draw, on_step=lambda: told.append(oracle.calls)
    )
    assert told == [1, 2, 3]


def test_no_gradients_are_kept() -> None:
    scale = nn.Parameter(torch.ones(()))
    assert not sample(Net(lambda x, time, cond: x * scale), Diffusion(), steps=2).requires_grad


def test_more_steps_than_the_schedule_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sampler\.steps=1001"):
        sample(Oracle(OBJECTIVES[4]), OBJECTIVES[4], steps=1001)
