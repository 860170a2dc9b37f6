"""The simulation of PyTorch's caching allocator, on traces made by hand."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mutoscope.estimate.allocator import Block, CachingAllocator
from mutoscope.estimate.tracker import HOST, Tracker

KiB, MiB = 1 << 10, 1 << 20


def made(allocator: CachingAllocator, *sizes: int) -> list[Block]:
    blocks = [allocator.malloc(size) for size in sizes]
    assert None not in blocks
    return [block for block in blocks if block is not None]


@pytest.mark.parametrize(
    ("size", "allocated", "reserved"),
    [
        (1, 512, 2 * MiB),
        (513, 1024, 2 * MiB),
        (MiB, MiB, 2 * MiB),
        (MiB + 1, MiB + 512, 20 * MiB),
        (10 * MiB - 512, 10 * MiB - 512, 20 * MiB),
        (10 * MiB, 10 * MiB, 10 * MiB),
        (21 * MiB, 22 * MiB, 22 * MiB),  # what is left has no more than 1 MiB, and is not split off
        (21 * MiB - 512, 21 * MiB - 512, 22 * MiB),
    ],
)
def test_a_segment_for_each_size(size: int, allocated: int, reserved: int) -> None:
    allocator = CachingAllocator()
    made(allocator, size)
    assert (allocator.allocated, allocator.reserved) == (allocated, reserved)


def test_tensors_of_no_size_take_nothing() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(0))
    assert allocator.reserved == allocator.allocated == 0


def test_freed_memory_is_used_again() -> None:
    allocator = CachingAllocator()
    for size in (64, 60, 64, 40):
        (block,) = made(allocator, size * MiB)
        allocator.free(block)
    assert (allocator.max_reserved, allocator.max_allocated, allocator.allocated) == (64 * MiB, 64 * MiB, 0)


def test_small_and_large_requests_have_pools_of_their_own() -> None:
    allocator = CachingAllocator()
    (large,) = made(allocator, 64 * MiB)
    allocator.free(large)
    made(allocator, MiB)
    assert allocator.reserved == 66 * MiB


def test_the_smallest_block_that_suffices_is_taken() -> None:
    allocator = CachingAllocator()
    large, small = made(allocator, 64 * MiB, 32 * MiB)
    allocator.free(large)
    allocator.free(small)
    (block,) = made(allocator, 30 * MiB)
    assert block.address == small.address


def test_what_is_left_of_a_block_is_split_off_and_joined_again() -> None:
    allocator = CachingAllocator()
    (whole,) = made(allocator, 60 * MiB)
    allocator.free(whole)
    parts = made(allocator, 20 * MiB, 20 * MiB, 20 * MiB)
    assert [part.address for part in parts] == [0, 20 * MiB, 40 * MiB]
    for i in (0, 2, 1):  # the last joins both of its neighbours
        allocator.free(parts[i])
    made(allocator, 60 * MiB)
    assert allocator.max_reserved == 60 * MiB


def test_gaps_that_are_large_enough_only_together_are_not_used() -> None:
    allocator = CachingAllocator()
    (whole,) = made(allocator, 60 * MiB)
    allocator.free(whole)
    first, between, last = made(allocator, 20 * MiB, 20 * MiB, 20 * MiB)
    allocator.free(first)
    allocator.free(last)
    made(allocator, 40 * MiB)
    assert (allocator.allocated, allocator.reserved) == (60 * MiB, 100 * MiB)
    allocator.free(between)


def test_requests_of_a_few_megabytes_share_segments() -> None:
    """Of 20 MiB: two of 7 MiB each fit in, and the 6 MiB that are left wait for something smaller."""
    allocator = CachingAllocator()
    made(allocator, *[7 * MiB] * 4)
    assert (allocator.allocated, allocator.reserved) == (28 * MiB, 40 * MiB)
    made(allocator, 6 * MiB, 6 * MiB)
    assert allocator.reserved == 40 * MiB


def test_an_empty_cache_gives_back_segments_in_which_nothing_lives() -> None:
    allocator = CachingAllocator()
    free, half, _ = made(allocator, 32 * MiB, 6 * MiB, 6 * MiB)
    allocator.free(free)
    allocator.free(half)
    allocator.empty_cache()
    assert (allocator.reserved, allocator.max_reserved) == (20 * MiB, 52 * MiB)
    made(allocator, 5 * MiB)  # in the gap that stayed
    assert allocator.reserved == 20 * MiB
    made(allocator, 32 * MiB)
    assert allocator.reserved == 52 * MiB


def test_freeing_twice_is_refused() -> None:
    allocator = CachingAllocator()
    (block,) = made(allocator, KiB)
    allocator.free(block)
    with pytest.raises(ValueError, match="is free already"):
        allocator.free(block)


def test_a_tracker_tells_of_what_is_on_the_device() -> None:
    allocator = CachingAllocator()
    tracker = Tracker("cuda", allocator)
    with FakeTensorMode(), tracker:
        x = torch.zeros(16, MiB)
        y = x + 1
        assert allocator.allocated == 128 * MiB
        del x
        with tracker.part(HOST):
            host = y.clone()
        assert (allocator.allocated, allocator.reserved) == (64 * MiB, 128 * MiB)
        tracker.tell(HOST, [y])
        assert allocator.allocated == 0
        del y, host
    assert (allocator.allocated, allocator.max_reserved) == (0, 128 * MiB)
