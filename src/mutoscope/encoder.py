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
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mutoscope.checkpoints import hash_part
from mutoscope.data.buckets import Pool, make_pools
from mutoscope.data.dataset import Clips, Listing, VideoDataset, list_and_look, to_pixels, to_uint8
from mutoscope.data.flying_mnist import Split
from mutoscope.data.loader import make_loader
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
from mutoscope.recipe import Autoencoder, Recipe
from mutoscope.types import DTYPES, PIXELS, Batch, Cond, LatentSpec
from mutoscope.weights import hash_weights
from mutoscope.workers import worker_context


class Encoder:
    """Clips <-> normalised latents or tokens, captions -> Cond. Frozen; never draws a gradient."""

    def __init__(
        self,
        autoencoder: nn.Module | Callable[[], nn.Module] | None = None,
        *,
        spec: LatentSpec | None = None,
        stats: LatentStats | None = None,
        text: Callable[[list[str]], Cond] | None = None,
        load_text: Callable[[], Callable[[list[str]], Cond]] | None = None,
        first_frame: bool = False,
        window: int | None = None,
        fps: float | None = None,
        dtype: str = "fp32",
        device: torch.device | str = "cpu",
    ) -> None:
        """autoencoder: None for pixels, which all methods then pass through; or the function that loads it when it is
        first needed, with its `spec`. stats: of its latents; tokens and pixels have none. text: the text encoder, None
        without; `load_text` loads it when it is first needed. first_frame: conditions hold each clip's first frame.
        window: latents along time that a batch has of each clip, a random stretch of them; None for all. fps: what
        conditions say of the videos' rate. dtype: fp32, bf16 or fp16, which moments and embeddings are rounded to,
        stored or not. device: where the work is done, and where results are."""
        self.device = torch.device(device)
        self.dtype = DTYPES[dtype]
        self.spec = spec if spec is not None else PIXELS if autoencoder is None else _spec_of(autoencoder)
        self.stats = stats
        self.first_frame, self.window, self.fps = first_frame, window, fps
        self.is_pixels = autoencoder is None
        self._autoencoder = self._prepared(autoencoder) if isinstance(autoencoder, nn.Module) else None
        self._load = None if isinstance(autoencoder, nn.Module) else autoencoder
        self._text, self._load_text = text, load_text

    @property
    def autoencoder(self) -> nn.Module | None:
        """The autoencoder, loaded now if it has not been; None for pixels."""
        if self._autoencoder is None and self._load is not None:
            self._autoencoder = self._prepared(self._load())
        return self._autoencoder

    @property
    def embed(self) -> Callable[[list[str]], Cond] | None:
        """The text encoder, loaded now if it has not been; None without."""
        if self._text is None and self._load_text is not None:
            text = self._load_text()
            self._text = self._prepared(text) if isinstance(text, nn.Module) else text
        return self._text

    def release(self) -> None:
        """Let go of what was loaded because it was needed; it is loaded again when it is needed again."""
        self._autoencoder = None if self._load is not None else self._autoencoder
        self._text = None if self._load_text is not None else self._text

    def _prepared(self, module: nn.Module) -> nn.Module:
        module = module.eval().requires_grad_(False)
        return module if self.device == _device_of(module) else module.to(self.device)

    @torch.no_grad()
    def moments(self, video: Float[Tensor, "b c t h w"]) -> Tensor:
        """Pixels in [-1, 1] -> moments (b, c or 2c, t, h, w) in the storage dtype, or tokens, int64 (b, t, h, w)."""
        if self.is_pixels:
            return video
        encoder = self.autoencoder
        encoded = torch.cat([encoder.encode(clip) for clip in video.to(self.device).split(1)])  # type: ignore[union-attr, operator]
        return encoded if self.spec.vocab else encoded.to(self.dtype)

    def latents(self, moments: Tensor, draw: Draw | None = None) -> Float[Tensor, "b c t h w"]:
        """Moments -> normalised latents, float32: drawn from the posterior, or its mean where `draw` is None or the
        moments are means alone. Raises ValueError without statistics."""
        if self.is_pixels:
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
        if self.is_pixels:
            return latents.clamp(-1, 1)
        if not self.spec.vocab:
            mean, std = self._stats()
            latents = latents.to(self.device).float() * std + mean
        return self.autoencoder.decode(latents.to(self.device)).clamp(-1, 1)  # type: ignore[union-attr, operator]

    @torch.no_grad()
    def text(self, captions: list[str]) -> Cond:
        """Captions -> Cond, without them where there is no text encoder. One caption at a time, for the reason clips
        are."""
        if self.embed is None:
            return self._with_rate(Cond(), len(captions))
        cond = Cond.stack([self.embed([caption]) for caption in captions])
        rounded = lambda embedded: embedded if embedded is None else embedded.to(self.dtype).float()
        cond = replace(cond, text=rounded(cond.text), null_text=rounded(cond.null_text)).to(self.device)
        return self._with_rate(cond, len(captions))

    def _with_rate(self, cond: Cond, num: int) -> Cond:
        return cond if self.fps is None else replace(cond, fps=torch.full((num,), float(self.fps), device=self.device))

    def batch(self, clips: Clips | StoredClips, draw: Draw | None = None) -> Batch:
        """What an objective learns from, of clips as they come from files or from a store.

        Where there is no autoencoder, `video` is set, and `latents` to the same tensor. Embeddings come from the store
        if it has them. `draw` is for windows, posteriors and the noise on the first frame; without it, windows are the
        first, and nothing else is drawn.
        """
        if isinstance(clips, StoredClips):
            moments, images = clips.moments.to(self.device), clips.images
            stored = clips.cond.text is not None
            text = self._with_rate(clips.cond.to(self.device), len(clips.ids)) if stored else None
            cond = text or self.text(clips.captions)
        else:
            moments, images = self.moments(to_pixels(clips.video.to(self.device))), clips.video[:, :1]
            cond = self.text(clips.captions)
        cond = replace(cond, label=clips.labels.to(self.device))
        batch = Batch(ids=clips.ids, samples=clips.samples, cond=cond)
        moments = self._windowed(moments, draw)
        if self.spec.vocab:
            return replace(batch, tokens=moments)
        latents = self.latents(moments, draw)
        if self.first_frame:
            assert images is not None
            batch = replace(batch, cond=replace(cond, known=self.known(images, latents.shape[2], draw)))
        return replace(batch, latents=latents, video=latents if self.is_pixels else None)

    def _windowed(self, moments: Tensor, draw: Draw | None) -> Tensor:
        """A stretch of each clip's moments or tokens along time, where a window is set."""
        frames = moments.shape[-3]
        if self.window is None or self.window == frames:
            return moments
        first = torch.zeros(len(moments), dtype=torch.long, device=moments.device)
        if draw is not None:
            first = (draw.uniform() * (frames - self.window + 1)).long().clamp(max=frames - self.window)
        places = first[:, None] + torch.arange(self.window, device=moments.device)
        rows = torch.arange(len(moments), device=moments.device)[:, None]
        return moments.movedim(-3, 1)[rows, places].movedim(1, -3)

    @torch.no_grad()
    def known(self, images: UInt8[Tensor, "b 1 h w 3"], frames: int, draw: Draw | None) -> Float[Tensor, "b c t y x"]:
        """First frames as `Cond.known` of videos of t = `frames` latents: zero but for the first. With `draw` they are
        noised, as image-to-video models are trained: the noise is drawn anew for stored clips, too."""
        image = to_pixels(images.to(self.device))
        latents = self.autoencoder.image_latents(image, draw)  # type: ignore[union-attr, operator]
        return torch.nn.functional.pad(latents, (0, 0, 0, 0, 0, frames - 1))

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


