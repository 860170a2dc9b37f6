"""The parts that transformers over video share: attention, MLP, positions, time embedding.

Attention is `scaled_dot_product_attention` over (B, heads, N, head_dim); nothing here knows about frames.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mutoscope.models.ulysses import Parts

Rotary = tuple[Float[Tensor, "places e2"], Float[Tensor, "places e2"]]
"""Cosines and sines of positions (see `rotate`)."""


class Attention(nn.Module):
    """Multi-head attention, of a sequence to itself or to a context (cross-attention).

    Queries and keys are normalised per head, with a scale and no bias ("QK-norm", arXiv:2302.05442 §2), which keeps
    bf16 training stable at high learning rates. (By LayerNorm: torch has no fused RMSNorm on CPUs.) Without it
    (`qk_norm`), the weights of older models fit in.
    """

    def __init__(self, width: int, heads: int, context_width: int | None = None, *, qk_norm: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(context_width or width, 2 * width)
        self.query_scale = nn.Parameter(torch.ones(width // heads)) if qk_norm else None
        self.key_scale = nn.Parameter(torch.ones(width // heads)) if qk_norm else None
        self.out = nn.Linear(width, width)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        context: Float[Tensor, "b m e"] | None = None,
        mask: Bool[Tensor, "b m"] | None = None,
        *,
        causal: bool = False,
        rotary: Rotary | None = None,
        parts: Parts | None = None,
    ) -> Float[Tensor, "b n d"]:
        """`mask` is True on the context tokens that may be seen; a row of all False yields zeros. causal: positions
        see themselves and those before them. `rotary` turns queries and keys (see `rotate`). parts: `x` is this
        process's part of a sequence, all of which is attended to."""
        k, v = self.keys_values(x if context is None else context, rotary)
        mask = None if mask is None else mask[:, None]
        return self.attend(x, k, v, mask, causal=causal, rotary=rotary, parts=parts)

    def keys_values(
        self, context: Float[Tensor, "b m e"], rotary: Rotary | None = None
    ) -> tuple[Float[Tensor, "b heads m head_dim"], Float[Tensor, "b heads m head_dim"]]:
        """What `attend` takes of a context: made once where it is attended to again and again."""
        b, m, _ = context.shape
        k, v = self.key_value(context).view(b, m, 2, self.heads, -1).unbind(2)
        k, v = _normalised(k, self.key_scale).transpose(1, 2), v.transpose(1, 2)
        return k if rotary is None else rotate(k, *rotary), v

    def attend(
        self,
        x: Float[Tensor, "b n d"],
        k: Float[Tensor, "b heads m head_dim"],
        v: Float[Tensor, "b heads m head_dim"],
        mask: Bool[Tensor, "#b #n m"] | None = None,
        *,
        causal: bool = False,
        rotary: Rotary | None = None,
        parts: Parts | None = None,
    ) -> Float[Tensor, "b n d"]:
        """`mask` is True where a position may look; a row of all False yields zeros."""
        b, n, d = x.shape
        q = _normalised(self.query(x).view(b, n, self.heads, -1), self.query_scale).transpose(1, 2)
        q = q if rotary is None else rotate(q, *rotary)
        join = lambda y: self.out(y.transpose(1, 2).reshape(b, n, d))
        if parts is not None:
            assert mask is None and not causal  # of whole videos, in which everything sees everything
            return join(parts.attention(q, k, v, scaled_dot_product_attention))
        if mask is None:
            return join(scaled_dot_product_attention(q, k, v, causal=causal))
        # A softmax over nothing is NaN on some devices: rows without context see all of it, and are zeroed after.
        some = mask.any(dim=-1, keepdim=True)
        return join(scaled_dot_product_attention(q, k, v, (mask | ~some)[:, None])) * some.to(x.dtype)


def _normalised(y: Float[Tensor, "b n heads d"], scale: Float[Tensor, "d"] | None) -> Float[Tensor, "b n heads d"]:
    return y if scale is None else F.layer_norm(y, scale.shape, scale.to(y.dtype), eps=1e-6)


def scaled_dot_product_attention(
    q: Float[Tensor, "b heads n d"],
    k: Float[Tensor, "b heads m d"],
    v: Float[Tensor, "b heads m d"],
    mask: Bool[Tensor, "#b #heads #n m"] | Float[Tensor, "#b #heads #n m"] | None = None,
    *,
    causal: bool = False,
) -> Float[Tensor, "b heads n d"]:
    """torch's, but on CPUs in fp32 for bf16, whose backward pass takes three times as long there. mask: True where a
    position may look, or what is added to the logits, in any dtype."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        with torch.autocast("cpu", enabled=False):
            return scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, causal=causal).to(q.dtype)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


class Dropout(nn.Dropout):
    """torch's, without its calls where nothing is dropped: they are a tenth of the time of drawing tokens on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if self.training and self.p else input


