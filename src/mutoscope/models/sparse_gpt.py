"""A GPT over the tokens of a clip in which a position attends to few of those before it, such as the nearest.

minisora's "mdGPT", with all positions trained in parallel: there, each forward pass told a single token. Which tokens
those are is in `sparse_context.py`, what a position is given in `token_inputs.py`. Attention knows where a token is
relative to the position by rotary embeddings in (t, h, w) with frequencies that are learned ("RoPE-Mixed",
arXiv:2403.13298 §3.2): they turn queries and keys before attention, which remains the fused one. A bias learned for
each (dt, dh, dw) would need the gradient of its mask, for which torch has no fused kernel on CPUs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor, nn

from mutoscope.models.gpt import init_weights
from mutoscope.models.kv_cache import KeyValues
from mutoscope.models.layers import MLP, Attention, Dropout, scaled_dot_product_attention
from mutoscope.models.sparse_context import (
    Frames,
    Grid,
    Nearest,
    Reads,
    Strided,
    Tiles,
    reads_of,
    tiles_of,
    window_mask,
)
from mutoscope.models.token_inputs import Positions, TokenInputs, positions_of, token_shapes
from mutoscope.recipe import ModelConfig
from mutoscope.types import Cond, ModelIO, TokenCache

GATHERED = 1 << 24
"""Numbers that are gathered at a time of what a cache keeps."""


@dataclass(frozen=True, kw_only=True)
class SparseGPT(ModelConfig):
    """A transformer that tells the next token from few of those before it."""

    depth: int = 8
    """Number of blocks."""
    width: int = 768
    """Width of the residual stream: an even multiple of `heads`."""
    heads: int = 6
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs over `width`."""
    dropout: float = 0.0
    """Share of the inputs and of what each branch adds to them that is dropped in training."""
    context: Nearest | Frames | Strided = field(default_factory=Nearest)
    """The known tokens that a position attends to."""
    positions: Positions = "3d"
    """3d: a table of positions for each of t, h and w. 1d: one for the place in raster order (minisora's
    use_1d_pos_emb). Attention is relative in t, h and w with both."""
    neighbours: bool = True
    """Give each position the known tokens around it in space and time, not only the one before it in raster order."""

    def __post_init__(self) -> None:
        if min(self.depth, self.width, self.heads) < 1 or self.width % (2 * self.heads):
            raise ValueError(f"model: depth={self.depth} must be at least 1, and width={self.width} a multiple of "
                             f"twice heads={self.heads}")  # fmt: skip
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout={self.dropout:g} must be at least 0 and below 1")

    def build(self, io: ModelIO) -> SparseGPTModel:
        return SparseGPTModel(self, io)


class SparseGPTModel(nn.Module):
    """A `TokenModel`.

    The receptive field of one block: position i sees the states of positions j + 1 of the tokens j that its context
    holds, all below i, and its own. State m holds token m − 1 and, with `neighbours`, those around m.
    """

    def __init__(self, config: SparseGPT, io: ModelIO) -> None:
        super().__init__()
        vocab, self.grid = token_shapes(io)
        self.context = config.context
        self.inputs = TokenInputs(
            config.width, vocab, self.grid, io.num_labels, positions=config.positions, neighbours=config.neighbours
        )
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(SparseBlock(config, io.text_dim) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, vocab, bias=False)
        self.tiles: dict[Grid, Tiles] = {}
        init_weights(self.blocks, self.head)

    def forward(
        self,
        tokens: Int[Tensor, "b t h w"],
        cond: Cond,
        start: Int[Tensor, "b"] | None = None,
        length: int | None = None,
        cache: TokenCache | None = None,
    ) -> Float[Tensor, "b n k"]:
        """See `types.TokenModel`."""
        grid, total = (tokens.shape[1], tokens.shape[2], tokens.shape[3]), tokens[0].numel()
        positions = positions_of(start, length, total, tokens)
        x = self.dropout(self.inputs(tokens, cond, positions))
        place = places(torch.cat([positions[:, :1] - 1, positions], dim=1), grid)
        sight = self._sight(positions, grid, cache)
        for i, block in enumerate(self.blocks):
            kept = None if cache is None else KeyValues(cache, f"block{i}", total)
            x = block(x, place, sight, cond.text, cond.text_mask, kept)
        if cache is not None:
            cache.length += positions.shape[1]
        logits: Tensor = self.head(self.norm(x))
        return logits

    def _sight(self, positions: Int[Tensor, "#b n"], grid: Grid, cache: TokenCache | None) -> Tiles | Reads | Tensor:
        """Who sees whom."""
        if cache is not None:
            return reads_of(self.context, cache.length, positions.shape[1], grid, cache.window, positions.device)
        if positions.shape[1] < grid[0] * grid[1] * grid[2]:
            return window_mask(self.context, positions, grid)
        known = self.tiles.get(grid)
        if known is None or known.bias.device != positions.device:
            known = self.tiles[grid] = tiles_of(self.context, grid, positions.device)
        return known


