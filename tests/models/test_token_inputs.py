"""What a token model is given at each position: the same, by whichever way it is computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mutoscope.models.token_inputs import TokenInputs
from mutoscope.types import Cond

GRID, CODES, WIDTH = (3, 4, 5), 7, 16


class OtherLinear(nn.Linear):
    """As a LoRA's layer is: not to be looked into."""


def inputs_and_gradients(dtype: torch.dtype, layer: type[nn.Linear]) -> list[Tensor]:
    torch.manual_seed(0)
    module = TokenInputs(WIDTH, CODES, GRID, 0).to(dtype)
    assert module.join is not None
    module.join.__class__ = layer
    tokens = torch.randint(CODES, (2, *GRID))
    x = module(tokens, Cond(), torch.arange(60)[None])
    x.backward(torch.randn(x.shape, dtype=dtype))
    return [x.detach(), *(p.grad for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_shares_of_codes_add_up_to_the_joined_embeddings(dtype: torch.dtype, near: float) -> None:
    """9 codes and 120 positions go by shares; a layer that is no plain one never does."""
    by_shares, joined = (inputs_and_gradients(dtype, layer) for layer in (nn.Linear, OtherLinear))
    for found, expected in zip(by_shares, joined, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=near, atol=near * float(expected.abs().max()))


def test_embeddings_of_neighbours_are_not_kept() -> None:
    """They are ten for each position: at the sizes of minisora's recipes, gigabytes."""
    kept: list[int] = []
    module = TokenInputs(WIDTH, CODES, GRID, 0)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):
        module(torch.zeros(4, *GRID, dtype=torch.long), Cond(), torch.arange(60)[None])
    assert max(kept) < 10 * 4 * 60 * WIDTH
