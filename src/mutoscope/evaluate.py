"""What a finished run is worth, in numbers: the verb `mutoscope evaluate`.

An autoencoder is judged on the val clips it reconstructs; a generator on videos that it draws for the val clips'
conditions. Every figure is described in docs/metrics.md.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from mutoscope.data.buckets import iterate_once
from mutoscope.data.flying_mnist import preset_of
from mutoscope.encode import Source, open_source
from mutoscope.files import replacing
from mutoscope.metrics.frechet import FrechetDistance, random_conv_features
from mutoscope.metrics.glyph import GlyphMetric
from mutoscope.metrics.reconstruction import reconstruct_metrics
from mutoscope.pictures import write_grid
from mutoscope.run import Run
from mutoscope.sample import Generator, load_generator, reconstruct, sample_videos
from mutoscope.types import NO_LABEL, Cond

GRID = 10
"""Videos in a row of the grid that evaluation leaves."""


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
        num: clips to reconstruct, or videos to draw.
        seed: of the drawn videos.
        on_clips: called with the number of clips done since the last call, for progress.

    Raises as `load_generator` and `open_source` do.
    """
    if num < 2:
        raise ValueError(f"--num {num}: at least 2 videos are needed")
    generator = load_generator(folder, trust_code)
    source = open_source(generator.recipe, generator.encoder, "val")
    judge = _judge_reconstruction if generator.recipe.sampler is None else _judge_samples
    figures, rows = judge(generator, source, num, seed, on_clips)
    run = Run(folder)
    write_grid(run.folder / "evaluation", rows, generator.recipe.data.fps or 8)
    with replacing(run.folder / "evaluation.json") as aside:
        aside.write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def _judge_reconstruction(
    generator: Generator, source: Source, num: int, seed: int, on_clips: Callable[[int], None]
) -> tuple[dict[str, float], list[list[Tensor]]]:
    """PSNR, SSIM and the use of the codebook over val clips; originals above their reconstructions."""
    size = generator.recipe.batch_size
    num = min(num, len(source))

    def batches() -> Iterator[Tensor]:
        for raw in source.loader(iterate_once(num, size)):
            batch = generator.encoder.batch(raw)
            assert batch.video is not None
            yield batch.video
            on_clips(len(batch.ids))

    figures = reconstruct_metrics(generator.model, batches())
    shown = next(iter(source.loader(iterate_once(min(GRID, num), GRID))))
    rebuilt = reconstruct(generator, generator.encoder.batch(shown))
    return figures, [list(source.videos(range(len(rebuilt)))), list(rebuilt)]


def _judge_samples(
    generator: Generator, source: Source, num: int, seed: int, on_clips: Callable[[int], None]
) -> tuple[dict[str, float], list[list[Tensor]]]:
    """Fréchet distance to the val clips and, where clips show one digit each, whether it is the digit asked for."""
    conds, labels = [], []
    for raw in source.loader([(n % len(source), n)] for n in range(num)):
        conds.append(generator.encoder.batch(raw).cond)
        labels.append(int(raw.labels[0]))
    started = time.monotonic()
    drawn = torch.stack(list(sample_videos(generator, Cond.stack(conds), num, seed, on_clips)))
    figures = {"seconds_per_clip": (time.monotonic() - started) / num}
    frechet = FrechetDistance(random_conv_features(seed=0))
    frechet.update(drawn, real=False)
    for first in range(0, len(source), 64):
        frechet.update(source.videos(range(first, min(first + 64, len(source)))), real=True)
    figures["frechet_random_conv"] = frechet.compute()
    preset = preset_of(generator.recipe.data.root)
    if preset is not None and preset.digits == (1, 1) and NO_LABEL not in labels:
        figures |= GlyphMetric(preset).accuracy(drawn, torch.tensor(labels))
    return figures, _by_label(drawn, labels)


def _by_label(videos: Tensor, labels: list[int]) -> list[list[Tensor]]:
    """At most GRID videos of each label, a row each."""
    rows = [[v for v, label in zip(videos, labels, strict=True) if label == wanted] for wanted in sorted(set(labels))]
    return [row[:GRID] for row in rows]
