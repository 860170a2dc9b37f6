"""What a token model sees at each position: where it is, and which tokens are known around it.

The input of position i is about the token that is to be told there: its place (t, h, w), the label, the token before it
in raster order, and the tokens of its neighbours in space and time that are known by then. With those a small model
knows at once what a plain one has to find by attention (minisora's "mdGPT" idea, for all positions in parallel).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mutoscope.types import NO_LABEL, Cond, ModelIO

NEIGHBOURS = (
    (0, 0, -1), (0, -1, -1), (0, -1, 0), (0, -1, 1),
    (-1, 0, 0), (-1, 0, -1), (-1, 0, 1), (-1, -1, 0), (-1, 1, 0),
)  # fmt: skip
"""Places (t, h, w) relative to a position whose tokens come before it in raster order."""

Positions = Literal["3d", "1d"]


def places_around(
    positions: Int[Tensor, "#b n"], grid: tuple[int, int, int], neighbours: Int[Tensor, "k 3"] | None
) -> Int[Tensor, "#b n j"]:
    """For each position: the place before it in raster order and then, where there are `neighbours` (offsets in t, h
    and w), theirs. t·h·w stands for a place outside of the clip, t·h·w + 1 for the one before its first position."""
    t, h, w = grid
    total = t * h * w
    before = torch.where(positions > 0, positions - 1, total + 1)[..., None]
    if neighbours is None:
        return before
    place = torch.stack([positions // (h * w), positions // w % h, positions % w], dim=-1)
    there_t, there_h, there_w = (place[..., None, :] + neighbours).unbind(-1)
    inside = (there_t >= 0) & (there_h >= 0) & (there_h < h) & (there_w >= 0) & (there_w < w)
    around = torch.where(inside, (there_t * h + there_h) * w + there_w, total)
    return torch.cat([before, around], dim=-1)


def positions_of(start: Int[Tensor, "b"] | None, length: int | None, total: int, like: Tensor) -> Int[Tensor, "#b n"]:
    """The positions that `TokenModel.__call__` is asked about, one row for all clips where `start` is None.
    Raises ValueError where one of the two arguments is missing."""
    if (start is None) != (length is None):
        raise ValueError("a window of tokens needs both of start and length, or neither")
    if start is None or length is None:
        return torch.arange(total, device=like.device)[None]
    return start[:, None] + torch.arange(length, device=like.device)


def token_shapes(io: ModelIO) -> tuple[int, tuple[int, int, int]]:
    """(number of codes, largest grid) of a model over tokens. Raises ValueError where the recipe has no codes."""
    if io.vocab is None:
        raise ValueError("this model is over tokens: the recipe needs an autoencoder with codes (model.bottleneck of "
                         "vq, ema_vq, kl_vq, fsq or lfq)")  # fmt: skip
    t, h, w = (max(sizes) for sizes in zip(io.grid, *io.more_grids, strict=True))
    return io.vocab, (t, h, w)


class TokenInputs(nn.Module):
    """Tokens (b, t, h, w), Cond, positions (#b, n) -> embeddings (b, n, d)."""

    neighbours: Tensor | None

    def __init__(
        self,
        width: int,
        vocab: int,
        grid: tuple[int, int, int],
        num_labels: int,
        *,
        positions: Positions = "3d",
        neighbours: bool = True,
    ) -> None:
        """grid: the largest (t, h, w) that there will be. positions: a table for each of t, h and w, or one for the
        position in raster order."""
        super().__init__()
        self.vocab, self.grid = vocab, grid
        offsets = torch.tensor(NEIGHBOURS) if neighbours else None
        self.register_buffer("neighbours", offsets, persistent=False)
        sizes = grid if positions == "3d" else (grid[0] * grid[1] * grid[2],)
        self.tables = nn.ModuleList(nn.Embedding(size, width) for size in sizes)
        # Behind the codes: a place outside of the clip, and what is before its first token (BOS)
        self.codes = nn.Embedding(vocab + 2, width)
        looked_up = 1 + len(NEIGHBOURS) * neighbours
        self.join = nn.Linear(looked_up * width, width, bias=False) if neighbours else None
        self.label = nn.Embedding(num_labels + 1, width) if num_labels else None  # the last row: no label
        for table in (*self.tables, self.codes, *([self.label] if self.label is not None else [])):
            nn.init.normal_(table.weight, std=0.02)
        if self.join is not None:
            nn.init.normal_(self.join.weight, std=looked_up**-0.5 * width**-0.5)

    def forward(
        self, tokens: Int[Tensor, "b t h w"], cond: Cond, positions: Int[Tensor, "#b n"]
    ) -> Float[Tensor, "b n d"]:
        """Raises ValueError for a clip that is larger than `grid`."""
        _, t, h, w = tokens.shape
        if any(size > largest for size, largest in zip((t, h, w), self.grid, strict=True)):
            raise ValueError(f"tokens of {t} × {h} × {w}: this model knows positions up to {self.grid}")
        total = t * h * w
        places = places_around(positions, (t, h, w), self.neighbours).expand(len(tokens), -1, -1)
        found = tokens.flatten(1).gather(1, places.clamp(max=total - 1).flatten(1)).view(places.shape)
        around = torch.where(places < total, found, places - total + self.vocab)  # (b, n, k)
        x = self.codes(around[:, :, 0]) if self.join is None else self._joined(self.join, around)
        x = x + self._place(positions, (t, h, w))
        if self.label is not None:
            none = self.label.num_embeddings - 1
            label = cond.label if cond.label is not None else tokens.new_full((len(tokens),), NO_LABEL)
            x = x + self.label(torch.where(label == NO_LABEL, none, label))[:, None]
        return x

    def _joined(self, join: nn.Linear, around: Int[Tensor, "b n k"]) -> Float[Tensor, "b n d"]:
        """`join` of the embeddings of what is around each position, side by side.

        Where there are more positions than codes, each code's share from each place is worked out first, and positions
        add up theirs. That is less work, and their embeddings, k of them for each, need not be kept.
        """
        codes, k = self.codes.num_embeddings, around.shape[-1]
        plain = type(join) is nn.Linear and type(join.weight) is nn.Parameter  # no LoRA's, and not quantised
        if not plain or codes >= around[..., 0].numel():
            return join(self.codes(around).flatten(2))
        by_place = join.weight.unflatten(1, (k, -1)).permute(1, 2, 0)
        shares = torch.matmul(self.codes.weight, by_place).flatten(0, 1).to(self.codes.weight.dtype)
        rows = around + codes * torch.arange(k, device=around.device)
        return F.embedding_bag(rows.flatten(0, 1), shares, mode="sum").unflatten(0, around.shape[:2])

    def _place(self, positions: Int[Tensor, "#b n"], grid: tuple[int, int, int]) -> Float[Tensor, "#b n d"]:
        if len(self.tables) == 1:
            found: Tensor = self.tables[0](positions)
            return found
        _, h, w = grid
        t_table, h_table, w_table = self.tables
        summed: Tensor = t_table(positions // (h * w)) + h_table(positions // w % h) + w_table(positions % w)
        return summed
