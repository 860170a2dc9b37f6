from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mutoscope.data.buckets import Batches, epoch_order, iterate_once

small = st.integers(1, 6)


def stream(size: int, seed: int, start: int, count: int) -> list[tuple[int, int]]:
    """The samples start to start + count, one at a time: what everything else must be a division of."""
    return [(int(epoch_order(seed, n // size, size)[n % size]), n) for n in range(start, start + count)]


def consumed(steps: int, *, size: int, batch_size: int, accumulate: int, world: int, start: int) -> list[list]:
    """What all processes together consume in each optimizer step."""
    ranks = [
        iter(Batches(size=size, batch_size=batch_size, seed=3, rank=r, world=world, start=start)) for r in range(world)
    ]
    return [sorted((p for r in ranks for b in islice(r, accumulate) for p in b), key=lambda p: p[1])
            for _ in range(steps)]  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 30), batch_size=small, accumulate=small, world=small, start=st.integers(0, 200))
def test_every_step_takes_the_next_samples_whatever_their_division(
    size: int, batch_size: int, accumulate: int, world: int, start: int
) -> None:
    per_step = batch_size * accumulate * world
    steps = consumed(3, size=size, batch_size=batch_size, accumulate=accumulate, world=world, start=start)
    for k, step in enumerate(steps):
        assert step == stream(size, 3, start + k * per_step, per_step)


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 30), before=st.tuples(small, small, small), after=st.tuples(small, small, small),
       steps=st.integers(0, 5))  # fmt: skip
def test_a_run_resumes_with_another_division(
    size: int, before: tuple[int, int, int], after: tuple[int, int, int], steps: int
) -> None:
    done = steps * before[0] * before[1] * before[2]
    parts = []
    for (batch_size, accumulate, world), count, start in ((before, steps, 0), (after, 2, done)):
        parts += consumed(count, size=size, batch_size=batch_size, accumulate=accumulate, world=world, start=start)
    samples = [pair for step in parts for pair in step]
    assert samples == stream(size, 3, 0, len(samples))


@settings(deadline=None)
@given(size=st.integers(1, 60), epoch=st.integers(0, 1000), seed=st.integers(0, 2**40))
def test_an_epoch_is_a_permutation(size: int, epoch: int, seed: int) -> None:
    assert sorted(epoch_order(seed, epoch, size).tolist()) == list(range(size))


def test_the_order_is_what_it_always_was() -> None:
    """Golden: a run must resume under another version of NumPy, on another machine."""
    assert epoch_order(0, 0, 8).tolist() == [2, 4, 5, 0, 3, 7, 1, 6]
    assert epoch_order(7, 3, 8).tolist() == [1, 5, 7, 3, 6, 0, 4, 2]
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(0, 0, 8)[0] = 1


def test_orders_differ_and_are_uniform() -> None:
    orders = [tuple(epoch_order(seed, epoch, 4)) for seed in range(20) for epoch in range(120)]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24  # All permutations of four turn up ...
    assert ((counts - 100) ** 2 / 100).sum() < 50  # ... equally often: chi² with 23 degrees, p = 0.001.


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 40), batch_size=small, world=small)
def test_once_means_once_and_in_order(size: int, batch_size: int, world: int) -> None:
    ranks = [list(iterate_once(size, batch_size, r, world)) for r in range(world)]
    assert sorted(p for batches in ranks for b in batches for p in b) == [(i, i) for i in range(size)]
    for batches in ranks:
        assert all(len(b) == batch_size for b in batches[:-1])
        assert [p for b in batches for p in b] == sorted(p for b in batches for p in b)
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1


def test_nonsense_is_refused() -> None:
    for wrong, text in (
        ({"size": 0}, "size=0"), ({"batch_size": 0}, "batch_size=0"), ({"start": -1}, "start=-1"),
        ({"rank": 2, "world": 2}, "rank=2"), ({"world": 0}, "world=0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            Batches(**{"size": 4, "batch_size": 2, "seed": 0} | wrong)
    with pytest.raises(ValueError, match="rank=-1"):
        list(iterate_once(4, 2, -1, 2))
