"""Diffusion transformer over video latents.

``factorised`` is Latte's Variant 1 (arXiv:2401.03048 §3.2): blocks attend in turn within a frame and along time; the
fixed sinusoids of rows and columns are added at the beginning, those of time before the second block.
``joint`` lets every block attend to every position: better where a video has few of them. Its sinusoids of t, h and w
lie side by side and are added once. Time and class enter by adaLN-Zero (DiT, arXiv:2212.09748); captions by
cross-attention, whose output is zero at the start too. Frames that are known are at a time of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mutoscope.models.layers import (
    MLP,
    Attention,
    TimeEmbedding,
    add_gated,
    frame_places,
    grid_sinusoid,
    line_sinusoid,
    modulate,
    plane_sinusoid,
)
from mutoscope.models.patches import Grid, grid_of, label_rows, patchify, token_times, unpatchify
from mutoscope.models.ulysses import ContextGroup, Parts
from mutoscope.recipe import ModelConfig
from mutoscope.types import Cond, ModelIO

Preset = Literal[
    "Latte-T/2", "Latte-T/4", "Latte-T/8", "Latte-S/2", "Latte-S/4", "Latte-S/8", "Latte-B/2", "Latte-B/4",
    "Latte-B/8", "Latte-L/2", "Latte-L/4", "Latte-L/8", "Latte-XL/2", "Latte-XL/4", "Latte-XL/8",
]  # fmt: skip
_SIZES = {"T": (2, 384, 3), "S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
"""Depth, width and heads. T is minisora's own; the others are those of DiT and Latte."""


@dataclass(frozen=True, kw_only=True)
class DiT(ModelConfig):
    """A diffusion transformer; as it stands, Latte-S/2."""

    preset: Preset | None = None
    """One of Latte's sizes by name, in place of depth, width, heads and patch, which stay as they are then."""
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
    qk_norm: bool = True
    """Normalise queries and keys: stable in bf16 at high learning rates. Latte does not."""
    base_frames: int | None = None
    """Frames of tokens that positions along time are counted in; those of longer videos are interpolated into them
    (arXiv:2306.15595), for training that goes on from a model of shorter ones: 8, to go from 8 to 32. none: 0, 1, 2, …
    """

    def __post_init__(self) -> None:
        if self.preset is not None:
            if changed := [n for n in _SIZED if getattr(self, n) != getattr(DiT, n)]:
                raise ValueError(f"model.preset={self.preset} says what {', '.join(changed)} are; leave them out, or "
                                 "set preset = none")  # fmt: skip
            return
        if self.width % 8 or self.width % self.heads:
            raise ValueError(f"model.width={self.width} must be a multiple of 8 and of heads={self.heads}")
        if self.attention == "factorised" and self.depth % 2:
            raise ValueError(f"model.depth={self.depth} must be even: factorised blocks come in pairs")
        if self.base_frames is not None and self.base_frames < 1:
            raise ValueError(f"model.base_frames={self.base_frames} must be at least 1")

    @property
    def sized(self) -> DiT:
        """This configuration with its preset's sizes in the fields."""
        if self.preset is None:
            return self
        sizes = {name: getattr(preset(self.preset), name) for name in _SIZED}
        return replace(self, preset=None, **sizes)

    def build(self, io: ModelIO) -> DiTModel:
        return DiTModel(self.sized, io)


_SIZED = ("depth", "width", "heads", "patch")


def preset(name: str) -> DiT:
    """Latte's size of that name, Latte-SIZE/PATCH, as in "Latte-S/2". Change what should differ with
    `dataclasses.replace`. Raises ValueError with the names there are."""
    if name not in get_args(Preset):
        raise ValueError(f"no size {name!r}; there are {', '.join(get_args(Preset))}")
    size, patch = name.removeprefix("Latte-").split("/")
    depth, width, heads = _SIZES[size]
    return DiT(depth=depth, width=width, heads=heads, patch=(1, int(patch), int(patch)))


