"""What PyTorch's caching allocator reserves on a GPU, when tensors of given sizes are made and freed in a given order.

After c10/cuda/CUDACachingAllocator.cpp (the native backend with its default settings, one stream):

    sizes     are rounded up to 512 bytes. Up to 1 MiB they are of the small pool, above of the large one.
    segments  come from CUDA: of 2 MiB for the small pool; of 20 MiB for requests below 10 MiB; else of the request
              itself, rounded up to 2 MiB.
    a request takes the smallest free block of its pool that holds it (of equal ones that with the lowest address),
              and a segment where there is none. The remainder stays a free block, unless it is below 512 bytes in the
              small pool, or not above 1 MiB in the large one.
    freed     blocks join their free neighbours of the same segment. Segments stay reserved until `empty_cache`.

No limit is set: an allocator that runs into one returns its free segments first. Left out are streams, expandable
segments, and what lies outside of the allocator (CUDA's context, libraries).

It wants all blocks of a network, one after another: what is reserved is not linear in their number (extrapolated from
six and eight of 42 blocks it may be a third too low), which is why `mutoscope show` tells only what lives.
`benchmarks/estimate_published.py` compares it with published figures.
"""

from __future__ import annotations

from bisect import bisect_left, insort

MiB = 1 << 20
ROUND = 512
SMALL = MiB
"""Largest request of the small pool, and the remainder above which blocks of the large pool are split."""
SMALL_SEGMENT = 2 * MiB
MIDDLE_SEGMENT, LARGE = 20 * MiB, 10 * MiB
"""The segment for requests below `LARGE`."""
ROUND_LARGE = 2 * MiB


class Block:
    """A part of a segment."""

    __slots__ = ("address", "after", "before", "free", "size", "small")

    def __init__(self, address: int, size: int, small: bool) -> None:
        self.address, self.size, self.small = address, size, small
        self.free = False
        self.before: Block | None = None
        self.after: Block | None = None


class CachingAllocator:
    """Counts, in bytes, as torch.cuda does.

    allocated, reserved: now (`memory_allocated`, `memory_reserved`).
    max_allocated, max_reserved: the most so far.
    """

    def __init__(self) -> None:
        self.allocated = self.max_allocated = 0
        self.reserved = self.max_reserved = 0
        self._free: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}
        self._next_address = 0

    def malloc(self, size: int) -> Block | None:
        """A block for a tensor of so many bytes; None for one of none."""
        if size == 0:
            return None
        size = _up(size, ROUND)
        block = self._found(size)
        rest = block.size - size
        if rest >= ROUND if block.small else rest > SMALL:
            remainder = Block(block.address + size, rest, block.small)
            block.size = size
            _link(remainder, block.after)
            _link(block, remainder)
            self._put(remainder)
        self.allocated += block.size
        self.max_allocated = max(self.max_allocated, self.allocated)
        return block

    def free(self, block: Block | None) -> None:
        """Let go of what `malloc` returned."""
        if block is None:
            return
        if block.free:
            raise ValueError(f"the block of {block.size} bytes at {block.address} is free already")
        self.allocated -= block.size
        if (before := block.before) is not None and before.free:
            self._take(before)
            block = _joined(before, block)
        if (after := block.after) is not None and after.free:
            self._take(after)
            block = _joined(block, after)
        self._put(block)

    def empty_cache(self) -> None:
        """Give segments back to CUDA in which nothing lives."""
        for small, blocks in self._free.items():
            whole = [b for _, _, b in blocks if b.before is None and b.after is None]
            self.reserved -= sum(b.size for b in whole)
            self._free[small] = [entry for entry in blocks if entry[2].before or entry[2].after]

    def _found(self, size: int) -> Block:
        small = size <= SMALL
        blocks = self._free[small]
        i = bisect_left(blocks, (size,))
        if i < len(blocks):
            block = blocks.pop(i)[2]
            block.free = False
            return block
        segment = SMALL_SEGMENT if small else MIDDLE_SEGMENT if size < LARGE else _up(size, ROUND_LARGE)
        block = Block(self._next_address, segment, small)
        self._next_address += segment
        self.reserved += segment
        self.max_reserved = max(self.max_reserved, self.reserved)
        return block

    def _put(self, block: Block) -> None:
        block.free = True
        insort(self._free[block.small], (block.size, block.address, block))

    def _take(self, block: Block) -> None:
        blocks = self._free[block.small]
        del blocks[bisect_left(blocks, (block.size, block.address))]
        block.free = False


def _link(block: Block, after: Block | None) -> None:
    block.after = after
    if after is not None:
        after.before = block


def _joined(block: Block, after: Block) -> Block:
    block.size += after.size
    _link(block, after.after)
    return block


def _up(size: int, step: int) -> int:
    return -(-size // step) * step
