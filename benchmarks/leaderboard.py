"""Ways to generate video, each trained under one budget on the same clips, and what they are worth.

    python -m benchmarks.leaderboard --out runs/leaderboard --minutes 20 [--families gpt dit] [--jobs 2]

Models over tokens learn the same tokens, diffusion models the same latents, of the same clips. A family takes the steps
that its budget of CPU time on one thread allows; nothing else of its recipe is changed. Everything is kept in --out:
called again, what is finished is not done again. On a GPU the budget is wall time, and --arena full takes the recipes
of 32×256×256 in place of those of 8×32×32.

Prints a table, and writes it with its figures and plots to --out: leaderboard.{json,md,png}, and samples.png, what each
family draws for the ten digits.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.harness import table
from mutoscope.build import build_model
from mutoscope.encode import encode
from mutoscope.evaluate import evaluate_run
from mutoscope.loading import load_recipe
from mutoscope.objectives.tokens import NextToken
from mutoscope.pictures import write_strips
from mutoscope.recipe import Autoencoder, Recipe
from mutoscope.run import Run
from mutoscope.sample import conditions, load_generator, sample_videos
from mutoscope.training.loop import train

FAMILIES = {
    "cpu": {
        "DiT": "quickstart.dit",
        "STDiT": "quickstart.stdit",
        "GPT": "quickstart.gpt",
        "sparse GPT": "quickstart.sparse_gpt",
        "Mamba 1": "quickstart.mamba",
        "Mamba 2": "quickstart.mamba2",
    },
    "full": {
        "Latte": "minisora.dit",
        "STDiT": "minisora.stdit",
        "GPT": "minisora.gpt",
        "sparse GPT": "minisora.sparse_gpt",
        "Mamba 1": "minisora.mamba",
    },
}
"""Recipes by what the table calls them."""
PROBE = (10, 40)
"""Steps of the two short runs whose difference tells how long a step takes."""
DRAWN = 200
"""Videos that each family is judged by."""


@dataclass(frozen=True)
class Task:
    """One family to train and to judge."""

    name: str
    recipe: Recipe
    folder: Path
    minutes: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/leaderboard"))
    parser.add_argument("--minutes", type=float, default=20, help="budget of each family, on one thread")
    parser.add_argument("--arena", choices=sorted(FAMILIES), default="cpu")
    parser.add_argument("--families", nargs="*", help="those to run; all unless you say otherwise")
    parser.add_argument("--jobs", type=int, default=1, help="families at a time")
    options = parser.parse_args()
    names = options.families or list(FAMILIES[options.arena])
    if unknown := [name for name in names if name not in FAMILIES[options.arena]]:
        parser.error(f"no such families: {', '.join(unknown)}; there are {', '.join(FAMILIES[options.arena])}")
    torch.set_num_threads(1)
    recipes = {name: load_recipe(FAMILIES[options.arena][name]) for name in names}
    tasks = [
        Task(name, _with_latents(recipe, options.out), options.out / name.replace(" ", "_"), options.minutes)
        for name, recipe in recipes.items()
    ]
    if options.jobs == 1:
        rows = [run_family(task) for task in tasks]
    else:
        with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            rows = list(pool.map(run_family, tasks))
    finished = dict(zip(names, rows, strict=True))
    (options.out / "leaderboard.json").write_text(json.dumps(finished, indent=2) + "\n")
    show(finished, options.out)
    best = max(finished, key=lambda name: finished[name]["glyph_accuracy"])
    print(f"leaderboard: {best} leads with {finished[best]['glyph_accuracy']:.1%} glyph accuracy; "
          f"no ratio was taken, the families are each other's peers")  # fmt: skip


def _with_latents(recipe: Recipe, out: Path) -> Recipe:
    """The recipe over the store that all of its kind share: its autoencoder is trained and its clips are encoded now,
    those that have not been."""
    assert recipe.autoencoder is not None and recipe.autoencoder.recipe is not None
    name = recipe.autoencoder.recipe
    path = out / name.replace(".", "_")
    if not Run(path).weights.exists():
        train(load_recipe(name), path)
    recipe = replace(recipe, autoencoder=Autoencoder(path=str(path), recipe=name, dtype=recipe.autoencoder.dtype))
    store = out / f"{path.name}_store"
    encode(recipe, store)
    return replace(recipe, data=replace(recipe.data, latents=str(store)))


def run_family(task: Task) -> dict[str, float]:
    """Train one family within the budget, and judge it."""
    done = task.folder / "row.json"
    if done.exists():
        row: dict[str, float] = json.loads(done.read_text())
        return row
    torch.set_num_threads(1)
    recipe = replace(task.recipe, validate_every=0, sample_every=0, save_every=10**9)
    few, more = (_seconds(lambda n=n: _probe(recipe, task.folder, n)) for n in PROBE)
    step = (more - few) / (PROBE[1] - PROBE[0])
    steps = max(PROBE[1], int(task.minutes * 60 / step))
    recipe = replace(recipe, steps=steps, validate_every=steps, log_every=max(1, steps // 200))
    seconds = _seconds(lambda: train(recipe, task.folder / "run"))
    run = Run(task.folder / "run")
    figures = evaluate_run(run.folder, num=DRAWN)
    losses = [line["val_loss"] for line in run.metrics() if "val_loss" in line]
    row = {
        "parameters": float(sum(p.numel() for p in build_model(recipe).parameters())),
        "steps": float(steps),
        "train_seconds": seconds,
        "tokens": float(isinstance(recipe.objective, NextToken)),
        "val_loss": losses[-1],
        **figures,
    }
    _draw_digits(run, task.folder / "samples.png")
    done.write_text(json.dumps(row, indent=2) + "\n")
    return row


def _probe(recipe: Recipe, folder: Path, steps: int) -> None:
    train(replace(recipe, steps=steps, log_every=steps), folder / f"probe{steps}")


def _seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process; on a GPU, seconds."""
    clock = time.monotonic if torch.cuda.is_available() else time.process_time
    start = clock()
    work()
    return clock() - start


