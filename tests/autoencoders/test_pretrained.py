"""The autoencoder of a finished run: rebuilt from its recipe, loaded strictly, or refused with what to do."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mutoscope.autoencoders.conv import ConvAutoencoder
from mutoscope.autoencoders.pretrained import load_autoencoder
from mutoscope.models.dit import DiT
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.recipe import Autoencoder, Data, Recipe
from mutoscope.toml import dump_toml
from mutoscope.types import ModelIO
from mutoscope.weights import hash_weights, save_weights

RECIPE = Recipe(
    data=Data(root="flying-mnist://tiny", frames=4, height=16, width=16),
    model=ConvAutoencoder(bottleneck="kl", encoder_channels=(8,), decoder_channels=(8, 8)),
    objective=Diffusion(),
    steps=1,
    batch_size=1,
)


def finished_run(folder: Path, recipe: Recipe = RECIPE) -> torch.nn.Module:
    module = RECIPE.model.build(ModelIO(channels=3, grid=(4, 16, 16)))
    folder.mkdir()
    (folder / "recipe.toml").write_text(dump_toml(recipe))
    save_weights(folder / "final" / "model.safetensors", module.state_dict())
    return module


def test_the_weights_of_a_run_come_back(tmp_path: Path) -> None:
    trained = finished_run(tmp_path / "run")
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    loaded = load_autoencoder(Autoencoder(path=str(tmp_path / "run"), recipe="x"))
    assert hash_weights(loaded) == hash_weights(trained)
    assert torch.equal(torch.randn(4), expected)  # loading draws nothing that others would draw


def test_a_missing_run_is_told_with_the_command_that_makes_it(tmp_path: Path) -> None:
    config = Autoencoder(path=str(tmp_path / "run"), recipe="minisora.vae")
    with pytest.raises(FileNotFoundError, match=f"mutoscope train minisora.vae --out {tmp_path}/run"):
        load_autoencoder(config)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").write_text(dump_toml(RECIPE))  # begun, not finished
    with pytest.raises(FileNotFoundError, match="mutoscope train minisora"):
        load_autoencoder(config)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    finished_run(tmp_path / "run", replace(RECIPE, model=replace(RECIPE.model, latent_channels=8)))
    with pytest.raises(ValueError, match=r"model\.safetensors: these weights are not of this"):
        load_autoencoder(Autoencoder(path=str(tmp_path / "run"), recipe="x"))


def test_a_run_of_something_else_is_refused(tmp_path: Path) -> None:
    finished_run(tmp_path / "run", replace(RECIPE, model=DiT()))
    with pytest.raises(ValueError, match="no autoencoder: it has no spec, encode and decode"):
        load_autoencoder(Autoencoder(path=str(tmp_path / "run"), recipe="x"))
