"""Diffusion: one objective for rectified flow, DDPM (eps, v, x0, learned variance) and EDM.

Whatever a network predicts, F, says what the clean sample is: x̂0 = c_skip·x + c_out·F. That one identity ties the
loss (F's target is closed-form, and equals (x0 − c_skip·x)/c_out) to sampling, which sees only `denoise`.
All arithmetic here is fp32: in bf16 the target's cancellation alone shows as a loss of 0.03.

Frames that are given (`Cond.known_mask`) take the place of noise in what the network sees and have a time of their own,
the schedule's cleanest; they are no part of the loss, and x̂0 has them as they are. Then the network is called with a
time of each frame, (b, t) in place of (b,).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mutoscope.objectives.schedules import DDPMSchedule, EDMSchedule, FlowSchedule, Schedule
from mutoscope.objectives.variance import variance_bound
from mutoscope.randomness import Draw
from mutoscope.recipe import ObjectiveConfig
from mutoscope.types import Batch, Cond, Loss

VALIDATION_QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where the validation loss looks: fixed, so that it measures the model and not the draw."""


@dataclass(frozen=True, kw_only=True)
class Diffusion(ObjectiveConfig):
    """Learn to denoise. Defaults are rectified flow with logit-normal times."""

    schedule: Literal["flow", "ddpm_linear", "ddpm_cosine", "scaled_linear", "edm"] = "flow"
    """The path from data to noise. scaled_linear is a ddpm schedule, latent diffusion's and CogVideoX's."""
    prediction: Literal["velocity", "eps", "v", "x0", "edm"] = "velocity"
    """What the network predicts. velocity (ε − x0) goes with flow, eps with ddpm_linear,
    v and x0 with flow and ddpm, edm with edm."""
    timesteps: Literal["uniform", "logit_normal"] = "logit_normal"
    """Distribution of training times on the flow schedule; ddpm is uniform and edm log-normal."""
    shift: float = 1.0
    """Time shift of the flow schedule (arXiv:2403.03206 eq. 23); above 1 for large videos."""
    snr_shift_scale: float = 1.0
    """Of the scaled_linear schedule: divides the signal-to-noise ratio of every step. 3 for CogVideoX-2b, else 1."""
    zero_terminal_snr: bool = False
    """Of the scaled_linear schedule: the last step is noise alone (arXiv:2305.08891), as in CogVideoX."""
    min_snr_gamma: float = 0.0
    """Min-SNR weighting (arXiv:2303.09556), 5 in the paper; 0 weighs every time alike."""
    sigma_data: float = 1.0
    """Standard deviation that EDM's preconditioning takes the latents to have; ours are normalised to 1."""
    learned_variance: bool = False
    """Learn the variance of ancestral sampling's steps as well (IDDPM, arXiv:2102.09672 §3.1; DiT's learn_sigma), on
    ddpm schedules: the network puts out twice the channels."""
    prefix_share: float = 0.0
    """Share of samples that train with some of their first frames given, a random number of latents from one to all
    but one: for models that go on from an image or a video."""
    cond_dropout: float = 0.1
    """Share of samples that train without their condition, for classifier-free guidance."""
    known_dropout: float = 0.0
    """Share of samples that train without the frames that are given them; CogVideoX's image to video has 0.05."""
    temporal_patch: int = 1
    """Latents are preceded by copies of their first until their number is a multiple of this, which the model takes
    together: 2 for CogVideoX 1.5. Noise and loss are theirs as well; samples are cut off again."""

    def __post_init__(self) -> None:
        allowed = {
            "flow": ("velocity", "v", "x0"),
            "ddpm_linear": ("eps", "v", "x0"),
            # No eps: α falls to 5e-5, so that the first step blows the network's error up by 700, and only clipping x̂0
            # to the range of pixels (as IDDPM does) would save it. Latents have no range.
            "ddpm_cosine": ("v", "x0"),
            "scaled_linear": ("v", "x0"),  # nor here: α may fall to 0
            "edm": ("edm",),
        }[self.schedule]
        if self.prediction not in allowed:
            raise ValueError(
                f"objective.prediction={self.prediction!r} does not go with objective.schedule={self.schedule!r}; "
                f"allowed: {', '.join(allowed)}"
            )
        if self.shift <= 0 or self.sigma_data <= 0 or self.min_snr_gamma < 0 or not 0 <= self.cond_dropout <= 1:
            raise ValueError(
                f"objective: shift={self.shift} and sigma_data={self.sigma_data} must be above 0, "
                f"min_snr_gamma={self.min_snr_gamma} at least 0, cond_dropout={self.cond_dropout} from 0 to 1"
            )
        if self.snr_shift_scale <= 0 or not 0 <= self.known_dropout <= 1 or self.temporal_patch < 1:
            raise ValueError(
                f"objective: snr_shift_scale={self.snr_shift_scale} must be above 0, "
                f"known_dropout={self.known_dropout} from 0 to 1, temporal_patch={self.temporal_patch} at least 1"
            )
        if (self.snr_shift_scale != 1 or self.zero_terminal_snr) and self.schedule != "scaled_linear":
            raise ValueError(
                f"objective: snr_shift_scale and zero_terminal_snr are of schedule 'scaled_linear', not "
                f"{self.schedule!r}; leave them at 1 and false"
            )
        if self.shift != 1 and self.schedule != "flow":
            raise ValueError(f"objective.shift={self.shift} shifts the flow schedule, not {self.schedule}; set it to 1")
        if self.learned_variance and self.schedule in ("flow", "edm"):
            raise ValueError(f"objective.learned_variance is of the ddpm schedules, not {self.schedule!r}: set it to "
                             "false, or schedule to ddpm_linear and prediction to eps")  # fmt: skip
        if not 0 <= self.prefix_share <= 1 or (self.prefix_share and self.temporal_patch > 1):
            raise ValueError(f"objective.prefix_share={self.prefix_share} must be from 0 to 1, and is not for models "
                             "with temporal_patch above 1")  # fmt: skip
        if self.sigma_data != 1 and self.prediction != "edm":
            raise ValueError(f"objective.sigma_data={self.sigma_data} is of prediction 'edm' only; set it to 1")

    @cached_property
    def noise_schedule(self) -> Schedule:
        """The schedule that this objective walks."""
        match self.schedule:
            case "flow":
                return FlowSchedule(shift=self.shift, distribution=self.timesteps)
            case "ddpm_linear":
                return DDPMSchedule(betas="linear")
            case "ddpm_cosine":
                return DDPMSchedule(betas="cosine")
            case "scaled_linear":
                return DDPMSchedule(
                    betas="scaled_linear",
                    snr_shift_scale=self.snr_shift_scale,
                    zero_terminal_snr=self.zero_terminal_snr,
                )
            case "edm":
                return EDMSchedule()

    def out_channels(self, channels: int) -> int:
        return 2 * channels if self.learned_variance else channels

    def loss(self, model: nn.Module, batch: Batch, draw: Draw) -> Loss:
        """Weighted squared error of the network's prediction, at one random time per sample; with learned variance, the
        variational bound besides. Raises ValueError where frames are given in two ways."""
        drop = draw.uniform() < self.cond_dropout
        quantile = draw.uniform().clamp(1e-4, 1 - 1e-4)
        clean, cond = _clean(batch), batch.cond.dropped(drop)
        if cond.known is not None:
            if self.prefix_share:
                raise ValueError("objective.prefix_share gives first frames of its own, and the batch has some already "
                                 "(recipe.first_frame): set prefix_share = 0")  # fmt: skip
            cond = cond.without_known(draw.uniform() < self.known_dropout)
        if self.prefix_share:
            cond = self._with_prefix(cond, clean, draw)
        per_sample, parts = self._errors(model, clean, quantile, cond, draw)
        parts = {name: value.mean() for name, value in parts.items()}
        return Loss(total=per_sample.mean(), per_sample=per_sample.detach(), parts=parts)

    def validation_loss(self, model: nn.Module, batch: Batch, draw: Draw) -> Loss:
        """The loss at fixed quantiles of the training times and fixed noise, with no condition dropped and no frames
        given that the batch does not give."""
        clean = _clean(batch)
        at = {}
        for q in VALIDATION_QUANTILES:
            quantile = torch.full((len(clean),), q, device=clean.device)
            at[f"q{q:g}"], _ = self._errors(model, clean, quantile, batch.cond, draw)
        per_sample = torch.stack(list(at.values())).mean(0)
        return Loss(total=per_sample.mean(), per_sample=per_sample.detach(), parts={k: v.mean() for k, v in at.items()})

    def _with_prefix(self, cond: Cond, clean: Tensor, draw: Draw) -> Cond:
        frames = clean.shape[2]
        length = (1 + (draw.uniform() * (frames - 1)).floor()).clamp(max=frames - 1)  # a single frame is never given
        length = torch.where(draw.uniform() < self.prefix_share, length, 0)
        mask = torch.arange(frames, device=clean.device)[None] < length[:, None]
        return replace(cond, known=clean * mask[:, None, :, None, None], known_mask=mask)

    def _errors(
        self, model: nn.Module, clean: Tensor, quantile: Tensor, cond: Cond, draw: Draw
    ) -> tuple[Float[Tensor, "b"], dict[str, Float[Tensor, "b"]]]:
        """The loss by sample, and what it is made of where that is several things."""
        schedule = self.noise_schedule
        t = schedule.times(quantile)
        clean, cond = self._padded(clean), self.padded(cond, clean.shape[2])
        noise = draw.normal(*clean.shape[1:])
        alpha, sigma = (_broadcast(v, clean) for v in schedule.alpha_sigma(t))
        noisy = alpha * clean + sigma * noise
        _, c_skip, c_out = self._preconditioning(alpha, sigma)
        predicted, variance = self._predicted(model, noisy, t, cond)
        errors = _mean((predicted - self._target(clean, noise, alpha, sigma)).square(), cond.known_mask)
        if self.min_snr_gamma:
            snr = (alpha / sigma).square()
            weight = snr.clamp(max=self.min_snr_gamma) * c_out.square()  # of x̂0's error, carried over to F's
            errors = errors * weight.flatten()
        if variance is None:
            return errors, {}
        assert isinstance(schedule, DDPMSchedule)
        guess = c_skip * noisy + c_out * predicted.detach()  # the bound moves the variance alone
        bound = _mean(variance_bound(schedule, t, clean, guess, variance), cond.known_mask)
        return errors + bound, {"mse": errors.detach(), "vb": bound.detach()}

    def denoise(
        self, model: nn.Module, noisy: Float[Tensor, "b c t h w"], t: Float[Tensor, "b"], cond: Cond
    ) -> Float[Tensor, "b c t h w"]:
        """x̂0, the model's guess of the clean sample behind `noisy` at time t."""
        return self.predict(model, noisy, t, cond)[0]

    def predict(
        self, model: nn.Module, noisy: Float[Tensor, "b c t h w"], t: Float[Tensor, "b"], cond: Cond
    ) -> tuple[Float[Tensor, "b c t h w"], Float[Tensor, "b c t h w"] | None]:
        """x̂0, and what the model says of the variance where that is learned (see `objectives.variance`): all that
        samplers see of a model. Known frames are in x̂0 as they are given."""
        alpha, sigma = (_broadcast(v, noisy) for v in self.noise_schedule.alpha_sigma(t))
        _, c_skip, c_out = self._preconditioning(alpha, sigma)
        predicted, variance = self._predicted(model, noisy, t, cond)
        x0 = c_skip * noisy + c_out * predicted
        if cond.known is not None and cond.known_mask is not None:
            x0 = torch.where(cond.known_mask[:, None, :, None, None], cond.known, x0)
        return x0, variance

    def _predicted(self, model: nn.Module, noisy: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor | None]:
        """What the network says of noisy samples, fp32; with its channels for the variance by themselves."""
        schedule = self.noise_schedule
        alpha, sigma = (_broadcast(v, noisy) for v in schedule.alpha_sigma(t))
        shown, time = self._preconditioning(alpha, sigma)[0] * noisy, schedule.embedding(t)
        if cond.known is not None and cond.known_mask is not None:
            c_in = self._preconditioning(torch.ones_like(alpha), torch.zeros_like(sigma))[0]
            shown = torch.where(cond.known_mask[:, None, :, None, None], c_in * cond.known, shown)
            cleanest = schedule.embedding(torch.full_like(t, schedule.cleanest))
            time = torch.where(cond.known_mask, cleanest[:, None], time[:, None])
        predicted = model(shown, time, cond).float()
        channels = self.out_channels(noisy.shape[1])
        if predicted.shape[1] != channels:
            raise ValueError(f"the model puts out {predicted.shape[1]} channels, objective wants {channels}: a learned "
                             "variance takes a model that honours ModelIO.out_channels")  # fmt: skip
        mean, variance = predicted[:, : noisy.shape[1]], predicted[:, noisy.shape[1] :]
        return mean, variance if self.learned_variance else None

    def padding(self, frames: int) -> int:
        """How many latents precede the t = `frames` of a video (see `temporal_patch`)."""
        return -frames % self.temporal_patch

    def padded(self, cond: Cond, frames: int) -> Cond:
        """The condition of a video of t = `frames` latents, for all that the model sees. The first known frame moves to
        the very front and zeros follow, as in CogVideoX 1.5's training and diffusers' pipeline."""
        padding = self.padding(frames)
        if cond.known is None or not padding:
            return cond
        first, rest = cond.known[:, :, :1], cond.known[:, :, 1:]
        return replace(cond, known=torch.cat([first, torch.zeros_like(first).repeat_interleave(padding, 2), rest], 2))

    def _padded(self, clean: Tensor) -> Tensor:
        copies = clean[:, :, :1].expand(-1, -1, self.padding(clean.shape[2]), -1, -1)
        return torch.cat([copies, clean], 2)

    def _preconditioning(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(c_in, c_skip, c_out): the network sees c_in·x, and x̂0 = c_skip·x + c_out·F."""
        one = torch.ones_like(alpha)
        match self.prediction:
            case "velocity":
                return one, one, -sigma
            case "eps":
                return one, 1 / alpha, -sigma / alpha
            case "v":  # arXiv:2202.00512 appendix D; divided by α² + σ², which is 1 on a ddpm schedule
                norm = alpha.square() + sigma.square()
                return one, alpha / norm, -sigma / norm
            case "x0":
                return one, 0 * one, one
            case "edm":  # arXiv:2206.00364 table 1
                total = (sigma.square() + self.sigma_data**2).sqrt()
                return 1 / total, self.sigma_data**2 / total.square(), sigma * self.sigma_data / total

    def _target(self, clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """(x0 − c_skip·x)/c_out, simplified: without the cancellation, which loses digits at small σ."""
        match self.prediction:
            case "velocity":
                return noise - clean
            case "eps":
                return noise
            case "v":
                return alpha * noise - sigma * clean
            case "x0":
                return clean
            case "edm":
                total = (sigma.square() + self.sigma_data**2).sqrt()
                return (sigma / self.sigma_data * clean - self.sigma_data * noise) / total


def _clean(batch: Batch) -> Tensor:
    clean = batch.latents if batch.latents is not None else batch.video
    if clean is None:
        raise ValueError(
            "diffusion learns latents or pixels; this batch holds tokens (a continuous autoencoder is needed)"
        )
    return clean.float()


def _broadcast(v: Tensor, like: Tensor) -> Tensor:
    return v.float().reshape(-1, *[1] * (like.ndim - 1))


def _mean(values: Float[Tensor, "b c t h w"], known: Bool[Tensor, "b t"] | None) -> Float[Tensor, "b"]:
    """The mean of each sample, over the frames that are not known."""
    if known is None:
        return values.flatten(1).mean(1)
    frames, wanted = values.mean((1, 3, 4)), ~known
    return (frames * wanted).sum(1) / wanted.sum(1).clamp(min=1)
