"""Contrastive learning: the loss by hand and by transformers, many processes in one, temperature, recall."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from mutoscope.contradictions import validate
from mutoscope.errors import ConfigError
from mutoscope.loading import load_recipe
from mutoscope.metrics.retrieval import recall
from mutoscope.models.clip import MAX_SCALE, Clip, ClipModel
from mutoscope.objectives.contrastive import Contrastive
from mutoscope.randomness import Draw
from mutoscope.recipe import Sampler
from mutoscope.types import Batch, Cond, ModelIO

IO = ModelIO(channels=3, grid=(4, 8, 8), text_dim=6)
CONFIG = Clip(width=16, heads=2, patch=(2, 4, 4), embedding=12)


def model() -> ClipModel:
    torch.manual_seed(0)
    return CONFIG.build(IO)


def batch(count: int, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(5) < torch.randint(1, 6, (count, 1), generator=g)
    cond = Cond(text=torch.randn(count, 5, 6, generator=g) * mask[..., None], text_mask=mask)
    latents = torch.randn(count, 3, *IO.grid, generator=g)
    return Batch(ids=[str(n) for n in range(count)], samples=list(range(count)), cond=cond, latents=latents)


def loss(network: Any, samples: Batch) -> Any:
    return Contrastive().loss(network, samples, Draw(0, "train", samples.samples))


def test_the_loss_is_the_paper_s() -> None:
    """Figure 3 of arXiv:2103.00020, sample by sample in fp64; and what transformers makes of the same logits."""
    network, samples = model(), batch(6)
    video, text, scale = network(samples.latents, samples.cond)
    a, b, s = (x.double().detach() for x in (video, text, scale))
    torch.testing.assert_close(a.norm(dim=1), torch.ones(6).double())
    by_hand = []
    for i in range(6):
        to_texts = torch.stack([s[0] * a[i] @ b[j] for j in range(6)])
        to_videos = torch.stack([s[0] * b[i] @ a[j] for j in range(6)])
        by_hand.append(-(to_texts.softmax(0)[i].log() + to_videos.softmax(0)[i].log()) / 2)
    found = loss(network, samples)
    torch.testing.assert_close(found.per_sample.double(), torch.stack(by_hand), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.total.double(), torch.stack(by_hand).mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.total, image_text_contrastive_loss(scale * text @ video.T), rtol=1e-5, atol=1e-6)


class Fixed(nn.Module):
    """Always says the same."""

    def __init__(self, *said: Tensor) -> None:
        super().__init__()
        self.said = said

    def forward(self, latents: Tensor, cond: Cond) -> tuple[Tensor, ...]:
        return self.said


def test_logits_are_fp32_under_autocast() -> None:
    """With what the towers say fixed, bf16 around the loss changes nothing."""
    fixed = Fixed(*model()(batch(6).latents, batch(6).cond))
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(fixed, batch(6))
    assert found.total == loss(fixed, batch(6)).total and found.total.dtype == torch.float32


def gather_of(rank: int, rows: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """Gathers as an engine does, from processes that are played one after the other."""
    return lambda own: torch.cat([own, *rows[rank + 1 :], *rows[:rank]])


def test_the_mean_over_processes_is_the_loss_of_the_joined_batch() -> None:
    """Value and gradient: each process compares its samples with everyone's. The processes here share one graph, as
    gradients that go back through the gathering make them do."""
    network, joined = model(), batch(6)
    whole = loss(network, joined)
    expected = torch.autograd.grad(whole.total, list(network.parameters()))

    parts = [
        replace(joined, latents=joined.latents[r : r + 2], cond=joined.cond.rows(slice(r, r + 2)),
                ids=joined.ids[r : r + 2], samples=joined.samples[r : r + 2])
        for r in (0, 2, 4)
    ]  # fmt: skip
    rows = [torch.cat(network(part.latents, part.cond)[:2], 1) for part in parts]
    losses = [loss(network, replace(part, gather=gather_of(rank, rows))) for rank, part in enumerate(parts)]
    total = torch.stack([one.total for one in losses]).mean()
    torch.testing.assert_close(total, whole.total, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat([one.per_sample for one in losses]), whole.per_sample, rtol=1e-5, atol=1e-6)
    for found, wanted in zip(torch.autograd.grad(total, list(network.parameters())), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_accumulated_micro_steps_are_not_one_batch() -> None:
    """As the documentation says: negatives are those of a micro-step."""
    network, joined = model(), batch(6)
    halves = [
        replace(joined, latents=joined.latents[r : r + 3], cond=joined.cond.rows(slice(r, r + 3))) for r in (0, 3)
    ]
    accumulated = torch.stack([loss(network, half).total for half in halves]).mean()
    assert accumulated < loss(network, joined).total - 0.1  # among three it is easier than among six


def test_the_temperature_stays_above_a_hundredth() -> None:
    network, samples = model(), batch(4)
    with torch.no_grad():
        network.log_scale.fill_(7.0)
    assert network(samples.latents, samples.cond)[2].item() == pytest.approx(MAX_SCALE)
    Contrastive().after_step(network, lambda x: x)
    assert network.log_scale.item() == pytest.approx(math.log(MAX_SCALE))
    loss(network, samples).total.backward()
    assert network.log_scale.grad is not None and network.log_scale.grad.item() != 0  # it can rise again


def test_over_all_is_one_large_batch() -> None:
    network, joined = model(), batch(6)
    whole = loss(network, joined)
    figures = Contrastive().over_all(whole.rows)
    torch.testing.assert_close(figures["loss"], whole.total.detach())
    assert figures["text_to_video_1"] == whole.parts["accuracy"]


def test_recall() -> None:
    """Ranks by hand: caption 0 finds its video first, caption 1 third, caption 2 second; ties count against."""
    similarity = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.1, 0.3], [0.1, 0.4, 0.2]])
    found = recall(similarity, at=(1, 2))
    assert {name: round(float(value), 3) for name, value in found.items()} == {
        "text_to_video_1": 0.333, "text_to_video_2": 0.667, "video_to_text_1": 0.333, "video_to_text_2": 0.667,
    }  # fmt: skip
    assert recall(torch.ones(3, 3))["text_to_video_1"] == 0
    same = torch.tensor([[True, False, False], [False, True, True], [False, True, True]])
    assert recall(similarity, same)["video_to_text_1"] == pytest.approx(2 / 3)


def test_what_the_objective_refuses() -> None:
    tokens = Batch(ids=["a"], samples=[0], cond=Cond(), tokens=torch.zeros(1, 1, 1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="the batch holds tokens"):
        loss(model(), tokens)
    recipe = load_recipe("dalle2_video.clip_tiny")
    with pytest.raises(ConfigError, match="a contrastive model draws nothing"):
        validate(replace(recipe, sample_every=10, sampler=Sampler()))
    with pytest.raises(ConfigError, match=r"recipe\.text: a contrastive model compares videos with captions"):
        validate(replace(recipe, text=None))
