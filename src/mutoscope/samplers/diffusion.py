"""Drawing a video from a diffusion model: solvers of dx = x0·dα + ε·dσ, from noise to data.

With x̂0 and ε̂ = (x − α·x̂0)/σ held over a step, the exact step is x' = α'·x̂0 + σ'·ε̂. On every schedule that is DDIM
with η = 0 (arXiv:2010.02502 eq. 12), and Euler's method in the schedule's own path (for rectified flow, x + Δt·v).
Heun repeats it with the mean of both ends' estimates (arXiv:2206.00364 algorithm 1). DPM-Solver++ (2M) draws a line
through the last two x̂0 (arXiv:2211.01095 algorithm 2), and puts noise back with η > 0 (its SDE form). Ancestral
sampling puts back as much noise as the chain's posterior has (DDIM's η = 1, which is DDPM's algorithm 2 where no step
is left out), or as the model has learned to.

Frames that are known (`Cond.known_mask`) come out as they went in: every x̂0 has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mutoscope.objectives.diffusion import Diffusion
from mutoscope.objectives.schedules import DDPMSchedule
from mutoscope.objectives.variance import log_variance, log_variance_range
from mutoscope.randomness import Draw
from mutoscope.recipe import Sampler
from mutoscope.types import Cond


@dataclass(frozen=True)
class Point:
    """A time of the grid, and how much of data and of noise there is at it."""

    t: Float[Tensor, ""]
    alpha: Float[Tensor, "1"]
    sigma: Float[Tensor, "1"]


@torch.no_grad()
def sample_diffusion(
    model: nn.Module,
    objective: Diffusion,
    sampler: Sampler,
    cond: Cond,
    shape: tuple[int, int, int, int],
    draw: Draw,
    on_step: Callable[[], None] = lambda: None,
) -> Float[Tensor, "b c t h w"]:
    """Normalised latents (or pixels) of one video for each of `draw`'s streams.

    Args:
        cond: what to draw, one row a video.
        shape: (c, t, h, w) of a video.
        on_step: called after each step, for progress.
    """
    schedule = objective.noise_schedule
    batch = len(draw.generators)
    padding = objective.padding(shape[1])
    cond = objective.padded(cond, shape[1])
    nothing = cond.dropped(torch.ones(batch, dtype=torch.bool, device=draw.device))

    def predict(x: Tensor, at: Point) -> tuple[Tensor, Tensor | None]:
        """x̂0 with guidance, and what the model says of the variance."""
        x0, variance = objective.predict(model, x, at.t.expand(batch), cond)
        if sampler.guidance_scale != 1:
            x0_null = objective.denoise(model, x, at.t.expand(batch), nothing)
            x0 = x0_null + sampler.guidance_scale * (x0 - x0_null)
        return x0, variance

    grid = [Point(t, *schedule.alpha_sigma(t[None])) for t in schedule.grid(sampler.steps).to(draw.device)]
    x = grid[0].sigma * draw.normal(shape[0], padding + shape[1], *shape[2:])
    previous: tuple[Point, Tensor] | None = None
    for here, there in pairwise(grid):
        x0, variance = predict(x, here)
        noise = (x - here.alpha * x0) / here.sigma
        match sampler.method:
            case "ancestral" | "ddim" if there.sigma > 0:
                eta = 1.0 if sampler.method == "ancestral" else sampler.eta
                up, down = _put_back(here, there, eta)
                if variance is not None and sampler.method == "ancestral":
                    assert isinstance(schedule, DDPMSchedule)
                    low, high = log_variance_range(schedule, here.t[None], there.t[None])
                    up = (log_variance(variance, low, high) / 2).exp()
                x = there.alpha * x0 + down * noise
                if eta:
                    x = x + up * draw.normal(*x.shape[1:])
            case "heun" if there.sigma > 0:
                x0_there, _ = predict(there.alpha * x0 + there.sigma * noise, there)
                noise_there = (there.alpha * x0 + there.sigma * noise - there.alpha * x0_there) / there.sigma
                x = x + (there.alpha - here.alpha) * (x0 + x0_there) / 2
                x = x + (there.sigma - here.sigma) * (noise + noise_there) / 2
            case "dpmpp_2m":
                x, up = _dpmpp_2m(x, x0, previous, here, there, sampler.eta)
                if sampler.eta and there.sigma > 0:
                    x = x + up * draw.normal(*x.shape[1:])
                previous = here, x0
            case _:
                x = there.alpha * x0 + there.sigma * noise
        on_step()
    return x[:, :, padding:]


def _put_back(here: Point, there: Point, eta: float) -> tuple[Tensor, Tensor]:
    """Deviations of the noise that is drawn and of that which stays (arXiv:2010.02502 eq. 16, written so that it holds
    on any schedule and at α = 0)."""
    kept = (here.alpha * there.sigma / (there.alpha * here.sigma)).square()
    up = eta * there.sigma * (1 - kept).clamp(min=0).sqrt()
    return up, (there.sigma.square() - up.square()).clamp(min=0).sqrt()


def _dpmpp_2m(
    x: Tensor, x0: Tensor, previous: tuple[Point, Tensor] | None, here: Point, there: Point, eta: float
) -> tuple[Tensor, Tensor]:
    """A step of DPM-Solver++ (2M), and the deviation of the noise that is to be put back: with η = 1 it is
    SDE-DPM-Solver++ (2M), between 0 and 1 k-diffusion's sample_dpmpp_2m_sde. The first, the last and one that follows
    noise alone are of first order: their logarithms of α/σ are infinite, or there is no estimate before."""
    shrink = (here.alpha / here.sigma) * (there.sigma / there.alpha)  # e^−h
    forgotten = shrink**eta
    guess = x0
    if previous is not None and there.sigma > 0 and previous[0].alpha > 0:
        log_snr = lambda at: (at.alpha / at.sigma).log()
        ratio = (log_snr(here) - log_snr(previous[0])) / (log_snr(there) - log_snr(here))
        guess = x0 + (x0 - previous[1]) / (2 * ratio)
    mean = there.sigma / here.sigma * forgotten * x + there.alpha * (1 - shrink * forgotten) * guess
    return mean, there.sigma * (1 - forgotten.square()).sqrt()
