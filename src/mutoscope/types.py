"""The nouns that travel between rooms, and THE legend of shapes.

    B b  batch                    C T H W  channels, frames, height, width of pixels, floats in [-1, 1]
    L l  text tokens              c t h w  channels and grid of latents or tokens
    D d  width of an embedding    N n      positions of one video (t·h·w)          K k  vocabulary

Video and latents are ``(B, C, T, H, W)`` everywhere inside; a model that wants another order permutes inside its
own file. At rest a video is uint8 ``(T, H, W, C)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By the names that recipes use."""
NO_LABEL = -1
"""The label of a sample without one; models map it to their null embedding (classifier-free guidance)."""


@dataclass(frozen=True, kw_only=True)
class LatentSpec:
    """How a grid of latents or tokens lies over the pixels of a clip; derived from the autoencoder."""

    strides: tuple[int, int, int]
    """Pixels per latent position along (T, H, W)."""
    channels: int
    """Channels of the latents; for tokens, of the vectors that the codes stand for."""
    vocab: int | None = None
    """Number of codes where the autoencoder yields tokens; None for continuous latents."""
    first_frame_alone: bool = False
    """Causal autoencoders encode the first frame by itself: T = 1 + stride·(t − 1) instead of T = stride·t."""

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(T, H, W) of a clip -> (t, h, w) of its latents. Raises ValueError naming the nearest size that fits."""
        lead = 1 if self.first_frame_alone else 0
        grid = []
        for name, size, stride, extra in zip(
            ("frames", "height", "width"), (frames, height, width), self.strides, (lead, 0, 0), strict=True
        ):
            if size < 1 or (size - extra) % stride:
                below = max((size - extra) // stride * stride + extra, extra or stride)
                rule = f"{stride}·n + 1" if extra else f"a multiple of {stride}"
                raise ValueError(f"{name}={size} does not fit this autoencoder: it must be {rule} "
                                 f"(nearest: {below} or {below + stride})")  # fmt: skip
            grid.append((size - extra) // stride + extra)
        return grid[0], grid[1], grid[2]

    def pixel_shape(self, t: int, h: int, w: int) -> tuple[int, int, int]:
        """(t, h, w) of latents -> (T, H, W) of the clip; the inverse of `latent_shape`."""
        st, sh, sw = self.strides
        return (1 + st * (t - 1) if self.first_frame_alone else st * t), sh * h, sw * w


PIXELS = LatentSpec(strides=(1, 1, 1), channels=3)
"""The spec of a model that works on pixels, with no autoencoder before it."""


@dataclass(frozen=True, kw_only=True)
class Cond:
    """What a video is conditioned on. Every field is optional; a model reads those it knows."""

    text: Float[Tensor, "b l d"] | None = None
    """Embeddings of the caption, zero where `text_mask` is False; comes with its mask or not at all."""
    text_mask: Bool[Tensor, "b l"] | None = None
    """True on real text tokens; a row that is False throughout means 'no caption'."""
    null_text: Float[Tensor, "b l d"] | None = None
    """What takes the place of `text` where the caption is dropped: the embeddings of "", for models that were trained
    so. None for zeros that are masked."""
    label: Int[Tensor, "b"] | None = None
    """Class index, or NO_LABEL."""
    known: Float[Tensor, "b c t h w"] | None = None
    """Latents of the frames that are given (the image of image-to-video), scaled as the model takes them; zero where
    nothing is."""
    known_mask: Bool[Tensor, "b t"] | None = None
    """True on latent frames that are given clean: the model sees them in place of noise, at a time of their own, and
    the loss does not count them. None where `known` is an input beside the noise, as in CogVideoX's image to video."""
    fps: Float[Tensor, "b"] | None = None
    """Frames per second that the video shows; 0 where that is not known."""
    known_tokens: Int[Tensor, "b t1 h w"] | None = None
    """Of models over tokens: the tokens of the frames that a video begins with. For sampling; training knows all."""

    def __post_init__(self) -> None:
        # Without a mask, padding and dropped captions would be attended to as if they were words
        if (self.text is None) != (self.text_mask is None):
            raise ValueError("a Cond needs both of text and text_mask, or neither")
        if self.null_text is not None and self.text is None:
            raise ValueError("a Cond with null_text needs text, whose place it takes where captions are dropped")
        if self.known_mask is not None and self.known is None:
            raise ValueError("a Cond with known_mask needs known, the latents of the frames that it says are given")

    def dropped(self, drop: Bool[Tensor, "b"]) -> Cond:
        """This condition with all of it removed for the samples where `drop` is True.

        The one place where conditions are dropped: for classifier-free guidance in training and for the
        unconditional pass in sampling. Frames that are known stay: guidance is about what is said, and both of its
        passes are about the same image.
        """
        keep = ~drop
        text, text_mask = self.text, self.text_mask
        if text is not None and text_mask is not None:
            if self.null_text is not None:
                text = torch.where(keep[:, None, None], text, self.null_text)
            else:
                text, text_mask = text * keep[:, None, None], text_mask & keep[:, None]
        label = None if self.label is None else torch.where(keep, self.label, NO_LABEL)
        return replace(self, text=text, text_mask=text_mask, label=label)

    def without_known(self, drop: Bool[Tensor, "b"]) -> Cond:
        """This condition with no frames known for the samples where `drop` is True."""
        if self.known is None:
            return self
        mask = None if self.known_mask is None else self.known_mask & ~drop[:, None]
        return replace(self, known=self.known * ~drop[:, None, None, None, None], known_mask=mask)

    def to(self, device: torch.device) -> Cond:
        """The same condition on another device."""
        return self._map(lambda value: value.to(device, non_blocking=True))

    def rows(self, rows: slice) -> Cond:
        """The condition of some of the samples."""
        return self._map(lambda value: value[rows])

    def _map(self, change: Callable[[Tensor], Tensor]) -> Cond:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Cond(**{name: None if value is None else change(value) for name, value in values.items()})

    @staticmethod
    def stack(conds: Sequence[Cond]) -> Cond:
        """Conditions joined along the batch; texts of unequal length are padded with masked zeros."""
        return Cond(
            text=_cat([c.text for c in conds]),
            text_mask=_cat([c.text_mask for c in conds]),
            null_text=_cat([c.null_text for c in conds]),
            label=_cat([c.label for c in conds]),
            known=_cat([c.known for c in conds]),
            known_mask=_cat([c.known_mask for c in conds]),
            known_tokens=_cat([c.known_tokens for c in conds]),
            fps=_cat([c.fps for c in conds]),
        )


