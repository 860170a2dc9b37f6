"""Which known tokens a position sees in sparse attention, and how positions are computed together.

A context says it for one position: `known` gives the tokens that position i may look at, all of them before i. Token j
is in the state of position j + 1, the first that was given it (`token_inputs.py`): so what i attends to are the states
behind its tokens, and its own, which holds token i − 1.

Attention to a list of keys of one's own is bound by memory: each key is copied once for each position that sees it.
`tiles_of` splits the grid into small boxes instead, whose positions see much the same: for each box the keys that any
of its positions sees are gathered once, and a mask says who sees which.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Grid = tuple[int, int, int]
Indices = npt.NDArray[np.int64]

BOX = {"cpu": (2, 4, 4), "cuda": (2, 4, 8)}
"""Positions (t, h, w) that share their keys, where these are near to one another. Larger boxes gather less and mask
more; by measurement on a CPU, by guess on a GPU, whose kernels take 64 rows at a time."""
RUN = 128
"""Positions that share their keys in other contexts: about as many, in whole rows of a frame."""
CHUNK = 4096
"""Positions whose nearest tokens are looked for at a time."""


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """The known tokens that are nearest in (t, h, w), by Euclid's distance; of those as far, the first in raster
    order (minisora's sparse_block_size)."""

    tokens: int = 128
    """Tokens that a position sees; all there are where fewer are known."""

    def __post_init__(self) -> None:
        _at_least_1("Nearest", tokens=self.tokens)

    def count(self, grid: Grid) -> int:
        """The most tokens that a position sees."""
        return max(1, min(self.tokens, grid[0] * grid[1] * grid[2] - 1))

    def known(self, positions: Any, ranks: Any, grid: Grid) -> Any:
        """Tokens (…, k) that each of `positions` (…, 1) sees, nearest first; −1 stands for none.

        Both are NumPy arrays or both are tensors; `ranks` is 0 … count(grid) − 1.
        """
        table: Any = nearest_tokens(grid, self.count(grid))
        if isinstance(positions, Tensor):
            table = torch.from_numpy(table).to(positions.device)
        return table[positions[..., 0]]

    def box(self, grid: Grid, device: str) -> Grid:
        """Positions (t, h, w) that are computed together."""
        t, h, w = (min(size, most) for size, most in zip(BOX.get(device, BOX["cuda"]), grid, strict=True))
        return t, h, w


@dataclass(frozen=True, kw_only=True)
class Frames:
    """The known tokens of the own frame and all of the frames before it (minisora's context_type prev_frame)."""

    previous: int = 1
    """Whole frames before the own one."""

    def __post_init__(self) -> None:
        if self.previous < 0:
            raise ValueError(f"model.context: Frames.previous={self.previous} must be at least 0")

    def count(self, grid: Grid) -> int:
        """See `Nearest.count`."""
        frames = min(self.previous + 1, grid[0])
        return max(1, frames * grid[1] * grid[2] - 1)

    def known(self, positions: Any, ranks: Any, grid: Grid) -> Any:
        """See `Nearest.known`; the last token comes first."""
        size = grid[1] * grid[2]
        token = positions - 1 - ranks
        return _or_none(token, token >= (positions // size - self.previous) * size)

    def box(self, grid: Grid, device: str) -> Grid:
        """See `Nearest.box`."""
        return _rows(grid)


@dataclass(frozen=True, kw_only=True)
class Strided:
    """The last tokens in raster order and, of those before them, every `stride`-th (minisora's sparse_context_window,
    context_stride and context_stride_start)."""

    tokens: int = 512
    """Tokens that a position sees in all."""
    stride: int = 2
    """Of the older tokens, those at multiples of it are seen: the same ones by all positions."""
    recent: int = 32
    """Last tokens, all of which are seen."""

    def __post_init__(self) -> None:
        _at_least_1("Strided", tokens=self.tokens, stride=self.stride, recent=self.recent)
        if self.recent > self.tokens:
            raise ValueError(f"model.context: Strided.recent={self.recent} is part of tokens={self.tokens}, and can't "
                             "be more")  # fmt: skip

    def count(self, grid: Grid) -> int:
        """See `Nearest.count`."""
        return max(1, min(self.tokens, grid[0] * grid[1] * grid[2] - 1))

    def known(self, positions: Any, ranks: Any, grid: Grid) -> Any:
        """See `Nearest.known`; the last token comes first."""
        last, older = positions - 1 - ranks, ((positions - 1 - self.recent) // self.stride + self.recent - ranks)
        token = last * (ranks < self.recent) + older * self.stride * (ranks >= self.recent)
        return _or_none(token, token >= 0)

    def box(self, grid: Grid, device: str) -> Grid:
        """See `Nearest.box`."""
        return _rows(grid)


Context = Nearest | Frames | Strided


def _at_least_1(name: str, **counts: int) -> None:
    for field, count in counts.items():
        if count < 1:
            raise ValueError(f"model.context: {name}.{field}={count} must be at least 1")


def _or_none(tokens: Any, there: Any) -> Any:
    return (tokens + 1) * there - 1


def _rows(grid: Grid) -> Grid:
    return 1, max(1, min(RUN // grid[2], grid[1])), grid[2]


# ---------------------------------------------------------------- nearest


@cache
def nearest_tokens(grid: Grid, count: int) -> Indices:
    """(n, count): for each position of a grid the `count` nearest of the tokens before it, nearest first and, of those
    as far, the first in raster order; −1 where there are no more."""
    t, h, w = grid
    offsets = _offsets(grid)
    steps = offsets.astype(np.int64) @ [h * w, w, 1]  # in raster order
    found = np.full((t * h * w, count), -1, dtype=np.int64)
    for first in range(0, len(found), CHUNK):
        left = np.arange(first, min(first + CHUNK, len(found)))
        some = 2 * count
        while len(left):  # most find all they need among the nearest few; those at edges look further
            inside = np.ones((len(left), len(offsets[:some])), dtype=np.bool_)
            for axis, place in enumerate((left // (h * w), left // w % h, left % w)):
                there = place.astype(np.int16)[:, None] + offsets[:some, axis]
                inside &= (there >= 0) & (there < grid[axis])
            rank = inside.cumsum(1, dtype=np.int32)
            row, column = np.nonzero(inside & (rank <= count))
            found[left[row], rank[row, column] - 1] = left[row] + steps[column]
            left, some = left[inside.sum(1) < np.minimum(left, count)], some * 4
    return found


@cache
def _offsets(grid: Grid) -> npt.NDArray[np.int16]:
    """(m, 3): all (t, h, w) from a position of a grid to one before it, nearest first. Among those as far, offsets are
    in lexical order, which for the tokens that they lead to is raster order."""
    t, h, w = grid
    axes = np.meshgrid(np.arange(-t + 1, 1), np.arange(-h + 1, h), np.arange(-w + 1, w), indexing="ij")
    offsets = np.stack(axes, axis=-1).reshape(-1, 3)
    before = (offsets * [(2 * h) * (2 * w), 2 * w, 1]).sum(-1) < 0  # lexically below (0, 0, 0)
    offsets = offsets[before]
    return offsets[np.argsort((offsets**2).sum(-1), kind="stable")].astype(np.int16)


# ---------------------------------------------------------------- what is computed together


class Tiles(NamedTuple):
    """All positions of a grid in g boxes of q positions, each box with the m states that it attends to."""

    queries: Int[Tensor, "gq"]
    """The position of each row of each box, box by box; boxes that reach over an edge repeat their first."""
    rows: Int[Tensor, "n"]
    """For each position, its place in `queries`."""
    keys: Int[Tensor, "gm"]
    """The states of each box, box by box, padded with 0."""
    bias: Float[Tensor, "g 1 q m"]
    """0 where a position sees a state, −inf where not, in fp32. (Of a mask of bools, every block would make such a one,
    and keep it for its backward pass; on a GPU in bf16 it still makes one, of half the size.)"""

    def to(self, device: torch.device) -> Tiles:
        """The same on another device."""
        return Tiles(*(tensor.to(device) for tensor in self))


class Reads(NamedTuple):
    """For each of n positions the k states that it attends to, one by one."""

    states: Int[Tensor, "n k"]
    mask: Bool[Tensor, "n 1 1 k"]
    """True where there is such a state."""
    total: int
    """Positions of a clip."""


def tiles_of(context: Context, grid: Grid, device: torch.device) -> Tiles:
    """All positions of a grid in boxes that suit the device."""
    *places, mask = _tiles(context, grid, device.type)
    bias = torch.zeros(mask.shape).masked_fill_(~torch.from_numpy(mask), -torch.inf)
    queries, rows, keys = (torch.from_numpy(array.ravel()) for array in places)
    return Tiles(queries, rows, keys, bias).to(device)


@cache
def _tiles(context: Context, grid: Grid, device: str) -> tuple[Indices, Indices, Indices, npt.NDArray[np.bool_]]:
    queries = _boxes(grid, context.box(grid, device))
    total, ranks = grid[0] * grid[1] * grid[2], np.arange(context.count(grid))
    seen = []
    for box in queries:
        # As bits of all states, which need no sorting
        bits = np.zeros(total, dtype=np.bool_)
        states = _states(context, box, ranks, grid)
        bits[states[states >= 0]] = True
        seen.append(np.flatnonzero(bits))
    most = -(-max(len(states) for states in seen) // 8) * 8  # fused kernels want multiples of 8
    keys = np.zeros((len(queries), most), dtype=np.int64)
    mask = np.zeros((len(queries), 1, queries.shape[1], most), dtype=np.bool_)
    place = np.zeros(total, dtype=np.int64)
    for g, box in enumerate(queries):
        keys[g, : len(seen[g])] = seen[g]
        place[seen[g]] = np.arange(len(seen[g]))
        states = _states(context, box, ranks, grid)
        row, column = np.nonzero(states >= 0)
        mask[g, 0, row, place[states[row, column]]] = True
    rows = np.empty(total, dtype=np.int64)
    rows[queries.ravel()[::-1]] = np.arange(queries.size)[::-1]  # of repeated positions, the first
    return queries, rows, keys, mask


def _boxes(grid: Grid, box: Grid) -> Indices:
    """(g, q): the positions of each box."""
    parts = [-(-size // side) for size, side in zip(grid, box, strict=True)]
    axes = [np.arange(count * side) for count, side in zip(parts, box, strict=True)]
    t, h, w = np.meshgrid(*axes, indexing="ij")
    position = np.where((t < grid[0]) & (h < grid[1]) & (w < grid[2]), (t * grid[1] + h) * grid[2] + w, -1)
    split = position.reshape(parts[0], box[0], parts[1], box[1], parts[2], box[2])
    boxes: Indices = split.transpose(0, 2, 4, 1, 3, 5).reshape(-1, box[0] * box[1] * box[2])
    return np.where(boxes < 0, boxes[:, :1], boxes)


def _states(context: Context, positions: Indices, ranks: Indices, grid: Grid) -> Indices:
    """(n, k): states that these positions attend to, −1 for none; the own one is the last."""
    known = context.known(positions[:, None], ranks, grid)
    return np.concatenate([np.where(known < 0, -1, known + 1), positions[:, None]], axis=1)


def reads_of(context: Context, start: int, length: int, grid: Grid, window: int, device: torch.device) -> Reads:
    """What `length` positions from `start` on attend to, of the last `window` states (0 for all), the own one
    included."""
    positions = np.arange(start, start + length)
    states = _states(context, positions, np.arange(context.count(grid)), grid)
    # The own state may be among those of the known tokens, too: once is enough
    states[:, :-1][states[:, :-1] == positions[:, None]] = -1
    seen = (states >= 0) & (states > positions[:, None] - (window or start + length))
    total = grid[0] * grid[1] * grid[2]
    return Reads(torch.from_numpy(states.clip(0)).to(device), torch.from_numpy(seen[:, None, None]).to(device), total)


def window_mask(context: Context, positions: Int[Tensor, "b n"], grid: Grid) -> Bool[Tensor, "b 1 n n"]:
    """Who sees whom within windows, one of each clip."""
    n, ranks = positions.shape[1], torch.arange(context.count(grid), device=positions.device)
    masks = []
    for row in positions:  # one by one: the tokens of all of them can be many
        known = context.known(row[:, None], ranks, grid)
        state = known + 1 - row[0]
        state = torch.where((known >= 0) & (state >= 0), state, n)  # the last column takes what is not in the window
        seen = torch.zeros(n, n + 1, dtype=torch.bool, device=row.device).scatter(1, state, True)
        masks.append(seen[:, :n] | torch.eye(n, dtype=torch.bool, device=row.device))
    return torch.stack(masks)[:, None]
