"""From nothing to videos on a laptop: `mutoscope demo` runs the chain at the end of this file.

The recipes are small enough for two CPU cores and take any folder of short clips (see the README).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from rich.progress import Progress

from mutoscope.autoencoders.conv import ConvAutoencoder
from mutoscope.data.flying_mnist import make, preset_named
from mutoscope.data.video import write_video
from mutoscope.encode_job import encode
from mutoscope.evaluate import evaluate_run
from mutoscope.models.dit import DiT
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.objectives.reconstruction import Reconstruction
from mutoscope.pictures import write_strips
from mutoscope.recipe import Autoencoder, Data, Optim, Recipe, Sampler
from mutoscope.report import Stage, write_report
from mutoscope.run import Run
from mutoscope.sample import conditions, load_generator, sample_videos
from mutoscope.text.encoders import HashedWords
from mutoscope.training.log import console, peak_memory
from mutoscope.training.loop import train

CLIPS = Data(root="flying-mnist://demo", frames=8, height=32, width=32, fps=8, num_labels=10, cache=True)


def autoencoder() -> Recipe:
    """Patch-local autoencoder of small clips: 4 × 4 × 4 pixels to 12 numbers.

    Every patch is encoded by itself, so that background is the same latent everywhere and at all times: what a
    generator need not learn. Noise on the latents while training makes the decoder forgive a generator's errors.

    Source: our own (docs/design/004-demo.md).
    Command: mutoscope train quickstart.autoencoder [--data.root DIR_OF_MP4]
    Hardware: 2 CPU cores, under half a minute.
    Status: verified
    """
    return Recipe(
        data=CLIPS,
        model=ConvAutoencoder(
            network="patch", strides=(4, 4, 4), encoder_channels=(256,), decoder_channels=(256,), latent_channels=12,
            bounded=True, latent_noise=0.1,
        ),
        objective=Reconstruction(),
        optim=Optim(lr=3e-3, schedule="cosine", warmup_steps=20),
        steps=600,
        batch_size=32,
        validate_every=200,
        sample_every=600,
        save_every=300,
    )  # fmt: skip


def dit() -> Recipe:
    """Latent diffusion transformer, conditioned on the clip's class.

    Source: DiT (arXiv:2212.09748) with joint attention over space and time, rectified flow, Muon.
    Command: mutoscope train quickstart.dit
    Hardware: 2 CPU cores, under 5 minutes.
    Status: verified
    """
    return Recipe(
        data=CLIPS,
        autoencoder=Autoencoder(path="runs/autoencoder", recipe="quickstart.autoencoder"),
        model=DiT(depth=4, width=160, heads=5, patch=(1, 1, 1), attention="joint"),
        objective=Diffusion(),
        sampler=Sampler(steps=25, guidance_scale=2.0),
        optim=Optim(name="muon", lr=3e-3, betas=(0.9, 0.99), schedule="cosine", warmup_steps=50),
        steps=2500,
        batch_size=16,
        precision="bf16",
        ema=0.995,
        log_every=50,
        validate_every=1000,
        sample_every=2000,
        save_every=1000,
    )


def text_to_video() -> Recipe:
    """The same transformer, conditioned on captions instead of a class.

    Source: as quickstart.dit, with cross-attention to the words.
    Command: mutoscope train quickstart.text_to_video --data.root DIR_OF_MP4_WITH_TXT
    Hardware: 2 CPU cores, minutes to hours; depends on the clips.
    Status: untested
    """
    return replace(dit(), text=HashedWords(), data=replace(CLIPS, num_labels=0))


def demo(out: Path, *, clips: int = 4000, num: int = 200) -> dict[str, float]:
    """The whole chain on generated clips: data, autoencoder, latents, transformer, evaluation, videos, report.

    Stages that an earlier call finished in `out` are not done again. Returns the figures, which are printed too.

    Args:
        clips: training clips to generate.
        num: videos to draw for the evaluation.
    """
    data = replace(CLIPS, root=str(out / "clips"))
    first = replace(autoencoder(), data=data)
    second = replace(
        dit(),
        data=replace(data, latents=str(out / "latents"), cache=False),
        autoencoder=Autoencoder(path=str(out / "autoencoder"), recipe="quickstart.autoencoder"),
    )
    stages: list[Stage] = []
    with _timed("generate clips", stages):
        make(out / "clips", preset_named("demo"), workers=os.cpu_count() or 1, train=clips)
    with _timed("train the autoencoder", stages):
        train(first, out / "autoencoder")
    with _timed("encode the clips", stages):
        encode(second, out / "latents")
    with _timed("train the transformer", stages):
        train(second, out / "dit")
    with _timed("draw and evaluate", stages):
        rebuilt = _with_bar(
            "reconstructing", num, lambda tick: evaluate_run(out / "autoencoder", num=num, on_clips=tick)
        )
        drawn = _with_bar("drawing", num, lambda tick: evaluate_run(out / "dit", num=num, on_clips=tick))
    figures = {f"autoencoder.{k}": v for k, v in rebuilt.items()} | {f"dit.{k}": v for k, v in drawn.items()}
    _draw_digits(out / "dit", out)
    runs = {"Autoencoder": Run(out / "autoencoder"), "Latent diffusion transformer": Run(out / "dit")}
    write_report(out / "report.html", "Mutoscope demo: flying digits", runs, stages, figures)
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    for name, value in figures.items():
        console.print(f"{name:32} {value:.4g}")
    for what, path in {
        "videos": "videos",
        "their frames": "digits.png",
        "200 more": "dit/evaluation.mp4",
        "report": "report.html",
    }.items():
        console.print(f"{what}: {out / path}", markup=False)
    return figures


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


@contextmanager
def _timed(name: str, stages: list[Stage]) -> Iterator[None]:
    console.rule(name, align="left")
    started = time.monotonic()
    yield
    stages.append(Stage(name=name, seconds=time.monotonic() - started, peak_memory=peak_memory()))


def _with_bar(name: str, total: int, work: Callable[[Callable[[int], None]], dict[str, float]]) -> dict[str, float]:
    with Progress(console=console) as progress:
        bar = progress.add_task(name, total=total)
        return work(lambda done: progress.advance(bar, done))
