"""Frozen feed-forward layers that keep nothing but their input, for blocks that are recomputed anyway.

Between its two matrices a feed-forward layer is four times as wide as the network: its hidden numbers, their gradient
and that of what comes before them are the most that a block has at a time. Here they are computed a chunk of tokens at
a time, in the backward pass as well.

Under activation checkpointing that is less work, too. A block's recomputation would go through both matrices, although
the backward pass asks for the hidden numbers alone. Here it goes through neither, and the hidden numbers are computed
once, where they are needed. What the layer returns to a recomputation means nothing; nor does anyone look at it,
because the layer is the block's last, and all that follows is linear in it and has no trained weights.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mutoscope.training.quantize import QuantizedLinear, dequantize

CHUNK = 2048
"""Tokens at a time: few beside those of a video, and enough to keep a GPU busy."""


def chunk_feed_forwards(model: nn.Module) -> None:
    """Make the frozen feed-forward layers of diffusers blocks (`ff`, with GELU) work in chunks, where nothing but these
    blocks' attention is trained; leave all other networks as they are. Parameters keep their names.

    For blocks that are recomputed: their own forward pass must be called again in the backward pass.
    """
    blocks = [block for block in getattr(model, "blocks", ()) if hasattr(block, "ff") and hasattr(block, "attn1")]
    attention = {id(p) for block in blocks for p in block.attn1.parameters()}
    if all(id(p) in attention for p in model.parameters() if p.requires_grad):
        for block in blocks:
            if _is_frozen_gelu(block.ff):
                block.ff.forward = partial(_forward, block.ff, block.ff.forward)


def _is_frozen_gelu(ff: Any) -> bool:
    try:
        from diffusers.models.activations import GELU
    except ImportError:
        return False
    layers = list(getattr(ff, "net", ()))
    if not layers or type(layers[0]) is not GELU or any(p.requires_grad for p in ff.parameters()):
        return False
    linears = [layers[0].proj, layers[2]]
    dropped = any(isinstance(layer, nn.Dropout) and layer.p for layer in layers)
    return not dropped and all(type(x) in (nn.Linear, QuantizedLinear) for x in linears)


def _forward(ff: Any, usual: Any, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return usual(x)
    gelu, down = ff.net[0], ff.net[2]
    again = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
    return _FeedForward.apply(x, gelu.approximate, again, *_parts(gelu.proj), *_parts(down))


def _parts(linear: Any) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, int]:
    """weight, scale and pairs where it is quantised, bias, rows."""
    if isinstance(linear, QuantizedLinear):
        return linear.weight, linear.scale, linear.pairs, linear.bias, linear.out_features
    return linear.weight, None, None, linear.bias, linear.out_features


def _matrix(weight: Tensor, scale: Tensor | None, pairs: Tensor | None, rows: int, dtype: torch.dtype) -> Tensor:
    return weight if scale is None else dequantize(weight, scale, pairs, dtype, rows)


class _FeedForward(torch.autograd.Function):
    """x -> GELU(x Uᵀ + u) Dᵀ + d, with the gradient of x alone. U and D are unpacked once each way."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, approximate: str, again: bool,
        up: Tensor, up_scale: Tensor | None, up_pairs: Tensor | None, up_bias: Tensor | None, up_rows: int,
        down: Tensor, down_scale: Tensor | None, down_pairs: Tensor | None, down_bias: Tensor | None, down_rows: int,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, up, up_scale, up_pairs, up_bias, down, down_scale, down_pairs)
        ctx.approximate, ctx.rows = approximate, (up_rows, down_rows)
        out = x.new_empty(*x.shape[:-1], down_rows)
        if again:
            return out
        u = _matrix(up, up_scale, up_pairs, up_rows, x.dtype)
        d = _matrix(down, down_scale, down_pairs, down_rows, x.dtype)
        for some, to in zip(x.split(CHUNK, -2), out.split(CHUNK, -2), strict=True):
            to.copy_(F.linear(F.gelu(F.linear(some, u, up_bias), approximate=approximate), d, down_bias))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, up, up_scale, up_pairs, up_bias, down, down_scale, down_pairs = ctx.saved_tensors
        (grad,) = grads
        u = _matrix(up, up_scale, up_pairs, ctx.rows[0], x.dtype)
        d = _matrix(down, down_scale, down_pairs, ctx.rows[1], x.dtype)
        grad_x = torch.empty_like(x)
        for some, g, to in zip(x.split(CHUNK, -2), grad.split(CHUNK, -2), grad_x.split(CHUNK, -2), strict=True):
            hidden = F.linear(some, u, up_bias)
            to.copy_(torch.ops.aten.gelu_backward(g @ d, hidden, approximate=ctx.approximate) @ u)
        return grad_x, *[None] * 12
