"""STDiT, the transformers of Open-Sora 1.0 to 1.2 (https://github.com/hpcaitech/Open-Sora, opensora/models/stdit).

Time (and class) enter by adaLN-single (PixArt-α, arXiv:2310.00426 §2.3): one projection for all blocks, to which each
adds a table of its own. Captions enter by cross-attention.

    1  (STDiT)   Each block attends within frames, along time, to the caption, and ends in an MLP. Sinusoids of time are
                 added in the first block. Attention along time takes the residual stream as it is, neither normalised
                 nor modulated, and shares the gate of attention within frames. That is Open-Sora's code, and what its
                 checkpoints are; it is kept as it is.
    2  (STDiT2)  Attention along time has a norm, a modulation and rotary positions of its own; queries and keys are
                 normalised; the model is told the video's size and rate, and frames that are known are modulated by a
                 time of their own.
    3  (STDiT3)  As 2, but blocks within frames and blocks along time take turns, each with a caption and an MLP;
                 `depth` counts pairs.

Open-Sora embeds sizes by one small MLP each; here all go through one, as in SDXL (arXiv:2307.01952 §2.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mutoscope.models.dit import attend
from mutoscope.models.layers import (
    MLP,
    Attention,
    TimeEmbedding,
    add_gated,
    frame_places,
    line_sinusoid,
    modulate,
    plane_sinusoid,
    sinusoid,
)
from mutoscope.models.patches import Grid, grid_of, label_rows, patchify, token_times, unpatchify
from mutoscope.models.ulysses import ContextGroup, Parts
from mutoscope.recipe import ModelConfig
from mutoscope.types import Cond, ModelIO

FREQUENCIES = 256
"""Of each of the sizes that the model is told."""


@dataclass(frozen=True, kw_only=True)
class STDiT(ModelConfig):
    """Open-Sora's transformer; as it stands, that of Open-Sora 1.2 (STDiT3-XL/2)."""

    version: Literal[1, 2, 3] = 3
    """1: STDiT of Open-Sora 1.0. 2: own modulation and rotary positions along time, sizes, known frames (1.1).
    3: blocks within frames and along time in turn (1.2)."""
    depth: int = 28
    """Number of blocks; of version 3, of pairs of blocks."""
    width: int = 1152
    """Width of the residual stream: a multiple of 4 and of 2·`heads`."""
    heads: int = 16
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs over `width`."""
    patch: tuple[int, int, int] = (1, 2, 2)
    """Latent positions (t, h, w) that make one token."""
    base_frames: int | None = None
    """Frames of tokens that positions along time are counted in; those of longer videos are interpolated into them
    (arXiv:2306.15595), for training that goes on from a model of shorter ones: 8, to go from 8 to 32. none: 0, 1, 2, …
    """

    def __post_init__(self) -> None:
        if self.width % 4 or self.width % (2 * self.heads):
            raise ValueError(f"model.width={self.width} must be a multiple of 4 and of 2·heads, heads={self.heads}")
        if self.base_frames is not None and self.base_frames < 1:
            raise ValueError(f"model.base_frames={self.base_frames} must be at least 1")

    def build(self, io: ModelIO) -> STDiTModel:
        return STDiTModel(self, io)


class STDiTModel(nn.Module):
    """(B, c, t, h, w), time (B,) or of each frame (B, t), Cond -> (B, c or 2c, t, h, w)."""

    context: ContextGroup | None = None
    """Processes that share each video: every one has a part of each frame's tokens."""

    def __init__(self, config: STDiT, io: ModelIO) -> None:
        super().__init__()
        self.patch, self.base_frames, self.version = config.patch, config.base_frames, config.version
        self.grid = grid_of(io.grid, self.patch)
        for grid in io.more_grids:
            grid_of(grid, self.patch)
        width, patch_size = config.width, config.patch[0] * config.patch[1] * config.patch[2]
        self.heads, self.head_dim = config.heads, width // config.heads

        self.embed = nn.Linear(io.channels * patch_size, width)
        self.positions: dict[Grid, Positions] = {}
        self.time = TimeEmbedding(width)
        # The last row stands for "no label".
        self.label = nn.Embedding(io.num_labels + 1, width) if io.num_labels else None
        self.sizes = SizeEmbedding(width) if config.version > 1 else None
        self.caption = MLP(io.text_dim, width, width) if io.text_dim else None
        self.modulation = nn.Linear(width, 6 * width)
        self.modulation_time = nn.Linear(width, 3 * width) if config.version == 2 else None
        has_text = io.text_dim is not None
        axes: list[Literal["space", "time", "both"]] = ["space", "time"] if config.version == 3 else ["both"]
        self.blocks = nn.ModuleList(STDiTBlock(config, has_text, axis) for _ in range(config.depth) for axis in axes)
        self.final_norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.final_table = nn.Parameter(torch.randn(1, 2, width) / width**0.5)
        self.head = nn.Linear(width, (io.out_channels or io.channels) * patch_size)
        self._init_weights()

    def _init_weights(self) -> None:
        """Open-Sora's: Xavier for matrices, 0.02 for what embeds, zero for attention along time (in version 3, for all
        of such a block), for captions and for the end of the network."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        small = [self.time.up.weight, self.time.down.weight, self.modulation.weight]
        small += [self.label.weight] if self.label is not None else []
        small += [self.modulation_time.weight] if self.modulation_time is not None else []
        small += [self.caption.up.weight, self.caption.down.weight] if self.caption is not None else []
        for weight in small:
            nn.init.normal_(weight, std=0.02)
        ends = [self.head]
        for block in self.blocks:
            assert isinstance(block, STDiTBlock)
            ends += [block.cross.out] if block.cross is not None else []
            ends += [block.attention_time.out] if block.attention_time is not None else []
            ends += [block.attention.out, block.mlp.down] if block.along == "time" else []
        for module in ends:
            nn.init.zeros_(module.weight)

    def forward(
        self, x: Float[Tensor, "b c t h w"], time: Float[Tensor, "b"] | Float[Tensor, "b t"], cond: Cond
    ) -> Float[Tensor, "b k t h w"]:
        """Frames that are known come with a time of each frame, whose label and caption are the video's."""
        grid = grid_of((x.shape[2], x.shape[3], x.shape[4]), self.patch)
        at = self._positions(grid)

        # 1. Patches, and what modulates them: (b, 1 or t, d)
        c = self.time(token_times(time, self.patch))
        if self.label is not None:
            c = c + label_rows(cond, self.label, len(x))[:, None]
        if self.sizes is not None:
            c = c + self.sizes(x, cond)[:, None]
        active = nn.functional.silu(c)
        m = self.modulation(active)
        m_time = self.modulation_time(active) if self.modulation_time is not None else None
        patches, plane, parts = patchify(x, self.patch), at.plane, None
        if self.context is not None:
            parts = self.context.parts(patches.shape[2])
            patches, plane = parts.own(patches, -2), parts.own(plane, -2)
        x = self.embed(patches) + plane  # (b, t, n, d)
        text = self.caption(cond.text.to(x.dtype)) if self.caption is not None and cond.text is not None else None

        # 2. Blocks
        for i, block in enumerate(self.blocks):
            x = block(x, m, m_time, text, cond.text_mask, at.line if i == 0 else None, at.rotary, parts)

        # 3. Prediction
        shift, scale = (self.final_table + c.unsqueeze(2)).unbind(2)
        out = self.head(modulate(self.final_norm(x), shift, scale))
        return unpatchify(out if parts is None else parts.whole(out, -2), grid, self.patch)

    def share_sequence(self, group: ContextGroup) -> None:
        """See `ulysses.share_sequence`."""
        group.check_heads(self.heads)
        self.context = group

    def _positions(self, grid: Grid) -> Positions:
        """Of this grid, in the dtype and on the device of the model's weights. The rows and columns of a bucket are
        stretched over those of the recipe's own size, which versions above 1 are trained at several sizes for."""
        weight = self.embed.weight
        known = self.positions.get(grid)
        if known is None or known.plane.device != weight.device or known.plane.dtype != weight.dtype:
            stretch = [own / size for own, size in zip(self.grid[1:], grid[1:], strict=True)]
            stretch = [1.0, 1.0] if self.version == 1 else stretch
            h, w = (s * torch.arange(n, dtype=torch.float32) for s, n in zip(stretch, grid[1:], strict=True))
            along_time, width = frame_places(grid[0], self.base_frames), self.embed.out_features
            turns = sinusoid(along_time, self.head_dim)
            cos, sin = turns.to(weight.device).chunk(2, -1)
            known = Positions(
                plane=plane_sinusoid(h, w, width)[None].to(weight),
                line=line_sinusoid(along_time, width)[:, None].to(weight) if self.version == 1 else None,
                rotary=(cos, sin) if self.version > 1 else None,
            )
            self.positions[grid] = known
        return known


