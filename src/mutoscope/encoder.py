"""Encoder: the one path from clips and captions to what a model learns from, and from latents back to video.

Training uses it on the fly, `mutoscope encode` uses it to fill a LatentStore, sampling uses it to decode. What it draws
hangs on the sample alone, and clips go through the autoencoder one at a time: in a larger batch, convolutions give
other last bits, so that only a batch of one makes a stored clip equal, bit for bit, to one encoded on the fly in
whatever company. (On the same hardware with the same number of threads: those change last bits too.) The price is speed
for small clips, 1.6x for clips of 16x32x32 on one core; whoever wants speed encodes once and trains from the store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mutoscope.data.buckets import Pool, make_pools
from mutoscope.data.dataset import Clips, VideoDataset, make_loader, to_pixels, to_uint8
from mutoscope.data.flying_mnist import Split
from mutoscope.data.store import (
    STATS_CLIPS,
    LatentStats,
    LatentStore,
    Manifest,
    StoredClips,
    StoredSplit,
    Text,
    transform_of,
)
from mutoscope.randomness import Draw
from mutoscope.recipe import Recipe
from mutoscope.types import PIXELS, Batch, Cond, LatentSpec
from mutoscope.weights import hash_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Encoder:
    """Clips <-> normalised latents or tokens, captions -> Cond. Frozen; never draws a gradient."""

    def __init__(
        self,
        autoencoder: nn.Module | None = None,
        *,
        stats: LatentStats | None = None,
        text: Callable[[list[str]], Cond] | None = None,
        dtype: str = "fp32",
        device: torch.device | str = "cpu",
    ) -> None:
        """autoencoder: None for pixels, which all methods then pass through. stats: of its latents; tokens and pixels
        have none. text: the text encoder, None without. dtype: fp32, bf16 or fp16, which moments and embeddings are
        rounded to, stored or not. device: where the work is done, and where results are."""
        self.device = torch.device(device)
        self.dtype = DTYPES[dtype]
        self.autoencoder = None if autoencoder is None else autoencoder.to(self.device).eval().requires_grad_(False)
        self.spec: LatentSpec = PIXELS if autoencoder is None else autoencoder.spec  # type: ignore[assignment]
        self.stats = stats
        self.embed = text

    @torch.no_grad()
    def moments(self, video: Float[Tensor, "b c t h w"]) -> Tensor:
        """Pixels in [-1, 1] -> moments (b, c or 2c, t, h, w) in the storage dtype, or tokens, int64 (b, t, h, w)."""
        if self.autoencoder is None:
            return video
        encoded = torch.cat([self.autoencoder.encode(clip) for clip in video.to(self.device).split(1)])  # type: ignore[operator]
        return encoded if self.spec.vocab else encoded.to(self.dtype)

    def latents(self, moments: Tensor, draw: Draw | None = None) -> Float[Tensor, "b c t h w"]:
        """Moments -> normalised latents, float32: drawn from the posterior, or its mean where `draw` is None or the
        moments are means alone. Raises ValueError without statistics."""
        if self.autoencoder is None:
            return moments
        mean, std = self._stats()
        moments = moments.to(self.device).float()
        latents, logvar = moments[:, : self.spec.channels], moments[:, self.spec.channels :]
        if draw is not None and logvar.shape[1]:
            latents = latents + torch.exp(logvar / 2) * draw.normal(*latents.shape[1:])
        return (latents - mean) / std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Float[Tensor, "b c t h w"]:
        """Normalised latents (b, c, t, h, w) or tokens (b, t, h, w) -> pixels in [-1, 1]."""
        if self.autoencoder is None:
            return latents.clamp(-1, 1)
        if not self.spec.vocab:
            mean, std = self._stats()
            latents = latents.to(self.device).float() * std + mean
        return self.autoencoder.decode(latents.to(self.device)).clamp(-1, 1)  # type: ignore[operator]

    @torch.no_grad()
    def text(self, captions: list[str]) -> Cond:
        """Captions -> Cond, empty where there is no text encoder. One caption at a time, for the reason clips are."""
        if self.embed is None:
            return Cond()
        cond = Cond.stack([self.embed([caption]) for caption in captions])
        rounded = cond.text if cond.text is None else cond.text.to(self.dtype).float()
        return replace(cond, text=rounded).to(self.device)

    def batch(self, clips: Clips | StoredClips, draw: Draw | None = None) -> Batch:
        """What an objective learns from, of clips as they come from files or from a store.

        Where there is no autoencoder, `video` is set, and `latents` to the same tensor. Embeddings come from the store
        if it has them.
        """
        if isinstance(clips, StoredClips):
            moments = clips.moments.to(self.device)
            stored = clips.cond.text is not None
            cond = clips.cond.to(self.device) if stored else self.text(clips.captions)
        else:
            moments = self.moments(to_pixels(clips.video.to(self.device)))
            cond = self.text(clips.captions)
        cond = replace(cond, label=clips.labels.to(self.device))
        batch = Batch(ids=clips.ids, samples=clips.samples, cond=cond)
        if self.spec.vocab:
            return replace(batch, tokens=moments)
        latents = self.latents(moments, draw)
        return replace(batch, latents=latents, video=latents if self.autoencoder is None else None)

    def fit_stats(self, clips: Iterable[UInt8[Tensor, "t h w c"]]) -> None:
        """Take the latents' statistics from clips: those that `mutoscope encode` takes, if these are its first
        STATS_CLIPS train clips."""
        moments = (self.moments(to_pixels(clip[None].to(self.device)))[0].cpu() for clip in clips)
        self.stats = LatentStats.fit(moments, self.spec.channels)

    def _stats(self) -> tuple[Tensor, Tensor]:
        if self.stats is None:
            raise ValueError("the latents' mean and standard deviation are not known: give stats, or call fit_stats")
        shape = lambda values: torch.tensor(values, device=self.device).view(-1, 1, 1, 1)
        return shape(self.stats.mean), shape(self.stats.std)


class Source:
    """A split of a recipe's data to train or validate on: clips from files, or what a store holds of them."""

    def __init__(self, dataset: VideoDataset | StoredSplit, encoder: Encoder) -> None:
        self.dataset, self.encoder = dataset, encoder

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def groups(self) -> list[int]:
        """The bucket of each clip."""
        return self.dataset.groups

    def report(self) -> list[str]:
        """What became of the clips, where that is worth a word: lines."""
        return self.dataset.report() if isinstance(self.dataset, VideoDataset) else []

    def pools(self, recipe: Recipe) -> tuple[Pool, ...]:
        """The clips by bucket, as training goes through them."""
        return make_pools(self.dataset.groups, self.dataset.sets, recipe.data, recipe.batch_size)

    def loader(self, batches: Iterable[list[tuple[int, int]]], workers: int = 0) -> Iterator[Clips | StoredClips]:
        """The clips of these batches of (index, place in the stream of samples), for `Encoder.batch`."""
        if isinstance(self.dataset, VideoDataset):
            return make_loader(self.dataset, batches, workers)
        loader = DataLoader(
            self.dataset,
            batch_sampler=batches,
            collate_fn=self.dataset.collate,
            num_workers=workers,
            multiprocessing_context="spawn" if workers else None,
            generator=torch.Generator(),
        )
        return iter(loader)

    def videos(self, indices: Sequence[int]) -> UInt8[Tensor, "n t h w c"]:
        """These clips, all of one bucket, to look at. Of a store, which keeps no pixels, what the autoencoder makes of
        their latents."""
        if isinstance(self.dataset, VideoDataset):
            return torch.stack([self.dataset.read(i, i).video for i in indices])
        clips = self.dataset.collate([self.dataset[i, i] for i in indices])
        encoded = clips.moments if self.encoder.spec.vocab else self.encoder.latents(clips.moments)
        return to_uint8(self.encoder.decode(encoded)).cpu()


