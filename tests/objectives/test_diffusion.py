"""The identity that ties the loss to the sampler, schedules and weights against the papers' formulas, in fp64."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor, nn

from mutoscope.objectives.diffusion import VALIDATION_QUANTILES, Diffusion
from mutoscope.objectives.schedules import DDPMSchedule, EDMSchedule, FlowSchedule
from mutoscope.randomness import Draw
from mutoscope.types import NO_LABEL, Batch, Cond

PAIRS = {
    ("flow", "velocity"), ("flow", "v"), ("flow", "x0"),
    ("ddpm_linear", "eps"), ("ddpm_linear", "v"), ("ddpm_linear", "x0"),
    ("ddpm_cosine", "v"), ("ddpm_cosine", "x0"),
    ("scaled_linear", "v"), ("scaled_linear", "x0"),
    ("edm", "edm"),
}  # fmt: skip
OBJECTIVES = [
    *(Diffusion(schedule=s, prediction=p) for s, p in sorted(PAIRS)),  # type: ignore[arg-type]
    Diffusion(shift=5.0, timesteps="uniform"),
    Diffusion(schedule="edm", prediction="edm", sigma_data=0.5),
]
every_objective = pytest.mark.parametrize(
    "objective", OBJECTIVES, ids=lambda o: f"{o.schedule}-{o.prediction}-{o.shift:g}-{o.sigma_data:g}"
)
SHAPE = (3, 2, 4, 4)


class Net(nn.Module):
    """A network made of a function, which notes what it was called with."""

    def __init__(self, function: Callable[[Tensor, Tensor, Cond], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.calls: list[tuple[Tensor, Tensor, Cond]] = []

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        self.calls.append((x, time, cond))
        return self.function(x, time, cond)


def constant(value: float | Tensor) -> Net:
    return Net(lambda x, time, cond: torch.zeros_like(x) + value)


def alpha_sigma(objective: Diffusion, t: Tensor) -> tuple[Tensor, Tensor]:
    """α(t) and σ(t) in fp64, (B, 1, 1, 1, 1), by the papers."""
    t = t.double()[:, None, None, None, None]
    if objective.schedule == "flow":
        return 1 - t, t
    if objective.schedule == "edm":
        return torch.ones_like(t), t
    alpha2 = torch.tensor(ALPHAS_CUMPROD[objective.schedule], dtype=torch.float64)[t.long()]
    return alpha2.sqrt(), (1 - alpha2).sqrt()


def alphas_cumprod(betas: list[float]) -> list[float]:
    return [*accumulate((1 - b for b in betas), operator.mul)]


def cosine(u: float) -> float:
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


ALPHAS_CUMPROD = {
    "ddpm_linear": alphas_cumprod([1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]),
    "ddpm_cosine": alphas_cumprod([min(1 - cosine((i + 1) / 1000) / cosine(i / 1000), 0.999) for i in range(1000)]),
    "scaled_linear": alphas_cumprod([(0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999) ** 2 for i in range(1000)]),
}


def perfect(objective: Diffusion, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What a perfect network predicts, in fp64, by the papers."""
    alpha, sigma = alpha_sigma(objective, t)
    clean, noise, d = clean.double(), noise.double(), objective.sigma_data
    match objective.prediction:
        case "velocity":
            return noise - clean
        case "eps":
            return noise
        case "v":
            return alpha * noise - sigma * clean
        case "x0":
            return clean
        case "edm":  # arXiv:2206.00364 eq. 8: (y − c_skip·(y + n))/c_out
            noisy = clean + sigma * noise
            c_skip, c_out = d**2 / (sigma**2 + d**2), sigma * d / (sigma**2 + d**2).sqrt()
            return (clean - c_skip * noisy) / c_out


def batch(size: int, **changes: Any) -> Batch:
    latents = Draw(7, "latents", range(size)).normal(*SHAPE)
    whole = Batch(ids=[f"clip {i}" for i in range(size)], samples=list(range(size)), cond=Cond(), latents=latents)
    return replace(whole, **changes)


def drawn(objective: Diffusion, samples: range) -> tuple[Tensor, Tensor]:
    """Times and noise that `loss` draws for these samples."""
    draw = Draw(0, "train", samples)
    draw.uniform()  # which samples lose their condition
    return objective.noise_schedule.times(draw.uniform()), draw.normal(*SHAPE)


# ---------------------------------------------------------------- the identity


