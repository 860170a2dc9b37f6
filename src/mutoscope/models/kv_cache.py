"""Keys and values of the positions that a model has seen, kept in a `TokenCache` for its attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mutoscope.types import TokenCache

Heads = Float[Tensor, "b heads n head_dim"]
Seen = Float[Tensor, "b heads m head_dim"]


class KeyValues:
    """What one layer keeps: a ring of as many positions as it may look back at, allocated once.

    Position i lies in slot i mod capacity. Attention does not ask for the order of its keys, so that nothing is ever
    moved, and a step costs a write of one slot. Not for gradients: slots are written in place.
    """

    def __init__(self, cache: TokenCache, layer: str, total: int) -> None:
        """layer: its name, unique within the model. total: positions of a clip."""
        self.cache, self.layer = cache, layer
        self.capacity = min(cache.window or total, total)

    def extended(self, k: Heads, v: Heads) -> tuple[Seen, Seen, Bool[Tensor, "1 n m"] | None, bool]:
        """Add the keys and values (b, heads, n, head_dim) of the n positions behind the cache's.

        Returns (keys, values, mask, causal): what these n positions attend to, as `Attention.attend` takes it.
        """
        start, n = self.cache.length, k.shape[2]
        kept_k, kept_v = (self._ring(name, like) for name, like in (("keys", k), ("values", v)))
        if n == 1:
            slot, held = start % self.capacity, min(start + 1, self.capacity)
            kept_k.narrow(2, slot, 1).copy_(k)  # indexing would take longer than the copy
            kept_v.narrow(2, slot, 1).copy_(v)
            return kept_k.narrow(2, 0, held), kept_v.narrow(2, 0, held), None, False

        mask, causal = None, start == 0 and n <= self.capacity
        seen_k, seen_v, old = k, v, min(start, self.capacity)
        if not causal:
            seen_k, seen_v = torch.cat([kept_k[:, :, :old], k], 2), torch.cat([kept_v[:, :, :old], v], 2)
            slots = torch.arange(old, device=k.device)
            positions = torch.arange(start, start + n, device=k.device)
            seen = torch.cat([start - 1 - (start - 1 - slots) % self.capacity, positions])
            mask = ((seen <= positions[:, None]) & (seen > positions[:, None] - self.capacity))[None]
        last = torch.arange(start + max(0, n - self.capacity), start + n, device=k.device)
        kept_k.index_copy_(2, last % self.capacity, k[:, :, last - start])
        kept_v.index_copy_(2, last % self.capacity, v[:, :, last - start])
        return seen_k, seen_v, mask, causal

    def once(self, make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Seen, Seen]:
        """The keys and values of a context that stays the same, made at the first call."""
        names = f"{self.layer}.context.keys", f"{self.layer}.context.values"
        if names[0] not in self.cache.state:
            self.cache.state.update(zip(names, make(), strict=True))
        return self.cache.state[names[0]], self.cache.state[names[1]]

    def _ring(self, name: str, like: Heads) -> Seen:
        key = f"{self.layer}.{name}"
        if key not in self.cache.state:
            self.cache.state[key] = like.new_empty(like.shape[0], like.shape[1], self.capacity, like.shape[3])
        return self.cache.state[key]
