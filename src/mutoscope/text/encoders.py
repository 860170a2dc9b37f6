"""Captions -> embeddings."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from mutoscope.randomness import seed_of
from mutoscope.recipe import TextConfig
from mutoscope.types import Cond


@dataclass(frozen=True, kw_only=True)
class HashedWords(TextConfig):
    """Words as fixed random vectors: nothing to train, nothing to download.

    Meant for captions from a small closed vocabulary, such as Flying MNIST's: a model learns what each word means from
    scratch, and a word that it never saw in training means nothing to it. Captions in free language need a trained
    encoder.
    """

    width: int = 64
    """Width of the embeddings; random vectors of 64 numbers keep some hundred words well apart."""
    max_length: int = 32
    """Words and punctuation marks kept of a caption; the rest is cut off."""

    def __post_init__(self) -> None:
        if self.width < 2 or self.width % 2:
            raise ValueError(f"width={self.width} must be even, 2 or more: positions are pairs of sine and cosine")
        if self.max_length < 1:
            raise ValueError(f"max_length={self.max_length} must be 1 or more")

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return self.width

    @property
    def length(self) -> int:
        """`max_length`."""
        return self.max_length

    def build(self) -> Callable[[list[str]], Cond]:
        """A function from captions to a Cond: `text` (B, max_length, width) and `text_mask`, which is False throughout
        for a caption without words."""
        positions = sinusoids(self.max_length, self.width)

        def encode(captions: list[str]) -> Cond:
            text = torch.zeros(len(captions), self.max_length, self.width)
            mask = torch.zeros(len(captions), self.max_length, dtype=torch.bool)
            for row, caption in enumerate(captions):
                words = split_words(caption)[: self.max_length]
                for column, word in enumerate(words):
                    text[row, column] = word_vector(word, self.width) + positions[column]
                mask[row, : len(words)] = True
            return Cond(text=text, text_mask=mask)

        return encode


def split_words(caption: str) -> list[str]:
    """Lower-case words (letters, digits, underscores) and single punctuation marks, in order."""
    return re.findall(r"\w+|[^\w\s]", caption.lower())


@lru_cache(maxsize=65536)
def word_vector(word: str, width: int) -> Float[Tensor, "d"]:
    """The word's direction: drawn from N(0, 1) by a generator seeded with the word, then scaled to the length
    sqrt(width), so that its numbers are of the size that layers expect."""
    drawn = torch.randn(width, generator=torch.Generator().manual_seed(seed_of("word", word)))
    return drawn * math.sqrt(width) / drawn.norm()


def sinusoids(length: int, width: int) -> Float[Tensor, "l d"]:
    """Positions as sines (first half of the channels) and cosines (second) of wavelengths from 2π to 10000·2π
    (arXiv:1706.03762 §3.5)."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2) / (width // 2))
    angles = torch.arange(length)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)
