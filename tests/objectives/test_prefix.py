"""Frames that are given: the model sees them clean and at a time of their own, the loss leaves them out, and samplers
give them back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mutoscope.objectives.diffusion import Diffusion
from mutoscope.randomness import Draw
from mutoscope.recipe import Sampler
from mutoscope.samplers.diffusion import sample_diffusion
from mutoscope.types import Batch, Cond

OBJECTIVES = [
    Diffusion(prefix_share=1.0),
    Diffusion(schedule="flow", prediction="x0", prefix_share=1.0),
    Diffusion(schedule="ddpm_linear", prediction="eps", prefix_share=1.0),
    Diffusion(schedule="ddpm_linear", prediction="eps", prefix_share=1.0, learned_variance=True),
    Diffusion(schedule="ddpm_cosine", prediction="v", prefix_share=1.0, min_snr_gamma=5.0),
    Diffusion(schedule="edm", prediction="edm", prefix_share=1.0, sigma_data=0.5),
]
every_objective = pytest.mark.parametrize(
    "objective", OBJECTIVES, ids=lambda o: f"{o.schedule}-{o.prediction}{'-variance' * o.learned_variance}"
)
SHAPE = (3, 5, 2, 2)


class Net(nn.Module):
    """A network made of a function, which notes what it was called with."""

    def __init__(self, function: Callable[[Tensor, Tensor, Cond], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.calls: list[tuple[Tensor, Tensor, Cond]] = []

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        self.calls.append((x, time, cond))
        return self.function(x, time, cond)


def net_for(objective: Diffusion, function: Callable[[Tensor], Tensor] = lambda x: 0.3 * x) -> Net:
    twice = lambda x: torch.cat([function(x), 0 * x], 1) if objective.learned_variance else function(x)
    return Net(lambda x, time, cond: twice(x))


def a_batch(size: int = 64, **changes: Any) -> Batch:
    latents = Draw(7, "latents", range(size)).normal(*SHAPE)
    fields = {"cond": Cond(), "latents": latents} | changes
    return Batch(ids=[str(i) for i in range(size)], samples=list(range(size)), **fields)


@every_objective
def test_the_model_sees_given_frames_clean_and_at_the_cleanest_time(objective: Diffusion) -> None:
    net, data = net_for(objective), a_batch()
    objective.loss(net, data, Draw(0, "train", range(64)))
    [(x, time, cond)] = net.calls
    mask = cond.known_mask
    assert mask is not None and cond.known is not None and data.latents is not None
    lengths = mask.sum(1)
    assert set(lengths.tolist()) == {1, 2, 3, 4}, "from one frame to all but one"
    assert torch.equal(mask, torch.arange(5)[None] < lengths[:, None]), "first frames"
    clean = data.latents / objective.sigma_data if objective.schedule == "edm" else data.latents
    frames = mask[:, None, :, None, None].expand_as(x)
    torch.testing.assert_close(x[frames], clean[frames])
    assert (x[~frames] - clean[~frames]).abs().mean() > 0.1
    schedule = objective.noise_schedule
    assert (time[mask] == schedule.embedding(torch.tensor([schedule.cleanest]))).all()
    assert time.shape == (64, 5)
    rest = [times[~given] for times, given in zip(time, mask, strict=True)]
    assert all((r == r[0]).all() for r in rest)


@every_objective
def test_given_frames_are_no_part_of_the_loss(objective: Diffusion) -> None:
    """What the network says of them changes nothing, and gets no gradient; the others weigh as much as ever."""
    data, wild = a_batch(), net_for(objective)
    calm = objective.loss(net_for(objective), data, Draw(0, "train", range(64)))

    def loud(x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        assert cond.known_mask is not None
        given = cond.known_mask[:, None, :, None, None]
        out = wild.function(x, time, cond)
        return torch.where(given, out + 1e3, out)

    torch.testing.assert_close(objective.loss(Net(loud), data, Draw(0, "train", range(64))).per_sample, calm.per_sample)
    said = torch.zeros(64, objective.out_channels(3), *SHAPE[1:], requires_grad=True)
    net = Net(lambda x, time, cond: said)
    objective.loss(net, data, Draw(0, "train", range(64))).total.backward()
    mask = net.calls[0][2].known_mask
    assert said.grad is not None and mask is not None
    moved = said.grad[:, :3].abs().sum((1, 3, 4)) > 0
    assert torch.equal(moved, ~mask)


def test_the_mean_is_over_the_frames_that_are_left() -> None:
    objective = Diffusion(prefix_share=1.0)
    net = Net(lambda x, time, cond: torch.zeros_like(x))
    data = a_batch(8)
    loss = objective.loss(net, data, Draw(0, "train", range(8)))
    draw = Draw(0, "train", range(8))
    draw.uniform(), draw.uniform(), draw.uniform(), draw.uniform()
    assert data.latents is not None
    errors = (draw.normal(*SHAPE) - data.latents).square()
    mask = net.calls[0][2].known_mask
    assert mask is not None
    for i in range(8):
        torch.testing.assert_close(loss.per_sample[i], errors[i][:, ~mask[i]].mean())


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_share_of_samples_with_given_frames(share: float) -> None:
    net = Net(lambda x, time, cond: torch.zeros_like(x))
    Diffusion(prefix_share=share).loss(net, a_batch(1000), Draw(0, "train", range(1000)))
    [(_, time, cond)] = net.calls
    if not share:
        assert cond.known_mask is None and time.shape == (1000,)
    else:
        assert cond.known_mask is not None
        assert cond.known_mask.any(1).float().mean().item() == pytest.approx(share, abs=0.05)


def test_a_single_frame_is_never_given() -> None:
    net = Net(lambda x, time, cond: torch.zeros_like(x))
    data = a_batch(4, latents=torch.ones(4, 3, 1, 2, 2))
    loss = Diffusion(prefix_share=1.0).loss(net, data, Draw(0, "train", range(4)))
    mask = net.calls[0][2].known_mask
    assert mask is not None and not mask.any() and loss.total.isfinite()


def test_frames_given_in_two_ways_are_refused() -> None:
    known = Cond(known=torch.zeros(4, *SHAPE))
    with pytest.raises(ValueError, match="prefix_share gives first frames of its own"):
        Diffusion(prefix_share=0.5).loss(net_for(Diffusion()), a_batch(4, cond=known), Draw(0, "train", range(4)))
    with pytest.raises(ValueError, match=r"prefix_share=0\.5 .* temporal_patch above 1"):
        Diffusion(prefix_share=0.5, temporal_patch=2)
    with pytest.raises(ValueError, match="known_mask needs known"):
        Cond(known_mask=torch.zeros(4, 5, dtype=torch.bool))


SOLVERS = [{"method": "euler"}, {"method": "heun"}, {"method": "ddim", "eta": 1.0}, {"method": "dpmpp_2m"},
           {"method": "ancestral"}]  # fmt: skip


@every_objective
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s["method"])
def test_samplers_give_known_frames_back(objective: Diffusion, solver: dict[str, Any]) -> None:
    """As they were, bit for bit, in samples with guidance as well; and they are seen at every step."""
    known = Draw(3, "known", range(2)).normal(*SHAPE)
    mask = torch.tensor([[True, True, False, False, False], [True, False, False, False, False]])
    known = known * mask[:, None, :, None, None]
    cond = Cond(known=known, known_mask=mask, label=torch.tensor([1, 2]))
    net = net_for(objective)
    sampler = Sampler(steps=4, guidance_scale=2.0, **solver)
    drawn = sample_diffusion(net, objective, sampler, cond, SHAPE, Draw(0, "sample", range(2)))
    given = mask[:, None, :, None, None].expand_as(drawn)
    assert torch.equal(drawn[given], known[given])
    assert drawn[~given].abs().sum() > 0
    for x, time, seen in net.calls:
        assert seen.known_mask is not None and torch.equal(seen.known_mask, mask)
        torch.testing.assert_close(
            x[given], known[given] / (objective.sigma_data if objective.schedule == "edm" else 1)
        )
        assert time.shape == (2, 5)