def places(positions: Int[Tensor, "#b n"], grid: Grid) -> Float[Tensor, "#b n 3"]:
    """(t, h, w) of each; −1, before the first, is to the left of it."""
    _, h, w = grid
    place = torch.stack([positions // (h * w), positions // w % h, positions % w], dim=-1)
    first = place.new_tensor([0, 0, -1])
    return torch.where(positions[..., None] < 0, first, place).float()


class SparseBlock(nn.Module):
    """Sparse causal attention, cross-attention to the caption where there is one, MLP."""

    def __init__(self, config: SparseGPT, text_dim: int | None) -> None:
        super().__init__()
        width, heads = config.width, config.heads
        self.norm1 = nn.LayerNorm(width)
        self.attention = SparseAttention(width, heads)
        self.norm_cross = nn.LayerNorm(width) if text_dim else None
        self.cross = Attention(width, heads, context_width=text_dim) if text_dim else None
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, int(config.mlp_ratio * width))
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        place: Float[Tensor, "#b n1 3"],
        sight: Tiles | Reads | Bool[Tensor, "b 1 n n"],
        text: Float[Tensor, "b l e"] | None = None,
        text_mask: Tensor | None = None,
        kept: KeyValues | None = None,
    ) -> Float[Tensor, "b n d"]:
        """place: of the position before the first, and of all n."""
        x = x + self.dropout(self.attention(self.norm1(x), place, sight, kept))

        if self.cross is not None and self.norm_cross is not None and text is not None and text_mask is not None:
            cross, words = self.cross, text.to(x.dtype)
            k, v = cross.keys_values(words) if kept is None else kept.once(lambda: cross.keys_values(words))
            x = x + self.dropout(cross.attend(self.norm_cross(x), k, v, text_mask[:, None]))

        return x + self.dropout(self.mlp(self.norm2(x)))


class SparseAttention(nn.Module):
    """Multi-head attention with QK-norm and rotary embeddings, of positions to the states that they see."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, head_dim = heads, width // heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.query_scale = nn.Parameter(torch.ones(head_dim))
        self.key_scale = nn.Parameter(torch.ones(head_dim))
        # Radians per step along t, h and w: from 1 down to 0.1, in directions of space-time drawn at random
        directions = F.normalize(torch.randn(heads, head_dim // 2, 3), dim=-1)
        self.frequencies = nn.Parameter(directions * torch.logspace(0, -1, head_dim // 2)[:, None])
        self.out = nn.Linear(width, width)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        place: Float[Tensor, "#b n1 3"],
        sight: Tiles | Reads | Bool[Tensor, "b 1 n n"],
        kept: KeyValues | None = None,
    ) -> Float[Tensor, "b n d"]:
        """place: of the position before the first, and of all n. A position asks from its own place; what it holds, the
        token before it, is found at that token's."""
        along = 1
        if isinstance(sight, Tiles):  # keys are gathered by position, which so is the first axis
            x, place, along = x.transpose(0, 1).contiguous(), place.transpose(0, 1).contiguous(), 0
        v = self.value(x).unflatten(-1, (self.heads, -1))
        turns = self._turns(place, torch.promote_types(x.dtype, torch.float32))
        n = x.shape[along]
        q = self._turned(self.query(x), self.query_scale, turns.narrow(along, 1, n)).to(v.dtype)
        k = self._turned(self.key(x), self.key_scale, turns.narrow(along, 0, n)).to(v.dtype)
        if isinstance(sight, Tiles):
            y = attend_tiles(q, k, v, sight).transpose(0, 1)
        elif isinstance(sight, Reads):
            assert kept is not None
            keys, values = (_keep(kept, name, y, sight.total) for name, y in (("keys", k), ("values", v)))
            y = attend_kept(q, keys, values, sight)
        else:
            q, k, v = (y.transpose(1, 2) for y in (q, k, v))
            y = scaled_dot_product_attention(q, k, v, sight).transpose(1, 2)
        return self.out(y.flatten(2))

    def _turns(self, place: Float[Tensor, "#b #n 3"], dtype: torch.dtype) -> Complex[Tensor, "#b #n heads e2"]:
        """The place times the frequencies, as unit numbers; in no less than fp32, as far places turn often."""
        with torch.autocast(place.device.type, enabled=False):
            angle = place.to(dtype) @ self.frequencies.to(dtype).flatten(0, 1).T
        angle = angle.unflatten(-1, (self.heads, -1))
        return torch.complex(angle.cos(), angle.sin())

    def _turned(
        self, y: Float[Tensor, "b n d"], scale: Float[Tensor, "e"], turns: Complex[Tensor, "#b #n heads e2"]
    ) -> Float[Tensor, "b n heads e"]:
        """Normalised and turned, pair by pair."""
        y = y.unflatten(-1, (self.heads, -1))
        y = F.layer_norm(y, scale.shape, scale.to(y.dtype), eps=1e-6).to(turns.real.dtype)
        return torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2))) * turns).flatten(-2)


