"""Mamba over the tokens of a video: a state of fixed size in place of attention.

Blocks are as published: Mamba-1 (arXiv:2312.00752 figure 3) or Mamba-2 (arXiv:2405.21060 figure 6), each behind an
RMSNorm and added to the residual stream; parameters are called as in mamba_ssm and transformers. What comes in is
`token_inputs`: a state that forgets wants to be told where it is and what is around it. Captions enter by
cross-attention, whose output is zero at the start.

**Long videos.** The sequence is computed in pieces of `chunk` positions that hand their states on, which changes no
number. While training, a piece keeps its tokens and the states that it begins at, and is computed again in the backward
pass: what lives is the activations of one piece, and for each piece depth × (expand·width) × (state + conv − 1) numbers
per video. Gradients flow back through the states to the first piece (nothing is truncated): the pieces of one call are
all there when its backward pass begins, so that cutting them off would save nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mutoscope.models.layers import Attention
from mutoscope.models.selective_scan import at_least_fp32, selective_scan, ssd
from mutoscope.models.token_inputs import Positions, TokenInputs, positions_of, token_shapes
from mutoscope.recipe import ModelConfig
from mutoscope.types import Cond, ModelIO, TokenCache


@dataclass(frozen=True, kw_only=True)
class Mamba(ModelConfig):
    """A selective state space model over tokens. mamba_ssm's sizes (depth, width): 130M 24, 768 · 370M 48, 1024 ·
    790M 48, 1536 · 1.4B 48, 2048."""

    version: Literal[1, 2] = 2
    """Mamba-1: a decay for each channel and number of the state; slow on GPUs without mamba_ssm. Mamba-2: a decay for
    each head, computed by matrix products."""
    depth: int = 24
    """Number of blocks."""
    width: int = 768
    """Width of the residual stream."""
    state: int = 64
    """Numbers of state for each channel: 16 in Mamba-1, 64 or 128 in Mamba-2."""
    expand: int = 2
    """Channels inside a block over `width`."""
    conv: int = 4
    """Positions that a block's causal convolution sees: its own and those before it."""
    head_dim: int = 64
    """Of version 2: channels of a head; divides expand × width."""
    positions: Positions = "3d"
    """A table for each of t, h and w, or one for the position in raster order."""
    neighbours: bool = True
    """Whether a position sees the tokens around it in space and time, or the one before it alone."""
    chunk: int = 1024
    """Positions that are computed at a time, and whose activations live while training; 0 takes all at once."""

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("depth", "width", "state", "expand", "conv", "head_dim")}
        if low := [f"model.{name}={value}" for name, value in sizes.items() if value < 1]:
            raise ValueError(f"{', '.join(low)}: must be at least 1")
        if self.chunk < 0:
            raise ValueError(f"model.chunk={self.chunk} must be at least 1, or 0 for all positions at once")
        if self.version == 1 and self.head_dim != 64:
            raise ValueError(f"model.head_dim={self.head_dim} is of version 2; leave it at 64")
        if self.version == 2 and self.expand * self.width % self.head_dim:
            raise ValueError(f"model.head_dim={self.head_dim} must divide expand × width = {self.expand * self.width}")

    def build(self, io: ModelIO) -> MambaModel:
        return MambaModel(self, io)


