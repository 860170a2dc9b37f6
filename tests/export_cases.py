"""Trained models to export, and how near an exported one is to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline, CogVideoXTransformer3DModel
from torch import Tensor, nn

from mutoscope.checkpoints import open_checkpoint
from mutoscope.export import Exported, export_adapter, probe_of
from mutoscope.models.cogvideox import CogVideoX, CogVideoXModel
from mutoscope.models.dit import DiT
from mutoscope.recipe import Lora
from mutoscope.training.lora import adapter_state, add_lora
from mutoscope.types import ModelIO

IO = ModelIO(channels=4, grid=(3, 4, 6), text_dim=32)
LORA = Lora(rank=8, alpha=4.0)
NAMES = ["cogvideox-2b", "cogvideox-t2v", "cogvideox-i2v", "cogvideox-1.5-t2v", "cogvideox-1.5-i2v"]
DIT = DiT(depth=2, width=32, heads=2, attention="joint")


def config(name: str, weights: str = "fp32") -> CogVideoX:
    task = "i2v" if name.endswith("i2v") else "t2v"
    return CogVideoX(path=f"tiny://{name}", task=task, weights=weights)  # type: ignore[arg-type]


def maker(name: str, weights: str = "fp32") -> Callable[[], CogVideoXModel]:
    return lambda: config(name, weights).build(IO)


def shake(state: dict[str, Tensor]) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(7)
    by = lambda key: 0.05 if "magnitude" in key else 0.3
    return {key: tensor + by(key) * torch.randn(tensor.shape, generator=g) for key, tensor in state.items()}


def trained(build: Callable[[], nn.Module], lora: Lora = LORA) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with adapters as after training, and the adapters' state."""
    model = build()
    add_lora(model, lora, seed=0)
    state = adapter_state(model)
    for key, tensor in shake(state).items():
        state[key].copy_(tensor)
    return model.eval(), state


def write(
    to: Any, out: Path, build: Callable[[], nn.Module], lora: Lora, state: dict[str, Tensor], **more: Any
) -> Exported:
    about = {"name": "disney", "base_model": "tiny"}
    return export_adapter(to, out, build=build, lora=lora, state=state, probe=probe_of(IO), about=about, **more)


def output(transformer: nn.Module, height: int = 4) -> Tensor:
    """Of a bare diffusers transformer, with what a pipeline would give it beside video and text left out."""
    g = torch.Generator().manual_seed(0)
    c: Any = transformer.config
    rope = None
    if c.use_rotary_positional_embeddings:
        tokens = (4 // (c.patch_size_t or 1)) * (height // 2) * 3
        rope = tuple(torch.randn(tokens, c.attention_head_dim, generator=g) for _ in range(2))
    x, text = (
        torch.randn(1, 4, c.in_channels, height, 6, generator=g),
        torch.randn(1, c.max_text_seq_length, 32, generator=g),
    )
    ofs = torch.tensor([2.0]) if c.ofs_embed_dim else None
    with torch.no_grad():
        out: Tensor = transformer(x, text, torch.tensor([500]), ofs=ofs, image_rotary_emb=rope, return_dict=False)[0]
    return out


def error(network: nn.Module, wanted: nn.Module, base: nn.Module) -> float:
    """|output − wanted| over the adapter's effect: 0 identical, about 1 for none, or for twice the strength."""
    return float((output(network) - output(wanted)).norm() / (output(wanted) - output(base)).norm())


def base_of(name: str) -> CogVideoXTransformer3DModel:
    folder = open_checkpoint(f"tiny://{name}")
    return CogVideoXTransformer3DModel.from_pretrained(folder, subfolder="transformer", dtype=torch.float32)


def pipeline(name: str) -> Any:
    kind = CogVideoXImageToVideoPipeline if name.endswith("i2v") else CogVideoXPipeline
    return kind.from_pretrained(open_checkpoint(f"tiny://{name}"), dtype=torch.float32)
