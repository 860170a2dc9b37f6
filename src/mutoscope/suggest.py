"""Buckets for the clips at hand that a recipe's model can take and a memory can hold, for `mutoscope data stats`."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch

from mutoscope.build import latent_spec, model_io
from mutoscope.data.buckets import available_frames
from mutoscope.data.prepare.shapes import Allowed, Shape, Suggestion, assess, choose_shapes
from mutoscope.data.prepare.stats import Stats
from mutoscope.estimate.step import estimate
from mutoscope.progress import Bars
from mutoscope.recipe import Bucket, Data, Recipe
from mutoscope.types import PIXELS, LatentSpec

MAX_BATCH = 64
"""The largest batch that is suggested."""
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Buckets for a set of clips."""

    suggestions: tuple[Suggestion, ...]
    clips: int
    """All that were looked at."""
    too_short: int
    """How many of them no bucket takes."""
    allowed: Allowed
    """What the buckets were chosen from."""


def suggest(
    stats: Stats,
    recipe: Recipe | None = None,
    *,
    num_buckets: int = 4,
    memory: int | None = None,
    max_frames: int | None = None,
    area: int | None = None,
    spec: LatentSpec = PIXELS,
    progress: bool = True,
) -> Advice:
    """Up to `num_buckets` buckets that waste little of the clips (`data/prepare/shapes.py` says how), with batch sizes.

    recipe: its autoencoder and model decide which shapes there may be, in place of `spec`; its data how many frames a
        clip has (fps, frame_interval, frames left out); its batch size is every bucket's, unless `memory` is given.
    memory: bytes for a training step, by `mutoscope.estimate`; batches are the largest that fit, up to 64.
    max_frames: of a bucket; None takes the recipe's, or the median clip's.
    area: height × width in pixels to come near to; None takes the recipe's, or the median clip's.

    Raises ValueError for no buckets, where no clip has frames enough, where not one clip fits into the memory, for a
    memory without a recipe, and as `estimate` does.
    """
    if num_buckets < 1:
        raise ValueError(f"--num-buckets {num_buckets}: must be at least 1")
    if memory is not None and recipe is None:
        raise ValueError("--memory: how much a clip needs hangs on the model; name a --recipe too")
    data = recipe.data if recipe else Data(root=stats.root, frames=1, height=1, width=1)
    frames = [available_frames(info, data) for info in stats.infos]
    sizes = [(info.height, info.width) for info in stats.infos]
    aspects = np.array([width / height for height, width in sizes])
    now = data.shapes(1) if recipe else ()
    spec, patch = constraints(recipe) if recipe else (spec, (1, 1, 1))
    moving = [n for n, info in zip(frames, stats.infos, strict=True) if not info.image]
    allowed = Allowed(
        spec=spec,
        patch=patch,
        max_frames=max_frames or max((b.frames for b in now), default=0) or round(median(moving or [1])),
        area=area or max((b.height * b.width for b in now), default=0) or round(median(h * w for h, w in sizes)),
    )
    if recipe and memory is not None:
        allowed = _within(recipe, memory, allowed, aspects.tolist())
    shapes = choose_shapes(np.array(frames), aspects, allowed, num_buckets)
    if not shapes:
        least = spec.pixel_shape(patch[0], 1, 1)[0]
        least = least if least > 1 else spec.pixel_shape(2 * patch[0], 1, 1)[0]
        raise ValueError(f"{stats.root}: no buckets to suggest: a video has at least {least} frames for the model, the "
                         f"longest of {len(frames)} clips has {max(frames)}")  # fmt: skip
    buckets = []
    with Bars(progress and memory is not None) as bars:
        tell = bars.start("fitting batches into memory", len(shapes))
        for shape in shapes:
            buckets.append(_bucket(shape, recipe, memory))
            tell()
    suggestions, too_short = assess(frames, sizes, buckets)
    return Advice(suggestions=tuple(suggestions), clips=len(frames), too_short=too_short, allowed=allowed)


def constraints(recipe: Recipe) -> tuple[LatentSpec, Shape]:
    """How the recipe's autoencoder (or the one that it trains) lies over the pixels, and its model's patch."""
    spec = latent_spec(recipe.autoencoder)
    if recipe.autoencoder is None:
        with torch.device("meta"):
            spec = getattr(recipe.model.build(model_io(recipe)), "spec", PIXELS)
    patch: Shape = getattr(recipe.model, "patch", (1, 1, 1))
    return spec, patch


