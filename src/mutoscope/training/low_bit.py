"""Optimizer state in 8 or 4 bits: codes of a table's values, scaled block by block to the block's largest.

The 8-bit tables and the blocks of 256 are those of arXiv:2110.02861, the 4-bit ones and their blocks of 128 those of
arXiv:2309.01507. One thing differs: the table for second moments has no zero, in 8 bits either. A second moment that is
rounded to zero beside a first moment that is not makes a step of any size, once the weight's gradient pauses (the
second paper's "zero-point problem").
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

Bits = Literal[4, 8]


class Format:
    """A way to keep numbers in few bits, on one device."""

    def __init__(self, bits: Bits, signed: bool, device: torch.device) -> None:
        self.bits = bits
        self.block = 256 if bits == 8 else 128
        """Numbers that share a scale."""
        self.values = torch.tensor(_values(bits, signed), device=device)
        """What the codes stand for, ascending in [-1, 1]."""
        # Between two bf16 numbers there is one edge at most. So the search for a number's place among the edges is two
        # looks at tables, which is some ten times as fast on a CPU
        edges = (self.values[:-1] + self.values[1:]) / 2
        self._edges = torch.cat([edges, edges.new_tensor([torch.inf])])
        high = torch.arange(1 << 16, dtype=torch.int32, device=device)  # the first 16 bits of fp32 numbers
        least = ((high + (high >> 15)) << 16).view(torch.float32)  # that have them
        self._codes = torch.bucketize(least, edges, out_int32=True, right=True)

    def fits(self, numel: int) -> bool:
        """Whether a tensor of so many numbers is worth it and made of whole blocks. Others are kept in fp32."""
        return numel >= 4096 and numel % self.block == 0

    def zeros(self, numel: int) -> tuple[UInt8[Tensor, "bytes"], Float[Tensor, "blocks"]]:
        """Codes and scales of zeros."""
        codes = torch.zeros(numel * self.bits // 8, dtype=torch.uint8, device=self.values.device)
        return codes, torch.zeros(numel // self.block, device=self.values.device)

    def encode(self, x: Float[Tensor, "n"]) -> tuple[UInt8[Tensor, "bytes"], Float[Tensor, "blocks"]]:
        """The nearest codes, and the scales; n numbers are whole blocks."""
        blocks = x.view(-1, self.block)
        scale = blocks.abs().amax(1)
        scaled = (blocks / scale.clamp(min=1e-30)[:, None]).view(-1)
        high = scaled.view(torch.int32).bitwise_right_shift(16).bitwise_and_(0xFFFF)
        nearest = self._codes.index_select(0, high)
        nearest += scaled >= self._edges.index_select(0, nearest)
        codes = nearest.to(torch.uint8)
        return (codes if self.bits == 8 else codes[::2] << 4 | codes[1::2]), scale

    def decode(self, codes: UInt8[Tensor, "bytes"], scale: Float[Tensor, "blocks"]) -> Float[Tensor, "n"]:
        """The numbers that codes and scales stand for, fp32."""
        if self.bits == 4:
            codes = torch.stack([codes >> 4, codes & 15], -1).view(-1)
        values = self.values.index_select(0, codes.int())
        return values.view(len(scale), -1).mul_(scale[:, None]).view(-1)


def _values(bits: Bits, signed: bool) -> list[float]:
    if bits == 4 and not signed:
        return [(i + 1) / 16 for i in range(16)]
    exponents = 7 if bits == 8 else 3
    values = [0.0 if signed else 1e-7, 1.0]
    for i in range(exponents):
        number = 2 ** (i + (not signed))  # of equal steps from 0.1 to 1, by their middles
        middles = [(0.1 + 0.9 * (k + 0.5) / number) * 10.0 ** (i + 1 - exponents) for k in range(number)]
        values += middles + ([-x for x in middles] if signed else [])
    return sorted(values)
