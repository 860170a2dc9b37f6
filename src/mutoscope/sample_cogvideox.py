"""Drawing videos from CogVideoX, by diffusers' pipelines: for `mutoscope sample` and validation files in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mutoscope.build import build_trained
from mutoscope.checkpoints import part_config
from mutoscope.data.video import write_video
from mutoscope.loading import RECIPE_FILE
from mutoscope.models.cogvideox import CogVideoX, CogVideoXModel
from mutoscope.models.cogvideox_context import share_transformer
from mutoscope.models.ulysses import ContextGroup
from mutoscope.recipe import Recipe, Sampler
from mutoscope.run import Run
from mutoscope.sample import video_files
from mutoscope.text.t5 import T5

if TYPE_CHECKING:
    from mutoscope.samplers.request import Request


def sample_cogvideox(
    source: str,
    *,
    out: Path | None = None,
    num: int = 1,
    wishes: Mapping[str, Any],
    adapters: Sequence[str] = (),
    tile: bool = True,
    offload: Literal["none", "model", "sequential"] = "none",
    trust_code: bool = False,
    context: ContextGroup | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> list[Path]:
    """Draw videos from a run that trained CogVideoX, or from a checkpoint of it, and write them as mp4 files.

    Args:
        source: a run directory, a folder in diffusers' format, a Hub id or tiny://NAME.
        out: as in `sample.sample_run`; without a run, drawn/seedSEED.mp4.
        num: videos to draw, with seeds one after the other.
        wishes: fields of `samplers.request.Request` in place of the run's, or of the checkpoint's.
        adapters: LoRAs besides the run's own: PATH, PATH:WEIGHT or PATH:WEIGHT:ALPHA.
        tile, offload: as in `samplers.cogvideox.Drawer`.
        context: as in `sample.sample_run`.
        on_step: called after each step of each video.

    Raises ValueError, before weights are read, for what the checkpoint can't draw; FileNotFoundError for what is not
    there.
    """
    from mutoscope.samplers.cogvideox import AdapterFile, open_drawer
    from mutoscope.samplers.request import request_for

    if num < 1:
        raise ValueError(f"--num {num}: at least 1")
    recipe = cogvideox_recipe(Path(source), trust_code)
    path, base, build = source, None, None
    weights: Literal["bf16", "fp32"] = "bf16"
    text_weights: Literal["bf16", "fp32"] = "bf16"
    if recipe is not None:
        model, text = recipe.model, recipe.text
        assert isinstance(model, CogVideoX) and isinstance(text, T5)
        path, weights, text_weights, base = model.path, model.weights, text.weights, request_of(recipe)
        build = partial(_trained_transformer, Run(Path(source), trust_code=trust_code))
    base = base or request_for(source)
    base = replace(base, **wishes)
    requests = [replace(base, seed=base.seed + i) for i in range(num)]
    if context is not None:
        context.check_heads(part_config(path, "transformer")["num_attention_heads"])
    drawer = open_drawer(
        path,
        requests,
        weights=weights,
        text_weights=text_weights,
        build=build,
        adapters=[AdapterFile.parse(text) for text in adapters],
        tile=tile,
        offload=offload,
    )
    if context is not None:
        share_transformer(drawer.transformer, context)
    folder = Path() if recipe is None else Path(source)
    paths = video_files(out or folder / "drawn" / f"seed{base.seed}.mp4", num)
    for file, request in zip(paths, requests, strict=True):
        with torch.no_grad():
            latents = drawer.latents(request, on_step)
            if context is None or context.leads:
                write_video(file, drawer.decode(latents), request.fps)
    return paths


def _trained_transformer(run: Run) -> nn.Module:
    model = build_trained(run)
    assert isinstance(model, CogVideoXModel)
    transformer: nn.Module = model.transformer
    return transformer


def cogvideox_recipe(folder: Path, trust_code: bool = False) -> Recipe | None:
    """The recipe of a run that trained CogVideoX; None for any other folder or name."""
    if not (folder / RECIPE_FILE).is_file():
        return None
    recipe = Run(folder, trust_code=trust_code).recipe
    return recipe if isinstance(recipe.model, CogVideoX) else None


def request_of(recipe: Recipe) -> Request:
    """What a recipe of CogVideoX draws: at its size, by its sampler."""
    from mutoscope.samplers.request import request_for

    assert isinstance(recipe.model, CogVideoX)
    data, sampler = recipe.data, recipe.sampler or Sampler()
    assert isinstance(sampler, Sampler)
    base = request_for(recipe.model.path)
    return replace(
        base,
        frames=data.frames,
        height=data.height,
        width=data.width,
        fps=data.fps or base.fps,
        steps=sampler.steps,
        guidance_scale=sampler.guidance_scale,
    )


@dataclass(frozen=True)
class Wanted:
    """The videos of a validation file, and the embeddings of their prompts: the text encoder is not needed again."""

    path: str
    requests: list[Request]
    embeddings: dict[str, Tensor]


def read_wanted(recipe: Recipe, device: torch.device) -> Wanted:
    """The rows of the recipe's validation file, checked, and their prompts embedded. Raises as `read_requests`."""
    from mutoscope.samplers.cogvideox import embed_prompts
    from mutoscope.validation import read_requests

    assert isinstance(recipe.model, CogVideoX) and isinstance(recipe.text, T5) and recipe.validation_file is not None
    path = recipe.model.path
    requests = read_requests(Path(recipe.validation_file), path, request_of(recipe))
    return Wanted(path, requests, embed_prompts(path, requests, recipe.text.weights, device))


def draw_wanted(wanted: Wanted, model: nn.Module, folder: Path, rank: int, world: int, write: bool = True) -> None:
    """Draw this process's share of a validation file from a model in training, by the path that `mutoscope sample`
    takes. There is no second copy of the model; the autoencoder is there only while it decodes.

    rank, world: of copies of the model; write: False where another process writes what this one helps to draw."""
    from mutoscope.samplers.cogvideox import Drawer
    from mutoscope.validation import draw_requests

    assert isinstance(model, CogVideoXModel)
    drawer = Drawer(wanted.path, model.transformer, wanted.embeddings)
    draw_requests(drawer, wanted.requests, folder, rank=rank, world=world, write=write)
