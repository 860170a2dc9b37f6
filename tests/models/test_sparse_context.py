"""What positions see in sparse attention, against definitions written out one by one."""

from __future__ import annotations

import pytest
import torch

from mutoscope.models import sparse_context
from mutoscope.models.sparse_context import (
    Context,
    Frames,
    Grid,
    Nearest,
    Strided,
    nearest_tokens,
    reads_of,
    tiles_of,
    window_mask,
)

CPU = torch.device("cpu")
GRIDS: list[Grid] = [(3, 4, 5), (1, 1, 6), (5, 1, 3), (4, 6, 9), (1, 1, 1)]
CONTEXTS: list[Context] = [
    Nearest(tokens=1), Nearest(tokens=7), Nearest(tokens=500), Frames(), Frames(previous=0), Frames(previous=2),
    Strided(tokens=6, stride=3, recent=2), Strided(tokens=9, stride=1, recent=1),
    Strided(tokens=500, stride=2, recent=4),
]  # fmt: skip


def known(context: Context, i: int, grid: Grid) -> list[int]:
    """The tokens that position i sees, by the definition."""
    _, h, w = grid
    place = lambda j: (j // (h * w), j // w % h, j % w)
    if isinstance(context, Nearest):
        distance = lambda j: sum((a - b) ** 2 for a, b in zip(place(i), place(j), strict=True))
        return sorted(range(i), key=lambda j: (distance(j), j))[: context.tokens]
    if isinstance(context, Frames):
        return [j for j in range(i) if place(j)[0] >= place(i)[0] - context.previous]
    older = [j for j in range(max(0, i - context.recent)) if j % context.stride == 0]
    few = context.tokens - context.recent
    return list(range(max(0, i - context.recent), i)) + older[max(0, len(older) - few) :]


def attended(context: Context, i: int, grid: Grid) -> set[int]:
    return {j + 1 for j in known(context, i, grid)} | {i}


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_nearest_tokens_are_in_order(grid: Grid) -> None:
    total = grid[0] * grid[1] * grid[2]
    for count in (1, 5, total):
        table = nearest_tokens(grid, count)
        for i in range(total):
            expected = known(Nearest(tokens=count), i, grid)
            assert table[i].tolist() == expected + [-1] * (count - len(expected))


@pytest.mark.parametrize("context", CONTEXTS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda"])  # whose boxes differ; the tables are made anywhere
def test_tiles_hold_what_each_position_sees(
    context: Context, grid: Grid, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mutoscope.models.sparse_context.RUN", 8)
    box = context.box(grid, device)
    monkeypatch.setattr(type(context), "box", lambda *_: box)
    sparse_context._tiles.cache_clear()
    tiles = tiles_of(context, grid, CPU)
    sparse_context._tiles.cache_clear()
    groups, _, rows, states = tiles.bias.shape
    assert states % 8 == 0
    keys = tiles.keys.view(groups, states)
    for i, row in enumerate(tiles.rows.tolist()):
        assert tiles.queries[row] == i
        mask = tiles.bias[row // rows, 0, row % rows] == 0
        seen = keys[row // rows][mask].tolist()
        assert len(seen) == len(set(seen)) and set(seen) == attended(context, i, grid)
    assert (tiles.bias == 0).any(-1).all()  # no row is a softmax over nothing


@pytest.mark.parametrize("context", CONTEXTS, ids=str)
def test_reads_and_windows_hold_the_same(context: Context) -> None:
    grid, total = (3, 4, 5), 60
    for start, length, window in ((0, 60, 0), (17, 1, 0), (20, 30, 0), (20, 30, 9), (59, 1, 1)):
        reads = reads_of(context, start, length, grid, window, CPU)
        for n, i in enumerate(range(start, start + length)):
            seen = reads.states[n][reads.mask[n, 0, 0]].tolist()
            expected = {m for m in attended(context, i, grid) if m > i - (window or total)}
            assert len(seen) == len(set(seen)) and set(seen) == expected
    positions = torch.tensor([[0], [31], [50]]) + torch.arange(10)
    mask = window_mask(context, positions, grid)
    for row, first in enumerate(positions[:, 0].tolist()):
        for n in range(10):
            expected = {m - first for m in attended(context, first + n, grid) if m >= first}
            assert set(mask[row, 0, n].nonzero()[:, 0].tolist()) == expected


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match=r"Nearest\.tokens=0 must be at least 1"):
        Nearest(tokens=0)
    with pytest.raises(ValueError, match=r"Frames\.previous=-1"):
        Frames(previous=-1)
    with pytest.raises(ValueError, match=r"Strided\.recent=9 is part of tokens=8"):
        Strided(tokens=8, recent=9)
