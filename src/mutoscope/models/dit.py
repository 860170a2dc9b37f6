"""Diffusion transformer over video latents.

``factorised`` is Latte's Variant 1 (arXiv:2401.03048 §3.2): blocks attend in turn within a frame and along time.
``joint`` lets every block attend to every position: better where a video has few of them. Time and class enter by
adaLN-Zero (DiT, arXiv:2212.09748); captions by cross-attention, whose output is zero at the start too. Positions are
fixed sinusoids of t, h and w side by side, added once (Latte adds its temporal ones before the second block).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mutoscope.models.layers import MLP, Attention, TimeEmbedding, grid_sinusoid, modulate
from mutoscope.recipe import ModelConfig
from mutoscope.types import NO_LABEL, Cond, ModelIO


@dataclass(frozen=True, kw_only=True)
class DiT(ModelConfig):
    """A diffusion transformer. Latte's sizes (depth, width, heads): S 12, 384, 6 · B 12, 768, 12 · L 24, 1024, 16 ·
    XL 28, 1152, 16, each with patch 2, 4 or 8."""

    depth: int = 12
    """Number of blocks; even where attention is factorised."""
    width: int = 384
    """Width of the residual stream: a multiple of 8 and of `heads`."""
    heads: int = 6
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs over `width`."""
    patch: tuple[int, int, int] = (1, 2, 2)
    """Latent positions (t, h, w) that make one token."""
    attention: Literal["factorised", "joint"] = "factorised"
    """factorised: within a frame and along time in turn. joint: over all positions."""

    def __post_init__(self) -> None:
        if self.width % 8 or self.width % self.heads:
            raise ValueError(f"model.width={self.width} must be a multiple of 8 and of heads={self.heads}")
        if self.attention == "factorised" and self.depth % 2:
            raise ValueError(f"model.depth={self.depth} must be even: factorised blocks come in pairs")

    def build(self, io: ModelIO) -> DiTModel:
        return DiTModel(self, io)


