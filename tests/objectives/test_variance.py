"""Learned variance against OpenAI's improved-diffusion in fp64, and what makes it stable."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from mutoscope.models.dit import DiT
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.objectives.schedules import DDPMSchedule
from mutoscope.objectives.variance import log_variance, log_variance_range, variance_bound
from mutoscope.randomness import Draw
from mutoscope.types import Batch, Cond, ModelIO

SCHEDULES = [DDPMSchedule(betas="linear"), DDPMSchedule(betas="cosine"), DDPMSchedule(betas="scaled_linear")]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.betas)


def openai_bound(betas: Tensor, t: int, clean: Tensor, noisy: Tensor, guess: Tensor, out: Tensor) -> Tensor:
    """`GaussianDiffusion._vb_terms_bpd` with LEARNED_RANGE, by number and in fp64."""
    alphas = 1 - betas
    abar = torch.cumprod(alphas, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    variance = betas * (1 - before) / (1 - abar)
    clipped = torch.cat([variance[1:2], variance[1:]]).log()
    coef1, coef2 = betas * before.sqrt() / (1 - abar), (1 - before) * alphas.sqrt() / (1 - abar)
    true_mean, mean = coef1[t] * clean + coef2[t] * noisy, coef1[t] * guess + coef2[t] * noisy
    fraction = (out + 1) / 2
    logvar = fraction * betas[t].log() + (1 - fraction) * clipped[t]
    if t == 0:
        cdf = lambda x: 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        inverse, centred = torch.exp(-0.5 * logvar), clean - mean
        above, below = cdf(inverse * (centred + 1 / 255)), cdf(inverse * (centred - 1 / 255))
        log = lambda p: p.clamp(min=1e-12).log()
        inside = torch.where(clean > 0.999, log(1 - below), log(above - below))
        return -torch.where(clean < -0.999, log(above), inside) / math.log(2)
    apart = (true_mean - mean) ** 2
    kl = 0.5 * (-1 + logvar - clipped[t] + torch.exp(clipped[t] - logvar) + apart * torch.exp(-logvar))
    return kl / math.log(2)


def betas_of(schedule: DDPMSchedule) -> Tensor:
    abar = schedule.alphas_cumprod
    return 1 - abar[:-1] / torch.cat([torch.ones(1, dtype=torch.float64), abar[:-2]])


@every_schedule
def test_the_bound_is_openais(schedule: DDPMSchedule) -> None:
    """At every kind of time; pixels at the ends of their range, and latents beyond it, included."""
    times = [0, 1, 2, 10, 500, 998, 999]
    draw = Draw(0, "test", range(len(times)))
    clean = (draw.normal(2, 1, 4, 8) * 0.8).double()
    clean[:, :, :, 0, :3] = torch.tensor([-1.0, 1.0, 2.5])
    noise, guess = draw.normal(2, 1, 4, 8).double(), clean + 0.05 * draw.normal(2, 1, 4, 8)
    guess[0] = clean[0] + 0.1 * (guess - clean)[0]  # far in the tails of t = 0, fp32 has no digits left
    out = 0.5 * draw.normal(2, 1, 4, 8).double()
    abar = schedule.alphas_cumprod[times][:, None, None, None, None]
    noisy = abar.sqrt() * clean + (1 - abar).sqrt() * noise
    expected = torch.stack(
        [openai_bound(betas_of(schedule), t, clean[i], noisy[i], guess[i], out[i]) for i, t in enumerate(times)]
    )
    t = torch.tensor(times, dtype=torch.float32)
    found = variance_bound(schedule, t, clean.float(), guess.float(), out.float())
    torch.testing.assert_close(found.double().mean((1, 2, 3, 4)), expected.mean((1, 2, 3, 4)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@every_schedule
def test_a_perfect_guess_of_the_posterior_costs_nothing(schedule: DDPMSchedule) -> None:
    """The divergence is 0 where x̂0 is right and the variance is the posterior's (o = −1), and grows from there."""
    t = torch.tensor([1.0, 50.0, 900.0])
    clean = Draw(0, "test", range(3)).normal(2, 1, 2, 2)
    nothing = variance_bound(schedule, t, clean, clean, torch.full_like(clean, -1.0))
    torch.testing.assert_close(nothing, torch.zeros_like(nothing), atol=1e-6, rtol=0)
    assert (variance_bound(schedule, t, clean, clean, torch.full_like(clean, 0.5))[:2] > nothing[:2]).all()


@every_schedule
def test_everything_is_finite(schedule: DDPMSchedule) -> None:
    """At every t, for outputs far beyond what is sensible and guesses far off, in fp32 as in bf16."""
    t = torch.arange(1000, dtype=torch.float32)
    outs = [-1e4, -65.0, -8.0, -1.0, 0.0, 1.0, 8.0, 65.0, 1e4]
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.tensor(outs, dtype=dtype).expand(1000, 1, 1, 1, -1).clone().requires_grad_()
        for wrong in (0.0, 0.5, 30.0):
            clean = torch.linspace(-4, 4, len(outs)).expand(1000, 1, 1, 1, -1)
            bound = variance_bound(schedule, t, clean, clean + wrong, out.float())
            assert bound.isfinite().all()
            [gradient] = torch.autograd.grad(bound.sum(), out)
            assert gradient.isfinite().all()


