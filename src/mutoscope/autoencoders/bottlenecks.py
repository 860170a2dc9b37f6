"""Bottlenecks: what stands between an encoder and a decoder and turns vectors into codes.

Every quantiser has the same face: called on latents it returns `Quantized`, `encode` gives tokens and `lookup` gives
the vectors that tokens stand for. No quantiser ever holds a matrix of vectors by codes: `nearest` works in blocks
that fit a cache. All of it is fp32 whatever the network around it runs in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from mutoscope.randomness import seed_of
from mutoscope.sharded import fill, whole

_GROUP = 128  # keys in one group of `nearest`
_SPLIT_NOISE = 0.01  # how far a restarted code starts from its parent, in standard deviations of the codebook
_LFQ_GROUP = 8  # bits whose joint distribution the entropy of LFQ looks at


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What a quantiser makes of latents. A loss that it does not have is None; all are unweighted means."""

    latents: Float[Tensor, "b c t h w"]
    """The vectors that the codes stand for; gradients pass straight through to the encoder."""
    tokens: Int[Tensor, "b t h w"]
    """The codes, int64."""
    codebook: Float[Tensor, "b"] | None = None
    """||sg[z] − e||²: pulls codes to the encoder's outputs."""
    commitment: Float[Tensor, "b"] | None = None
    """||z − sg[e]||²: pulls the encoder's outputs to their codes."""
    entropy: Float[Tensor, ""] | None = None
    """E[H(code|z)] − H(E[code]), in nats: low when codes are chosen surely and all are used."""
    counts: Int[Tensor, "k"] | None = None
    """While training: how often each code was chosen since the epoch began."""


@torch.no_grad()
def nearest(queries: Float[Tensor, "n d"], keys: Float[Tensor, "m d"]) -> Int[Tensor, "n"]:
    """The index of the key closest to each query (Euclid; the first of equals).

    argmin_j ||q − k_j||² = argmin_j (||k_j||² − 2 q·k_j), which is one matrix product. It is made a block of queries
    at a time, and searched in two steps, for the minimum by group of keys (vectorised; argmin is not) and for its
    place within the winning group: on a CPU 18 times as fast as the whole matrix and its argmin, in constant memory.
    """
    found: Tensor = _nearest(queries, keys)
    return found


