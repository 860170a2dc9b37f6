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


@torch.no_grad()
def sample_tokens(
    model: TokenModel,
    sampler: TokenSampler,
    cond: Cond,
    grid: tuple[int, int, int],
    draw: Draw,
    known: Int[Tensor, "b t1 h w"] | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Int[Tensor, "b t h w"]:
    """Tokens of one video for each of `draw`'s streams.

    Args:
        cond: what to draw, one row a video.
        grid: (t, h, w) of a video.
        known: tokens of the first frames, which are kept.
        on_step: called after each frame of tokens, for progress.
    """
    batch, (t, h, w) = len(draw.generators), grid
    tokens = torch.zeros(batch, t, h, w, dtype=torch.long, device=draw.device)
    first = 0 if known is None else known.shape[1]
    if known is not None:
        tokens[:, :first] = known
    guided = sampler.guidance_scale != 1
    if guided:
        cond = Cond.stack([cond, cond.dropped(torch.ones(batch, dtype=torch.bool, device=draw.device))])
    flat, cache = tokens.flatten(1), TokenCache()

    def logits(start: int, length: int) -> Float[Tensor, "b k"]:
        """Of the last of `length` positions from `start` on."""
        rows = torch.cat([tokens, tokens]) if guided else tokens
        at = torch.full((len(rows),), start, device=draw.device)
        found = model(rows, cond, at, length, cache)[:, -1].float()
        if not guided:
            return found
        conditional, nothing = found.chunk(2)
        return nothing + sampler.guidance_scale * (conditional - nothing)

    begin = first * h * w
    for i in range(begin, t * h * w):
        # The known positions are seen together with the first that is not
        scores = logits(0, i + 1) if i == begin else logits(i, 1)
        flat[:, i] = pick(scores, sampler, draw.uniform())
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
