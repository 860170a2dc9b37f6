from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mutoscope.data.buckets import (
    Part,
    Plan,
    Pool,
    available_frames,
    choose_bucket,
    epoch_order,
    iterate_once,
    make_pools,
)
from mutoscope.data.index import ClipInfo
from mutoscope.recipe import Bucket, ClipSet, Data

small = st.integers(1, 6)
DATA = Data(root="there", frames=8, height=16, width=16)


def pool(*sizes: int, batch_size: int = 2, name: str = "8x16x16", first: int = 0) -> Pool:
    """A pool of so many clips from each set."""
    parts = []
    for size in sizes:
        parts.append(Part(np.arange(first, first + size), size))
        first += size
    return Pool(name, batch_size, tuple(parts))


def plan(*pools: Pool, accumulate: int = 1, rank: int = 0, world: int = 1) -> Plan:
    return Plan(pools=pools, seed=3, accumulate=accumulate, rank=rank, world=world)


def taken(of: Plan, steps: int, consumed: tuple[int, ...]) -> tuple[list[list[tuple[int, int]]], tuple[int, ...]]:
    """What all processes together take in each optimizer step, by place in the stream, and what is consumed then."""
    ranks = [replace(of, rank=r).batches(consumed) for r in range(of.world)]
    found = []
    for _ in range(steps):
        found.append(sorted((p for r in ranks for b in islice(r, of.accumulate) for p in b), key=lambda p: p[1]))
        consumed = of.after(consumed)
    return found, consumed


# ---- the order


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 30), batch_size=small, accumulate=small, world=small, start=st.integers(0, 200))
def test_every_step_takes_the_next_samples_whatever_their_division(
    size: int, batch_size: int, accumulate: int, world: int, start: int
) -> None:
    one = plan(pool(size, batch_size=1))
    ours = plan(pool(size, batch_size=batch_size), accumulate=accumulate, world=world)
    per_step = batch_size * accumulate * world
    steps, after = taken(ours, 3, (start,))
    assert after == (start + 3 * per_step,)
    assert [p for step in steps for p in step] == [(one.item(0, n), n) for n in range(start, start + 3 * per_step)]


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 30), before=st.tuples(small, small, small), after=st.tuples(small, small, small),
       steps=st.integers(0, 5))  # fmt: skip
def test_a_run_resumes_with_another_division(
    size: int, before: tuple[int, int, int], after: tuple[int, int, int], steps: int
) -> None:
    consumed, samples = (0,), []
    for (batch_size, accumulate, world), count in ((before, steps), (after, 2)):
        part, consumed = taken(
            plan(pool(size, batch_size=batch_size), accumulate=accumulate, world=world), count, consumed
        )
        samples += [p for step in part for p in step]
    one = plan(pool(size, batch_size=1))
    assert samples == [(one.item(0, n), n) for n in range(len(samples))]


pools = st.lists(st.tuples(st.lists(st.integers(1, 9), min_size=1, max_size=3), small), min_size=1, max_size=4)


def made(sizes: list[tuple[list[int], int]]) -> list[Pool]:
    found, first = [], 0
    for n, (parts, batch_size) in enumerate(sizes):
        found.append(pool(*parts, batch_size=batch_size, name=f"{n}x16x16", first=first))
        first += sum(parts)
    return found


@settings(max_examples=60, deadline=None)
@given(sizes=pools, accumulate=st.integers(1, 3), world=st.integers(1, 3), steps=st.integers(1, 30))
def test_ranks_are_disjoint_and_every_step_is_of_one_bucket(
    sizes: list[tuple[list[int], int]], accumulate: int, world: int, steps: int
) -> None:
    found = made(sizes)
    ours = plan(*found, accumulate=accumulate, world=world)
    whole, consumed = taken(ours, steps, (0,) * len(found))
    numbers = [n for step in whole for _, n in step]
    assert len(set(numbers)) == len(numbers) == sum(consumed)  # each place in the stream belongs to one process
    owner = {int(i): b for b, p in enumerate(found) for part in p.parts for i in part.items}
    assert all(len({owner[i] for i, _ in step}) == 1 for step in whole)