class DiTModel(nn.Module):
    """(B, c, t, h, w), time (B,) or of each frame (B, t), Cond -> (B, c or 2c, t, h, w)."""

    context: ContextGroup | None = None
    """Processes that share each video: every one has a part of each frame's tokens."""

    def __init__(self, config: DiT, io: ModelIO) -> None:
        super().__init__()
        self.patch, self.attention, self.base_frames = config.patch, config.attention, config.base_frames
        self.heads = config.heads
        self.grid = grid_of(io.grid, self.patch)
        for grid in io.more_grids:
            grid_of(grid, self.patch)
        width, patch_size = config.width, config.patch[0] * config.patch[1] * config.patch[2]

        self.embed = nn.Linear(io.channels * patch_size, width)
        self.positions: dict[Grid, tuple[Tensor, Tensor | None]] = {}
        self.time = TimeEmbedding(width)
        # The last row stands for "no label".
        self.label = nn.Embedding(io.num_labels + 1, width) if io.num_labels else None
        self.blocks = nn.ModuleList(
            DiTBlock(config, io.text_dim, along=self._axis(config, i)) for i in range(config.depth)
        )
        self.final_modulation = nn.Linear(width, 2 * width)
        self.final_norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.head = nn.Linear(width, (io.out_channels or io.channels) * patch_size)
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
        self, x: Float[Tensor, "b c t h w"], time: Float[Tensor, "b"] | Float[Tensor, "b t"], cond: Cond
    ) -> Float[Tensor, "b k t h w"]:
        """Frames that are known come with a time of each frame, whose label and caption are the video's."""
        grid = grid_of((x.shape[2], x.shape[3], x.shape[4]), self.patch)
        first, second = self._positions(grid)
        patches, parts = patchify(x, self.patch), None
        if self.context is not None:
            parts = self.context.parts(patches.shape[2])
            patches, first = parts.own(patches, -2), parts.own(first, -2)
        x = self.embed(patches) + first  # (b, t, n, d)
        c = self.time(token_times(time, self.patch))  # (b, 1 or t, d)
        if self.label is not None:
            c = c + label_rows(cond, self.label, len(x))[:, None]
        c = nn.functional.silu(c)
        for i, block in enumerate(self.blocks):
            if i == 1 and second is not None:
                x = x + second
            x = block(x, c, cond.text, cond.text_mask, parts)
        shift, scale = self.final_modulation(c).chunk(2, dim=-1)
        out = self.head(modulate(self.final_norm(x), shift, scale))
        return unpatchify(out if parts is None else parts.whole(out, -2), grid, self.patch)

    def share_sequence(self, group: ContextGroup) -> None:
        """See `ulysses.share_sequence`."""
        group.check_heads(self.heads)
        self.context = group

    def _positions(self, grid: Grid) -> tuple[Float[Tensor, "#t n d"], Float[Tensor, "t 1 d"] | None]:
        """What is added before the first and before the second block, as the model's weights are: in their dtype, on
        their device. Any grid goes that the patch divides: buckets have several."""
        weight = self.embed.weight
        known = self.positions.get(grid)
        if known is None or known[0].device != weight.device or known[0].dtype != weight.dtype:
            width = self.embed.out_features
            if self.attention == "joint":
                known = grid_sinusoid(grid, width, self.base_frames).to(weight), None
            else:
                h, w = (torch.arange(size, dtype=torch.float32) for size in grid[1:])
                along_time = line_sinusoid(frame_places(grid[0], self.base_frames), width)
                known = plane_sinusoid(h, w, width)[None].to(weight), along_time[:, None].to(weight)
            self.positions[grid] = known
        return known


class DiTBlock(nn.Module):
    """Attention along `along`, cross-attention to the caption where there is one, MLP; gated by time and class."""

    def __init__(self, config: DiT, text_dim: int | None, along: Literal["space", "time", "all"]) -> None:
        super().__init__()
        width = config.width
        self.along = along
        self.modulation = nn.Linear(width, 6 * width)
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attention = Attention(width, config.heads, qk_norm=config.qk_norm)
        self.cross = Attention(width, config.heads, text_dim, qk_norm=config.qk_norm) if text_dim else None
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = MLP(width, int(config.mlp_ratio * width))

    def forward(
        self,
        x: Float[Tensor, "b t n d"],
        c: Float[Tensor, "b f d"],
        text: Float[Tensor, "b l e"] | None = None,
        text_mask: Tensor | None = None,
        parts: Parts | None = None,
    ) -> Float[Tensor, "b t n d"]:
        """`c` is of a whole video (f = 1) or of each of its frames. parts: of a frame's tokens, where processes share
        them."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=-1)

        # 1. Self-attention, over the axis that this block looks along
        y = attend(self.attention, modulate(self.norm1(x), shift1, scale1), self.along, parts=parts)
        x = add_gated(x, gate1, y)

        # 2. Cross-attention to the caption
        if self.cross is not None and text is not None:
            x = x + self.cross(x.flatten(1, 2), text.to(x.dtype), text_mask).unflatten(1, x.shape[1:3])

        # 3. MLP
        return add_gated(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))


def attend(
    attention: Attention,
    x: Float[Tensor, "b t n d"],
    along: Literal["space", "time", "all"],
    rotary: tuple[Tensor, Tensor] | None = None,
    parts: Parts | None = None,
) -> Float[Tensor, "b t n d"]:
    """Self-attention within each frame, along time at each place, or over everything. parts: of a frame's tokens, where
    processes share them: each then has all that there is along time."""
    b, t, n, _ = x.shape
    if along == "space":
        return attention(x.flatten(0, 1), rotary=rotary, parts=parts).unflatten(0, (b, t))
    if along == "time":
        return attention(x.transpose(1, 2).flatten(0, 1), rotary=rotary).unflatten(0, (b, n)).transpose(1, 2)
    parts = None if parts is None else parts.times(t)
    return attention(x.flatten(1, 2), rotary=rotary, parts=parts).unflatten(1, (t, n))