@every_objective
def test_a_perfect_network_is_read_as_the_clean_sample(objective: Diffusion) -> None:
    quantiles = torch.linspace(0.001, 0.999, 64)
    t = objective.noise_schedule.times(quantiles)
    draw = Draw(1, "test", range(64))
    clean, noise = draw.normal(*SHAPE), draw.normal(*SHAPE)
    alpha, sigma = alpha_sigma(objective, t)
    noisy = (alpha * clean + sigma * noise).float()
    predicted = perfect(objective, clean, noise, t).float()
    denoised = objective.denoise(constant(predicted), noisy, t, Cond())
    assert denoised.dtype == torch.float32
    torch.testing.assert_close(denoised, clean, atol=3e-4, rtol=0)


@every_objective
def test_the_target_is_what_denoise_inverts(objective: Diffusion) -> None:
    """x̂0 = c_skip·x + c_out·F, read off denoise, turned round: the loss of F = (x0 − c_skip·x)/c_out is nothing."""
    data, (t, noise) = batch(16), drawn(objective, range(16))
    assert data.latents is not None
    alpha, sigma = alpha_sigma(objective, t)
    noisy = (alpha * data.latents + sigma * noise).float()
    skipped = objective.denoise(constant(0.0), noisy, t, Cond()).double()
    c_out = objective.denoise(constant(1.0), noisy, t, Cond()).double() - skipped
    target = (data.latents.double() - skipped) / c_out
    torch.testing.assert_close(target, perfect(objective, data.latents, noise, t), atol=5e-3, rtol=1e-3)
    loss = objective.loss(
        constant(perfect(objective, data.latents, noise, t).float()), data, Draw(0, "train", range(16))
    )
    assert loss.per_sample.max() < 1e-9


@every_objective
def test_the_loss_is_the_squared_error_of_the_prediction(objective: Diffusion) -> None:
    data, (t, noise) = batch(8), drawn(objective, range(8))
    assert data.latents is not None
    net = constant(0.25)
    loss = objective.loss(net, data, Draw(0, "train", range(8)))
    expected = (0.25 - perfect(objective, data.latents, noise, t)).square().flatten(1).mean(1)
    torch.testing.assert_close(loss.per_sample.double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(loss.total, loss.per_sample.mean())
    assert not loss.per_sample.requires_grad

    # The network is shown c_in·(α·x0 + σ·ε), and the time
    alpha, sigma = alpha_sigma(objective, t)
    c_in = 1 / (sigma**2 + objective.sigma_data**2).sqrt() if objective.prediction == "edm" else 1.0
    shown, time, _ = net.calls[0]
    torch.testing.assert_close(shown.double(), c_in * (alpha * data.latents + sigma * noise), atol=1e-5, rtol=1e-5)
    assert torch.equal(time, objective.noise_schedule.embedding(t))


@every_objective
def test_min_snr_weighs_the_error_of_the_clean_sample(objective: Diffusion) -> None:
    """arXiv:2303.09556 §3.4: whatever is predicted, min(SNR, γ)·||x0 − x̂0||²."""
    weighted = replace(objective, min_snr_gamma=5.0)
    data, (t, noise) = batch(32), drawn(objective, range(32))
    assert data.latents is not None
    alpha, sigma = alpha_sigma(objective, t)
    noisy = (alpha * data.latents + sigma * noise).float()
    error = (weighted.denoise(constant(0.25), noisy, t, Cond()) - data.latents).double().square().flatten(1).mean(1)
    expected = (alpha / sigma).square().clamp(max=5.0).flatten() * error
    loss = weighted.loss(constant(0.25), data, Draw(0, "train", range(32)))
    torch.testing.assert_close(loss.per_sample.double(), expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("prediction", "weight"),
    [
        ("eps", lambda snr: min(snr, 5) / snr),
        ("v", lambda snr: min(snr, 5) / (snr + 1)),
        ("x0", lambda snr: min(snr, 5)),
    ],
    ids=["eps", "v", "x0"],
)
def test_min_snr_weights_of_the_paper(prediction: Any, weight: Callable[[float], float]) -> None:
    plain = Diffusion(schedule="ddpm_linear", prediction=prediction)
    weighted = replace(plain, min_snr_gamma=5.0)
    t, _ = drawn(plain, range(32))
    losses = [o.loss(constant(0.25), batch(32), Draw(0, "train", range(32))).per_sample for o in (plain, weighted)]
    alpha2 = [ALPHAS_CUMPROD["ddpm_linear"][int(i)] for i in t]
    expected = torch.tensor([weight(a / (1 - a)) for a in alpha2])
    assert min(alpha2) < 5 / 6 < max(alpha2)  # γ bites at some of these times, where SNR > 5, and at others not
    torch.testing.assert_close(losses[1] / losses[0], expected, rtol=1e-4, atol=0)


# ---------------------------------------------------------------- schedules


def test_linear_ddpm_table() -> None:
    table = DDPMSchedule(betas="linear").alphas_cumprod
    assert table[0].item() == pytest.approx(0.9999, rel=1e-12)
    assert table[499].item() == pytest.approx(0.07858724, rel=1e-6)
    assert table[999].item() == pytest.approx(4.0358297e-5, rel=1e-6)
    torch.testing.assert_close(table[:-1].tolist(), ALPHAS_CUMPROD["ddpm_linear"], rtol=1e-10, atol=0)
    assert table[-1] == 1 and table.dtype == torch.float64


def test_cosine_ddpm_table() -> None:
    table = DDPMSchedule(betas="cosine").alphas_cumprod
    assert table[0].item() == pytest.approx(cosine(0.001) / cosine(0.0), rel=1e-12)  # 0.99995871...
    assert table[499].item() == pytest.approx(cosine(0.5) / cosine(0.0), rel=1e-10)
    assert table[998].item() == pytest.approx(cosine(0.999) / cosine(0.0), rel=1e-6)
    assert table[999].item() == pytest.approx(table[998].item() * 0.001, rel=1e-9)  # β clipped to 0.999
    torch.testing.assert_close(table[:-1].tolist(), ALPHAS_CUMPROD["ddpm_cosine"], rtol=1e-9, atol=0)


@pytest.mark.parametrize("betas", ["linear", "cosine"])
def test_ddpm_preserves_variance_and_ends_clean(betas: Any) -> None:
    alpha, sigma = DDPMSchedule(betas=betas).alpha_sigma(torch.arange(-1.0, 1000.0))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1001))
    assert (alpha[0], sigma[0]) == (1, 0)
    assert (alpha.diff() < 0).all() and (sigma.diff() >= 0).all()