def _within(recipe: Recipe, memory: int, allowed: Allowed, aspects: list[float]) -> Allowed:
    """With as many frames as the memory holds one clip of at the largest of the sizes."""
    height, width = max((allowed.size(a) for a in set(aspects)), key=lambda size: size[0] * size[1])
    counts = allowed.frames()
    fitting = bisect_right(counts, memory, key=lambda t: _peak(recipe, (t, height, width), 1))
    if not fitting:
        raise _too_large((counts[0], height, width), recipe, memory)
    return replace(allowed, max_frames=counts[fitting - 1])


def _bucket(shape: Shape, recipe: Recipe | None, memory: int | None) -> Bucket:
    frames, height, width = shape
    batch_size = 1
    if recipe:
        batch_size = recipe.batch_size
        with torch.device("meta"):  # A model may have rules of its own, which it tells by an error.
            recipe.model.build(model_io(_at(recipe, shape)))
    if recipe and memory is not None:
        batch_size = largest_batch(lambda size: _peak(recipe, shape, size), memory)
        if not batch_size:
            raise _too_large(shape, recipe, memory)
    return Bucket(frames=frames, height=height, width=width, batch_size=batch_size)


def _at(recipe: Recipe, shape: Shape) -> Recipe:
    frames, height, width = shape
    return replace(recipe, data=replace(recipe.data, frames=frames, height=height, width=width, buckets=()))


def _too_large(shape: Shape, recipe: Recipe, memory: int) -> ValueError:
    frames, height, width = shape
    needed = _peak(recipe, shape, 1)
    return ValueError(
        f"--memory: one clip of {frames} frames of {width}×{height} pixels needs {needed / 1e9:.1f} GB, "
        f"{memory / 1e9:.1f} GB are given; lower --area, or set the recipe's activation_checkpointing, precision or "
        "data.latents"
    )


def _peak(recipe: Recipe, shape: Shape, batch_size: int) -> int:
    """Bytes that a training step needs."""
    return estimate(replace(_at(recipe, shape), batch_size=batch_size)).peak_bytes


def largest_batch(peak: Callable[[int], int], memory: int, most: int = MAX_BATCH) -> int:
    """The largest batch, up to `most`, whose peak is within the memory; 0 where not one clip is.

    The peak must grow with the batch. It is asked seldom where it grows evenly: the first two tell where to look.
    """
    one = peak(1)
    if one > memory:
        return 0
    low, high = 1, most + 1  # `low` fits; `high` does not, or is not to be looked at.
    guess = 1 + (memory - one) // max(1, peak(2) - one)
    while high - low > 1:
        size = min(max(guess, low + 1), high - 1)
        if peak(size) <= memory:
            low, guess = size, size + 1
        else:
            high, guess = size, size - 1
    return low


# ---- what the command line says


def parse_memory(text: str, flag: str = "--memory") -> int:
    """24GB, 24GiB, 80G -> bytes: GB are thousands of MB, GiB are 1024 MiB. Raises ValueError for anything else, naming
    the flag."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if not match or match[2] not in UNITS or not float(match[1]):
        raise ValueError(f"{flag} {text}: write a number above 0 and a unit, as in 24GB or 22.5GiB")
    return int(float(match[1]) * UNITS[match[2]])


def parse_area(text: str) -> int:
    """480x720 -> 345600. Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+)\s*[x×]\s*(\d+)\s*", text.lower())
    if not match or not int(match[1]) * int(match[2]):
        raise ValueError(f"--area {text}: write HEIGHTxWIDTH, as in 480x720")
    return int(match[1]) * int(match[2])


def parse_rule(frames: str, multiple: int) -> LatentSpec:
    """4n+1 or 8n, and what heights and widths are multiples of, as strides. Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d*)\s*n\s*(\+\s*1)?\s*", frames.lower())
    if not match or match[1] == "0":
        raise ValueError(f"--frames-rule {frames}: write Kn or Kn+1, as in 4n+1, 8n or n")
    if multiple < 1:
        raise ValueError(f"--multiple {multiple}: must be at least 1")
    return LatentSpec(strides=(int(match[1] or 1), multiple, multiple), channels=3, first_frame_alone=bool(match[2]))
