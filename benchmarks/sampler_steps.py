"""Fréchet distance of few steps of DPM-Solver++ and of the seed's 1000 ancestral steps, from one model.

    python -m benchmarks.sampler_steps [--train-steps 2000] [--clips 128] [--seeds 1] [--out FOLDER]

Trains a small transformer by IDDPM, as the seed does (linear schedule, ε, learned variance), on digits of 4×16×16
pixels, conditioned on their class, and draws from it by each sampler, the same videos from the same noise: minutes on
a core, most of which are the 1000 steps. The distance is to held-out clips, in the features of a fixed random network
(metrics/frechet.py); that of as many training clips is the least one can ask for. The last line says how much nearer
50 steps are: above 1, they are no worse.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.harness import table
from mutoscope.data.dataset import VideoDataset
from mutoscope.metrics.frechet import FrechetDistance, random_conv_features
from mutoscope.models.dit import DiT
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.recipe import Data, Optim, Recipe, Sampler
from mutoscope.run import Run
from mutoscope.sample import Generator, load_generator, sample_videos
from mutoscope.training.loop import train
from mutoscope.types import Cond

SEED = "1000 ancestral steps, learned variance"
OURS = "50 steps of DPM-Solver++ (2M), eta 1"
SAMPLERS = {
    SEED: Sampler(method="ancestral", steps=1000),
    "50 ancestral steps, learned variance": Sampler(method="ancestral", steps=50),
    "50 steps of DDIM": Sampler(method="ddim", steps=50),
    "50 steps of DPM-Solver++ (2M), eta 0": Sampler(method="dpmpp_2m", steps=50),
    OURS: Sampler(method="dpmpp_2m", steps=50, eta=1.0),
    "20 steps of DPM-Solver++ (2M), eta 1": Sampler(method="dpmpp_2m", steps=20, eta=1.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train-steps", type=int, default=2000)
    parser.add_argument("--clips", type=int, default=128, help="drawn by each sampler, and held-out clips")
    parser.add_argument("--seeds", type=int, default=1, help="rounds of drawing, each from other noise")
    parser.add_argument("--out", type=Path, help="keep the run here; one that is finished is not trained again")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = args.out or Path(folder) / "run"
        run = Run(out) if Run(out).weights.exists() else train(recipe(args.train_steps), out)
        compare(load_generator(run.folder), args.clips, args.seeds)


def recipe(steps: int) -> Recipe:
    """IDDPM on small digits."""
    return Recipe(
        data=Data(root="flying-mnist://demo", frames=4, height=16, width=16, num_labels=10, cache=True),
        model=DiT(depth=4, width=96, heads=3, patch=(2, 2, 2), attention="joint"),
        objective=Diffusion(schedule="ddpm_linear", prediction="eps", learned_variance=True),
        sampler=SAMPLERS[OURS],
        optim=Optim(name="muon", lr=3e-3, schedule="cosine", warmup_steps=50),
        steps=steps,
        batch_size=16,
        ema=0.99,
        log_every=50,
        validate_every=0,
        sample_every=0,
        save_every=steps,
    )


def compare(generator: Generator, num: int, seeds: int) -> None:
    """Print each sampler's distances, and the ratio of the seed's to ours."""
    recipe, features = generator.recipe, random_conv_features(seed=0)
    held_out, trained_on = (VideoDataset(recipe.data, split, recipe.seed) for split in ("val", "train"))
    asked = [held_out[i % len(held_out), i] for i in range(num)]
    real = torch.stack([clip.video for clip in asked])
    cond = Cond(label=torch.tensor([clip.label for clip in asked], device=generator.device))
    floor = distance(real, torch.stack([trained_on[i, i].video for i in range(num)]), features)
    rows = [["training clips", f"{floor:.4g}", "-"]]
    found: dict[str, list[float]] = {}
    for name, sampler in SAMPLERS.items():
        drawer = replace(generator, recipe=replace(recipe, sampler=sampler, batch_size=64))
        began = time.process_time()
        for seed in range(seeds):
            drawn = torch.stack(list(sample_videos(drawer, cond, num, seed)))
            found.setdefault(name, []).append(distance(real, drawn, features))
        seconds = (time.process_time() - began) / num / seeds
        spread = f" ({min(found[name]):.4g} to {max(found[name]):.4g})" if seeds > 1 else ""
        rows.append([name, f"{median(found[name]):.4g}{spread}", f"{seconds:.3f}"])
    table([f"{num} videos, {seeds} times", "Fréchet distance", "s per video"], rows)
    ratios = [theirs / ours for theirs, ours in zip(found[SEED], found[OURS], strict=True)]
    spread = f"median of {seeds}, min {min(ratios):.2f}, max {max(ratios):.2f}"
    print(f"sampler_steps: {median(ratios):.2f}x vs {SEED} ({spread})")


def distance(real: Tensor, drawn: Tensor, features: object) -> float:
    """The Fréchet distance of two sets of videos."""
    metric = FrechetDistance(features)  # type: ignore[arg-type]
    metric.update(real, real=True)
    metric.update(drawn, real=False)
    return metric.compute()


if __name__ == "__main__":
    main()