def attend_tiles(
    q: Float[Tensor, "n b heads e"], k: Float[Tensor, "n b heads e"], v: Float[Tensor, "n b heads e"], tiles: Tiles
) -> Float[Tensor, "n b heads e"]:
    """Attention of each tile's positions to the tile's states.

    The batch goes to the heads: so one bias is for all of it, and what is gathered of a position is one long row. On a
    GPU by `embedding`, whose backward pass adds up rows in the same order each time; on a CPU that of `index_select`
    does, and takes half as long.
    """
    n, b, heads, e = q.shape
    groups, _, rows, _ = tiles.bias.shape

    def taken(y: Tensor, places: Tensor) -> Tensor:
        y = y.reshape(len(y), -1)
        return F.embedding(places, y) if y.is_cuda else y.index_select(0, places)

    gather = lambda y, places: taken(y, places).view(groups, -1, b * heads, e).transpose(1, 2)
    y = scaled_dot_product_attention(gather(q, tiles.queries), gather(k, tiles.keys), gather(v, tiles.keys), tiles.bias)
    return taken(y.transpose(1, 2).reshape(groups * rows, -1), tiles.rows).view(n, b, heads, e)


def attend_kept(
    q: Float[Tensor, "b n heads e"],
    k: Float[Tensor, "b m heads e"],
    v: Float[Tensor, "b m heads e"],
    reads: Reads,
) -> Float[Tensor, "b n heads e"]:
    """Attention of each position to the states that it reads, of those that are kept: the same cost for each, however
    many are kept."""
    b, n, heads, e = q.shape
    some = max(1, GATHERED // (b * reads.states.shape[1] * heads * e))
    parts = []
    for first in range(0, n, some):
        part = slice(first, first + some)
        seen_k, seen_v = (y[:, reads.states[part]].flatten(0, 1).transpose(1, 2) for y in (k, v))
        mask = reads.mask[part].repeat(b, 1, 1, 1)
        y = scaled_dot_product_attention(q[:, part].reshape(-1, heads, 1, e), seen_k, seen_v, mask)
        parts.append(y.view(b, -1, heads, e))
    return torch.cat(parts, dim=1)


def _keep(kept: KeyValues, name: str, new: Float[Tensor, "b n heads e"], total: int) -> Float[Tensor, "b m heads e"]:
    """What is kept by this name, with what is new behind it, written in place."""
    name, start = f"{kept.layer}.{name}", kept.cache.length
    if name not in kept.cache.state:
        kept.cache.state[name] = new.new_empty(len(new), total, *new.shape[2:])
    kept.cache.state[name][:, start : start + new.shape[1]] = new
    return kept.cache.state[name]
