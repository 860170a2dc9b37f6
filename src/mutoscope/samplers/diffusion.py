"""Drawing a video from a diffusion model: solvers of dx = x0·dα + ε·dσ, from noise to data.

With x̂0 and ε̂ = (x − α·x̂0)/σ held over a step, the exact step is x' = α'·x̂0 + σ'·ε̂. On every schedule that is DDIM
with η = 0 (arXiv:2010.02502 eq. 12), and Euler's method in the schedule's own path (for rectified flow, x + Δt·v).
Heun repeats it with the mean of both ends' estimates (arXiv:2206.00364 algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mutoscope.objectives.diffusion import Diffusion
from mutoscope.randomness import Draw
from mutoscope.recipe import Sampler
from mutoscope.types import Cond


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
    times = schedule.grid(sampler.steps).to(draw.device)
    batch = len(draw.generators)
    padding = objective.padding(shape[1])
    cond = objective.padded(cond, shape[1])
    nothing = cond.dropped(torch.ones(batch, dtype=torch.bool, device=draw.device))

    def clean_and_noise(x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        x0 = objective.denoise(model, x, t.expand(batch), cond)
        if sampler.guidance_scale != 1:
            x0_null = objective.denoise(model, x, t.expand(batch), nothing)
            x0 = x0_null + sampler.guidance_scale * (x0 - x0_null)
        return x0, (x - alpha * x0) / sigma

    at = [schedule.alpha_sigma(t[None]) for t in times]
    x = at[0][1] * draw.normal(shape[0], padding + shape[1], *shape[2:])
    for (t, t_next), ((alpha, sigma), (alpha_next, sigma_next)) in zip(pairwise(times), pairwise(at), strict=True):
        x0, noise = clean_and_noise(x, t, alpha, sigma)
        if sampler.method == "ddim" and sampler.eta:
            # arXiv:2010.02502 eq. 16, written so that it holds on any schedule and at α = 0
            up = (
                sampler.eta
                * sigma_next
                * (1 - (alpha * sigma_next / (alpha_next * sigma)).square()).clamp(min=0).sqrt()
            )
            down = (sigma_next.square() - up.square()).clamp(min=0).sqrt()
            x = alpha_next * x0 + down * noise + up * draw.normal(*x.shape[1:])
        elif sampler.method == "heun" and sigma_next > 0:
            x0_next, noise_next = clean_and_noise(alpha_next * x0 + sigma_next * noise, t_next, alpha_next, sigma_next)
            x = x + (alpha_next - alpha) * (x0 + x0_next) / 2 + (sigma_next - sigma) * (noise + noise_next) / 2
        else:
            x = alpha_next * x0 + sigma_next * noise
        on_step()
    return x[:, :, padding:]
