"""Drawing tokens: the distribution that is drawn from, what the cache must not change, and what hangs on what."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from mutoscope.models.gpt import GPT, GPTModel
from mutoscope.randomness import Draw
from mutoscope.recipe import TokenSampler
from mutoscope.samplers import tokens as module
from mutoscope.samplers.tokens import pick, sample_tokens
from mutoscope.types import Cond, ModelIO

GRID = (3, 2, 4)
TOTAL = 24
VOCAB = 13
GREEDY = TokenSampler(temperature=0)


@pytest.fixture(scope="module")
def model() -> GPTModel:
    model = GPT(depth=2, width=16, heads=2).build(ModelIO(channels=3, grid=GRID, vocab=VOCAB, num_labels=4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    return model.eval()


def draw(count: int = 4, seed: int = 0) -> Draw:
    return Draw(seed, "sample", range(count))


def labels(count: int = 4) -> Cond:
    return Cond(label=torch.arange(count) % 4)


def guided(model: GPTModel, tokens: Tensor, cond: Cond, scale: float, **window: Any) -> Tensor:
    """Guided logits of all positions, without a cache."""
    given = model(tokens, cond, **window)
    nothing = model(tokens, cond.dropped(torch.ones(len(tokens), dtype=torch.bool)), **window)
    return nothing + scale * (given - nothing)


# ---------------------------------------------------------------- one token


def brute_force(logits: Tensor, sampler: TokenSampler) -> list[float]:
    """The probability of each token, by the words of `TokenSampler`."""
    order = sorted(range(len(logits)), key=lambda k: -float(logits[k]))
    kept = order[: sampler.top_k] if sampler.top_k else order
    weights = {k: float(torch.exp(logits[k].double() / sampler.temperature)) for k in kept}
    total, nucleus, reached = sum(weights.values()), [], 0.0
    for k in kept:
        nucleus.append(k)
        reached += weights[k] / total
        if reached >= sampler.top_p - 1e-12:
            break
    total = sum(weights[k] for k in nucleus)
    return [weights[k] / total if k in nucleus else 0.0 for k in range(len(logits))]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [0, 1, 3, 99])
@pytest.mark.parametrize("top_p", [1.0, 0.7, 0.01])
def test_quantiles_cover_the_distribution_that_is_asked_for(temperature: float, top_k: int, top_p: float) -> None:
    sampler = TokenSampler(temperature=temperature, top_k=top_k, top_p=top_p)
    logits = torch.randn(7, generator=torch.Generator().manual_seed(int(10 * temperature) + top_k))
    grid = (torch.arange(20_000) + 0.5) / 20_000
    found = Counter(pick(logits.expand(len(grid), -1), sampler, grid).tolist())
    shares = [found[k] / len(grid) for k in range(7)]
    assert shares == pytest.approx(brute_force(logits, sampler), abs=2e-4)


def test_no_quantile_leads_to_a_token_that_is_not_left() -> None:
    logits = torch.tensor([[0.0, 3.0, -1e9, 1.0, -1e9]]).expand(3, -1)
    quantile = torch.tensor([0.0, 0.5, 1 - 2**-24])
    for sampler in (TokenSampler(), TokenSampler(top_p=0.999), TokenSampler(top_k=3)):
        assert set(pick(logits, sampler, quantile).tolist()) <= {0, 1, 3}
    assert pick(logits, GREEDY, quantile).tolist() == [1, 1, 1]
    assert pick(logits, TokenSampler(top_k=1), quantile).tolist() == [1, 1, 1]


# ---------------------------------------------------------------- a clip


def test_greedy_with_a_cache_is_argmax_without(model: GPTModel) -> None:
    found = sample_tokens(model, GREEDY, labels(), GRID, draw())
    expected = torch.zeros(4, *GRID, dtype=torch.long)
    with torch.no_grad():
        for i in range(TOTAL):
            expected.flatten(1)[:, i] = model(expected, labels())[:, i].argmax(-1)
    assert torch.equal(found, expected)
    assert len(set(map(str, found.tolist()))) == 4  # one for each label: the test can fail


def test_guidance_is_of_the_logits(model: GPTModel) -> None:
    sampler = TokenSampler(temperature=0, guidance_scale=2.5)
    found = sample_tokens(model, sampler, labels(), GRID, draw())
    with torch.no_grad():
        assert torch.equal(found.flatten(1), guided(model, found, labels(), 2.5).argmax(-1))
    assert not torch.equal(found, sample_tokens(model, GREEDY, labels(), GRID, draw()))
    ignored = TokenSampler(temperature=0, guidance_scale=0)
    alike = sample_tokens(model, ignored, labels(), GRID, draw())
    assert torch.equal(alike, alike[:1].expand_as(alike))


def test_each_token_hangs_on_its_own_quantile(model: GPTModel) -> None:
    sampler = TokenSampler(temperature=0.8, top_p=0.9)
    found = sample_tokens(model, sampler, labels(), GRID, draw())
    quantiles = draw().uniform(TOTAL)
    with torch.no_grad():
        logits = model(found, labels())
    for i in range(TOTAL):
        assert torch.equal(found.flatten(1)[:, i], pick(logits[:, i], sampler, quantiles[:, i]))


def test_a_video_hangs_on_its_own_stream_alone(model: GPTModel) -> None:
    together = sample_tokens(model, TokenSampler(), labels(), GRID, draw())
    for n in range(4):
        alone = sample_tokens(model, TokenSampler(), labels().rows(slice(n, n + 1)), GRID, Draw(0, "sample", [n]))
        assert torch.equal(alone[0], together[n])
    assert not torch.equal(together, sample_tokens(model, TokenSampler(), labels(), GRID, draw(seed=1)))


@pytest.mark.parametrize("chunk", [5, 1024])
@pytest.mark.parametrize("window", [0, 7])
def test_known_frames_are_kept_and_seen(
    model: GPTModel, monkeypatch: pytest.MonkeyPatch, chunk: int, window: int
) -> None:
    """Continuing what was drawn gives what was drawn, at each of its frames and however it is read in."""
    monkeypatch.setattr(module, "CHUNK", chunk)
    whole = sample_tokens(model, TokenSampler(), labels(), GRID, draw(), window=window)
    for frames in (1, 2, 3):
        known = whole[:, :frames]
        assert torch.equal(sample_tokens(model, TokenSampler(), labels(), GRID, draw(), known, window=window), whole)
    other = (whole[:, :1] + 1) % VOCAB
    continued = sample_tokens(model, TokenSampler(), labels(), GRID, draw(), other, window=window)
    assert torch.equal(continued[:, :1], other) and not torch.equal(continued, whole)


def test_progress_counts_frames(model: GPTModel) -> None:
    steps: list[int] = []
    sample_tokens(model, GREEDY, labels(1), GRID, draw(1), on_step=lambda: steps.append(1))
    assert len(steps) == GRID[0]