def _draw_digits(run: Run, path: Path) -> None:
    """A strip of frames for each digit."""
    generator = load_generator(run.folder)
    if generator.recipe.data.num_labels != 10:
        return
    cond = replace(conditions(generator, 10, None, None), label=torch.arange(10, device=generator.device))
    write_strips(path, list(sample_videos(generator, cond, 10, seed=1)))


COLUMNS: dict[str, tuple[str, Callable[[dict[str, float]], str]]] = {
    "parameters": ("parameters", lambda row: f"{row['parameters'] / 1e6:.2f} M"),
    "steps": ("steps", lambda row: f"{row['steps']:,.0f}"),
    "train_seconds": ("training, s", lambda row: f"{row['train_seconds']:.0f}"),
    "val_loss": (
        "validation loss",
        lambda row: f"{row['val_loss']:.4f}" + (" nats/token" if row["tokens"] else " (diffusion)"),
    ),
    "glyph_accuracy": ("glyph accuracy", lambda row: f"{row['glyph_accuracy']:.1%}"),
    "motion_error": ("motion error, px", lambda row: f"{row['motion_error']:.2f}"),
    "frechet_random_conv": ("Fréchet distance", lambda row: f"{row['frechet_random_conv']:.3f}"),
    "seconds_per_clip": ("s per clip", lambda row: f"{row['seconds_per_clip']:.2f}"),
}


def show(rows: dict[str, dict[str, float]], out: Path) -> None:
    """Print the table; write it as Markdown, and the plots."""
    order = sorted(rows, key=lambda name: -rows[name]["glyph_accuracy"])
    header = ["family", *(title for title, _ in COLUMNS.values())]
    cells = [[name, *(text(rows[name]) for _, text in COLUMNS.values())] for name in order]
    table(header, cells)
    lines = [" | ".join(row) for row in [header, ["---"] * len(header), *cells]]
    (out / "leaderboard.md").write_text("\n".join(f"| {line} |" for line in lines) + "\n")
    _plot(rows, order, out / "leaderboard.png", out)
    _samples(order, out)


def _plot(rows: dict[str, dict[str, float]], order: Sequence[str], path: Path, out: Path) -> None:
    """What each is worth, what drawing costs, and how each learned."""
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplots(2, 2)
    for ax, key, title in zip(
        axes.flat, ("glyph_accuracy", "frechet_random_conv", "seconds_per_clip"),
        ("glyph accuracy", "Fréchet distance (lower is better)", "seconds per clip, one CPU thread"), strict=False,
    ):  # fmt: skip
        ax.barh(list(order)[::-1], [rows[name][key] for name in order][::-1], color="#4a7ab5")
        ax.set_title(title, fontsize=10)
    axes[0, 0].axvline(0.8, color="#888", lw=0.8, ls="--")
    for name in order:
        points = [(m["step"], m["loss"]) for m in Run(out / name.replace(" ", "_") / "run").metrics() if "loss" in m]
        if points:
            first = points[0][1]
            share = [step / rows[name]["steps"] for step, _ in points]
            axes[1, 1].plot(share, [loss / first for _, loss in points], lw=1, label=name)
    axes[1, 1].set(title="training loss over its first value", xlabel="share of the budget", yscale="log")
    axes[1, 1].title.set_fontsize(10)
    axes[1, 1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def _samples(order: Sequence[str], out: Path) -> None:
    """What the families draw, beside each other: a row of frames for each digit."""
    figure = Figure(figsize=(3.2 * len(order), 4.2), layout="constrained")
    for ax, name in zip(np.atleast_1d(figure.subplots(1, len(order))), order, strict=True):
        picture = out / name.replace(" ", "_") / "samples.png"
        ax.axis("off")
        if picture.exists():
            ax.imshow(np.asarray(Image.open(picture)), interpolation="nearest")
            ax.set_title(name, fontsize=10)
    figure.savefig(out / "samples.png", dpi=110)


if __name__ == "__main__":
    main()
