"""Captions -> embeddings by T5 (arXiv:1910.10683), as CogVideoX takes them: padded to the length that the transformer
was trained with and not masked, so that padding is seen as well, and a caption that is dropped is an empty one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mutoscope.checkpoints import hash_part, load_part, open_checkpoint, part_config
from mutoscope.hub import INSTALL
from mutoscope.recipe import TextConfig
from mutoscope.types import DTYPES, Cond

_TOKENIZERS = ("T5Tokenizer", "T5TokenizerFast", "ByT5Tokenizer")


@dataclass(frozen=True, kw_only=True)
class T5(TextConfig):
    """The text encoder of a pretrained checkpoint."""

    path: str
    """The checkpoint: a folder in diffusers' format, a Hub id such as THUDM/CogVideoX-5b, or tiny://NAME."""
    weights: Literal["bf16", "fp32"] = "bf16"
    """Precision of its weights; the XXL of CogVideoX is 9.5 GB in bf16."""

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return int(part_config(self.path, "text_encoder")["d_model"])

    @property
    def length(self) -> int:
        """Tokens of every caption, padding included: those that the checkpoint's transformer takes. Longer captions are
        cut off."""
        return int(part_config(self.path, "transformer")["max_text_seq_length"])

    @property
    def has_null(self) -> bool:
        """CogVideoX's unconditional branch is the empty caption."""
        return True

    @property
    def identity(self) -> str:
        """The hashes of tokenizer and weights, the length and the precision, wherever the checkpoint lies."""
        parts = " ".join(f"{part} {hash_part(self.path, part)}" for part in ("tokenizer", "text_encoder"))
        return f"T5 {parts} length {self.length} {self.weights}"

    def build(self) -> T5Encoder:
        """The encoder, on the CPU. Raises as `checkpoints.load_part`."""
        return T5Encoder(_tokenizer(self.path), self.build_without_tokenizer(), self.length)

    def build_without_tokenizer(self) -> nn.Module:
        """The network alone, from token ids. Raises as `checkpoints.load_part`."""
        return load_part(self.path, "text_encoder", DTYPES[self.weights]).requires_grad_(False)


class T5Encoder(nn.Module):
    """A function from captions to a Cond of `text`, `text_mask` and `null_text`, fp32 on the encoder's device; a
    module, so that it can be moved."""

    def __init__(self, tokenizer: Callable[..., Any], model: nn.Module, length: int) -> None:
        super().__init__()
        self.tokenizer, self.model, self.length = tokenizer, model, length
        self._null: Tensor | None = None

    def forward(self, captions: list[str]) -> Cond:
        text = self._embed(captions)
        if self._null is None or self._null.device != text.device:
            self._null = self._embed([""])
        return Cond(
            text=text,
            text_mask=torch.ones(text.shape[:2], dtype=torch.bool, device=text.device),
            null_text=self._null.expand_as(text),
        )

    @torch.no_grad()
    def _embed(self, captions: list[str]) -> Float[Tensor, "b l d"]:
        tokens = self.tokenizer(
            captions, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        device = next(self.model.parameters()).device
        return self.model(tokens.input_ids.to(device))[0].float()


def _tokenizer(path: str) -> Any:
    """The checkpoint's tokenizer, of a class known here."""
    folder = open_checkpoint(path, ["tokenizer"]) / "tokenizer"
    name = json.loads((folder / "tokenizer_config.json").read_text()).get("tokenizer_class")
    if name not in _TOKENIZERS:
        raise ValueError(f"{folder}: its tokenizer is a {name}; known here: {', '.join(_TOKENIZERS)}")
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"{path}: T5 takes transformers: {INSTALL}") from error
    return getattr(transformers, name).from_pretrained(folder, local_files_only=True)
