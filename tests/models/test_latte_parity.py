"""Latte against diffusers' LatteTransformer3DModel, with its weights.

The two are one architecture but for this: diffusers' modulates all blocks by one projection and a table each (as
PixArt), ours each block by its own, so that the copied projection holds the table in its bias; the end of the network
has no SiLU there, so that it is copied for the one time that is asked; captions enter the blocks within frames alone,
so that the output of our others' is zero; and its caption's projection is applied before. GELU is the exact one on both
sides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mutoscope.models.dit import DiT, DiTBlock, DiTModel
from mutoscope.models.layers import Attention
from mutoscope.types import Cond, ModelIO

FRAMES, SIZE, TIME = 5, 8, 321.0


def reference() -> Any:
    from diffusers import LatteTransformer3DModel

    torch.manual_seed(0)
    model = LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=SIZE,
        cross_attention_dim=32, attention_bias=True, patch_size=2, activation_fn="gelu", norm_type="ada_norm_single",
        norm_elementwise_affine=False, norm_eps=1e-6, caption_channels=12, video_length=FRAMES,
    )  # fmt: skip
    for p in model.parameters():
        nn.init.normal_(p, std=0.15)
    return model.eval()


def copy_linear(ours: nn.Linear, *theirs: nn.Linear) -> None:
    ours.weight.data.copy_(torch.cat([layer.weight for layer in theirs]))
    ours.bias.data.copy_(torch.cat([layer.bias for layer in theirs]))


def copy_attention(ours: Attention, theirs: Any) -> None:
    copy_linear(ours.query, theirs.to_q)
    copy_linear(ours.key_value, theirs.to_k, theirs.to_v)
    copy_linear(ours.out, theirs.to_out[0])


@torch.no_grad()
def copied(theirs: Any) -> DiTModel:
    config = DiT(depth=4, width=32, heads=2, qk_norm=False)
    ours = config.build(ModelIO(channels=4, out_channels=8, grid=(FRAMES, SIZE, SIZE), text_dim=32))
    patch = theirs.pos_embed.proj
    ours.embed.weight.copy_(patch.weight.flatten(1))
    ours.embed.bias.copy_(patch.bias)
    embedder = theirs.adaln_single.emb.timestep_embedder
    copy_linear(ours.time.up, embedder.linear_1)
    copy_linear(ours.time.down, embedder.linear_2)
    pairs = zip(theirs.transformer_blocks, theirs.temporal_transformer_blocks, strict=True)
    for block, other in zip(ours.blocks, [b for pair in pairs for b in pair], strict=True):
        assert isinstance(block, DiTBlock) and block.cross is not None
        copy_linear(block.modulation, theirs.adaln_single.linear)
        block.modulation.bias.add_(other.scale_shift_table.flatten())
        copy_attention(block.attention, other.attn1)
        if block.along == "space":
            copy_attention(block.cross, other.attn2)
        else:
            block.cross.out.weight.zero_()
        copy_linear(block.mlp.up, other.ff.net[0].proj)
        copy_linear(block.mlp.down, other.ff.net[2])
    embedded = ours.time(torch.tensor([TIME]))
    ours.final_modulation.bias.copy_((theirs.scale_shift_table + embedded).flatten())
    # A patch's channels are outermost in ours, innermost in theirs
    order = torch.arange(2 * 2 * 8).reshape(2, 2, 8).permute(2, 0, 1).flatten()
    ours.head.weight.copy_(theirs.proj_out.weight[order])
    ours.head.bias.copy_(theirs.proj_out.bias[order])
    return ours


def both() -> tuple[Tensor, Tensor]:
    theirs = reference()
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, FRAMES, SIZE, SIZE, generator=generator), torch.randn(2, 6, 12, generator=generator)
    time = torch.full((2,), TIME)
    with torch.no_grad():
        expected = theirs(x, timestep=time.long(), encoder_hidden_states=text).sample
        cond = Cond(text=theirs.caption_projection(text), text_mask=torch.ones(2, 6, dtype=torch.bool))
        return copied(theirs)(x, time, cond), expected


def test_latte_is_diffusers() -> None:
    found, expected = both()
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