class MLP(nn.Module):
    """Linear, GELU, Linear. (GELU by erf: DiT's tanh form takes several times as long in bf16 on CPUs.)"""

    def __init__(self, width: int, hidden: int, out: int | None = None) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, out or width)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b e"]:
        return self.down(F.gelu(self.up(x)))


def modulate(
    x: Float[Tensor, "b t n d"], shift: Float[Tensor, "b #t d"], scale: Float[Tensor, "b #t d"]
) -> Float[Tensor, "b t n d"]:
    """x·(1 + scale) + shift, the modulation of adaLN (arXiv:2212.09748 §3.2); shift and scale are of a whole video, or
    of each of its frames."""
    return _add_scaled(shift.unsqueeze(2), x, 1 + scale.unsqueeze(2))


def add_gated(
    x: Float[Tensor, "b t n d"], gate: Float[Tensor, "b #t d"], y: Float[Tensor, "b t n d"]
) -> Float[Tensor, "b t n d"]:
    """x + gate·y, the end of a branch of adaLN."""
    return _add_scaled(x, y, gate.unsqueeze(2))


def _add_scaled(base: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    # The compiler fuses it as it is, and warns about functions with a backward pass of their own
    return torch.addcmul(base, x, scale) if torch.compiler.is_compiling() else _AddScaled.apply(base, x, scale)


class _AddScaled(torch.autograd.Function):
    """`torch.addcmul`, whose backward pass multiplies `x` by 1, in one more pass over memory and a tensor as large."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.base = base.shape
        return torch.addcmul(base, x, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        for_base, for_x, for_scale = ctx.needs_input_grad
        return (
            gradient.sum_to_size(ctx.base) if for_base else None,
            gradient * scale if for_x else None,
            (gradient * x).sum_to_size(scale.shape) if for_scale else None,
        )


def rotate(
    x: Float[Tensor, "b heads n e"], cos: Float[Tensor, "n e2"], sin: Float[Tensor, "n e2"]
) -> Float[Tensor, "b heads n e"]:
    """Rotary positions (arXiv:2104.09864 §3.4.2): pairs of channels side by side, turned by the angles of a place."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def sinusoid(values: Float[Tensor, "n"], width: int, max_period: float = 10_000.0) -> Float[Tensor, "n d"]:
    """cos and sin of `values` at geometric frequencies (arXiv:1706.03762 §3.5), fp32; `width` is even."""
    half = width // 2
    frequencies = torch.exp(
        -math.log(max_period) / half * torch.arange(half, device=values.device, dtype=torch.float32)
    )
    angles = values.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def frame_places(frames: int, base: int | None) -> Float[Tensor, "t"]:
    """The places along time of so many frames: 0, 1, 2, …; of more than `base`, squeezed evenly into the range of
    `base` frames (position interpolation, arXiv:2306.15595 eq. 4)."""
    places = torch.arange(frames, dtype=torch.float32)
    return places if base is None or frames <= base else places * (base / frames)


def plane_sinusoid(h: Float[Tensor, "h"], w: Float[Tensor, "w"], width: int) -> Float[Tensor, "n d"]:
    """Fixed positions of the rows and columns of a frame, (h·w, width): half of the width for the column and half for
    the row, sines before cosines, as in MAE's pos_embed.py, which Latte and Open-Sora have; `width` is a multiple of 4.
    """
    columns, rows = (line_sinusoid(places, width // 2) for places in (w, h))
    return torch.cat([columns[None].expand(len(h), -1, -1), rows[:, None].expand(-1, len(w), -1)], -1).flatten(0, 1)


def line_sinusoid(places: Float[Tensor, "n"], width: int) -> Float[Tensor, "n d"]:
    """`sinusoid` with sines before cosines."""
    return sinusoid(places, width).roll(width // 2, -1)


def grid_sinusoid(grid: tuple[int, int, int], width: int, base: int | None = None) -> Float[Tensor, "t n d"]:
    """Fixed positions of a (t, h, w) grid: a quarter of the width for h, a quarter for w, half for t (`frame_places`).

    Shape (t, h·w, width); `width` is a multiple of 8.
    """
    t, h, w = grid
    places = [frame_places(t, base), *(torch.arange(size, dtype=torch.float32) for size in (h, w))]
    axes = [sinusoid(p, part) for p, part in zip(places, (width // 2, width // 4, width // 4), strict=True)]
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

    def forward(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b d"]:
        waves = sinusoid(t.flatten(), self.frequencies).to(self.up.weight.dtype)
        return self.down(F.silu(self.up(waves))).unflatten(0, t.shape)