def _cat(parts: list[Tensor | None]) -> Tensor | None:
    present = [p for p in parts if p is not None]
    if not present:
        return None
    if len(present) != len(parts):
        raise ValueError("some samples of a batch carry a condition that others lack")
    if present[0].ndim > 1:
        longest = max(p.shape[1] for p in present)
        grow = lambda p: torch.nn.functional.pad(p, [0, 0] * (p.ndim - 2) + [0, longest - p.shape[1]])
        present = [grow(p) for p in present]
    return torch.cat(present)


def _alone(rows: Tensor) -> Tensor:
    return rows


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What an objective learns from. An objective reads the one of `video`, `latents`, `tokens` that it is about."""

    ids: list[str]
    """The clips' stable ids, for error messages."""
    samples: list[int]
    """The samples' places in the endless stream of training samples: the counter that their randomness hangs on."""
    cond: Cond
    video: Float[Tensor, "b c t h w"] | None = None
    """Pixels in [-1, 1]."""
    latents: Float[Tensor, "b c t h w"] | None = None
    """Normalised latents (zero mean and unit variance per channel)."""
    tokens: Int[Tensor, "b t h w"] | None = None
    """Codes in [0, vocab)."""
    gather: Callable[[Float[Tensor, "b d"]], Float[Tensor, "n d"]] = _alone
    """From rows of these samples to those of all samples of the micro-step, whatever process they are on: these first,
    then the others', through which gradients go back to where they are from. For losses that compare samples."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What an objective returns: a mean over the batch's samples."""

    total: Float[Tensor, ""]
    """The scalar to call backward on."""
    per_sample: Float[Tensor, "b"]
    """Detached losses by sample, to name the sample that went wrong."""
    parts: dict[str, Tensor]
    """Detached scalars for the log, means over the batch."""
    rows: Float[Tensor, "b d"] | None = None
    """Detached, of losses that compare samples: what each is compared by, for `ObjectiveConfig.over_all`."""


