"""The parts that transformers over video share: attention, MLP, positions, time embedding.

Attention is `scaled_dot_product_attention` over (B, heads, N, head_dim); nothing here knows about frames.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention, of a sequence to itself or to a context (cross-attention).

    Queries and keys are normalised per head, with a scale and no bias ("QK-norm", arXiv:2302.05442 §2), which keeps
    bf16 training stable at high learning rates. (By LayerNorm: torch has no fused RMSNorm on CPUs.)
    """

    def __init__(self, width: int, heads: int, context_width: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(context_width or width, 2 * width)
        self.query_scale = nn.Parameter(torch.ones(width // heads))
        self.key_scale = nn.Parameter(torch.ones(width // heads))
        self.out = nn.Linear(width, width)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        context: Float[Tensor, "b m e"] | None = None,
        mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """`mask` is True on the context tokens that may be seen; a row of all False yields zeros."""
        split = lambda y: y.unflatten(-1, (self.heads, -1))  # (b, n, d) -> (b, n, heads, head_dim)
        norm = lambda y, scale: F.layer_norm(y, scale.shape, scale.to(y.dtype), eps=1e-6)
        k, v = (split(y) for y in self.key_value(x if context is None else context).chunk(2, dim=-1))
        q, k = norm(split(self.query(x)), self.query_scale), norm(k, self.key_scale)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        join = lambda y: self.out(y.transpose(1, 2).flatten(2))
        if mask is None:
            return join(scaled_dot_product_attention(q, k, v))
        # A softmax over nothing is NaN on some devices: rows without context see all of it, and are zeroed after.
        some = mask.any(dim=-1)
        y = join(scaled_dot_product_attention(q, k, v, (mask | ~some[:, None])[:, None, None]))
        return y * some[:, None, None].to(y.dtype)


def scaled_dot_product_attention(
    q: Float[Tensor, "b heads n d"],
    k: Float[Tensor, "b heads m d"],
    v: Float[Tensor, "b heads m d"],
    mask: Bool[Tensor, "b #heads #n m"] | None = None,
) -> Float[Tensor, "b heads n d"]:
    """torch's, but on CPUs in fp32 for bf16, whose backward pass takes three times as long there."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class MLP(nn.Module):
    """Linear, GELU, Linear. (GELU by erf: DiT's tanh form takes several times as long in bf16 on CPUs.)"""

    def __init__(self, width: int, hidden: int, out: int | None = None) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, out or width)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b e"]:
        return self.down(F.gelu(self.up(x)))


def modulate(
    x: Float[Tensor, "b n d"], shift: Float[Tensor, "b d"], scale: Float[Tensor, "b d"]
) -> Float[Tensor, "b n d"]:
    """x·(1 + scale) + shift, the modulation of adaLN (arXiv:2212.09748 §3.2)."""
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))


def sinusoid(values: Float[Tensor, "n"], width: int, max_period: float = 10_000.0) -> Float[Tensor, "n d"]:
    """cos and sin of `values` at geometric frequencies (arXiv:1706.03762 §3.5), fp32; `width` is even."""
    half = width // 2
    frequencies = torch.exp(
        -math.log(max_period) / half * torch.arange(half, device=values.device, dtype=torch.float32)
    )
    angles = values.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def grid_sinusoid(grid: tuple[int, int, int], width: int) -> Float[Tensor, "t n d"]:
    """Fixed positions of a (t, h, w) grid: a quarter of the width for h, a quarter for w, half for t.

    Shape (t, h·w, width); `width` is a multiple of 8.
    """
    axes = [sinusoid(torch.arange(size, dtype=torch.float32), part)
            for size, part in zip(grid, (width // 2, width // 4, width // 4), strict=True)]  # fmt: skip
    t, h, w = grid
    return torch.cat(
        [
            axes[1][None, :, None].expand(t, h, w, -1),
            axes[2][None, None, :].expand(t, h, w, -1),
            axes[0][:, None, None].expand(t, h, w, -1),
        ],
        dim=-1,
    ).flatten(1, 2)


class TimeEmbedding(nn.Module):
    """Sinusoid of the time, then an MLP; the sinusoid in fp32 whatever the model's dtype."""

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.up = nn.Linear(frequencies, width)
        self.down = nn.Linear(width, width)

    def forward(self, t: Float[Tensor, "b"]) -> Float[Tensor, "b d"]:
        return self.down(F.silu(self.up(sinusoid(t, self.frequencies).to(self.up.weight.dtype))))