class DiTModel(nn.Module):
    """(B, c, t, h, w), time (B,), Cond -> (B, c, t, h, w)."""

    def __init__(self, config: DiT, io: ModelIO) -> None:
        super().__init__()
        self.patch, self.channels = config.patch, io.channels
        self.grid = self._tokens(io.grid)
        for grid in io.more_grids:
            self._tokens(grid)
        width, patch_dim = config.width, io.channels * config.patch[0] * config.patch[1] * config.patch[2]

        self.embed = nn.Linear(patch_dim, width)
        self.positions: dict[tuple[int, int, int], Tensor] = {}
        self.time = TimeEmbedding(width)
        # The last row stands for "no label".
        self.label = nn.Embedding(io.num_labels + 1, width) if io.num_labels else None
        self.blocks = nn.ModuleList(
            DiTBlock(config, io.text_dim, along=self._axis(config, i)) for i in range(config.depth)
        )
        self.final_modulation = nn.Linear(width, 2 * width)
        self.final_norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.head = nn.Linear(width, patch_dim)
        self._init_weights()

    @staticmethod
    def _axis(config: DiT, i: int) -> Literal["space", "time", "all"]:
        if config.attention == "joint":
            return "all"
        return "space" if i % 2 == 0 else "time"

    def _init_weights(self) -> None:
        """DiT's: Xavier for matrices, 0.02 for embeddings, zero for whatever ends a residual branch or the network."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for weight in (self.time.up.weight, self.time.down.weight):
            nn.init.normal_(weight, std=0.02)
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.02)
        ends = [self.head, self.final_modulation]
        for block in self.blocks:
            assert isinstance(block, DiTBlock)
            ends += [block.modulation] + ([block.cross.out] if block.cross is not None else [])
        for module in ends:
            nn.init.zeros_(module.weight)

    def forward(
        self, x: Float[Tensor, "b c t h w"], time: Float[Tensor, "b"], cond: Cond
    ) -> Float[Tensor, "b c t h w"]:
        grid = self._tokens((x.shape[2], x.shape[3], x.shape[4]))
        x = self.embed(self._patchify(x, grid)) + self._positions(grid)  # (b, t, n, d)
        c = self.time(time)
        if self.label is not None:
            null = self.label.num_embeddings - 1
            label = cond.label if cond.label is not None else torch.full((len(x),), NO_LABEL, device=x.device)
            c = c + self.label(torch.where(label == NO_LABEL, null, label))
        c = nn.functional.silu(c)
        for block in self.blocks:
            x = block(x, c, cond.text, cond.text_mask)
        shift, scale = self.final_modulation(c).chunk(2, dim=-1)
        x = self.head(modulate(self.final_norm(x).flatten(1, 2), shift, scale))
        return self._unpatchify(x, grid)

    def _tokens(self, grid: tuple[int, int, int]) -> tuple[int, int, int]:
        """Latents along t, h and w -> tokens. Any size goes that the patch divides: buckets have several."""
        for axis, size, patch in zip("thw", grid, self.patch, strict=True):
            if size % patch:
                raise ValueError(f"model.patch {self.patch} does not divide the latent grid {grid} along {axis}")
        t, h, w = (size // patch for size, patch in zip(grid, self.patch, strict=True))
        return t, h, w

    def _positions(self, grid: tuple[int, int, int]) -> Float[Tensor, "t n d"]:
        """Of this grid, as the model's weights are: in their dtype, on their device."""
        weight = self.embed.weight
        known = self.positions.get(grid)
        if known is None or known.device != weight.device or known.dtype != weight.dtype:
            known = self.positions[grid] = grid_sinusoid(grid, self.embed.out_features).to(weight)
        return known

    def _patchify(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        (t, h, w), (pt, ph, pw) = grid, self.patch
        x = x.reshape(len(x), self.channels, t, pt, h, ph, w, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
        return x.reshape(len(x), t, h * w, -1)

    def _unpatchify(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        (t, h, w), (pt, ph, pw) = grid, self.patch
        x = x.reshape(len(x), t, h, w, self.channels, pt, ph, pw).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return x.reshape(len(x), self.channels, t * pt, h * ph, w * pw)


class DiTBlock(nn.Module):
    """Attention along `along`, cross-attention to the caption where there is one, MLP; gated by time and class."""

    def __init__(self, config: DiT, text_dim: int | None, along: Literal["space", "time", "all"]) -> None:
        super().__init__()
        width = config.width
        self.along = along
        self.modulation = nn.Linear(width, 6 * width)
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attention = Attention(width, config.heads)
        self.cross = Attention(width, config.heads, context_width=text_dim) if text_dim else None
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = MLP(width, int(config.mlp_ratio * width))

    def forward(
        self,
        x: Float[Tensor, "b t n d"],
        c: Float[Tensor, "b d"],
        text: Float[Tensor, "b l e"] | None = None,
        text_mask: Tensor | None = None,
    ) -> Float[Tensor, "b t n d"]:
        b, t, n, d = x.shape
        x = x.flatten(1, 2)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=-1)

        # 1. Self-attention, over the axis that this block looks along
        y = modulate(self.norm1(x), shift1, scale1)
        if self.along == "space":
            y = self.attention(y.reshape(b * t, n, d)).reshape(b, t * n, d)
        elif self.along == "time":
            y = y.reshape(b, t, n, d).transpose(1, 2).reshape(b * n, t, d)
            y = self.attention(y).reshape(b, n, t, d).transpose(1, 2).reshape(b, t * n, d)
        else:
            y = self.attention(y)
        x = torch.addcmul(x, gate1.unsqueeze(1), y)

        # 2. Cross-attention to the caption
        if self.cross is not None and text is not None:
            x = x + self.cross(x, text.to(x.dtype), text_mask)

        # 3. MLP
        y = self.mlp(modulate(self.norm2(x), shift2, scale2))
        return torch.addcmul(x, gate2.unsqueeze(1), y).unflatten(1, (t, n))
