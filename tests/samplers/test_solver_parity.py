"""Solvers against diffusers' schedulers, step by step, with a network that is no denoiser's."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mutoscope.objectives.diffusion import Diffusion
from mutoscope.randomness import Draw, seed_of
from mutoscope.recipe import Sampler
from mutoscope.samplers.diffusion import sample_diffusion
from mutoscope.types import Cond

SHAPE = (3, 2, 4, 4)
PREDICTIONS: dict[Any, str] = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)
LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "timestep_spacing": "trailing"}


class Net(nn.Module):
    """Some function of the sample and the time, with the variance's channels where they are wanted."""

    def __init__(self, learned_variance: bool = False) -> None:
        super().__init__()
        self.learned_variance = learned_variance

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        out = torch.sin(2 * x) * 0.7 + x.flip(1) * 0.2 + time[:, None, None, None, None] / 2000
        return torch.cat([out, torch.cos(3 * x)], 1) if self.learned_variance else out


def ours(objective: Diffusion, steps: int, method: Any, eta: float = 0.0) -> Tensor:
    sampler = Sampler(steps=steps, method=method, eta=eta)
    net = Net(objective.learned_variance)
    return sample_diffusion(net, objective, sampler, Cond(), SHAPE, Draw(0, "sample", [0]))


def theirs(scheduler: Any, objective: Diffusion, steps: int, **options: Any) -> Tensor:
    """The scheduler's samples, from the same start and with the same noise."""
    net, generator = Net(objective.learned_variance), torch.Generator().manual_seed(seed_of(0, "sample", 0))
    schedule = objective.noise_schedule
    x = schedule.alpha_sigma(schedule.grid(steps)[:1])[1] * torch.randn(1, *SHAPE, generator=generator)
    if "sigmas" in options:
        scheduler.set_timesteps(sigmas=options.pop("sigmas"))
    else:
        scheduler.set_timesteps(steps)
    if "generator" in options:
        options["generator"] = generator
    for t in scheduler.timesteps:
        step = scheduler.step(net(x, t.float().reshape(1), Cond()), t, x, **options)
        x = step.prev_sample
    # diffusers puts noise back after the last step, too, unless that is from t = 0; OpenAI's code does not
    return getattr(step, "pred_original_sample", x) if "generator" in options else x


@every_prediction
@pytest.mark.parametrize("steps", [8, 50])
def test_ddim(prediction: Literal["eps", "v", "x0"], steps: int) -> None:
    from diffusers import DDIMScheduler

    objective = Diffusion(schedule="ddpm_linear", prediction=prediction)
    scheduler = DDIMScheduler(**LINEAR, clip_sample=False, prediction_type=PREDICTIONS[prediction])
    expected = theirs(scheduler, objective, steps)
    torch.testing.assert_close(ours(objective, steps, "ddim"), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours(objective, steps, "euler"), expected, atol=1e-4, rtol=1e-4)


@every_prediction
@pytest.mark.parametrize("steps", [1, 2, 10, 50])
@pytest.mark.parametrize("eta", [0.0, 1.0], ids=["ode", "sde"])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers' own
def test_dpm_solver(prediction: Literal["eps", "v", "x0"], steps: int, eta: float) -> None:
    from diffusers import DPMSolverMultistepScheduler

    objective = Diffusion(schedule="ddpm_linear", prediction=prediction)
    scheduler = DPMSolverMultistepScheduler(
        **LINEAR, algorithm_type="sde-dpmsolver++" if eta else "dpmsolver++", solver_order=2, final_sigmas_type="zero",
        prediction_type=PREDICTIONS[prediction],
    )  # fmt: skip
    expected = theirs(scheduler, objective, steps, **({"generator": None} if eta else {}))
    torch.testing.assert_close(ours(objective, steps, "dpmpp_2m", eta), expected, atol=2e-4, rtol=2e-4)


@every_prediction
@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("learned", [True, False], ids=["learned", "posterior"])
def test_ancestral_sampling(prediction: Literal["eps", "v", "x0"], steps: int, learned: bool) -> None:
    """With a learned variance or the posterior's, in chains with steps left out: β and β̃ are those of the longer
    steps."""
    from diffusers import DDPMScheduler

    objective = Diffusion(schedule="ddpm_linear", prediction=prediction, learned_variance=learned)
    scheduler = DDPMScheduler(
        **LINEAR, clip_sample=False, prediction_type=PREDICTIONS[prediction],
        variance_type="learned_range" if learned else "fixed_small",
    )  # fmt: skip
    expected = theirs(scheduler, objective, steps, generator=None)
    torch.testing.assert_close(ours(objective, steps, "ancestral"), expected, atol=2e-4, rtol=2e-4)
    if not learned:
        assert torch.equal(ours(objective, steps, "ancestral"), ours(objective, steps, "ddim", eta=1.0))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_of_rectified_flow(shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    expected = theirs(scheduler, Diffusion(shift=shift), 12, sigmas=np.linspace(1, 1 / 12, 12))
    torch.testing.assert_close(ours(Diffusion(shift=shift), 12, "euler"), expected, atol=1e-4, rtol=1e-4)


def test_a_learned_variance_is_of_no_account_elsewhere() -> None:
    """Solvers that put no noise back, and DDIM, which has its own, do not look at it."""
    objective = Diffusion(schedule="ddpm_linear", prediction="eps", learned_variance=True)
    plain = Diffusion(schedule="ddpm_linear", prediction="eps")
    for method in ("euler", "heun", "ddim", "dpmpp_2m"):
        assert torch.equal(ours(objective, 5, method), ours(plain, 5, method))
