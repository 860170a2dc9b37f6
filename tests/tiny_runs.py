"""Tiny finished runs and recipes for tests of what comes after an autoencoder."""

from dataclasses import replace
from pathlib import Path

import torch

from mutoscope.autoencoders.conv import ConvAutoencoder
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.recipe import Autoencoder, Data, Recipe
from mutoscope.text.encoders import HashedWords
from mutoscope.toml import dump_toml
from mutoscope.types import ModelIO
from mutoscope.weights import save_weights

KL = ConvAutoencoder(bottleneck="kl", encoder_channels=(8,), decoder_channels=(8, 8))
FSQ = replace(KL, bottleneck="fsq", latent_channels=3, fsq_levels=(8, 5, 5))


def make_run(folder: Path, data: Data, model: ConvAutoencoder = KL, seed: int = 0) -> Autoencoder:
    """A run directory as training leaves it, of an autoencoder with random weights."""
    recipe = Recipe(data=data, model=model, objective=Diffusion(), steps=1, batch_size=1)
    torch.manual_seed(seed)
    module = model.build(ModelIO(channels=3, grid=(data.frames, data.height, data.width)))
    folder.mkdir()
    (folder / "recipe.toml").write_text(dump_toml(recipe))
    save_weights(folder / "final" / "model.safetensors", module.state_dict())
    return Autoencoder(path=str(folder), recipe="quickstart.autoencoder")


def make_recipe(folder: Path, model: ConvAutoencoder = KL, root: str = "flying-mnist://tiny") -> Recipe:
    data = Data(root=root, frames=4, height=16, width=16, val_fraction=0.25, num_labels=10)
    return Recipe(
        data=data,
        autoencoder=make_run(folder / "autoencoder", data, model),
        text=HashedWords(width=8, max_length=10),
        model=KL,
        objective=Diffusion(),
        steps=1,
        batch_size=4,
    )
