"""Learned variance of a denoising chain's steps (IDDPM, arXiv:2102.09672 §3.1), in a form that stays finite.

The network says, for each number, where between the smallest and the largest sensible variance a step's lies:
log σ² = f·log β + (1 − f)·log β̃ with f = (o + 1)/2 (eq. 15). It learns that from the variational bound. As in OpenAI's
improved-diffusion, β̃ of the last step, which is 0, is taken to be that of the step before; the widely copied
log(max(β̃, 1e-20)) = −46 makes that step's slope 50 times as steep, and gives NaN in half precision at once and in fp32
soon. What is not selected never sees what would be infinite in it, and log σ² is held in [−30, 20].
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from mutoscope.objectives.schedules import DDPMSchedule

LOG_VARIANCE = (-30.0, 20.0)
"""The bounds of log σ²."""


def log_variance_range(
    schedule: DDPMSchedule, t: Float[Tensor, "b"], before: Float[Tensor, "b"]
) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
    """log β̃ and log β of the steps from times t to the times `before` them (−1 is the clean sample), fp32. Times that a
    sampler leaves out make its steps longer, and their variances with them."""
    abar = schedule.alphas_cumprod.to(t.device)
    t, before = t.long(), before.long()
    last = before < 0
    above = (t + 1).clamp(max=schedule.num_steps - 1)
    t_low, before_low = torch.where(last, above, t), torch.where(last, t, before)
    beta = 1 - abar[t] / abar[before]
    posterior = (1 - abar[before_low]) / (1 - abar[t_low]) * (1 - abar[t_low] / abar[before_low])
    return posterior.log().float(), beta.log().float()


def log_variance(
    out: Float[Tensor, "b c t h w"], low: Float[Tensor, "#b"], high: Float[Tensor, "#b"]
) -> Float[Tensor, "b c t h w"]:
    """log σ² of what the network puts out: −1 is `low`, 1 is `high`, and anything else in between or beyond."""
    low, high = (v.reshape(-1, 1, 1, 1, 1) for v in (low, high))
    fraction = (out + 1) / 2
    return (fraction * high + (1 - fraction) * low).clamp(*LOG_VARIANCE)


def variance_bound(
    schedule: DDPMSchedule,
    t: Float[Tensor, "b"],
    clean: Float[Tensor, "b c t h w"],
    guess: Float[Tensor, "b c t h w"],
    out: Float[Tensor, "b c t h w"],
) -> Float[Tensor, "b c t h w"]:
    """The variational bound's term at times t = 0 … 999 in bits per number (arXiv:2102.09672 eq. 5 to 7), as OpenAI's
    `_vb_terms_bpd` has it: the divergence of the step's posterior from what the model says; at t = 0, the clean
    sample's likelihood.

    guess: x̂0. It should be detached: the bound is for the variance alone, and the mean learns from its own error.
    out: what the network puts out for the variance.
    """
    first = (t == 0).reshape(-1, 1, 1, 1, 1)
    low, high = log_variance_range(schedule, t, t - 1)
    logvar = log_variance(out, low, high)

    # The posterior's mean and the model's hold the same share of x_t, and differ in that of x0
    abar = schedule.alphas_cumprod.to(t.device)
    abar_t, abar_before = abar[t.long()], abar[t.long() - 1]  # that of −1 is the last, 1
    share = abar_before.sqrt() * (1 - abar_t / abar_before) / (1 - abar_t)
    apart = share.float().reshape(-1, 1, 1, 1, 1) * (clean - guess)
    low = low.reshape(-1, 1, 1, 1, 1)
    chosen = torch.where(first, low, logvar)
    divergence = 0.5 * (-1 + chosen - low + torch.exp(low - chosen) + apart.square() * torch.exp(-chosen))

    chosen, mean = torch.where(first, logvar, 0.0), torch.where(first, guess, clean)
    likelihood = discretized_log_likelihood(clean, mean, 0.5 * chosen)
    return torch.where(first, -likelihood, divergence) / math.log(2)


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-likelihood of numbers in [−1, 1] that are multiples of 2/255 under a Gaussian, as DDPM has it for pixels
    (arXiv:2006.11239 eq. 13). For latents it is a formality, which published models share: one step of a thousand.
    """
    centred, inverse = x - mean, torch.exp(-log_std)
    above, below = _normal_cdf(inverse * (centred + 1 / 255)), _normal_cdf(inverse * (centred - 1 / 255))
    inside = torch.where(x > 0.999, 1 - below, above - below)
    return torch.where(x < -0.999, above, inside).clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """OpenAI's approximation, in which trained models have learned."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))))
