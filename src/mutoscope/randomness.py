"""Counter-based randomness: every number drawn is a function of (seed, purpose, sample), never of what ran before.

A sample's place in the endless stream of training samples is its counter. So a run that is killed and resumed draws
what it would have drawn; so do two ranks, or two micro-batches, that share the work of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xxhash
from torch import Tensor


def seed_of(*key: int | str) -> int:
    """A 63-bit seed from any key, the same on every machine."""
    return xxhash.xxh3_64_intdigest("/".join(str(k) for k in key).encode()) >> 1


class Draw:
    """Random tensors for a batch, one independent stream for each of its samples.

    Every method returns a tensor whose first axis is the batch. Calls draw on from where the last one stopped, so
    that the order of calls matters and the company of a sample does not.

    The numbers of a CPU and of a GPU differ. torch's CPU generator takes 32 bits of its seed: among a million samples
    about a hundred pairs share their noise, which does no harm.
    """

    def __init__(self, seed: int, purpose: str, samples: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.generators = [
            torch.Generator(self.device).manual_seed(seed_of(seed, purpose, n)) for n in samples
        ]  # fmt: skip

    def normal(self, *shape: int) -> Tensor:
        """N(0, 1), float32 (B, *shape)."""
        return torch.stack([torch.randn(shape, generator=g, device=self.device) for g in self.generators])

    def uniform(self, *shape: int) -> Tensor:
        """U[0, 1), float32 (B, *shape)."""
        return torch.stack([torch.rand(shape, generator=g, device=self.device) for g in self.generators])