class Autoencoder(Protocol):
    """A module that turns clips into latents or tokens and back."""

    spec: LatentSpec

    def encode(self, video: Float[Tensor, "b c t h w"]) -> Tensor:
        """Pixels in [-1, 1] -> moments (b, c or 2c, t, h, w): the posterior's mean and, for a variational
        autoencoder, its log-variance behind it along the channels; or tokens, int64 (b, t, h, w), where `spec.vocab`
        is set. Deterministic."""
        ...

    def decode(self, latents: Tensor) -> Float[Tensor, "b c t h w"]:
        """Latents (b, c, t, h, w), not normalised, or tokens (b, t, h, w) -> pixels in [-1, 1]."""
        ...


@dataclass
class TokenCache:
    """What a token model keeps of the positions that it has seen, so that it need not see them again: keys and values,
    or the state of a recurrence. Made empty by the caller; only the model knows what it puts there."""

    length: int = 0
    """Positions that it covers: always the first of the clip."""
    window: int = 0
    """The last positions, the one that is told included, that attention may look at: as many as in training
    (`NextToken.window`); 0 for all. No concern of a recurrence."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """The model's own tensors; the batch is their first axis."""

    def detach(self) -> None:
        """Cut the tensors off from the graph that made them, for truncated backpropagation through time."""
        self.state = {name: tensor.detach() for name, tensor in self.state.items()}


@runtime_checkable
class TokenModel(Protocol):
    """A module that knows, for each token of a clip, how likely its values are given the tokens before it.

    Positions are counted in raster order, i = (t·H + h)·W + w, 0 first. Nothing is shifted outside of the model:
    the logits of position i are about token i, and hang on tokens 0 … i − 1 alone, whatever the others hold.
    """

    def __call__(
        self,
        tokens: Int[Tensor, "b t h w"],
        cond: Cond,
        start: Int[Tensor, "b"] | None = None,
        length: int | None = None,
        cache: TokenCache | None = None,
    ) -> Float[Tensor, "b n k"]:
        """Logits of n = `length` positions, from `start` of each clip on; all positions where both are None.

        Without a cache the model attends within these positions only, though each position may still look up single
        tokens before them by their place (its neighbours). With a cache, whose length is `start` for all clips,
        it attends to what the cache holds, too, and adds these positions to it.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class ModelIO:
    """What a model has to fit: derived from the data, the autoencoder and the text encoder, never typed twice."""

    channels: int
    """Channels of the latents (3 for pixels)."""
    out_channels: int | None = None
    """Channels that the objective wants of a denoiser, where it wants more than `channels`: 2·channels for a learned
    variance."""
    grid: tuple[int, int, int]
    """(t, h, w) that the recipe samples at, and trains at where it has no buckets."""
    more_grids: tuple[tuple[int, int, int], ...] = ()
    """(t, h, w) of each bucket that the recipe trains at, where it has some."""
    vocab: int | None = None
    """Number of codes, for models over tokens."""
    text_dim: int | None = None
    """Width of the text embeddings; None without text."""
    num_labels: int = 0
    """Number of classes; 0 without labels."""