@torch.library.custom_op("mutoscope::nearest", mutates_args=(), schema="(Tensor queries, Tensor keys) -> Tensor")
def _nearest(queries: Tensor, keys: Tensor) -> Tensor:
    """One operator: to an estimate, which sees shapes alone, its thousands of blocks are one step."""
    queries, keys = queries.float(), keys.float()
    padding = -len(keys) % _GROUP
    norms = F.pad(keys.square().sum(1), (0, padding), value=torch.inf)
    right = torch.cat([F.pad(keys.T, (0, padding)), norms[None]])
    left = torch.cat([-2 * queries, queries.new_ones(len(queries), 1)], dim=1)
    # A block of 1 MB stays in a core's cache; an accelerator wants fewer, larger ones (64 MB).
    block = max(1, (1 << 18 if queries.device.type == "cpu" else 1 << 24) // right.shape[1])
    distances = queries.new_empty(min(block, len(queries)), right.shape[1])
    found = torch.empty(len(queries), dtype=torch.int64, device=queries.device)
    for start in range(0, len(queries), block):
        rows = left[start : start + block]
        grouped = torch.mm(rows, right, out=distances[: len(rows)]).unflatten(1, (-1, _GROUP))
        group = grouped.amin(2).argmin(1)
        within = grouped[torch.arange(len(rows), device=rows.device), group].argmin(1)
        found[start : start + block] = group * _GROUP + within
    return found.clamp_(max=len(keys) - 1)  # an infinite query is nearest to the padding (inf · 0)


@_nearest.register_fake
def _(queries: Tensor, keys: Tensor) -> Tensor:
    return queries.new_empty(len(queries), dtype=torch.int64)


@register_flop_formula(torch.ops.mutoscope.nearest)
def _flops(queries: tuple[int, int], keys: tuple[int, int], out_shape: object = None) -> int:
    return 2 * queries[0] * keys[0] * (queries[1] + 1)


def codebook_usage(counts: Int[Tensor, "k"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(share of the codes that were chosen at all, perplexity exp(H) of the choice), from counts per code."""
    share = counts.double() / counts.sum().clamp(min=1)
    perplexity = torch.exp(-torch.xlogy(share, share).sum())
    return (counts > 0).float().mean(), perplexity.float()


class VectorQuantizer(nn.Module):
    """A codebook learned by gradient: VQ-VAE (arXiv:1711.00937 eq. 3).

    Statistics over micro-batches and ranks are kept in buffers, so that a checkpoint in the middle of an epoch
    loses none: `pending` counts the codes chosen since the last optimizer step by this process, `counts` those of
    the epoch by all processes.
    """

    pending: Tensor
    counts: Tensor

    def __init__(self, num_codes: int, dim: int) -> None:
        super().__init__()
        self.vocab = num_codes
        self.weight: Tensor = nn.Parameter(torch.randn(num_codes, dim))
        self.register_buffer("pending", torch.zeros(num_codes, dtype=torch.int64))
        self.register_buffer("counts", torch.zeros(num_codes, dtype=torch.int64))

    def forward(self, z: Float[Tensor, "b c t h w"]) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):
            rows = _rows(z)
            codes = nearest(rows, self.weight)
            vectors = F.embedding(codes, self.weight)
            if self.training:
                self._record(rows.detach(), codes)
            per_sample = (len(z), -1)
            return Quantized(
                latents=_grid(rows + (vectors - rows).detach(), z),
                tokens=codes.reshape(len(z), *z.shape[2:]),
                codebook=(vectors - rows.detach()).square().reshape(per_sample).mean(1),
                commitment=(vectors.detach() - rows).square().reshape(per_sample).mean(1),
                counts=self.counts + self.pending if self.training else None,
            )

    def low_utilization(self, z: Float[Tensor, "b c t h w"]) -> Float[Tensor, ""]:
        """||sg[z_j(k)] − e_k||², a mean over all codes k: pulls each, used or not, to the output nearest to it."""
        with torch.autocast(z.device.type, enabled=False):
            rows = _rows(z.detach())
            return F.mse_loss(self.weight, rows[nearest(self.weight, rows)])

    @torch.no_grad()
    def _record(self, rows: Tensor, codes: Tensor) -> None:
        self.pending += torch.bincount(codes, minlength=self.vocab)

    def encode(self, z: Float[Tensor, "b c t h w"]) -> Int[Tensor, "b t h w"]:
        """Latents -> tokens."""
        return nearest(_rows(z), self.weight).reshape(len(z), *z.shape[2:])

    def lookup(self, tokens: Int[Tensor, "b t h w"]) -> Float[Tensor, "b c t h w"]:
        """Tokens -> the vectors that they stand for."""
        return F.embedding(tokens, self.weight).movedim(-1, 1)

    @torch.no_grad()
    def after_step(self, all_reduce: Callable[[Tensor], Tensor], skipped: bool) -> None:
        """Fold the step's statistics into the epoch's; forget them if the step was skipped."""
        if not skipped:
            self.counts += all_reduce(self.pending)
        self.pending.zero_()

    @torch.no_grad()
    def after_epoch(self, epoch: int, reinit: bool) -> None:
        """Begin the counts of a new epoch; before that, with `reinit`, let codes that the epoch never chose split
        those that it chose, drawn in proportion to how often it did."""
        unused = self.counts == 0
        if reinit and unused.any() and not unused.all():
            weight = whole(self.weight).clone()
            _, weight[unused] = _split(weight, self.counts.double(), unused, seed_of("reinit unused codes", epoch))
            fill(self.weight, weight)
        self.counts.zero_()


class EMAVectorQuantizer(VectorQuantizer):
    """A codebook that follows the running mean of the vectors assigned to each code (arXiv:1711.00937 appendix A.1).

        N_k <- g·N_k + (1 − g)·n_k        m_k <- g·m_k + (1 − g)·Σ z        e_k = m_k / N_k

    The update is made once per optimizer step, from the vectors of all its micro-batches on all ranks. The first
    one places the codes by the mean and standard deviation of the encoder's outputs; that it has happened is a buffer,
    so that a loaded codebook is never placed anew. A code whose N_k falls under `restart_below` times the average
    splits one drawn in proportion to N with it (Linde, Buzo and Gray 1980): unlike a vector taken from the batch, that
    is the same on every rank, and counts as used at once.
    """

    weight: Tensor
    ema_counts: Tensor
    ema_sums: Tensor
    pending_sums: Tensor
    pending_moments: Tensor
    updates: Tensor

    def __init__(self, num_codes: int, dim: int, decay: float, restart_below: float) -> None:
        super().__init__(num_codes, dim)
        self.decay, self.restart_below = decay, restart_below
        weight = self.weight.detach()
        del self.weight
        self.register_buffer("weight", weight)
        self.register_buffer("ema_counts", torch.zeros(num_codes))
        self.register_buffer("ema_sums", torch.zeros(num_codes, dim))
        self.register_buffer("pending_sums", torch.zeros(num_codes, dim))
        self.register_buffer("pending_moments", torch.zeros(2, dim))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(self, z: Float[Tensor, "b c t h w"]) -> Quantized:
        return replace(super().forward(z), codebook=None)  # nothing for a gradient to move

    @torch.no_grad()
    def _record(self, rows: Tensor, codes: Tensor) -> None:
        super()._record(rows, codes)
        # A step that overflows is skipped, but its statistics may be kept until the next one
        rows = torch.where(rows.isfinite(), rows, 0)
        self.pending_sums.index_add_(0, codes, rows)
        self.pending_moments += torch.stack([rows.sum(0), rows.square().sum(0)])

    @torch.no_grad()
    def after_step(self, all_reduce: Callable[[Tensor], Tensor], skipped: bool) -> None:
        """The update of the codebook; none if the step was skipped."""
        if not skipped:
            counts, sums = all_reduce(self.pending), all_reduce(self.pending_sums)
            self.counts += counts
            if self.updates == 0:
                self._place(counts.sum(), all_reduce(self.pending_moments))
            else:
                self.ema_counts.lerp_(counts.float(), 1 - self.decay)
                self.ema_sums.lerp_(sums, 1 - self.decay)
                self._restart()
                self.weight.copy_(self.ema_sums / self.ema_counts[:, None])
            self.updates += 1
        for pending in (self.pending, self.pending_sums, self.pending_moments):
            pending.zero_()

    def _place(self, total: Tensor, moments: Tensor) -> None:
        mean = moments[0] / total
        std = (moments[1] / total - mean.square()).clamp(min=0).sqrt()
        generator = torch.Generator().manual_seed(seed_of("place codes"))
        noise = torch.randn(self.weight.shape, generator=generator).to(mean.device)
        self.weight.copy_(mean + std * noise)
        self.ema_counts.fill_(total / self.vocab)
        self.ema_sums.copy_(self.weight * self.ema_counts[:, None])

    def _restart(self) -> None:
        dead = self.ema_counts < self.restart_below * self.ema_counts.mean()
        if not dead.any():
            return
        means = self.ema_sums / self.ema_counts[:, None].clamp(min=torch.finfo(torch.float32).tiny)
        seed = seed_of("restart dead codes", int(self.updates))
        parents, vectors = _split(means, torch.where(dead, 0, self.ema_counts).double(), dead, seed)
        # A parent shares what it has collected evenly with its children.
        family = torch.bincount(parents, minlength=self.vocab) + 1
        self.ema_counts /= family
        self.ema_counts[dead] = self.ema_counts[parents]
        self.ema_sums.copy_(means * self.ema_counts[:, None])
        self.ema_sums[dead] = vectors * self.ema_counts[parents, None]

    @torch.no_grad()
    def after_epoch(self, epoch: int, reinit: bool) -> None:
        """Begin the counts of a new epoch. Dead codes are restarted as they die, so `reinit` has nothing to do."""
        self.counts.zero_()


def _split(weight: Tensor, usage: Tensor, unused: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """(a parent for each unused code, drawn in proportion to `usage`; that parent's vector and a little noise, without
    which the two would stay one for ever). A function of its arguments alone, so that all ranks find the same."""
    generator = torch.Generator().manual_seed(seed)
    parents = torch.multinomial(usage.cpu(), int(unused.sum()), replacement=True, generator=generator)
    parents = parents.to(weight.device)
    noise = torch.randn(len(parents), weight.shape[1], generator=generator).to(weight)
    return parents, weight[parents] + _SPLIT_NOISE * weight.std(0) * noise


class FiniteScalarQuantizer(nn.Module):
    """FSQ: each channel is bounded and rounded to one of a few levels (arXiv:2309.15505 §3, appendix A.1).

    No codebook, no losses. The paper's levels: 2^8 codes (8, 6, 5), 2^10 (8, 5, 5, 5), 2^12 (7, 5, 5, 5, 5),
    2^14 (8, 8, 8, 6, 5), 2^16 (8, 8, 8, 5, 5, 5). Quantised channels lie in [-1, 1].
    """

    levels: Tensor
    basis: Tensor

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.vocab = prod(levels)
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("basis", torch.tensor([prod(levels[:i]) for i in range(len(levels))]), persistent=False)

    def forward(self, z: Float[Tensor, "b c t h w"]) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):
            rows = _rows(z)
            half = (self.levels - 1) * (1 + 1e-3) / 2
            offset = (1 - self.levels % 2) / 2  # an even number of levels is not symmetric about a level
            bounded = torch.tanh(rows + torch.atanh(offset / half)) * half - offset
            steps = bounded.round()
            latents = (bounded + (steps - bounded).detach()) / (self.levels // 2)
            codes = ((steps.detach().long() + self.levels // 2) * self.basis).sum(1)
            return Quantized(latents=_grid(latents, z), tokens=codes.reshape(len(z), *z.shape[2:]))

    def encode(self, z: Float[Tensor, "b c t h w"]) -> Int[Tensor, "b t h w"]:
        """Latents -> tokens."""
        return self(z).tokens

    def lookup(self, tokens: Int[Tensor, "b t h w"]) -> Float[Tensor, "b c t h w"]:
        """Tokens -> the vectors that they stand for."""
        half = self.levels // 2
        steps = tokens[..., None] // self.basis % self.levels - half
        return (steps / half).movedim(-1, 1)


class LookupFreeQuantizer(nn.Module):
    """LFQ: each channel is its sign (MAGVIT-v2, arXiv:2310.05737 §3.2); `bits` channels are 2^bits codes.

    The entropy loss needs p(code|z) = softmax(−||z − code||²), which is a product over the bits, p(bit) = σ(4z). The
    entropy of its mean is not; as in BSQ (arXiv:2406.07548 §3.3) it is summed over groups of 8 bits, each exact.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits, self.vocab = bits, 2**bits

    def forward(self, z: Float[Tensor, "b c t h w"]) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):
            rows = _rows(z)
            signs = torch.where(rows > 0, 1.0, -1.0)
            return Quantized(
                latents=_grid(rows + (signs - rows).detach(), z),
                tokens=self.encode(z),
                commitment=(rows - signs).square().reshape(len(z), -1).mean(1),
                entropy=self._entropy(rows),
            )

    def _entropy(self, rows: Tensor) -> Tensor:
        total = rows.new_zeros(())
        for logits in (4 * rows).split(_LFQ_GROUP, dim=1):
            log_one, log_zero = F.logsigmoid(logits), F.logsigmoid(-logits)
            total = total - (log_one.exp() * log_one + log_zero.exp() * log_zero).sum(1).mean()
            joint = rows.new_ones(len(rows), 1)
            for one, zero in zip(log_one.exp().unbind(1), log_zero.exp().unbind(1), strict=True):
                joint = torch.cat([joint * zero[:, None], joint * one[:, None]], dim=1)
            mean = joint.mean(0)
            total = total + (mean * mean.clamp(min=torch.finfo(mean.dtype).tiny).log()).sum()
        return total

    def encode(self, z: Float[Tensor, "b c t h w"]) -> Int[Tensor, "b t h w"]:
        """Latents -> tokens."""
        basis = 2 ** torch.arange(self.bits, device=z.device)
        return ((z.movedim(1, -1) > 0) * basis).sum(-1)

    def lookup(self, tokens: Int[Tensor, "b t h w"]) -> Float[Tensor, "b c t h w"]:
        """Tokens -> the vectors that they stand for."""
        bits = tokens[..., None] >> torch.arange(self.bits, device=tokens.device) & 1
        return (bits * 2.0 - 1.0).movedim(-1, 1)


def _rows(z: Tensor) -> Tensor:
    """(b, c, t, h, w) -> float32 (b·t·h·w, c)."""
    return z.float().movedim(1, -1).flatten(0, -2)


def _grid(rows: Tensor, like: Tensor) -> Tensor:
    """(b·t·h·w, c) -> (b, c, t, h, w), the shape of `like`."""
    return rows.reshape(len(like), *like.shape[2:], rows.shape[1]).movedim(-1, 1)