def _spec_of(autoencoder: Any) -> LatentSpec:
    spec: LatentSpec = autoencoder.spec
    return spec


def _device_of(module: nn.Module) -> torch.device | None:
    """Where a module is: fake tensors, on which estimates are made, do not let it be moved, not even to where it is."""
    parameter = next(module.parameters(), None)
    return None if parameter is None else parameter.device


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
            multiprocessing_context=worker_context() if workers else None,
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


def open_source(recipe: Recipe, encoder: Encoder, split: Split, listing: Listing | None = None) -> Source:
    """The recipe's clips of a split, from its store if it names one. listing: of its clips, where it is at hand.

    Gives the encoder its statistics where it has none yet: the store's, or those of the train clips at hand.
    Raises StoreError where the store was made by another autoencoder, transform or text encoder.
    """
    if recipe.data.latents is not None:
        store = LatentStore(recipe.data.latents)
        store.check(describe(recipe, encoder))
        encoder.stats = encoder.stats or store.manifest.stats
        return Source(StoredSplit(store, split, recipe.seed), encoder)
    listing = listing or list_and_look(recipe.data)
    dataset = VideoDataset(recipe.data, split, recipe.seed, listing)
    if encoder.stats is None and not encoder.is_pixels and not encoder.spec.vocab:
        train = dataset if split == "train" else VideoDataset(recipe.data, "train", recipe.seed, listing)
        encoder.fit_stats(train.read(i, i).video for i in range(min(len(train), STATS_CLIPS)))
    return Source(dataset, encoder)


def describe(recipe: Recipe, encoder: Encoder) -> Manifest:
    """The manifest of a new store of what `encoder` makes of the recipe's clips. Loads neither of its parts, where they
    are a checkpoint's."""
    if recipe.autoencoder is None:
        raise ValueError("the recipe has no autoencoder: it trains on pixels, and there are no latents to store")
    text = None
    if recipe.text is not None:
        about = recipe.text
        text = Text(identity=about.identity, length=about.length, dim=about.dim, has_null=about.has_null)
    return Manifest(
        kind="tokens" if encoder.spec.vocab else "latents",
        autoencoder_hash=autoencoder_hash(recipe.autoencoder, encoder),
        spec=encoder.spec,
        transform=transform_of(recipe.data),
        dtype=str(encoder.dtype).removeprefix("torch."),
        text=text,
        images=recipe.first_frame,
    )


def autoencoder_hash(config: Autoencoder, encoder: Encoder) -> str:
    """Hash of an autoencoder's weights, and of what else decides what it makes of a clip."""
    if config.recipe is None:
        return f"{hash_part(config.path, 'vae')}{' tiled' if config.tiling else ''}"
    assert encoder.autoencoder is not None
    return hash_weights(encoder.autoencoder)
