"""`mutoscope demo`: from nothing to videos, figures and a report, on generated clips."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.progress import Progress

from mutoscope.data.flying_mnist import make, preset_named
from mutoscope.data.video import write_video
from mutoscope.encode import encode
from mutoscope.evaluate import evaluate_run
from mutoscope.pictures import write_strips
from mutoscope.recipe import Autoencoder, Recipe
from mutoscope.recipes import quickstart
from mutoscope.report import Stage, write_report
from mutoscope.run import Run
from mutoscope.sample import conditions, load_generator, sample_videos
from mutoscope.training.log import console, peak_memory
from mutoscope.training.loop import train


def demo(
    out: Path,
    *,
    autoencoder: Recipe | None = None,
    transformer: Recipe | None = None,
    clips: int = 4000,
    num: int = 200,
) -> dict[str, float]:
    """The whole chain on generated clips: data, autoencoder, latents, transformer, evaluation, videos, report.

    What an earlier call finished in `out` is not done again. Returns the figures, which are printed too.

    Args:
        autoencoder, transformer: in place of quickstart.autoencoder and quickstart.dit.
        clips: training clips to generate.
        num: videos to draw for the evaluation.
    """
    first, second = autoencoder or quickstart.autoencoder(), transformer or quickstart.dit()
    first = replace(first, data=replace(first.data, root=str(out / "clips")))
    second = replace(
        second,
        data=replace(second.data, root=str(out / "clips"), latents=str(out / "latents")),
        autoencoder=Autoencoder(path=str(out / "autoencoder"), recipe="quickstart.autoencoder"),
    )
    stages = _Stages(out / "stages.json")
    with stages.timed("generate clips"):
        make(out / "clips", preset_named("demo"), workers=os.cpu_count() or 1, train=clips)
    with stages.timed("train the autoencoder"):
        train(first, out / "autoencoder")
    with stages.timed("encode the clips"):
        encode(second, out / "latents")
    with stages.timed("train the transformer"):
        train(second, out / "dit")
    with stages.timed("draw and evaluate"):
        figures = _figures("autoencoder", out, num) | _figures("dit", out, num)
        _draw_digits(out / "dit", out)
    runs = {"Autoencoder": Run(out / "autoencoder"), "Latent diffusion transformer": Run(out / "dit")}
    write_report(out / "report.html", "Mutoscope demo: flying digits", runs, stages.done, figures)
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    for name, value in figures.items():
        console.print(f"{name:40} {value:.4g}")
    for stage in stages.done:
        console.print(f"{stage.name:40} {stage.seconds:.1f} s")
    for path in ("videos", "digits.png", "dit/evaluation.mp4", "report.html"):
        console.print(str(out / path), markup=False, soft_wrap=True)
    return figures


def _figures(name: str, out: Path, num: int) -> dict[str, float]:
    with Progress(console=console) as progress:
        bar = progress.add_task(f"evaluating {name}", total=num)
        figures = evaluate_run(out / name, num=num, on_clips=lambda done: progress.advance(bar, done))
    return {f"{name}.{key}": value for key, value in figures.items()}


def _draw_digits(run: Path, out: Path) -> None:
    """One video of each digit, and a sheet of their frames."""
    generator = load_generator(run)
    digits = range(10)
    cond = replace(conditions(generator, len(digits), None, None), label=torch.tensor(digits, device=generator.device))
    videos = list(sample_videos(generator, cond, len(digits), seed=1))
    (out / "videos").mkdir(exist_ok=True)
    for digit in digits:
        write_video(out / "videos" / f"digit-{digit}.mp4", videos[digit].numpy(), fps=8)
    write_strips(out / "digits.png", videos)


class _Stages:
    """Times of the stages, added up over calls that were interrupted."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.done = [Stage(**stage) for stage in json.loads(file.read_text())] if file.exists() else []

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        console.rule(name, align="left")
        started = time.monotonic()
        try:
            yield
        finally:
            before = [stage for stage in self.done if stage.name == name]
            seconds = time.monotonic() - started + sum(stage.seconds for stage in before)
            now = Stage(name=name, seconds=seconds, peak_memory=peak_memory())
            self.done = [stage for stage in self.done if stage.name != name] + [now]
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps([asdict(stage) for stage in self.done]))