def open_source(recipe: Recipe, encoder: Encoder, split: Split) -> Source:
    """The recipe's clips of a split, from its store if it names one.

    Gives the encoder its statistics where it has none yet: the store's, or those of the train clips at hand.
    Raises StoreError where the store was made by another autoencoder, transform or text encoder.
    """
    if recipe.data.latents is not None:
        store = LatentStore(recipe.data.latents)
        store.check(describe(recipe, encoder))
        encoder.stats = encoder.stats or store.manifest.stats
        return Source(StoredSplit(store, split, recipe.seed), encoder)
    dataset = VideoDataset(recipe.data, split, recipe.seed)
    if encoder.stats is None and encoder.autoencoder is not None and not encoder.spec.vocab:
        train = dataset if split == "train" else VideoDataset(recipe.data, "train", recipe.seed)
        encoder.fit_stats(train.read(i, i).video for i in range(min(len(train), STATS_CLIPS)))
    return Source(dataset, encoder)


def describe(recipe: Recipe, encoder: Encoder) -> Manifest:
    """The manifest of a new store of what `encoder` makes of the recipe's clips."""
    if encoder.autoencoder is None:
        raise ValueError("the recipe has no autoencoder: it trains on pixels, and there are no latents to store")
    text = None
    if recipe.text is not None:
        embedded = encoder.text([""]).text
        assert embedded is not None
        text = Text(identity=recipe.text.identity, length=embedded.shape[1], dim=embedded.shape[2])
    return Manifest(
        kind="tokens" if encoder.spec.vocab else "latents",
        autoencoder_hash=hash_weights(encoder.autoencoder),
        spec=encoder.spec,
        transform=transform_of(recipe.data),
        dtype=str(encoder.dtype).removeprefix("torch."),
        text=text,
    )
