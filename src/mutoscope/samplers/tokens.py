"""Drawing a video token by token, with a cache of what the model has seen.

Codes are all that can be drawn: no model here has logits for anything else.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mutoscope.randomness import Draw
from mutoscope.recipe import TokenSampler
from mutoscope.types import Cond, TokenCache, TokenModel

CHUNK = 1024
"""Known positions that the model sees at a time; more would need masks of great size."""


@torch.no_grad()
def sample_tokens(
    model: TokenModel,
    sampler: TokenSampler,
    cond: Cond,
    grid: tuple[int, int, int],
    draw: Draw,
    known: Int[Tensor, "b t1 h w"] | None = None,
    window: int = 0,
    on_step: Callable[[], None] = lambda: None,
) -> Int[Tensor, "b t h w"]:
    """Tokens of one video for each of `draw`'s streams.

    Args:
        cond: what to draw, one row a video.
        grid: (t, h, w) of a video.
        known: tokens of the first frames, which are kept.
        window: positions that the model attended to while it was trained; 0 for all.
        on_step: called after each frame of tokens, for progress.
    """
    batch, (t, h, w) = len(draw.generators), grid
    total, first = t * h * w, 0 if known is None else known.shape[1] * h * w
    tokens = torch.zeros(batch, t, h, w, dtype=torch.long, device=draw.device)
    flat = tokens.flatten(1)  # the same memory
    if known is not None:
        flat[:, :first] = known.flatten(1)
    quantiles = draw.uniform(total)
    guided = sampler.guidance_scale != 1
    if guided:
        cond = Cond.stack([cond, cond.dropped(torch.ones(batch, dtype=torch.bool, device=draw.device))])
    cache = TokenCache(window=window)

    def logits(start: int, stop: int) -> Float[Tensor, "b k"]:
        """Of the position before `stop`; the cache covers those before `start`."""
        rows = torch.cat([tokens, tokens]) if guided else tokens
        at = torch.full((len(rows),), start, device=draw.device)
        found = model(rows, cond, at, stop - start, cache)[:, -1].float()
        if not guided:
            return found
        conditional, nothing = found.chunk(2)
        return nothing + sampler.guidance_scale * (conditional - nothing)

    # A compiled block would be compiled anew for each length of the cache
    with torch.compiler.set_stance("force_eager"):
        for start in range(0, first, CHUNK):
            logits(start, min(start + CHUNK, first))
        for i in range(first, total):
            flat[:, i] = pick(logits(i, i + 1), sampler, quantiles[:, i])
            if (i + 1) % (h * w) == 0:
                on_step()
    return tokens


def pick(logits: Float[Tensor, "b k"], sampler: TokenSampler, quantile: Float[Tensor, "b"]) -> Int[Tensor, "b"]:
    """One token of each row, at a quantile in [0, 1) of what temperature, top-k and top-p leave of the distribution."""
    if sampler.temperature == 0:
        return logits.argmax(-1)
    values, codes = (logits / sampler.temperature).sort(dim=-1, descending=True, stable=True)
    if 0 < sampler.top_k < logits.shape[-1]:
        values, codes = values[:, : sampler.top_k], codes[:, : sampler.top_k]
    probabilities = values.double().softmax(-1)
    if sampler.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities * (before < sampler.top_p)  # the likeliest always stays
    reached = probabilities.cumsum(-1)
    place = torch.searchsorted(reached, quantile.double()[:, None] * reached[:, -1:], right=True)
    last = (probabilities > 0).sum(-1, keepdim=True) - 1  # rounding may lead beyond the last token that is left
    return codes.gather(1, torch.minimum(place, last)).squeeze(1)