@dataclass(frozen=True)
class Positions:
    """Where the tokens of a grid are."""

    plane: Float[Tensor, "1 n d"]
    """Rows and columns, added to the tokens."""
    line: Float[Tensor, "t 1 d"] | None
    """Times, added in the first block before attention along time; of version 1."""
    rotary: tuple[Float[Tensor, "t e"], Float[Tensor, "t e"]] | None
    """cos and sin of the angles that attention along time turns by, fp32; of versions above 1."""


class SizeEmbedding(nn.Module):
    """Height, width, aspect ratio, frames (all of latents) and frames per second -> one vector a video."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(5 * FREQUENCIES, width)
        self.down = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "b c t h w"], cond: Cond) -> Float[Tensor, "b d"]:
        b, _, t, h, w = x.shape
        # The ratio is about 1: times 100, it is as far apart in the waves as the sizes are
        sizes = x.new_tensor([h, w, 100 * h / w, t], dtype=torch.float32).expand(b, 4)
        fps = cond.fps if cond.fps is not None else x.new_zeros(b, dtype=torch.float32)
        values = torch.cat([sizes, fps[:, None]], 1)
        waves = sinusoid(values.flatten(), FREQUENCIES).unflatten(0, (b, 5)).flatten(1)
        return self.down(nn.functional.silu(self.up(waves.to(self.up.weight.dtype))))


class STDiTBlock(nn.Module):
    """Attention within frames, along time, or first one and then the other; cross-attention to the caption; MLP."""

    def __init__(self, config: STDiT, has_text: bool, along: Literal["space", "time", "both"]) -> None:
        super().__init__()
        width, heads, modern = config.width, config.heads, config.version > 1
        self.along = along
        norm = lambda: nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        # Tables have an axis for the batch, lest Muon takes them for matrices
        self.table = nn.Parameter(torch.randn(1, 6, width) / width**0.5)
        self.norm1 = norm()
        self.attention = Attention(width, heads, qk_norm=modern)
        self.attention_time = Attention(width, heads, qk_norm=modern) if along == "both" else None
        own = along == "both" and modern
        self.table_time = nn.Parameter(torch.randn(1, 3, width) / width**0.5) if own else None
        self.norm_time = norm() if own else None
        self.cross = Attention(width, heads, qk_norm=False) if has_text else None
        self.norm2 = norm()
        self.mlp = MLP(width, int(config.mlp_ratio * width))

    def forward(
        self,
        x: Float[Tensor, "b t n d"],
        m: Float[Tensor, "b f d6"],
        m_time: Float[Tensor, "b f d3"] | None,
        text: Float[Tensor, "b l d"] | None,
        text_mask: Tensor | None,
        line: Float[Tensor, "t 1 d"] | None,
        rotary: tuple[Tensor, Tensor] | None,
        parts: Parts | None = None,
    ) -> Float[Tensor, "b t n d"]:
        """m, m_time: what the blocks share of modulation and of that along time, of a whole video (f = 1) or of each
        of its frames. line, rotary: see `Positions`. parts: of a frame's tokens, where processes share them."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.table + m.unflatten(-1, (6, -1))).unbind(2)

        # 1. Attention within frames, or of a block that is along time, along it
        y = modulate(self.norm1(x), shift1, scale1)
        axis: Literal["space", "time"] = "time" if self.along == "time" else "space"
        y = attend(self.attention, y, axis, rotary if axis == "time" else None, parts)
        x = add_gated(x, gate1, y)

        # 2. Attention along time
        if self.attention_time is not None:
            if self.norm_time is None or self.table_time is None or m_time is None:  # version 1
                y, gate = x if line is None else x + line, gate1
            else:
                shift, scale, gate = (self.table_time + m_time.unflatten(-1, (3, -1))).unbind(2)
                y = modulate(self.norm_time(x), shift, scale)
            x = add_gated(x, gate, attend(self.attention_time, y, "time", rotary))

        # 3. Cross-attention to the caption
        if self.cross is not None and text is not None:
            x = x + self.cross(x.flatten(1, 2), text, text_mask).unflatten(1, x.shape[1:3])

        # 4. MLP
        return add_gated(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))
