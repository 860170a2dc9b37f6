"""CogVideoX by several processes that share a sample's tokens.

diffusers' own context parallelism does not reach this transformer, whose attention knows nothing of it
(docs/design/011-context-parallel.md). It is done from outside, before the first block, in attention and behind the last
matrix, so that our way through the network and that of diffusers' pipelines, which draw videos, both take part.
Text and video are divided each by itself: a process has a stretch of the one beside a stretch of the other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mutoscope.models.ulysses import ContextGroup, Parts


def share_transformer(transformer: Any, group: ContextGroup) -> None:
    """Let the processes of a group run diffusers' CogVideoXTransformer3DModel together, from inputs that they all have,
    in every call from now on. With all adapters that it is to have: they may stand in the place of its modules.

    Raises ValueError where the attention heads cannot be dealt out.
    """
    group.check_heads(transformer.config.num_attention_heads)
    shared = _SharedSequence(group)
    blocks: nn.ModuleList = transformer.transformer_blocks
    blocks[0].register_forward_pre_hook(shared.divide, with_kwargs=True)
    transformer.proj_out.register_forward_hook(shared.put_together)
    for block in blocks:
        block.attn1.set_processor(shared)  # type: ignore[union-attr, operator]


class _SharedSequence:
    """What the blocks of a transformer know of the sequence that they are at work on; their attention processor."""

    text: Parts
    video: Parts

    def __init__(self, group: ContextGroup) -> None:
        self.group = group

    def divide(self, block: nn.Module, args: tuple[()], inputs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        """The first block's inputs -> this process's part of them."""
        video, text = inputs["hidden_states"], inputs["encoder_hidden_states"]
        self.video, self.text = self.group.parts(video.shape[1]), self.group.parts(text.shape[1])
        own = {"hidden_states": self.video.own(video, 1), "encoder_hidden_states": self.text.own(text, 1)}
        return args, inputs | own

    def put_together(self, module: nn.Module, args: Any, out: Float[Tensor, "b n k"]) -> Float[Tensor, "b m k"]:
        """A part of the prediction -> all of it."""
        return self.video.whole(out, 1)

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "b n d"],
        encoder_hidden_states: Float[Tensor, "b l d"],
        attention_mask: None = None,
        image_rotary_emb: tuple[Float[Tensor, "m e"], Float[Tensor, "m e"]] | None = None,
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b l d"]]:
        """As diffusers' CogVideoXAttnProcessor2_0, of parts of video and text. image_rotary_emb: of the whole video."""
        from diffusers.models.embeddings import apply_rotary_emb

        turn: Any = apply_rotary_emb
        length = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], 1)
        q, k, v = (
            project(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        if attn.norm_q is not None:
            q, k = attn.norm_q(q), attn.norm_k(k)
        if image_rotary_emb is not None:
            places = [self.video.own(y, 0) for y in image_rotary_emb]
            q, k = (torch.cat([y[:, :, :length], turn(y[:, :, length:], places).to(y.dtype)], 2) for y in (q, k))
        y = self.text.beside(self.video).attention(q, k, v, F.scaled_dot_product_attention)
        y = attn.to_out[1](attn.to_out[0](y.transpose(1, 2).flatten(2)))
        return y[:, length:], y[:, :length]