@settings(max_examples=60, deadline=None)
@given(sizes=pools, accumulate=st.integers(1, 3), world=st.integers(1, 3), stop=st.integers(0, 20))
def test_resuming_at_any_step_goes_on_as_if_nothing_had_happened(
    sizes: list[tuple[list[int], int]], accumulate: int, world: int, stop: int
) -> None:
    found = made(sizes)
    ours = plan(*found, accumulate=accumulate, world=world)
    straight, _ = taken(ours, stop + 5, (0,) * len(found))
    first, consumed = taken(ours, stop, (0,) * len(found))
    then, _ = taken(plan(*found, accumulate=accumulate, world=world), 5, consumed)
    assert first + then == straight


@settings(max_examples=40, deadline=None)
@given(sizes=pools, epochs=st.integers(1, 3))
def test_the_union_of_an_epoch_is_the_data(sizes: list[tuple[list[int], int]], epochs: int) -> None:
    """Of each bucket: its first n·size places hold every clip n times. And no bucket runs ahead of the others."""
    found = made(sizes)
    ours = plan(*found)
    for b, p in enumerate(found):
        counts = Counter(ours.item(b, n) for n in range(epochs * p.size))
        assert counts == {int(i): epochs for part in p.parts for i in part.items}
    consumed: tuple[int, ...] = (0,) * len(found)
    for _ in range(40):
        consumed = ours.after(consumed)
        shares = [n / p.size for n, p in zip(consumed, found, strict=True)]
        steps = [ours.step_samples(b) / p.size for b, p in enumerate(found)]
        assert max(shares) - min(shares) <= 2 * max(steps) + 1e-9


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


# ---- mixtures


def mixture(*sets: tuple[int, dict], root: dict | None = None) -> tuple[Data, list[int]]:
    """Data of several sets, and the set of each of its items."""
    first, *rest = sets
    data = replace(DATA, **first[1], mix=tuple(ClipSet(root=f"set{k}", **o) for k, (_, o) in enumerate(rest)))
    return data, [k for k, (count, _) in enumerate(sets) for _ in range(count)]


def drawn(data: Data, sets: list[int], epochs: int) -> Counter[int]:
    (only,) = make_pools([0] * len(sets), sets, data, 4)
    ours = plan(only)
    return Counter(ours.item(0, n) for n in range(epochs * only.size))


def test_repeats_are_seen_so_often_in_every_epoch() -> None:
    counts = drawn(*mixture((3, {}), (2, {"repeats": 5})), epochs=1)
    assert counts == {0: 1, 1: 1, 2: 1, 3: 5, 4: 5}


def test_weights_are_shares_of_the_samples_and_all_clips_of_a_set_come_alike() -> None:
    data, sets = mixture((90, {"weight": 1.0}), (10, {"weight": 3.0}))
    counts = drawn(data, sets, epochs=18)  # 25 of 100 from the first set, so that 18 epochs go five times round it
    assert {counts[i] for i in range(90)} == {5} and {counts[i] for i in range(90, 100)} == {135}


def test_weights_hold_in_every_bucket() -> None:
    data, sets = mixture((40, {"weight": 1.0}), (40, {"weight": 4.0}))
    data = replace(data, buckets=(Bucket(frames=8, height=16, width=16, batch_size=4),
                                  Bucket(frames=4, height=16, width=16, batch_size=8)))  # fmt: skip
    a, b = make_pools([0, 0, 0, 1] * 20, sets, data, 1)
    assert [p.draws for p in a.parts] == [12, 48] and [p.draws for p in b.parts] == [4, 16]
    assert (a.batch_size, b.batch_size, a.name, b.name) == (4, 8, "8x16x16", "4x16x16")


def test_empty_buckets_make_no_pool() -> None:
    data = replace(DATA, buckets=tuple(Bucket(frames=f, height=16, width=16, batch_size=1) for f in (1, 4, 8)))
    assert [p.name for p in make_pools([2, 0, 2], [0, 0, 0], data, 1)] == ["1x16x16", "8x16x16"]


