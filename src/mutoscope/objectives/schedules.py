"""Noise schedules: the path x_t = α(t)·x0 + σ(t)·ε from data to noise, each in the time of its own literature.

    flow   t in [0, 1]              α = 1 − s, σ = s, s the shifted time   arXiv:2209.03003, arXiv:2403.03206 eq. 23
    ddpm   t = 0 … 999 (integers)   α = √ᾱ_t, σ = √(1 − ᾱ_t)               arXiv:2006.11239, arXiv:2102.09672
    edm    t = σ in [0, ∞)          α = 1, σ = t                           arXiv:2206.00364

A schedule also says at which times training looks (`times`, by quantile) and through which times sampling walks
(`grid`). All of it is fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Schedule(Protocol):
    """What losses and samplers need to know of a schedule."""

    @property
    def cleanest(self) -> float:
        """The time with the least noise that the network's time embedding knows: that of frames that are given."""
        ...

    def times(self, quantile: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
        """Quantiles of the training distribution in (0, 1), from little noise to much -> times."""
        ...

    def alpha_sigma(self, t: Float[Tensor, "b"]) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
        """α(t) and σ(t)."""
        ...

    def embedding(self, t: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
        """The number that the network's time embedding sees."""
        ...

    def grid(self, steps: int) -> Float[Tensor, "n"]:
        """The steps + 1 times from noise to the clean sample at which α = 1 and σ = 0."""
        ...


def _logit_normal(quantile: Tensor, mean: float, std: float) -> Tensor:
    return torch.sigmoid(mean + std * torch.special.ndtri(quantile))


@dataclass(frozen=True)
class FlowSchedule:
    """Straight paths (rectified flow)."""

    shift: float = 1.0
    """Above 1, more of the time is spent at high noise: for large videos."""
    distribution: Literal["uniform", "logit_normal"] = "logit_normal"
    cleanest: ClassVar[float] = 0.0

    def times(self, quantile: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
        t = quantile if self.distribution == "uniform" else _logit_normal(quantile, 0.0, 1.0)
        return self._shifted(t)

    def alpha_sigma(self, t: Float[Tensor, "b"]) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
        return 1 - t, t

    def embedding(self, t: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
        return 1000 * t

    def grid(self, steps: int) -> Float[Tensor, "n"]:
        return self._shifted(torch.linspace(1, 0, steps + 1))

    def _shifted(self, t: Tensor) -> Tensor:
        return self.shift * t / (1 + (self.shift - 1) * t)


@dataclass(frozen=True)
class DDPMSchedule:
    """A variance-preserving chain of 1000 steps."""

    betas: Literal["linear", "cosine", "scaled_linear"] = "linear"
    """scaled_linear is latent diffusion's: linear in the square root."""
    num_steps: int = 1000
    snr_shift_scale: float = 1.0
    """Divides the signal-to-noise ratio of every step; above 1, more of the time is spent at high noise."""
    zero_terminal_snr: bool = False
    """Stretch the path so that the last step is noise alone (arXiv:2305.08891 algorithm 1)."""
    cleanest: ClassVar[float] = 0.0

    @cached_property
    def alphas_cumprod(self) -> Float[Tensor, "n"]:
        """ᾱ_t for t = 0 … num_steps − 1, then 1: the clean sample is t = −1. fp64."""
        n = self.num_steps
        if self.betas == "linear":
            betas = torch.linspace(1e-4, 0.02, n, dtype=torch.float64) * 1000 / n
        elif self.betas == "scaled_linear":  # arXiv:2112.10752
            betas = torch.linspace(0.00085**0.5, 0.012**0.5, n, dtype=torch.float64).square() * 1000 / n
        else:  # arXiv:2102.09672 eq. 17, betas clipped at 0.999
            f = lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = torch.tensor([min(1 - f((i + 1) / n) / f(i / n), 0.999) for i in range(n)], dtype=torch.float64)
        alpha2 = torch.cumprod(1 - betas, 0)
        alpha2 = alpha2 / (self.snr_shift_scale + (1 - self.snr_shift_scale) * alpha2)
        if self.zero_terminal_snr:
            alpha = alpha2.sqrt()
            alpha2 = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])).square()
        return torch.cat([alpha2, torch.ones(1, dtype=torch.float64)])

    def times(self, quantile: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
        return (quantile * self.num_steps).floor().clamp(max=self.num_steps - 1)

    def alpha_sigma(self, t: Float[Tensor, "b"]) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
        alpha2 = self.alphas_cumprod.to(t.device)[t.long()]
        return alpha2.sqrt().float(), (1 - alpha2).sqrt().float()

    def embedding(self, t: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
        return t

    def grid(self, steps: int) -> Float[Tensor, "n"]:
        """ "Trailing" spacing, which ends at the last, noisiest step (arXiv:2305.08891 table 2)."""
        if steps > self.num_steps:
            raise ValueError(f"sampler.steps={steps} is more than the {self.num_steps} steps of the DDPM schedule")
        times = (torch.arange(steps, 0, -1) * (self.num_steps / steps)).round() - 1
        return torch.cat([times, torch.tensor([-1.0])])


@dataclass(frozen=True)
class EDMSchedule:
    """Karras et al.: noise added to unscaled data; log-normal in training, ρ-spaced in sampling (table 1)."""

    log_sigma_mean: float = -1.2 + math.log(2)
    """The paper's −1.2 is for data of standard deviation 0.5; ours has 1."""
    log_sigma_std: float = 1.2
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    @property
    def cleanest(self) -> float:
        return self.sigma_min

    def times(self, quantile: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
        return torch.exp(self.log_sigma_mean + self.log_sigma_std * torch.special.ndtri(quantile))

    def alpha_sigma(self, t: Float[Tensor, "b"]) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
        return torch.ones_like(t), t

    def embedding(self, t: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
        # c_noise = ln(σ)/4 spans about ±1.5; scaled so that the embedding's frequencies, made for 0…1000, resolve it
        return 250 * t.log() / 4

    def grid(self, steps: int) -> Float[Tensor, "n"]:
        ramp = torch.linspace(self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho), steps)
        return torch.cat([ramp**self.rho, torch.zeros(1)])