def test_the_last_steps_slope_is_openais() -> None:
    """Not 18, as with β̃ clamped to 1e-20, but 0.32 to 0.43."""
    for schedule in SCHEDULES:
        low, high = log_variance_range(schedule, torch.tensor([0.0, 1.0]), torch.tensor([-1.0, 0.0]))
        assert low[0] == low[1], "that of the last step is that of the step before"
        assert ((high - low)[0] / 2).item() < 0.5
        out = torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1, 1)
        ends = log_variance(out, low, high).flatten()
        torch.testing.assert_close(ends, torch.stack([low[0], high[1]]))


def objective(prediction: Literal["eps", "v", "x0"] = "eps") -> Diffusion:
    return Diffusion(schedule="ddpm_linear", prediction=prediction, learned_variance=True, cond_dropout=0.0)


class Split(nn.Module):
    """Two networks, one for the mean and one for the variance."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.variance = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return torch.cat([self.mean(x), self.variance(x)], 1)


def a_batch(size: int = 8) -> Batch:
    latents = Draw(7, "latents", range(size)).normal(3, 2, 4, 4)
    return Batch(ids=[str(i) for i in range(size)], samples=list(range(size)), cond=Cond(), latents=latents)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_the_bound_does_not_move_the_mean(prediction: Literal["eps", "v", "x0"]) -> None:
    torch.manual_seed(0)
    net = Split()
    plain = replace(objective(prediction), learned_variance=False)
    learned = objective(prediction).loss(net, a_batch(), Draw(0, "train", range(8)))
    ours = torch.autograd.grad(learned.total, [*net.parameters()])
    mean_only = plain.loss(_mean(net), a_batch(), Draw(0, "train", range(8)))
    alone = torch.autograd.grad(mean_only.total, [*net.mean.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(ours, alone, strict=False)), "bit for bit: the bound's share is 0"
    assert all(g.abs().sum() > 0 for g in ours[2:])
    torch.testing.assert_close(learned.total, learned.parts["mse"] + learned.parts["vb"])
    torch.testing.assert_close(learned.parts["mse"], mean_only.total.detach())


def _mean(net: Split) -> nn.Module:
    class Mean(nn.Module):
        def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
            return net.mean(x)

    return Mean()


def test_the_best_variance_of_a_gaussian_is_its_posteriors() -> None:
    """For data N(0, s²) and the best x̂0, what is left to learn is known: the variance of x_{t−1} given x_t alone."""
    schedule, s = DDPMSchedule(betas="linear"), 0.5
    abar = schedule.alphas_cumprod
    for step in (20, 200, 700):
        a, b = abar[step], abar[step - 1]
        exact = (b * s**2 + 1 - b) - (b * s**2 + 1 - b) ** 2 * (a / b) / (a * s**2 + 1 - a)
        draw = Draw(0, "test", range(2000))
        clean, noise = s * draw.normal(1, 1, 2, 2), draw.normal(1, 1, 2, 2)
        noisy = a.sqrt().float() * clean + (1 - a).sqrt().float() * noise
        guess = noisy * (a.sqrt() * s**2 / (a * s**2 + 1 - a)).float()
        out = torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.LBFGS([out], max_iter=40)
        t = torch.full((2000,), float(step))

        def closure(out: Tensor = out, t: Tensor = t, clean: Tensor = clean, guess: Tensor = guess) -> Tensor:
            out.grad = None
            loss = variance_bound(schedule, t, clean, guess, out.expand_as(clean)).mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        learned = log_variance(out.detach().reshape(1, 1, 1, 1, 1), *log_variance_range(schedule, t[:1], t[:1] - 1))
        assert learned.item() == pytest.approx(float(exact.log()), abs=2e-3)


def test_a_model_has_twice_the_channels_and_learns() -> None:
    torch.manual_seed(0)
    io = ModelIO(channels=3, out_channels=objective().out_channels(3), grid=(2, 4, 4))
    model = DiT(depth=2, width=16, heads=2).build(io)
    assert io.out_channels == 6
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for i in range(40):
        loss = objective().loss(model, a_batch(), Draw(i, "train", range(8)))
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(loss.total.item())
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_what_cannot_have_a_learned_variance_is_refused() -> None:
    with pytest.raises(ValueError, match=r"learned_variance is of the ddpm schedules, not 'flow'"):
        Diffusion(learned_variance=True)
    with pytest.raises(ValueError, match="puts out 3 channels, objective wants 6"):
        objective().loss(_mean(Split()), a_batch(), Draw(0, "train", range(8)))
