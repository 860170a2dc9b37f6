"""Numbers in 8 and 4 bits, against a search through the table."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mutoscope.training.low_bit import Bits, Format

FORMATS = [(8, True), (8, False), (4, True), (4, False)]


def form(bits: Bits, signed: bool) -> Format:
    return Format(bits, signed, torch.device("cpu"))


def numbers(signed: bool, n: int = 1024, seed: int = 0) -> Tensor:
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed)) ** 5
    return x if signed else x.square()


@pytest.mark.parametrize(
    ("bits", "signed", "expected"),
    [  # bitsandbytes' create_dynamic_map; in torchao 0.18 the second begins with 0
        (8, True, [-0.99296875, -0.97890625, -0.96484375]),
        (8, False, [1e-7, 3.25e-7, 7.75e-7, 2.125e-6]),
        (4, True, [-0.8875, -0.6625, -0.4375, -0.2125, -0.0775, -0.0325, -0.0055, 0, 0.0055, 0.0325]),
        (4, False, [0.0625, 0.125, 0.1875]),
    ],
)
def test_tables(bits: Bits, signed: bool, expected: list[float]) -> None:
    values = form(bits, signed).values
    torch.testing.assert_close(values[: len(expected)], torch.tensor(expected))
    assert len(values) == 2**bits and values[-1] == 1
    assert torch.equal(values, values.unique())
    assert (0 in values) == signed  # a second moment is never rounded to zero


@pytest.mark.parametrize(("bits", "signed"), FORMATS)
def test_codes_are_the_nearest(bits: Bits, signed: bool) -> None:
    f, x = form(bits, signed), numbers(signed)
    codes, scale = f.encode(x)
    assert codes.dtype == torch.uint8 and codes.numel() == x.numel() * bits // 8
    assert torch.equal(scale, x.view(-1, f.block).abs().amax(1))
    scaled = x.view(-1, f.block) / scale[:, None]
    nearest = f.values[(scaled[..., None] - f.values).abs().argmin(-1)]
    torch.testing.assert_close(f.decode(codes, scale).view(-1, f.block), nearest * scale[:, None])


@pytest.mark.parametrize(("bits", "signed"), FORMATS)
@given(seed=st.integers(0, 10**6))
def test_what_is_decoded_is_encoded_as_it_was(bits: Bits, signed: bool, seed: int) -> None:
    """Else a state would drift that no gradient touches. (Where a block's largest is negative it does: the signed
    tables have 1 and no −1.)"""
    f, x = form(bits, signed), numbers(signed, 256, seed)
    x[::128] = x.abs().max()
    codes, scale = f.encode(x)
    again, same = f.encode(f.decode(codes, scale))
    torch.testing.assert_close(same, scale)
    assert torch.equal(again, codes)


@pytest.mark.parametrize(("bits", "signed"), FORMATS)
def test_zeros(bits: Bits, signed: bool) -> None:
    f = form(bits, signed)
    assert torch.equal(f.decode(*f.zeros(512)), torch.zeros(512))
    assert torch.equal(f.decode(*f.encode(torch.zeros(512))), torch.zeros(512))


def test_small_and_uneven_tensors_do_not_fit() -> None:
    f = form(8, True)
    assert f.fits(4096) and not f.fits(4095) and not f.fits(4096 + 128)
    assert form(4, True).fits(4096 + 128)
