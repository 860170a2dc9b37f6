"""The two towers: what embeddings hang on, sizes, and what training and retrieval make of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mutoscope.estimate.step import estimate
from mutoscope.evaluate import evaluate_run
from mutoscope.loading import load_recipe
from mutoscope.models.clip import Clip, ClipModel
from mutoscope.training.loop import train
from mutoscope.types import Cond, ModelIO

IO = ModelIO(channels=3, grid=(4, 8, 8), text_dim=6)
CONFIG = Clip(width=16, heads=2, patch=(1, 4, 4), embedding=12)


@pytest.fixture(scope="module")
def model() -> ClipModel:
    torch.manual_seed(0)
    return CONFIG.build(IO).eval()


def test_order_of_frames_and_of_places_matters(model: ClipModel) -> None:
    """The seed's video tower looks at one patch of each frame."""
    video = torch.randn(2, 3, 4, 8, 8)
    embedded = model.embed_video(video)
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(2))
    for other in (video.flip(2), video.flip(3), video.flip(4)):
        assert (model.embed_video(other) - embedded).abs().max() > 1e-3
    for place in [(t, h, w) for t in (0, 3) for h in (0, 7) for w in (0, 7)]:
        other = video.clone()
        other[(slice(None), slice(None), *place)] += 3
        assert (model.embed_video(other) - embedded).abs().max() > 1e-4


@pytest.mark.parametrize("grid", [(1, 8, 8), (7, 8, 8), (26, 4, 12)])
def test_other_lengths_and_sizes(model: ClipModel, grid: tuple[int, int, int]) -> None:
    """The seed's takes multiples of 25 frames."""
    assert model.embed_video(torch.randn(2, 3, *grid)).shape == (2, 12)


def test_padding_of_captions_changes_nothing(model: ClipModel) -> None:
    text, mask = torch.randn(2, 3, 6), torch.ones(2, 3, dtype=torch.bool)
    embedded = model.embed_text(Cond(text=text, text_mask=mask))
    padded = Cond(text=torch.cat([text, torch.randn(2, 4, 6)], 1), text_mask=torch.cat([mask, ~mask, ~mask[:, :1]], 1))
    torch.testing.assert_close(model.embed_text(padded), embedded)
    empty = model.embed_text(Cond(text=text, text_mask=mask & False))
    assert empty.isfinite().all()
    with pytest.raises(ValueError, match=r"set recipe\.text"):
        model.embed_text(Cond())


def test_what_cannot_be_built() -> None:
    with pytest.raises(ValueError, match="the recipe has no text"):
        CONFIG.build(replace(IO, text_dim=None))
    with pytest.raises(ValueError, match="does not divide the latent grid"):
        replace(CONFIG, patch=(3, 4, 4)).build(IO)
    with pytest.raises(ValueError, match=r"temperature=0\.001 must be from 0\.01 to 1"):
        Clip(temperature=0.001)


def test_an_estimate_counts_every_tower() -> None:
    """Blocks of several towers see other numbers of tokens: none stands for another."""
    recipe = load_recipe("dalle2_video.clip_tiny")

    def flops(**depths: int) -> int:
        return estimate(replace(recipe, model=replace(recipe.model, **depths))).flops_forward

    eight, nine, in_space = flops(text_depth=8), flops(text_depth=9), flops(text_depth=8, space_depth=3)
    assert in_space - eight > 4 * (nine - eight) > 0  # 64 tokens against 8


def test_it_trains_goes_on_and_is_judged(tmp_path: Path) -> None:
    """A few steps of the tiny twin on few clips: the loss falls, a resumed run ends in the same bits."""
    base = load_recipe("dalle2_video.clip_tiny")
    data = replace(base.data, root="flying-mnist://tiny", frames=4, height=16, width=16)
    recipe = replace(base, data=data, steps=30, batch_size=8, log_every=1, validate_every=15, save_every=15)
    run = train(recipe, tmp_path / "whole")
    losses = [line["loss"] for line in run.metrics() if "loss" in line]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert "val_text_to_video_1" in [*run.metrics()][-1]
    train(replace(recipe, steps=15), tmp_path / "part")
    resumed = train(recipe, tmp_path / "part")
    assert resumed.weights.read_bytes() == run.weights.read_bytes()
    figures = evaluate_run(run.folder, num=16)
    assert figures["text_to_video_5"] > 5 / 16 and figures["distinct_captions"] <= 1
    assert json.loads((run.folder / "evaluation.json").read_text()) == figures
