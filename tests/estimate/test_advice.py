"""Which levers are named for a memory that is too small, and that they do what is said of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mutoscope.cli import main
from mutoscope.estimate import advice
from mutoscope.estimate.advice import advise, training_peak
from mutoscope.estimate.phases import phases
from mutoscope.estimate.report import describe
from mutoscope.loading import load_recipe
from mutoscope.models.dit import DiT
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.recipe import Data, Lora, Recipe

DIT = Recipe(
    data=Data(root="flying-mnist://tiny", frames=8, height=32, width=32),
    model=DiT(depth=4, width=64, heads=2, patch=(1, 4, 4), attention="joint"),
    objective=Diffusion(),
    steps=1,
    batch_size=2,
    validate_every=0,
    sample_every=0,
)


@pytest.fixture(autouse=True)
def _no_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "RESERVE", 0)


def test_what_fits_needs_nothing() -> None:
    told = advise(DIT, 10**9)
    assert told.fits and told.steps == () and told.peak == training_peak(DIT)


@pytest.mark.parametrize(
    "recipe", [pytest.param(DIT, marks=pytest.mark.slow), replace(DIT, lora=Lora(rank=4))], ids=["full", "LoRA"]
)
def test_levers_come_cheapest_first_until_it_fits(recipe: Recipe) -> None:
    peak = training_peak(recipe)
    told = advise(recipe, int(0.45 * peak))
    assert told.fits and told.shorter is None
    assert told.reached == training_peak(told.steps[-1].recipe) <= 0.45 * peak
    order = [lever.flags for lever in advice.levers(recipe, 4)]
    places = [order.index(step.lever.flags) for step in told.steps]
    assert places == sorted(places)
    if len(told.steps) > 1:  # the last is needed
        assert told.steps[-2].peak > 0.45 * peak


@pytest.mark.slow
def test_what_can_never_fit_says_so() -> None:
    text = describe(DIT, 100)
    assert "nothing gets it below" in text and "--data.frames 4 needs" in text
    assert "--weights bf16 --precision bf16" in text


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    main(["show", "minisora.dit_tiny", "--gpu-memory", "24GB"])
    assert "# fits into 22.35 GiB" in capsys.readouterr().out
    for wrong in ("lots", "24", "0GB", "-1GB"):
        with pytest.raises(SystemExit) as error:
            main(["show", "minisora.dit_tiny", f"--gpu-memory={wrong}x" if wrong == "24" else f"--gpu-memory={wrong}"])
        assert error.value.code == 2
        assert f"--gpu-memory {wrong}" in capsys.readouterr().err


def test_phases_of_cogvideox() -> None:
    recipe = load_recipe("cogvideox.t2v_lora_tiny")
    found = {phase.name: phase for phase in phases(recipe)}
    assert list(found) == ["encode captions", "encode clips", "validate", "draw"]
    assert "text encoder" in found["encode captions"].peak_parts and "weights" not in found["encode clips"].peak_parts
    stored = {p.name: p for p in phases(replace(recipe, data=replace(recipe.data, latents="made")))}
    assert "text encoder" in found["validate"].peak_parts and "text encoder" not in stored["validate"].peak_parts
    assert {"weights", "optimizer"} <= stored["draw"].peak_parts.keys()