def test_trailing_ddpm_grid() -> None:
    schedule = DDPMSchedule()
    assert schedule.grid(5).tolist() == [999, 799, 599, 399, 199, -1]  # arXiv:2305.08891 table 2
    assert schedule.grid(3).tolist() == [999, 666, 332, -1]
    assert schedule.grid(1000).tolist() == [*range(999, -1, -1), -1]
    with pytest.raises(ValueError, match="1001 is more than the 1000"):
        schedule.grid(1001)


def test_flow_shift() -> None:
    """arXiv:2403.03206 eq. 23: t' = s·t/(1 + (s − 1)·t)."""
    shifted = FlowSchedule(shift=3.0, distribution="uniform")
    torch.testing.assert_close(shifted.times(torch.tensor([0.25, 0.5, 0.75])), torch.tensor([0.5, 0.75, 0.9]))
    torch.testing.assert_close(shifted.grid(4), torch.tensor([1, 0.9, 0.75, 0.5, 0]))
    torch.testing.assert_close(FlowSchedule().grid(4), torch.tensor([1, 0.75, 0.5, 0.25, 0]))


def test_edm_grid() -> None:
    """arXiv:2206.00364 eq. 5, with its 18 steps."""
    grid = EDMSchedule().grid(18)
    expected = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)] + [0.0]
    torch.testing.assert_close(grid.tolist(), expected, rtol=1e-4, atol=0)
    assert grid[1].item() == pytest.approx(57.586, rel=1e-4)


@pytest.mark.parametrize(
    ("sigma", "sigma_data", "c_in", "c_skip", "c_out"),
    [
        (1.0, 1.0, 0.7071068, 0.5, 0.7071068),
        (0.5, 0.5, 1.4142136, 0.5, 0.3535534),
        (2.0, 0.5, 0.4850713, 0.0588235, 0.4850713),
        (80.0, 0.5, 0.01249976, 3.906097e-5, 0.4999902),
        (0.002, 0.5, 1.999984, 0.999984, 0.001999984),
    ],
)
def test_edm_preconditioning(sigma: float, sigma_data: float, c_in: float, c_skip: float, c_out: float) -> None:
    """arXiv:2206.00364 table 1, "Network and preconditioning"."""
    objective = Diffusion(schedule="edm", prediction="edm", sigma_data=sigma_data)
    ones, t = torch.ones(1, *SHAPE), torch.tensor([sigma])
    net = constant(0.0)
    skipped = objective.denoise(net, ones, t, Cond())
    outward = objective.denoise(constant(1.0), ones, t, Cond()) - skipped
    shown, time, _ = net.calls[0]
    for found, expected in ((shown, c_in), (skipped, c_skip)):
        torch.testing.assert_close(found, torch.full_like(found, expected), rtol=1e-5, atol=0)
    torch.testing.assert_close(outward, torch.full_like(outward, c_out), rtol=1e-4, atol=1e-6)
    # c_noise = ln(σ)/4, on the scale of the embedding's frequencies
    assert time.item() == pytest.approx(1000 * math.log(sigma) / 16, rel=1e-5)