# ---- the bucket of a clip

shapes = st.builds(Bucket, frames=st.integers(1, 100), height=st.integers(16, 800), width=st.integers(16, 800),
                   batch_size=st.just(1))  # fmt: skip


@given(frames=st.integers(0, 300), height=st.integers(1, 3000), width=st.integers(1, 3000),
       buckets=st.lists(shapes, min_size=1, max_size=6), short=st.sampled_from(["error", "loop", "drop"]))  # fmt: skip
def test_every_clip_has_one_bucket_or_a_reason(
    frames: int, height: int, width: int, buckets: list[Bucket], short: str
) -> None:
    found = choose_bucket(frames, height, width, buckets, short)
    if isinstance(found, str):
        suited = [b.frames for b in buckets if b.frames > 1 or frames <= 1] or [1]
        assert found.startswith("too short") and (frames < 1 or frames < min(suited))
    else:
        assert 0 <= found < len(buckets)
        assert buckets[found].frames <= frames or short in ("loop", "pad")


def test_a_bucket_keeps_most_of_the_clip() -> None:
    b = lambda f, h, w: Bucket(frames=f, height=h, width=w, batch_size=1)
    wide, tall, still = b(49, 480, 720), b(49, 720, 480), b(1, 480, 720)
    assert choose_bucket(100, 1080, 1920, [still, tall, wide]) == 2
    assert choose_bucket(100, 1920, 1080, [still, tall, wide]) == 1
    assert choose_bucket(1, 100, 100, [wide, tall, still]) == 2  # an image
    assert choose_bucket(100, 480, 720, [b(97, 720, 480), wide]) == 1  # not the longer one, which shows half
    assert choose_bucket(100, 480, 720, [wide, b(97, 240, 360)]) == 1  # the longer one, where both show all
    assert choose_bucket(60, 480, 720, [b(49, 240, 360), wide, b(49, 960, 1440)]) == 1  # nothing is magnified
    assert choose_bucket(30, 480, 720, [still, wide]) == "too short: 30 frames, 49 are needed"  # and no still
    assert choose_bucket(30, 480, 720, [still, wide], "loop") == 1


def test_available_frames() -> None:
    info = ClipInfo(frames=100, fps=25.0, height=16, width=16, duration=4.0, rotation=0, image=False)
    available = lambda **options: available_frames(info, replace(DATA, **options))
    assert available() == 100 and available(fps=8.0) == 32
    assert available(skip_frames_start=10, skip_frames_end=5) == 85
    assert available(frame_interval=3) == 34 and available(skip_frames_start=200) == 0


@settings(max_examples=100, deadline=None)
@given(groups=st.lists(st.integers(0, 3), min_size=1, max_size=40), batch_size=small, world=small)
def test_once_means_once(groups: list[int], batch_size: int, world: int) -> None:
    ranks = [list(iterate_once(groups, batch_size, r, world)) for r in range(world)]
    assert sorted(p for batches in ranks for b in batches for p in b) == [(i, i) for i in range(len(groups))]
    for batch in (b for batches in ranks for b in batches):
        assert 0 < len(batch) <= batch_size and len({groups[i] for i, _ in batch}) == 1
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1
    assert all(ranks) or len(groups) < world  # none goes without


def test_nonsense_is_refused() -> None:
    for wrong, text in (
        ({"pools": ()}, "no clips"), ({"pools": (pool(3, batch_size=0),)}, "batch_size"),
        ({"accumulate": 0}, "accumulate"), ({"rank": 2, "world": 2}, "rank=2"), ({"world": 0}, "world=0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            Plan(**{"pools": (pool(4),), "seed": 0} | wrong)
    with pytest.raises(ValueError, match="rank=-1"):
        list(iterate_once([0] * 4, 2, -1, 2))
    with pytest.raises(ValueError, match="0 items"):
        list(iterate_once([], 2))
