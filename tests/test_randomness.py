"""Draws that hang on (seed, purpose, sample) alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mutoscope.randomness import Draw, seed_of

SAMPLES = st.lists(st.integers(0, 2**40), min_size=1, max_size=6, unique=True)


def test_seeds_are_the_same_on_every_machine() -> None:
    assert seed_of(0) == 919140953729665066
    assert seed_of(0, "train", 17) == 8697769753274535636
    assert seed_of("flying-mnist", "train", 12) == 764599385152210489
    assert seed_of("späte Züge") == 291694971427131389


def test_seeds_fit_an_int64_and_differ_by_every_part_of_the_key() -> None:
    keys = [(seed, purpose, n) for seed in range(5) for purpose in ("train", "val") for n in range(200)]
    seeds = {seed_of(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= s < 2**63 for s in seeds)


def test_uniform_draws_are_the_same_on_every_machine() -> None:
    drawn = Draw(0, "train", [3]).uniform(4)
    assert drawn[0].tolist() == [0.2612072229385376, 0.6570510864257812, 0.08143246173858643, 0.43202704191207886]


@given(SAMPLES, st.data())
def test_a_sample_draws_the_same_in_any_company_and_order(samples: list[int], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(samples))))
    together = Draw(1, "train", samples)
    shuffled = Draw(1, "train", [samples[i] for i in order])
    alone = [Draw(1, "train", [n]) for n in samples]
    for draw in (lambda d: d.uniform(), lambda d: d.normal(2, 3), lambda d: d.normal(20), lambda d: d.uniform(5)):
        drawn = draw(together)
        assert torch.equal(drawn[order], draw(shuffled))
        assert torch.equal(drawn, torch.cat([draw(one) for one in alone]))


def test_two_ranks_draw_what_one_process_draws() -> None:
    whole = Draw(0, "train", range(8)).normal(3)
    ranks = [Draw(0, "train", range(rank, 8, 2)).normal(3) for rank in range(2)]
    assert torch.equal(whole, torch.stack(ranks, 1).flatten(0, 1))


def test_calls_draw_on_and_a_new_draw_starts_again() -> None:
    draw = Draw(0, "train", [5, 6])
    first, second = draw.normal(4), draw.normal(4)
    assert not torch.equal(first, second)
    again = Draw(0, "train", [5, 6])
    assert torch.equal(again.normal(4), first) and torch.equal(again.normal(4), second)


@pytest.mark.parametrize("other", [(1, "train", [0]), (0, "validate", [0]), (0, "train", [1])])
def test_other_seeds_purposes_and_samples_draw_otherwise(other: tuple[int, str, list[int]]) -> None:
    assert not torch.equal(Draw(0, "train", [0]).normal(4), Draw(*other).normal(4))


def test_first_draws_of_neighbouring_samples_are_uniform_and_uncorrelated() -> None:
    u = Draw(0, "train", range(4000)).uniform(2).double()
    ranks = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    for column in (u[:, 0], u[:, 1]):  # Kolmogorov-Smirnov, at the 1 % level
        assert (column.sort().values - ranks).abs().max() < 1.63 / math.sqrt(4000)
    pairs = torch.stack([u[:-1, 0], u[1:, 0], u[:-1, 1]])  # a sample, the next one, and the same one's second number
    correlations = torch.corrcoef(pairs) - torch.eye(3)
    assert correlations.abs().max() < 3 / math.sqrt(4000)


def test_normal_draws_are_normal() -> None:
    z = Draw(0, "train", range(4)).normal(5000).double().flatten()
    assert z.dtype == torch.float64 and abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.03
    cdf = torch.special.ndtr(z.sort().values)
    ranks = (torch.arange(len(z), dtype=torch.float64) + 0.5) / len(z)
    assert (cdf - ranks).abs().max() < 1.63 / math.sqrt(len(z))


def test_shapes_and_dtypes() -> None:
    draw = Draw(0, "train", range(3))
    assert draw.uniform().shape == (3,) and draw.normal(2, 5).shape == (3, 2, 5)
    assert draw.uniform(2).dtype == draw.normal(2).dtype == torch.float32


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    Draw(0, "train", range(3)).normal(4)
    assert torch.equal(torch.get_rng_state(), before)