# ---------------------------------------------------------------- times


def test_times_by_quantile() -> None:
    half, one_sigma = torch.tensor([0.5]), torch.tensor([0.8413447])  # Φ(0), Φ(1)
    logit_normal = FlowSchedule(distribution="logit_normal")
    assert logit_normal.times(half).item() == pytest.approx(0.5, abs=1e-6)
    assert logit_normal.times(one_sigma).item() == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-6)
    assert FlowSchedule(distribution="uniform").times(one_sigma).item() == pytest.approx(0.8413447, abs=1e-6)
    assert EDMSchedule().times(half).item() == pytest.approx(2 * math.exp(-1.2), rel=1e-6)
    assert EDMSchedule().times(one_sigma).item() == pytest.approx(2.0, rel=1e-5)
    centres = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert DDPMSchedule().times(centres.float()).tolist() == [*range(1000)]


@every_objective
def test_times_go_from_little_noise_to_much(objective: Diffusion) -> None:
    t = objective.noise_schedule.times(torch.linspace(1e-4, 1 - 1e-4, 500))
    alpha, sigma = objective.noise_schedule.alpha_sigma(t)
    assert ((sigma / alpha).diff() >= 0).all()
    assert torch.isfinite(objective.noise_schedule.embedding(t)).all()


@every_objective
def test_training_looks_at_the_times_of_the_quantiles(objective: Diffusion) -> None:
    net = constant(0.0)
    latents = torch.zeros(1500, 1, 1, 1, 1)
    objective.loss(net, batch(1500, latents=latents), Draw(0, "train", range(1500)))
    seen, schedule = net.calls[0][1].sort().values, objective.noise_schedule
    for q in (0.1, 0.5, 0.9):  # Kolmogorov's and Smirnov's band, at the 1 % level
        low, high = schedule.embedding(schedule.times(torch.tensor([q - 0.042, q + 0.042]))).tolist()
        assert low <= seen[int(1500 * q)] <= high


# ---------------------------------------------------------------- precision


@every_objective
def test_a_perfect_network_in_bf16_shows_nothing_but_its_own_rounding(objective: Diffusion) -> None:
    """With targets in bf16 too, a perfect network would show a loss of 0.03."""
    data, (t, noise) = batch(16), drawn(objective, range(16))
    assert data.latents is not None
    target = perfect(objective, data.latents, noise, t).float()
    identity = nn.Linear(SHAPE[-1], SHAPE[-1], bias=False)
    nn.init.eye_(identity.weight)
    net = Net(lambda x, time, cond: identity(target))
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective.loss(net, data, Draw(0, "train", range(16)))
        assert net(torch.zeros(1), torch.zeros(1), Cond()).dtype == torch.bfloat16
        denoised = objective.denoise(net, data.latents, t, Cond())
    assert loss.total.dtype == loss.per_sample.dtype == denoised.dtype == torch.float32
    rounding = 2.0**-16 * target.square().flatten(1).mean(1)  # eight binary places: at most 2⁻⁸ of a number is lost
    assert (loss.per_sample <= rounding).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_latents_of_another_dtype_are_taken_to_fp32_first(dtype: torch.dtype) -> None:
    data = batch(4)
    assert data.latents is not None
    stored = data.latents.to(dtype)
    objective = Diffusion(prediction="x0")
    a, b = (
        objective.loss(constant(0.0), batch(4, latents=latents), Draw(0, "train", range(4)))
        for latents in (stored, stored.float())
    )
    assert a.total.dtype == torch.float32 and torch.equal(a.per_sample, b.per_sample)


# ---------------------------------------------------------------- conditions, draws, batches


def test_the_share_of_dropped_conditions() -> None:
    cond = Cond(label=torch.zeros(1500, dtype=torch.int64))
    data = batch(1500, latents=torch.zeros(1500, 1, 1, 1, 1), cond=cond)
    for share in (0.0, 0.1, 1.0):
        net = constant(0.0)
        Diffusion(cond_dropout=share).loss(net, data, Draw(0, "train", range(1500)))
        label = net.calls[0][2].label
        assert label is not None
        dropped = label.eq(NO_LABEL).float().mean().item()
        assert dropped == pytest.approx(share, abs=3 * math.sqrt(share * (1 - share) / 1500))


