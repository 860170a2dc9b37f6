"""Two towers, one over videos and one over captions, into one space (CLIP, arXiv:2103.00020).

The video tower is ViViT's factorised encoder (arXiv:2103.15691 §3.3, model 2), as DALLE2-video has it: blocks within
each frame, whose tokens' mean becomes the frame's one token; blocks along time; the mean over frames. Positions are
fixed sinusoids, so that clips of any length and size go that the patch divides. The text tower attends to the text
encoder's embeddings, which bring the words' places with them; padding is masked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mutoscope.models.layers import MLP, Attention, line_sinusoid, plane_sinusoid
from mutoscope.models.patches import grid_of, patchify
from mutoscope.recipe import ModelConfig
from mutoscope.types import Cond, ModelIO

Tower = Literal["space", "time", "text"]
MAX_SCALE = 100.0
"""Cosines are multiplied by no more than that: a temperature of 0.01 (arXiv:2103.00020 §2.5)."""


@dataclass(frozen=True, kw_only=True)
class Clip(ModelConfig):
    """A video tower and a text tower; as it stands, the video tower of DALLE2-video, with a text tower as large."""

    width: int = 512
    """Width of both towers: a multiple of 4 and of `heads`."""
    heads: int = 8
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs over `width`."""
    space_depth: int = 2
    """Blocks that attend within a frame."""
    time_depth: int = 2
    """Blocks that attend along time."""
    text_depth: int = 2
    """Blocks over the caption; 0 for text encoders that have seen the words together already."""
    patch: tuple[int, int, int] = (1, 56, 56)
    """Pixels, or latent positions, (t, h, w) that make one token; above one frame they are tubelets."""
    embedding: int = 512
    """Width of the space that videos and captions meet in."""
    temperature: float = 0.07
    """That cosines are divided by at first; it is learned, and never falls below 0.01."""

    def __post_init__(self) -> None:
        if self.width % 4 or self.width % self.heads:
            raise ValueError(f"model.width={self.width} must be a multiple of 4 and of heads={self.heads}")
        for name in ("space_depth", "time_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} must be at least 1")
        if self.text_depth < 0 or self.embedding < 1:
            raise ValueError(f"model: text_depth={self.text_depth} must be at least 0, embedding={self.embedding} at "
                             "least 1")  # fmt: skip
        if not 1 / MAX_SCALE <= self.temperature <= 1:
            raise ValueError(f"model.temperature={self.temperature} must be from {1 / MAX_SCALE} to 1")

    def build(self, io: ModelIO) -> ClipModel:
        return ClipModel(self, io)


class ClipModel(nn.Module):
    """(B, c, t, h, w), Cond -> embeddings of videos (B, e) and of captions (B, e), both of length 1 and fp32, and what
    their cosines are to be multiplied by (1,)."""

    def __init__(self, config: Clip, io: ModelIO) -> None:
        """Raises ValueError where the recipe has no text, or the patch does not divide a grid of `io`."""
        super().__init__()
        if io.text_dim is None:
            raise ValueError("Clip compares videos with captions, and the recipe has no text; set recipe.text")
        for grid in (io.grid, *io.more_grids):
            grid_of(grid, config.patch)
        self.patch, width = config.patch, config.width
        self.embed = nn.Linear(io.channels * math.prod(config.patch), width)
        self.words = nn.Linear(io.text_dim, width)
        towers: dict[Tower, int] = {
            "space": config.space_depth, "time": config.time_depth, "text": config.text_depth
        }  # fmt: skip
        self.blocks = nn.ModuleList(ClipBlock(config, tower) for tower, depth in towers.items() for _ in range(depth))
        self.norms = nn.ModuleDict({tower: nn.LayerNorm(width) for tower in towers})
        self.video_projection = nn.Linear(width, config.embedding, bias=False)
        self.text_projection = nn.Linear(width, config.embedding, bias=False)
        # Of one dimension, since FSDP takes no scalars
        self.log_scale = nn.Parameter(torch.tensor([-math.log(config.temperature)]))
        self._init_weights()

    def _init_weights(self) -> None:
        """Xavier for matrices, and the ends of residual branches smaller by sqrt(2·depth) (GPT-2, as CLIP has it)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            assert isinstance(block, ClipBlock)
            depth = sum(other.tower == block.tower for other in self.blocks)
            for end in (block.attention.out, block.mlp.down):
                end.weight.data /= math.sqrt(2 * depth)

    def forward(
        self, video: Float[Tensor, "b c t h w"], cond: Cond
    ) -> tuple[Float[Tensor, "b e"], Float[Tensor, "b e"], Float[Tensor, "1"]]:
        scale = self.log_scale.float().clamp(max=math.log(MAX_SCALE)).exp()
        return self.embed_video(video), self.embed_text(cond), scale

    def embed_video(self, video: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b e"]:
        """Of length 1."""
        t, h, w = grid_of((video.shape[2], video.shape[3], video.shape[4]), self.patch)
        weight, width = self.embed.weight, self.embed.out_features
        places = [torch.arange(size, dtype=torch.float32) for size in (t, h, w)]
        x = self.embed(patchify(video.to(weight.dtype), self.patch))  # (b, t, n, d)
        x = x + plane_sinusoid(places[1], places[2], width).to(x)
        x = self._through("space", x.flatten(0, 1)).mean(1).unflatten(0, (-1, t))
        x = self._through("time", x + line_sinusoid(places[0], width).to(x)).mean(1)
        return F.normalize(self.video_projection(x).float(), dim=-1)

    def embed_text(self, cond: Cond) -> Float[Tensor, "b e"]:
        """Of length 1. Raises ValueError for conditions without text."""
        if cond.text is None or cond.text_mask is None:
            raise ValueError("these clips come without embeddings of their captions; set recipe.text")
        mask = cond.text_mask
        x = self._through("text", self.words(cond.text.to(self.words.weight.dtype)), mask)
        x = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return F.normalize(self.text_projection(x).float(), dim=-1)

    def _through(
        self, tower: Tower, x: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n d"]:
        for block in self.blocks:
            if block.tower == tower:
                x = block(x, mask)
        out: Tensor = self.norms[tower](x)
        return out


class ClipBlock(nn.Module):
    """Attention and MLP."""

    def __init__(self, config: Clip, tower: Tower) -> None:
        super().__init__()
        self.tower = tower
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config.width, int(config.mlp_ratio * config.width))

    def forward(self, x: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n d"]:
        """`mask` is True on what may be seen."""
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.mlp(self.norm2(x))
