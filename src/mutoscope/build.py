"""From a recipe to its parts: shapes that follow from one another are worked out here, once, for training, sampling
and estimates alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from mutoscope.adapters import read_adapter
from mutoscope.autoencoders.pretrained import load_autoencoder, pretrained_spec, pretrained_stats
from mutoscope.data.store import LatentStats
from mutoscope.encoder import Encoder
from mutoscope.loading import load_recipe
from mutoscope.recipe import Autoencoder, Recipe
from mutoscope.run import Run
from mutoscope.training.lora import add_lora, load_adapter_state, network_of
from mutoscope.types import PIXELS, Cond, LatentSpec, ModelIO
from mutoscope.weights import load_file


def build_encoder(
    recipe: Recipe, device: torch.device, stats: LatentStats | None = None, trust_code: bool = False
) -> Encoder:
    """The recipe's autoencoder and text encoder; those of a checkpoint are loaded when they are needed.

    trust_code: as in `load_recipe`, for the autoencoder's run.

    Raises FileNotFoundError, with the command that makes it, where the autoencoder's run is not there.
    """
    return encoder_of(
        recipe.autoencoder,
        device,
        stats=stats,
        load_text=recipe.text.build if recipe.text else None,
        first_frame=recipe.first_frame,
        window=recipe.data.latent_window,
        fps=frame_rate(recipe),
        trust_code=trust_code,
    )


def frame_rate(recipe: Recipe) -> float | None:
    """Frames per second of the recipe's training clips, where it sets them."""
    return None if recipe.data.fps is None else recipe.data.fps / recipe.data.frame_interval


def encoder_of(
    config: Autoencoder | None,
    device: torch.device,
    *,
    stats: LatentStats | None = None,
    load_text: Callable[[], Callable[[list[str]], Cond]] | None = None,
    first_frame: bool = False,
    window: int | None = None,
    fps: float | None = None,
    trust_code: bool = False,
) -> Encoder:
    """As `build_encoder`, for those who know of an autoencoder and not of a recipe."""
    if config is None:
        return Encoder(stats=stats, load_text=load_text, window=window, fps=fps, device=device)
    load = partial(load_autoencoder, config, trust_code=trust_code)
    if config.recipe is not None:  # a run's own is small: what is wrong with it is told at once
        return Encoder(load(), stats=stats, load_text=load_text, window=window, fps=fps, dtype=config.dtype,
                       device=device)  # fmt: skip
    return Encoder(
        load,
        spec=latent_spec(config),
        stats=pretrained_stats(config.path),
        load_text=load_text,
        first_frame=first_frame,
        window=window,
        fps=fps,
        dtype=config.dtype,
        device=device,
    )


def latent_spec(autoencoder: Autoencoder | None) -> LatentSpec:
    """The spec of an autoencoder without its weights: by the recipe of its run, or by the one that would make it."""
    if autoencoder is None:
        return PIXELS
    if autoencoder.recipe is None:
        return pretrained_spec(autoencoder.path)
    made = Path(autoencoder.path) / "recipe.toml"
    recipe = load_recipe(str(made) if made.exists() else autoencoder.recipe)
    with torch.device("meta"):
        spec = recipe.model.build(model_io(recipe)).spec
    assert isinstance(spec, LatentSpec)
    return spec


def model_io(recipe: Recipe, spec: LatentSpec | None = None) -> ModelIO:
    """What the recipe's model has to fit. `spec` is its autoencoder's, where that is loaded already.

    Raises ValueError where the clips' size does not fit the autoencoder, or the window of latents does not fit them.
    """
    spec = spec or latent_spec(recipe.autoencoder)
    data = recipe.data
    grid = lambda frames, height, width: _windowed(spec.latent_shape(frames, height, width), data.latent_window, spec)
    return ModelIO(
        channels=spec.channels,
        out_channels=recipe.objective.out_channels(spec.channels),
        grid=grid(data.frames, data.height, data.width),
        more_grids=tuple(grid(b.frames, b.height, b.width) for b in data.buckets),
        vocab=spec.vocab,
        text_dim=recipe.text.dim if recipe.text else None,
        num_labels=data.num_labels,
    )


def _windowed(grid: tuple[int, int, int], window: int | None, spec: LatentSpec) -> tuple[int, int, int]:
    if window is None:
        return grid
    if window > grid[0]:
        raise ValueError(f"data.latent_window={window}: a clip has only {grid[0]} latents along time; take fewer, or "
                         "more data.frames")  # fmt: skip
    if spec.first_frame_alone and window < grid[0]:
        raise ValueError(f"data.latent_window={window}: this autoencoder's first latent is one frame and the others "
                         "are several, so that no other can come first; set it to none")  # fmt: skip
    return window, grid[1], grid[2]


def build_model(recipe: Recipe, spec: LatentSpec | None = None) -> nn.Module:
    """The recipe's network, with fresh weights that hang on the recipe's seed alone, or with its checkpoint's."""
    torch.manual_seed(recipe.seed)
    return recipe.model.build(model_io(recipe, spec))


def build_trainee(recipe: Recipe, spec: LatentSpec | None = None) -> nn.Module:
    """The network as its training begins: with the weights of `init_from`, under adapters where the recipe has some."""
    model = build_model(recipe, spec)
    if recipe.init_from is not None:
        load_file(model, Run(Path(recipe.init_from)).weights)
    if recipe.lora is not None:
        add_lora(model, recipe.lora, recipe.seed)
    return model


def build_trained(run: Run, spec: LatentSpec | None = None) -> nn.Module:
    """The network of a finished run, its weights loaded strictly."""
    recipe = run.recipe
    if recipe.lora is not None:  # what it started from may be gone, and is in its own adapters
        model = build_trainee(replace(recipe, lora=replace(recipe.lora, init_from=None, init_alpha=None)), spec)
        trained = read_adapter(run.weights, network_of(model)).scaled(recipe.lora.scale)
        load_adapter_state(model, trained.state, source=str(run.weights))
        return model
    model = recipe.model.build(model_io(recipe, spec))
    load_file(model, run.weights)
    return model
