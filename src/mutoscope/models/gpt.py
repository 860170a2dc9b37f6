"""A GPT over the tokens of a clip: causal attention in raster order (t, h, w).

The blocks are GPT-2's (pre-norm, GELU, learned positions), with QK-norm, and with cross-attention where there are
captions. What they are given at each position is in `token_inputs.py`, what they keep of it in `kv_cache.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from mutoscope.models.kv_cache import KeyValues
from mutoscope.models.layers import MLP, Attention, Dropout
from mutoscope.models.token_inputs import Positions, TokenInputs, positions_of, token_shapes
from mutoscope.recipe import ModelConfig
from mutoscope.types import Cond, ModelIO, TokenCache


@dataclass(frozen=True, kw_only=True)
class GPT(ModelConfig):
    """A transformer that tells the next token. GPT-2's sizes (depth, width, heads): small 12, 768, 12 · medium 24,
    1024, 16."""

    depth: int = 8
    """Number of blocks."""
    width: int = 768
    """Width of the residual stream: a multiple of `heads`."""
    heads: int = 6
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs over `width`."""
    dropout: float = 0.0
    """Share of the inputs and of what each branch adds to them that is dropped in training. (Attention's weights are
    not, or it could not be fused.)"""
    positions: Positions = "3d"
    """3d: a table of positions for each of t, h and w. 1d: one for the place in raster order, as in GPT-2."""
    neighbours: bool = True
    """Give each position the known tokens around it in space and time, not only the one before it in raster order."""
    qk_norm: bool = True
    """Normalise queries and keys; GPT-2 does not."""

    def __post_init__(self) -> None:
        if min(self.depth, self.width, self.heads) < 1 or self.width % self.heads:
            raise ValueError(f"model: depth={self.depth} must be at least 1, and width={self.width} a multiple of "
                             f"heads={self.heads}")  # fmt: skip
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout={self.dropout:g} must be at least 0 and below 1")

    def build(self, io: ModelIO) -> GPTModel:
        return GPTModel(self, io)


class GPTModel(nn.Module):
    """A `TokenModel`."""

    def __init__(self, config: GPT, io: ModelIO) -> None:
        super().__init__()
        vocab, self.grid = token_shapes(io)
        self.inputs = TokenInputs(
            config.width, vocab, self.grid, io.num_labels, positions=config.positions, neighbours=config.neighbours
        )
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(GPTBlock(config, io.text_dim) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, vocab, bias=False)
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
        total = tokens[0].numel()
        positions = positions_of(start, length, total, tokens)
        x = self.dropout(self.inputs(tokens, cond, positions))
        for i, block in enumerate(self.blocks):
            kept = None if cache is None else KeyValues(cache, f"block{i}", total)
            x = block(x, cond.text, cond.text_mask, kept)
        if cache is not None:
            cache.length += positions.shape[1]
        logits: Tensor = self.head(self.norm(x))
        return logits


def init_weights(blocks: Iterable[Any], head: nn.Linear) -> None:
    """GPT-2's 0.02, and zero for whatever ends a residual branch (of blocks with `attention`, `cross` and `mlp`) or the
    network: at first, all codes are alike."""
    for block in blocks:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for end in (block.attention.out, block.mlp.down, *([block.cross.out] if block.cross is not None else [])):
            nn.init.zeros_(end.weight)
    nn.init.zeros_(head.weight)


class GPTBlock(nn.Module):
    """Causal attention, cross-attention to the caption where there is one, MLP."""

    def __init__(self, config: GPT, text_dim: int | None) -> None:
        super().__init__()
        width, heads, norm = config.width, config.heads, config.qk_norm
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, qk_norm=norm)
        self.norm_cross = nn.LayerNorm(width) if text_dim else None
        self.cross = Attention(width, heads, context_width=text_dim, qk_norm=norm) if text_dim else None
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, int(config.mlp_ratio * width))
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        text: Float[Tensor, "b l e"] | None = None,
        text_mask: Tensor | None = None,
        kept: KeyValues | None = None,
    ) -> Float[Tensor, "b n d"]:
        # 1. Self-attention, to what is kept, too
        y = self.norm1(x)
        k, v = self.attention.keys_values(y)
        mask, causal = None, True
        if kept is not None:
            k, v, mask, causal = kept.extended(k, v)
        x = x + self.dropout(self.attention.attend(y, k, v, mask, causal=causal))

        # 2. Cross-attention to the caption
        if self.cross is not None and self.norm_cross is not None and text is not None and text_mask is not None:
            cross, words = self.cross, text.to(x.dtype)
            k, v = cross.keys_values(words) if kept is None else kept.once(lambda: cross.keys_values(words))
            x = x + self.dropout(cross.attend(self.norm_cross(x), k, v, text_mask[:, None]))

        # 3. MLP
        return x + self.dropout(self.mlp(self.norm2(x)))