def test_validation_drops_no_condition_and_looks_at_fixed_quantiles() -> None:
    objective = Diffusion(cond_dropout=1.0)
    data = batch(6, cond=Cond(label=torch.arange(6)))
    net = constant(0.0)
    loss = objective.validation_loss(net, data, Draw(0, "validate", range(6)))
    assert [*loss.parts] == ["q0.1", "q0.3", "q0.5", "q0.7", "q0.9"]
    assert all(c.label is not None and c.label.tolist() == [*range(6)] for _, _, c in net.calls)
    times = objective.noise_schedule.times(torch.tensor(VALIDATION_QUANTILES))
    for (_, seen, _), t in zip(net.calls, times, strict=True):
        torch.testing.assert_close(seen, objective.noise_schedule.embedding(t.expand(6)))
    torch.testing.assert_close(loss.total, torch.stack([*loss.parts.values()]).mean())
    assert torch.equal(loss.per_sample, objective.validation_loss(net, data, Draw(0, "validate", range(6))).per_sample)


@every_objective
def test_a_perfect_network_validates_at_nothing(objective: Diffusion) -> None:
    data = batch(4)
    assert data.latents is not None
    draw = Draw(0, "validate", range(4))
    targets = [
        perfect(objective, data.latents, draw.normal(*SHAPE), objective.noise_schedule.times(torch.full((4,), q)))
        for q in VALIDATION_QUANTILES
    ]
    net = Net(lambda x, time, cond: targets[len(net.calls) - 1].float())
    loss = objective.validation_loss(net, data, Draw(0, "validate", range(4)))
    assert max(loss.parts.values()) < 1e-9


def test_a_sample_weighs_the_same_in_any_company() -> None:
    objective = Diffusion(min_snr_gamma=5.0)
    data = batch(6, cond=Cond(label=torch.arange(6)))
    net = Net(lambda x, time, cond: x * 0.1)
    whole = objective.loss(net, data, Draw(0, "train", range(6))).per_sample
    assert data.latents is not None
    for part in (slice(0, 2), slice(2, 6)):
        half = replace(data, latents=data.latents[part], cond=data.cond.rows(part))
        loss = objective.loss(net, half, Draw(0, "train", range(6)[part]))
        assert torch.equal(loss.per_sample, whole[part])


def test_gradients_reach_the_network() -> None:
    net = nn.Linear(SHAPE[-1], SHAPE[-1])
    loss = Diffusion().loss(Net(lambda x, time, cond: net(x)), batch(4), Draw(0, "train", range(4)))
    loss.total.backward()
    assert net.weight.grad is not None and net.weight.grad.abs().sum() > 0


def test_pixels_are_learned_where_there_are_no_latents() -> None:
    latents = batch(4).latents
    as_video = batch(4, latents=None, video=latents)
    losses = [Diffusion().loss(constant(0.0), b, Draw(0, "train", range(4))).per_sample for b in (batch(4), as_video)]
    assert torch.equal(*losses)
    with pytest.raises(ValueError, match="tokens"):
        tokens = batch(4, latents=None, tokens=torch.zeros(4, 2, 4, 4, dtype=torch.int64))
        Diffusion().loss(constant(0.0), tokens, Draw(0, "train", range(4)))


# ---------------------------------------------------------------- options


def test_every_pair_is_known_or_refused() -> None:
    hints = get_type_hints(Diffusion)
    for schedule in get_args(hints["schedule"]):
        for prediction in get_args(hints["prediction"]):
            if (schedule, prediction) in PAIRS:
                Diffusion(schedule=schedule, prediction=prediction)
            else:
                with pytest.raises(ValueError, match=f"{prediction}.*does not go with.*{schedule}.*allowed: "):
                    Diffusion(schedule=schedule, prediction=prediction)


@pytest.mark.parametrize(
    "options",
    [
        {"shift": 0.0},
        {"sigma_data": 0.0},
        {"min_snr_gamma": -1.0},
        {"cond_dropout": 1.5},
        {"shift": 3.0, "schedule": "edm", "prediction": "edm"},
        {"shift": 3.0, "schedule": "ddpm_linear", "prediction": "v"},
        {"sigma_data": 0.5},
    ],
)
def test_options_out_of_range_or_without_effect_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Diffusion(**options)
