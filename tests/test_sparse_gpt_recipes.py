"""The sparse GPT by its recipes: trained, resumed, sampled, and as minisora's commands had it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mutoscope.cli import main
from mutoscope.estimate.step import estimate
from mutoscope.loading import load_recipe
from mutoscope.models.sparse_context import Frames, Strided
from mutoscope.models.sparse_gpt import SparseGPT
from mutoscope.run import Run
from mutoscope.training.loop import train
from mutoscope.weights import read_weights

CONTEXT = "mutoscope.models.sparse_context"


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    recipe = replace(load_recipe("minisora.sparse_gpt_tiny"), steps=6, save_every=3, sample_every=0, validate_every=0)
    assert recipe.activation_checkpointing
    whole = train(recipe, tmp_path / "whole")
    train(replace(recipe, steps=3), tmp_path / "parts")
    parts = train(recipe, tmp_path / "parts")
    a, b = read_weights(whole.weights), read_weights(parts.weights)
    assert a.keys() == b.keys() and [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize(
    ("flags", "context"),
    [
        (["--objective.window", "12", "--objective.only-last", "True", "--model.positions", "1d"], None),
        (["--model.context.type", f"{CONTEXT}:Frames"], Frames()),
        (["--model.context.type", f"{CONTEXT}:Strided", "--model.context.tokens", "40"], Strided(tokens=40)),
    ],
)
def test_the_ways_of_minisora(flags: list[str], context: Frames | Strided | None, tmp_path: Path) -> None:
    few = ["--steps", "4", "--sample-every", "4", "--num-samples", "2", "--validate-every", "0"]
    main(["train", "minisora.sparse_gpt_tiny", *few, *flags, "--out", str(tmp_path / "run")])
    model = Run(tmp_path / "run").recipe.model
    assert isinstance(model, SparseGPT) and (context is None or model.context == context)
    assert {p.suffix for p in (tmp_path / "run" / "samples").iterdir()} == {".mp4", ".png"}


def test_it_learns(tmp_path: Path) -> None:
    main(["train", "quickstart.sparse_gpt_tiny", "--sample-every", "0", "--out", str(tmp_path / "run")])
    losses = [line["val_loss"] for line in Run(tmp_path / "run").metrics() if "val_loss" in line]
    assert losses[-1] < 0.9 * losses[0]


def test_the_cost_of_the_full_size_is_known() -> None:
    recipe = load_recipe("minisora.sparse_gpt")
    cost = estimate(replace(recipe, data=replace(recipe.data, latents="x"), accumulate=1))
    assert cost.tokens == 32_768 and 60e6 < cost.trainable < 90e6
    # Attention adds little to what weights cost; all pairs of 32,768 positions would add 26e12
    assert cost.flops_forward < 1.1 * 2 * 32_768 * cost.trainable
    assert cost.peak_bytes < 12e9  # of a whole clip
