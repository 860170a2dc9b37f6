"""A run directory: all that a training run leaves, in one place.

recipe.toml        the resolved recipe            samples/STEP.mp4, .png   what the model draws, on the way
environment.json   versions, git, hardware        checkpoints/STEP/        to resume from
latents.json       mean and std of the latents    final/*.safetensors      the weights to use
metrics.jsonl      one line per logged step       tensorboard/             the same, for TensorBoard
quarantine.jsonl   one line per broken clip

final/ holds model.safetensors, all weights; or, of a LoRA, pytorch_lora_weights.safetensors as diffusers reads it.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mutoscope.adapters import DIFFUSERS_FILE
from mutoscope.config import classes, to_dict
from mutoscope.data.store import LatentStats
from mutoscope.files import replacing
from mutoscope.loading import load_recipe, load_toml
from mutoscope.recipe import Recipe
from mutoscope.toml import dump_toml
from mutoscope.user_code import code_files

FREE_TO_CHANGE = (
    "steps", "log_every", "validate_every", "sample_every", "save_every", "keep_last", "keep_every", "num_samples",
    "wandb", "compile", "activation_checkpointing", "parallel", "data.workers", "data.cache", "data.max_broken",
    "data.timeout", "optim.max_bad_steps", "batch_size", "accumulate",
)  # fmt: skip
"""What a resumed run may set anew; everything else decides what the weights become. (Of the last two their product with
the number of processes does, which the loop looks at.)"""


class Run:
    """The paths of a run directory, and what can be read from them."""

    def __init__(self, folder: Path, trust_code: bool = False) -> None:
        """`trust_code` allows the recipe to import the Python files that lie beside it."""
        self.folder, self.trust_code = folder, trust_code
        self.recipe_file = folder / "recipe.toml"
        self.metrics_file = folder / "metrics.jsonl"
        self.latents_file = folder / "latents.json"
        self.quarantine_file = folder / "quarantine.jsonl"
        self.samples = folder / "samples"
        self.checkpoints = folder / "checkpoints"
        self.final = folder / "final"

    @property
    def weights(self) -> Path:
        """The file of what training made, which is there once the run is finished."""
        adapter = self.final / DIFFUSERS_FILE
        return adapter if adapter.exists() else self.final / "model.safetensors"

    @property
    def recipe(self) -> Recipe:
        """The recipe that the run was made by."""
        return load_recipe(str(self.recipe_file), trust_code=self.trust_code)

    def metrics(self) -> list[dict[str, Any]]:
        """The logged lines, oldest first; a line that a kill cut short is left out."""
        if not self.metrics_file.exists():
            return []
        lines = self.metrics_file.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def latent_stats(self) -> LatentStats | None:
        """The statistics that the model's latents are normalised by, where it has latents."""
        if not self.latents_file.exists():
            return None
        stored = json.loads(self.latents_file.read_text())
        return LatentStats(mean=tuple(stored["mean"]), std=tuple(stored["std"]))

    def save_latent_stats(self, stats: LatentStats | None) -> None:
        """Keep the statistics for sampling."""
        if stats is not None:
            _write(self.latents_file, json.dumps(asdict(stats)))

    def forget_after(self, step: int) -> None:
        """Drop the logged lines of steps past `step`, which a resumed run will take anew."""
        kept = [line for line in self.metrics() if line["step"] <= step]
        if self.metrics_file.exists():
            _write(self.metrics_file, "".join(json.dumps(line) + "\n" for line in kept))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process alone. Raises ValueError where another one trains in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, however it ends
            except BlockingIOError:
                raise ValueError(
                    f"{self.folder}: another process is training in it; wait, or choose another --out"
                ) from None
            yield

    def prepare(self, recipe: Recipe) -> None:
        """Write the recipe and the environment; where there is a checkpoint to resume from, check that it is of the
        same recipe.

        Raises ValueError listing every field that differs and may not.
        """
        if self.recipe_file.exists() and any(self.checkpoints.glob("*")):
            # the classes of the new recipe are imported already; no file of the run's own is
            different = recipe_difference(load_toml(self.recipe_file, known=classes(recipe)), recipe)
            if different:
                raise ValueError(
                    f"{self.folder} holds a run of another recipe, which can't be resumed as this one:\n  "
                    + "\n  ".join(different)
                    + "\nChoose another --out, or set these fields back."
                )
        for file in code_files(classes(recipe)):
            _write(self.folder / file.name, file.read_text())
        _write(self.recipe_file, dump_toml(recipe))
        _write(self.folder / "environment.json", json.dumps(environment(), indent=2))


def recipe_difference(old: Recipe, new: Recipe) -> list[str]:
    """The fields in which two recipes differ, but for those that a resumed run may set anew."""
    a, b = _leaves(to_dict(old)), _leaves(to_dict(new))
    free = lambda key: any(key == f or key.startswith(f + ".") for f in FREE_TO_CHANGE)
    return [
        f"recipe.{key}: {a.get(key)!r} in the run, {b.get(key)!r} now"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key) and not free(key)
    ]


def environment() -> dict[str, Any]:
    """What a run depends on besides its recipe: versions, git commit, hardware, command."""
    packages = ("mutoscope", "torch", "numpy", "av", "safetensors")
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
        "git": git.stdout.strip() or None,
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def _write(path: Path, text: str) -> None:
    with replacing(path) as aside:
        aside.write_text(text)
