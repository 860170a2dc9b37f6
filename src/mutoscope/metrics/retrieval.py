"""How often a caption finds its video among many, and a video its caption."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def recall(
    similarity: Float[Tensor, "n n"], same: Bool[Tensor, "n n"] | None = None, at: tuple[int, ...] = (1, 5)
) -> dict[str, Tensor]:
    """text_to_video_K and video_to_text_K: the share of captions (videos) whose own video (caption) is among the K most
    similar ones.

    similarity: of video i and caption j; those of a pair are on the diagonal. same: captions that are equal, none of
    which can be told from another: they are left out of each other's ranking. Without it all count as different. Ties
    count against: where all are alike, nothing is found.
    """
    others = ~torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    if same is not None:
        others &= ~same
    found: dict[str, Tensor] = {}
    for name, scores in (("text_to_video", similarity.T), ("video_to_text", similarity)):
        before = ((scores >= scores.diagonal()[:, None]) & others).sum(1)
        found |= {f"{name}_{k}": (before < k).float().mean() for k in at}
    return found