class MambaModel(nn.Module):
    """A `TokenModel`. Windows without a cache begin at a state of zero; a cache holds states, and does not grow."""

    def __init__(self, config: Mamba, io: ModelIO) -> None:
        super().__init__()
        vocab, largest = token_shapes(io)
        self.config, self.grid = config, io.grid
        self.inputs = TokenInputs(
            config.width, vocab, largest, io.num_labels, positions=config.positions, neighbours=config.neighbours
        )
        self.blocks = nn.ModuleList(MambaBlock(config, io.text_dim) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.head = nn.Linear(config.width, vocab, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(
        self,
        tokens: Int[Tensor, "b t h w"],
        cond: Cond,
        start: Int[Tensor, "b"] | None = None,
        length: int | None = None,
        cache: TokenCache | None = None,
    ) -> Float[Tensor, "b n k"]:
        positions = positions_of(start, length, tokens[0].numel(), tokens)
        states = self._states(len(tokens), cache)
        pieces = positions.split(self.config.chunk or positions.shape[1], dim=1)
        recompute = torch.is_grad_enabled() and len(pieces) > 1
        logits = []
        for piece in pieces:
            out, *states = (
                checkpoint(self._piece, tokens, cond, piece, *states, use_reentrant=False, preserve_rng_state=False)
                if recompute
                else self._piece(tokens, cond, piece, *states)
            )
            logits.append(out)
        if cache is not None:
            cache.length += positions.shape[1]
            cache.state = dict(zip(self._state_names(), states, strict=True))
        return torch.cat(logits, dim=1) if len(logits) > 1 else logits[0]

    def _piece(
        self, tokens: Int[Tensor, "b t h w"], cond: Cond, positions: Int[Tensor, "#b n"], *states: Tensor
    ) -> tuple[Tensor, ...]:
        """(logits of these positions, the states after them), from the states before them: two for each block."""
        x = self.inputs(tokens, cond, positions)
        after: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            x, conv, state = block(x, states[2 * i], states[2 * i + 1], cond.text, cond.text_mask)
            after += [conv, state]
        return self.head(self.norm(x)), *after

    def _states(self, batch: int, cache: TokenCache | None) -> list[Tensor]:
        if cache is not None and cache.length:
            return [cache.state[name] for name in self._state_names()]
        config, like = self.config, self.head.weight
        inner = config.expand * config.width
        mixed = inner + (2 * config.state if config.version == 2 else 0)
        heads = (inner // config.head_dim, config.head_dim) if config.version == 2 else (inner,)
        dtype = torch.promote_types(like.dtype, torch.float32)
        conv = torch.zeros(batch, config.conv - 1, mixed, dtype=like.dtype, device=like.device)
        return [conv, torch.zeros(batch, *heads, config.state, dtype=dtype, device=like.device)] * config.depth

    def _state_names(self) -> list[str]:
        return [f"{kind}.{i}" for i in range(self.config.depth) for kind in ("conv", "state")]


class MambaBlock(nn.Module):
    """The mixer, then cross-attention to the caption where there is one, each normalised and added."""

    def __init__(self, config: Mamba, text_dim: int | None) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.mixer = Mamba1Mixer(config) if config.version == 1 else Mamba2Mixer(config)
        self.cross_norm = nn.RMSNorm(config.width, eps=1e-5) if text_dim else None
        heads = 1 if config.width % 64 else config.width // 64
        self.cross = Attention(config.width, heads, context_width=text_dim) if text_dim else None
        if self.cross is not None:
            nn.init.zeros_(self.cross.out.weight)
            nn.init.zeros_(self.cross.out.bias)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        conv: Float[Tensor, "b k c"],
        state: Float[Tensor, "b *s"],
        text: Float[Tensor, "b l e"] | None = None,
        text_mask: Bool[Tensor, "b l"] | None = None,
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b k c"], Float[Tensor, "b *s"]]:
        y, conv, state = self.mixer(self.norm(x), conv, state)
        x = x + y
        if self.cross is not None and self.cross_norm is not None and text is not None:
            x = x + self.cross(self.cross_norm(x), text.to(x.dtype), text_mask)
        return x, conv, state


class CausalConv(nn.Module):
    """Depthwise convolution over a position and those before it, of which the last k − 1 are the state; then SiLU."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, size))
        self.bias = nn.Parameter(torch.empty(channels))
        for p in (self.weight, self.bias):
            nn.init.uniform_(p, -(size**-0.5), size**-0.5)

    def forward(
        self, x: Float[Tensor, "b n c"], state: Float[Tensor, "b k c"]
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b k c"]]:
        n = x.shape[1]
        x = torch.cat([state.to(x.dtype), x], dim=1)
        y = F.conv1d(x.transpose(1, 2), self.weight, self.bias, groups=len(self.bias)).transpose(1, 2)
        return F.silu(y), x[:, n:].clone()  # not a view, which would keep all of x


class Mamba1Mixer(nn.Module):
    """(x, state of the convolution, state (b, d, s)) -> the same after these positions."""

    def __init__(self, config: Mamba) -> None:
        super().__init__()
        inner, self.size, self.rank = config.expand * config.width, config.state, math.ceil(config.width / 16)
        self.in_proj = nn.Linear(config.width, 2 * inner, bias=False)
        self.conv1d = CausalConv(inner, config.conv)
        self.x_proj = nn.Linear(inner, self.rank + 2 * self.size, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        # Flat, so that optimizers treat it as they do biases: without decay, and without Muon
        self.A_log = nn.Parameter(torch.arange(1.0, self.size + 1).log().repeat(inner))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, config.width, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt_bias(inner))
            self.out_proj.weight /= math.sqrt(config.depth)

    def forward(self, x: Tensor, conv: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u, conv = self.conv1d(u, conv)
        dt, B, C = self.x_proj(u).split([self.rank, self.size, self.size], dim=-1)
        dt = F.softplus(at_least_fp32(self.dt_proj(dt)))
        A = -at_least_fp32(self.A_log).exp().view(-1, self.size)
        y, state = selective_scan(u, dt, A, B, C, state)
        y = torch.addcmul(y, at_least_fp32(u), at_least_fp32(self.D)) * F.silu(at_least_fp32(z))
        return self.out_proj(y.to(x.dtype)), conv, state


class Mamba2Mixer(nn.Module):
    """(x, state of the convolution, state (b, heads, head_dim, s)) -> the same after these positions."""

    def __init__(self, config: Mamba) -> None:
        super().__init__()
        inner, self.size, self.head_dim = config.expand * config.width, config.state, config.head_dim
        self.inner, self.heads = inner, inner // config.head_dim
        self.in_proj = nn.Linear(config.width, 2 * inner + 2 * self.size + self.heads, bias=False)
        self.conv1d = CausalConv(inner + 2 * self.size, config.conv)
        self.dt_bias = nn.Parameter(dt_bias(self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = nn.RMSNorm(inner, eps=1e-5)
        self.out_proj = nn.Linear(inner, config.width, bias=False)
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(config.depth)

    def forward(self, x: Tensor, conv: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mixed = self.inner + 2 * self.size
        z, xBC, dt = self.in_proj(x).split([self.inner, mixed, self.heads], dim=-1)
        xBC, conv = self.conv1d(xBC, conv)
        u, B, C = xBC.split([self.inner, self.size, self.size], dim=-1)
        u = u.unflatten(-1, (self.heads, self.head_dim))
        dt = F.softplus(at_least_fp32(dt) + at_least_fp32(self.dt_bias))
        y, state = ssd(u, dt, -at_least_fp32(self.A_log).exp(), B, C, state)
        y = torch.addcmul(y, at_least_fp32(u), at_least_fp32(self.D)[:, None]).flatten(2)
        y = F.rms_norm(y * F.silu(at_least_fp32(z)), (self.inner,), at_least_fp32(self.norm.weight), self.norm.eps)
        return self.out_proj(y.to(x.dtype)), conv, state


def dt_bias(count: int) -> Float[Tensor, "n"]:
    """Where softplus is log-uniform in [0.001, 0.1]: how much of the past a position weighs at the start."""
    dt = (torch.rand(count) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)).exp()
    return dt + (-torch.expm1(-dt)).log()
