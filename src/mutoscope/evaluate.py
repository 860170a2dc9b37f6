"""What a finished run is worth, in numbers: the verb `mutoscope evaluate`.

An autoencoder is judged on the val clips it reconstructs; a generator on videos that it draws for the val clips'
conditions; a contrastive model on which of the val clips it finds for their captions. Every figure is described in
docs/metrics.md.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mutoscope.data.buckets import iterate_once
from mutoscope.data.dataset import VideoDataset, to_pixels
from mutoscope.data.flying_mnist import preset_of
from mutoscope.data.loader import make_loader
from mutoscope.files import replacing
from mutoscope.metrics.frechet import FrechetDistance, random_conv_features
from mutoscope.metrics.glyph import GlyphMetric
from mutoscope.metrics.reconstruction import reconstruct_metrics
from mutoscope.metrics.retrieval import recall
from mutoscope.objectives.contrastive import Contrastive
from mutoscope.pictures import write_grid
from mutoscope.recipe import Data
from mutoscope.run import Run
from mutoscope.sample import Generator, inference, load_generator, reconstruct, sample_videos
from mutoscope.types import NO_LABEL

GRID = 10
"""Videos in a row of the grid that evaluation leaves."""
MOST_REAL = 1000
"""Val clips that drawn videos are compared with, at most."""


def evaluate_run(
    folder: Path,
    *,
    num: int = 200,
    seed: int = 0,
    trust_code: bool = False,
    on_clips: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
    """Figures of a finished run, also written to RUN/evaluation.json, with a grid of videos beside it.

    Args:
        num: clips to reconstruct or to find each other among, or videos to draw.
        seed: of the drawn videos.
        on_clips: called with the number of clips done since the last call, for progress.

    Raises as `load_generator` and `VideoDataset` do.
    """
    if num < 2:
        raise ValueError(f"--num {num}: at least 2 videos are needed")
    generator = load_generator(folder, trust_code)
    recipe = generator.recipe
    clips = VideoDataset(_held_out(recipe.data), "val", recipe.seed)
    if isinstance(recipe.objective, Contrastive):
        judge = _judge_retrieval
    else:
        judge = _judge_reconstruction if recipe.sampler is None else _judge_samples
    figures, rows = judge(generator, clips, num, seed, on_clips)
    run = Run(folder)
    write_grid(run.folder / "evaluation", rows, recipe.data.fps or 8)
    with replacing(run.folder / "evaluation.json") as aside:
        aside.write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def _held_out(data: Data) -> Data:
    """The clips themselves, each at the recipe's one shape."""
    return replace(data, buckets=(), latents=None, window="first", window_interval=None, cache=False)


def _judge_reconstruction(
    generator: Generator, clips: VideoDataset, num: int, seed: int, on_clips: Callable[[int], None]
) -> tuple[dict[str, float], list[list[Tensor]]]:
    """PSNR, SSIM and the use of the codebook over val clips; originals above their reconstructions."""
    num = min(num, len(clips))

    def batches() -> Iterator[Tensor]:
        for raw in make_loader(clips, iterate_once(clips.groups[:num], generator.recipe.batch_size)):
            yield to_pixels(raw.video.to(generator.device))
            on_clips(len(raw.ids))

    figures = reconstruct_metrics(generator.model, batches())
    shown = torch.stack([clips[i, i].video for i in range(min(GRID, num))])
    rebuilt = reconstruct(generator, to_pixels(shown.to(generator.device)))
    return figures, [list(shown), list(rebuilt)]


def _judge_retrieval(
    generator: Generator, clips: VideoDataset, num: int, seed: int, on_clips: Callable[[int], None]
) -> tuple[dict[str, float], list[list[Tensor]]]:
    """Recall among val clips; some of them above what was found for their captions."""
    num, embedded, captions = min(num, len(clips)), [], list[str]()
    for raw in make_loader(clips, iterate_once(clips.groups[:num], generator.recipe.batch_size)):
        batch = generator.encoder.batch(raw, None)
        with inference(generator.recipe, generator.model):
            video, text, _ = generator.model(batch.latents, batch.cond)
        embedded.append(torch.stack([video, text]).cpu())
        captions += raw.captions
        on_clips(len(raw.ids))
    videos, texts = torch.cat(embedded, dim=1)
    similarity = videos @ texts.T
    same = torch.tensor([[a == b for b in captions] for a in captions])
    figures = {name: float(value) for name, value in recall(similarity, same).items()}
    figures["distinct_captions"] = len(set(captions)) / num
    shown = range(min(GRID, num))
    found = similarity.argmax(0).tolist()
    return figures, [[clips[i, i].video for i in shown], [clips[found[i], found[i]].video for i in shown]]


def _judge_samples(
    generator: Generator, clips: VideoDataset, num: int, seed: int, on_clips: Callable[[int], None]
) -> tuple[dict[str, float], list[list[Tensor]]]:
    """Fréchet distance to the val clips and, where clips show one digit each, whether it is the digit asked for."""
    asked = [clips[n % len(clips), n] for n in range(num)]
    labels = torch.tensor([clip.label for clip in asked])
    cond = generator.encoder.text([clip.caption for clip in asked])
    if generator.recipe.data.num_labels:
        cond = replace(cond, label=labels.to(generator.device))
    started = time.monotonic()
    drawn = torch.stack(list(sample_videos(generator, cond, num, seed, on_clips)))
    figures = {"seconds_per_clip": (time.monotonic() - started) / num}

    real = torch.stack([clips[i, i].video for i in range(min(len(clips), MOST_REAL))])
    real = real[:, : drawn.shape[1]]  # a model of windows draws shorter ones
    frechet = FrechetDistance(random_conv_features(seed=0))
    frechet.update(drawn, real=False)
    frechet.update(real, real=True)
    figures["frechet_random_conv"] = frechet.compute()
    preset = preset_of(generator.recipe.data.root)
    if preset is not None and preset.digits == (1, 1) and NO_LABEL not in labels.tolist():
        metric = GlyphMetric(preset)
        figures |= metric.accuracy(drawn, labels)
        real_labels = torch.tensor([clips[i, i].label for i in range(len(real))])
        figures |= {f"{name}_of_real_clips": value for name, value in metric.accuracy(real, real_labels).items()}
    return figures, _by_label(drawn, labels.tolist())


def _by_label(videos: Tensor, labels: list[int]) -> list[list[Tensor]]:
    """At most GRID videos of each label, a row each."""
    rows = [[v for v, label in zip(videos, labels, strict=True) if label == wanted] for wanted in sorted(set(labels))]
    return [row[:GRID] for row in rows]
