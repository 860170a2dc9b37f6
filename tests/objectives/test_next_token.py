"""Next-token prediction: cross-entropy by hand, windows, and how often each position is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mutoscope.objectives.tokens import NextToken
from mutoscope.randomness import Draw
from mutoscope.types import NO_LABEL, Batch, Cond

GRID = (2, 2, 5)
TOTAL = 20
VOCAB = 6


class Recorder(nn.Module):
    """A token model whose logits are a fixed table by position, and that remembers how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.randn(TOTAL, VOCAB, generator=torch.Generator().manual_seed(0))
        self.calls: list[tuple[Cond, Any, Any]] = []

    def forward(
        self, tokens: Tensor, cond: Cond, start: Tensor | None = None, length: int | None = None, cache: Any = None
    ) -> Tensor:
        self.calls.append((cond, start, length))
        if start is None or length is None:
            return self.table.expand(len(tokens), -1, -1)
        return self.table[start[:, None] + torch.arange(length)]


def batch(count: int = 8) -> Batch:
    tokens = torch.randint(VOCAB, (count, *GRID), generator=torch.Generator().manual_seed(1))
    ids = [str(n) for n in range(count)]
    return Batch(ids=ids, samples=list(range(count)), cond=Cond(label=torch.arange(count)), tokens=tokens)


def nats_by_hand(model: Recorder, tokens: Tensor) -> Tensor:
    """(b, n): −log p of each token."""
    flat = tokens.flatten(1)
    log_p = model.table.log_softmax(-1)
    return torch.stack([torch.stack([-log_p[i, row[i]] for i in range(TOTAL)]) for row in flat])


def draw(count: int = 8) -> Draw:
    return Draw(0, "train", range(count))


def test_the_loss_is_cross_entropy_in_nats() -> None:
    model, clips = Recorder(), batch()
    assert clips.tokens is not None
    expected = nats_by_hand(model, clips.tokens)
    for loss in (
        NextToken().loss(model, clips, draw()),
        NextToken().validation_loss(model, clips, draw()),
        NextToken(window=TOTAL).loss(model, clips, draw()),
    ):
        torch.testing.assert_close(loss.total, expected.mean())
        torch.testing.assert_close(loss.per_sample, expected.mean(1))


@pytest.mark.parametrize("only_last", [False, True])
def test_a_window_counts_its_own_positions(only_last: bool) -> None:
    model, clips = Recorder(), batch()
    assert clips.tokens is not None
    nats = nats_by_hand(model, clips.tokens)
    loss = NextToken(window=6, only_last=only_last).loss(model, clips, draw())
    [(_, start, length)] = model.calls
    assert length == 6
    for row in range(8):
        own = nats[row, start[row] : start[row] + 6]
        torch.testing.assert_close(loss.per_sample[row], own[-1] if only_last else own.mean())


@pytest.mark.parametrize("window", [1, 5, 6, 19])
def test_validation_counts_each_position_once(window: int) -> None:
    model, clips = Recorder(), batch()
    assert clips.tokens is not None
    loss = NextToken(window=window).validation_loss(model, clips, draw())
    torch.testing.assert_close(loss.per_sample, nats_by_hand(model, clips.tokens).mean(1))
    assert all(cond.label is clips.cond.label for cond, _, _ in model.calls)


@pytest.mark.parametrize("window", [1, 3, 7, 19])
def test_the_first_position_is_trained_as_often_as_those_in_the_middle(window: int) -> None:
    """Of all quantiles alike: no position less often than one far from the ends, the first exactly as often."""
    objective = NextToken(window=window)
    count = (TOTAL + window - 1) * 10
    starts = objective._starts((torch.arange(count) + 0.5) / count, TOTAL)
    assert starts.min() == 0 and starts.max() == TOTAL - window
    seen = torch.zeros(TOTAL)
    for start in starts.tolist():
        seen[start : start + window] += 1
    least = count * window / (TOTAL + window - 1)
    assert seen.min() == seen[0] == seen[-1] == least
    if 3 * window < TOTAL:
        assert (seen[window:-window] == least).all()


def test_conditions_are_dropped_in_training_alone() -> None:
    model, clips = Recorder(), batch(200)
    NextToken(cond_dropout=0.3).loss(model, clips, draw(200))
    [(cond, _, _)] = model.calls
    assert cond.label is not None
    assert 30 < (cond.label == NO_LABEL).sum() < 90
    NextToken(cond_dropout=1).loss(model, clips, draw(200))
    assert (model.calls[1][0].label == NO_LABEL).all()


def test_what_hangs_on_chance_hangs_on_the_sample_alone() -> None:
    """Two halves of a batch train what the whole does."""
    model, clips = Recorder(), batch()
    assert clips.tokens is not None
    whole = NextToken(window=4).loss(model, clips, draw()).per_sample
    for rows in (slice(0, 3), slice(3, 8)):
        part = Batch(ids=clips.ids[rows], samples=clips.samples[rows], cond=clips.cond.rows(rows),
                     tokens=clips.tokens[rows])  # fmt: skip
        found = NextToken(window=4).loss(model, part, Draw(0, "train", part.samples)).per_sample
        torch.testing.assert_close(found, whole[rows])


def test_mistakes_are_said() -> None:
    with pytest.raises(ValueError, match="the batch holds none"):
        NextToken().loss(Recorder(), Batch(ids=["a"], samples=[0], cond=Cond()), draw(1))
    with pytest.raises(ValueError, match=r"set objective\.window"):
        NextToken(only_last=True)
    with pytest.raises(ValueError, match="cond_dropout=2"):
        NextToken(cond_dropout=2)
