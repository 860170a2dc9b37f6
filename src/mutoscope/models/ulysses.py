"""Context parallelism: several processes share the tokens of each sample (DeepSpeed-Ulysses, arXiv:2309.14509 §3).

Each has its own stretch of the sequence from the first block to the last, and everything but attention works on single
tokens. Around attention, some tokens of all heads become all tokens of some heads, and back again. There is no mask and
positions are in queries and keys already, so that the order of the tokens between the two does not matter.

Stretches need not be of one length: nothing is padded, and what comes out is what one process computes, but for the
order of sums.

Gradients: all processes of a group have the whole prediction, and work out the same loss. What is gathered hands back
the sum of their gradients, N times that of one loss. So each has N times what its own tokens add to the gradient of a
weight, and the mean over processes, which DDP and FSDP take in any case, is the gradient of the loss over all tokens.
That holds for every weight whose tokens are divided when it meets them, or divided right after: nothing that is trained
may come after `Parts.whole`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values (B, heads, N, head_dim) -> (B, heads, N, head_dim)."""


@dataclass(frozen=True)
class ContextGroup:
    """The processes that share each sample, as one of them sees it."""

    group: dist.ProcessGroup
    rank: int
    """Of this process, in the group."""
    size: int

    @property
    def leads(self) -> bool:
        """Whether this process writes what the group has made."""
        return self.rank == 0

    def parts(self, length: int) -> Parts:
        """A sequence in stretches, the first of which are one longer where they cannot all be of one length.

        Raises ValueError where there are fewer tokens than processes.
        """
        if length < self.size:
            raise ValueError(f"parallel.context = {self.size}: {length} tokens cannot be shared by so many processes")
        each, more = divmod(length, self.size)
        return Parts(self, tuple(each + (r < more) for r in range(self.size)))

    def check_heads(self, heads: int) -> None:
        """Raise ValueError where attention heads cannot be dealt out evenly."""
        if heads % self.size:
            raise ValueError(f"parallel.context = {self.size} does not divide the {heads} attention heads of this "
                             "model, which the processes share out")  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """How a sequence lies over the processes of a group."""

    group: ContextGroup
    lengths: tuple[int, ...]
    """Tokens on each process."""

    def times(self, count: int) -> Parts:
        """As many such sequences in one, each process with its part of all of them."""
        return Parts(self.group, tuple(count * length for length in self.lengths))

    def beside(self, other: Parts) -> Parts:
        """Two sequences as one, each process with its parts of both."""
        return Parts(self.group, tuple(a + b for a, b in zip(self.lengths, other.lengths, strict=True)))

    def own(self, x: Tensor, dim: int) -> Tensor:
        """This process's part of what all have whole, as a copy: a view would keep the whole in memory."""
        return x.split(self.lengths, dim)[self.group.rank].clone()

    def whole(self, x: Tensor, dim: int) -> Tensor:
        """All parts, on every process. Gradients: see above."""
        x = x.movedim(dim, 0)
        everyone = x.expand(self.group.size, *x.shape).flatten(0, 1)
        return self._exchange(everyone, sent=[len(x)] * self.group.size, received=list(self.lengths)).movedim(0, dim)

    def attention(
        self,
        q: Float[Tensor, "b heads n d"],
        k: Float[Tensor, "b heads n d"],
        v: Float[Tensor, "b heads n d"],
        attend: Attend,
    ) -> Float[Tensor, "b heads n d"]:
        """Attention of the whole sequence to itself, from and to this process's part of it."""
        count, own, lengths = self.group.size, q.shape[2], list(self.lengths)
        dealt = [y.unflatten(1, (count, -1)).permute(1, 3, 0, 2, 4) for y in (q, k, v)]  # (count, n, b, heads, d)
        sent = torch.stack(dealt, 2).flatten(0, 1)
        q, k, v = self._exchange(sent, sent=[own] * count, received=lengths).permute(1, 2, 3, 0, 4).unbind()
        out = attend(q, k, v).permute(2, 0, 1, 3)  # (all tokens, b, some heads, d)
        out = self._exchange(out, sent=lengths, received=[own] * count)
        return out.unflatten(0, (count, own)).permute(2, 0, 3, 1, 4).flatten(1, 2)

    def _exchange(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Rows of `x` to each process of the group, and rows from each."""
        return all_to_all_single_autograd(x.contiguous(), received, sent, self.group.group)


def share_sequence(model: nn.Module, group: ContextGroup | None) -> None:
    """Let the processes of a group, where there is one, compute this network together, from now on, from inputs that
    they all have.

    Raises ValueError where the network cannot, or its heads cannot be dealt out.
    """
    if group is None:
        return
    share = getattr(model, "share_sequence", None)
    if share is None:
        raise ValueError(f"parallel.context = {group.size}: {type(model).__name__} cannot share a sequence; CogVideoX, "
                         "DiT and STDiT can. Set it to 1")  # fmt: skip
    share(group)
