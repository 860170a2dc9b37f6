"""Frozen weights in 8 or 4 bits, under LoRA (QLoRA, arXiv:2305.14314): int8, fp8 and nf4.

    int8    codes of −127 … 127 and a scale for each output     fp8    e4m3, likewise: keeps small weights beside large
    nf4     16 quantiles of the normal distribution, and a bf16 scale for each 64 weights: 4.25 bits

Only what is kept is small: products are taken in the precision of what flows through, and the weights unpacked for it
are let go at once, in the backward pass as well. So all kinds run on all devices; unpacking is a few per cent of a
product with thousands of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Kind = Literal["int8", "fp8", "nf4"]

SMALLEST = 4096
"""Weights of fewer numbers are left alone: they take no memory to speak of."""
BLOCK = 64
"""Weights that share a scale in nf4."""
_FP8 = torch.float8_e4m3fn
_LARGEST = {"int8": 127.0, "fp8": torch.finfo(_FP8).max}
# Of the paper's appendix E, as in bitsandbytes
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def check_quantization(kind: Kind, device: torch.device, compiled: bool) -> None:
    """Raise ValueError where this device can't do it, before anything is loaded."""
    if kind == "fp8" and compiled and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(f"quantize = fp8: torch.compile unpacks it on GPUs of compute capability 8.9 or more (Ada, "
                         f"Hopper), and {torch.cuda.get_device_name(device)} is older; take int8, or compile = false"
                         )  # fmt: skip


def quantize_frozen(model: nn.Module, kind: Kind, device: torch.device) -> None:
    """Replace the blocks' linear layers by quantised ones: those that are frozen, with weights of 4096 numbers or more.
    LoRA's are not frozen; embeddings and the head are outside the blocks and matter more than they weigh.

    The work is done on `device`, a layer at a time; its results lie where the layer's weight lay.

    Raises ValueError where there are none: nothing would be saved, and nothing would tell.
    """
    found = list(_frozen_layers(model))
    if not found:
        raise ValueError(f"quantize = {kind}: the blocks of this {type(model).__name__} have no frozen linear layers "
                         f"of {SMALLEST} weights or more; set quantize = none")  # fmt: skip
    for parent, name, layer in found:
        setattr(parent, name, QuantizedLinear(layer, kind, device))


def _frozen_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    blocks = getattr(model, "blocks", None)
    for parent in blocks.modules() if isinstance(blocks, nn.Module) else ():
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear) and not layer.weight.requires_grad and layer.weight.numel() >= SMALLEST:
                yield parent, name, layer


class QuantizedLinear(nn.Module):
    """A frozen linear layer whose weight is kept as codes.

    They are integers by dtype, fp8 included, so that nobody takes them for a weight; and parameters, so that they count
    among what is frozen.
    """

    pairs: Tensor | None
    """The two numbers that each byte stands for; of nf4."""

    def __init__(self, layer: nn.Linear, kind: Kind, device: torch.device) -> None:
        """Raises ValueError where nf4's blocks do not divide the weight."""
        super().__init__()
        self.in_features, self.out_features, self.kind = layer.in_features, layer.out_features, kind
        codes, scale = quantize(layer.weight.detach().to(device), kind)
        self.weight = nn.Parameter(codes.to(layer.weight.device), requires_grad=False)
        self.scale = nn.Parameter(scale.to(layer.weight.device), requires_grad=False)
        self.register_buffer("pairs", _pairs(layer.weight.device) if kind == "nf4" else None, persistent=False)
        self.bias = layer.bias

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y: Tensor = _Product.apply(x, self.weight, self.scale, self.pairs, self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind}"


class _Product(torch.autograd.Function):
    """x Wᵀ. F.linear would keep the unpacked W for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, pairs: Tensor | None, rows: int) -> Tensor:
        ctx.save_for_backward(codes, scale, pairs)
        return F.linear(x, dequantize(codes, scale, pairs, x.dtype, rows))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        codes, scale, pairs = ctx.saved_tensors
        return grad @ dequantize(codes, scale, pairs, grad.dtype, grad.shape[-1]), None, None, None, None


def quantize(weight: Float[Tensor, "o i"], kind: Kind) -> tuple[Tensor, Tensor]:
    """(codes, scale) of a matrix, the nearest to it that the kind has."""
    weight = weight.float()
    if kind == "nf4":
        return _quantize_nf4(weight)
    scale = weight.abs().amax(1, keepdim=True) / _LARGEST[kind]
    scaled = weight / torch.where(scale > 0, scale, 1)
    codes = scaled.round().to(torch.int8) if kind == "int8" else scaled.to(_FP8).view(torch.uint8)
    return codes, scale


def _quantize_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    if weight.numel() % BLOCK:
        raise ValueError(f"quantize = nf4: a layer of {' × '.join(map(str, weight.shape))} weights is not made of "
                         f"blocks of {BLOCK}; take int8")  # fmt: skip
    blocks, values = weight.reshape(-1, BLOCK), torch.tensor(NF4, device=weight.device)
    scale = blocks.abs().amax(1, keepdim=True).bfloat16()
    scaled = blocks / torch.where(scale > 0, scale, 1)
    codes = torch.bucketize(scaled, (values[:-1] + values[1:]) / 2, out_int32=True).to(torch.uint8).view(-1)
    return codes[::2] << 4 | codes[1::2], scale


def dequantize(
    codes: Tensor, scale: Tensor, pairs: Tensor | None, dtype: torch.dtype, rows: int
) -> Float[Tensor, "{rows} i"]:
    """The matrix of `rows` rows that `quantize` took apart, as far as it can be told. pairs: for nf4."""
    if pairs is not None:
        return pairs.to(dtype)[codes.int()].view(-1, BLOCK).mul_(scale).view(rows, -1)
    return (codes if codes.dtype == torch.int8 else codes.view(_FP8)).to(dtype).mul_(scale)


def _pairs(device: torch.device) -> Float[Tensor, "256 2"]:
    values, byte = torch.tensor(NF4, device=device), torch.arange(256, device=device)
    return torch.stack([values[byte >> 4], values[byte & 15]], 1)
