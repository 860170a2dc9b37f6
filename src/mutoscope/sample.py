"""Drawing videos: the only path from a model to frames, for `mutoscope sample`, evaluation and samples in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from mutoscope.build import build_encoder, build_trained, model_io
from mutoscope.data.dataset import to_uint8
from mutoscope.data.video import write_video
from mutoscope.encoder import Encoder
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.randomness import Draw
from mutoscope.recipe import Recipe, validate
from mutoscope.run import Run
from mutoscope.samplers.diffusion import sample_diffusion
from mutoscope.types import NO_LABEL, Batch, Cond


@dataclass(frozen=True)
class Generator:
    """A trained model with all that it takes to draw videos from it."""

    recipe: Recipe
    model: nn.Module
    encoder: Encoder

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.encoder.device


def load_generator(folder: Path, trust_code: bool = False) -> Generator:
    """The model of a finished run, its weights loaded strictly.

    Raises FileNotFoundError where the run, or the autoencoder's run, is not there or not finished; ValueError where
    weights do not fit.
    """
    run = Run(folder, trust_code=trust_code)
    if not run.recipe_file.exists():
        raise FileNotFoundError(f"{folder}: no run here (no recipe.toml)")
    if not run.weights.exists():
        raise FileNotFoundError(
            f"{run.weights}: the run is not finished; train it to its end: mutoscope train {folder}"
        )
    recipe = run.recipe
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = build_encoder(recipe, device, run.latent_stats(), trust_code)
    model = build_trained(run, encoder.spec)
    return Generator(recipe=recipe, model=model.to(device).eval().requires_grad_(False), encoder=encoder)


def draw_videos(
    generator: Generator, cond: Cond, draw: Draw, on_step: Callable[[], None] = lambda: None
) -> UInt8[Tensor, "b t h w 3"]:
    """One video for each of `draw`'s streams, conditioned on the rows of `cond`, by the recipe's sampler."""
    recipe, model = generator.recipe, generator.model
    if recipe.sampler is None:
        raise ValueError("this recipe has no sampler: its model does not generate (it is an autoencoder?)")
    io = model_io(recipe, generator.encoder.spec)
    with inference(recipe, model):
        match recipe.objective:
            case Diffusion() as objective:
                shape = (io.channels, *io.grid)
                drawn = sample_diffusion(model, objective, recipe.sampler, cond, shape, draw, on_step)
            case other:
                raise ValueError(f"recipe.objective {type(other).__name__} has no sampler")
    return to_uint8(generator.encoder.decode(drawn)).cpu()


def reconstruct(generator: Generator, video: Float[Tensor, "b 3 t h w"]) -> UInt8[Tensor, "b t h w 3"]:
    """Videos, pixels in [-1, 1], through an autoencoder and back, with nothing random."""
    model = generator.model
    with inference(generator.recipe, model):
        encoded = model.encode(video)  # type: ignore[operator]
        latents = encoded if model.spec.vocab else encoded[:, : model.spec.channels]  # type: ignore[union-attr]
        return to_uint8(model.decode(latents)).cpu()  # type: ignore[operator]


def preview(generator: Generator, batch: Batch, draw: Draw) -> UInt8[Tensor, "b t h w 3"]:
    """What to look at while a model trains: the batch reconstructed, or videos drawn for the batch's conditions."""
    if generator.recipe.sampler is None:
        assert batch.video is not None
        return reconstruct(generator, batch.video)
    return draw_videos(generator, batch.cond, draw)


@contextmanager
def inference(recipe: Recipe, model: nn.Module) -> Iterator[None]:
    """The model in eval mode, without gradients, in the recipe's precision."""
    was_training, device = model.training, next(model.parameters()).device.type
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=recipe.precision == "bf16"):
            yield
    finally:
        model.train(was_training)


def conditions(generator: Generator, num: int, label: int | None, prompt: str | None) -> Cond:
    """The condition of `num` videos of one label and prompt.

    Raises ValueError where the model was not trained with labels or captions, or the label is out of range.
    """
    recipe = generator.recipe
    if label is not None and not 0 <= label < recipe.data.num_labels:
        known = (
            f"0 to {recipe.data.num_labels - 1}" if recipe.data.num_labels else "none, it was trained without labels"
        )
        raise ValueError(f"--label {label}: the model's labels are {known}")
    if prompt is not None and recipe.text is None:
        raise ValueError("--prompt: the model was trained without captions (its recipe has no text encoder)")
    cond = generator.encoder.text([prompt or ""] * num)
    if recipe.data.num_labels:
        cond = replace(cond, label=torch.full((num,), NO_LABEL if label is None else label, device=generator.device))
    return cond


def sample_videos(
    generator: Generator, cond: Cond, num: int, seed: int, on_batch: Callable[[int], None] = lambda done: None
) -> Iterator[UInt8[Tensor, "t h w 3"]]:
    """`num` videos, drawn in batches of the recipe's size; the i-th hangs on the seed, i and row i of `cond`."""
    size = generator.recipe.batch_size
    for first in range(0, num, size):
        rows = range(first, min(first + size, num))
        draw = Draw(seed, "sample", rows, generator.device)
        yield from draw_videos(generator, cond.rows(slice(rows.start, rows.stop)), draw)
        on_batch(len(rows))


def sample_run(
    folder: Path,
    *,
    out: Path | None = None,
    num: int = 1,
    label: int | None = None,
    prompt: str | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    trust_code: bool = False,
    on_videos: Callable[[int], None] = lambda done: None,
) -> list[Path]:
    """Draw videos from a finished run and write them as mp4 files; returns their paths.

    Args:
        out: the file of one video; of more, the i-th goes to OUT-i.mp4. RUN/drawn/WHAT.mp4 by default.
        num: videos to draw.
        label: class of the videos, for models trained with labels.
        prompt: caption of the videos, for models trained with captions.
        seed: the i-th video of a seed is the same whatever `num` is.
        steps, guidance_scale: in place of the recipe's.
        on_videos: called with the number of videos drawn since the last call, for progress.

    Raises ValueError for what the model can't do, and as `load_generator` does.
    """
    if num < 1:
        raise ValueError(f"--num {num}: at least 1")
    generator = load_generator(folder, trust_code)
    sampler = generator.recipe.sampler
    if sampler is None:
        raise ValueError(f"{folder} holds a model that does not generate (its recipe has no sampler)")
    sampler = replace(
        sampler,
        steps=sampler.steps if steps is None else steps,
        guidance_scale=sampler.guidance_scale if guidance_scale is None else guidance_scale,
    )
    generator = replace(generator, recipe=replace(generator.recipe, sampler=sampler))
    validate(generator.recipe)
    cond = conditions(generator, num, label, prompt)
    what = "-".join([f"label{label}"] * (label is not None) + [f"seed{seed}"])
    out = out or folder / "drawn" / f"{what}.mp4"
    out.parent.mkdir(parents=True, exist_ok=True)
    paths = [out] if num == 1 else [out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(num)]
    videos = sample_videos(generator, cond, num, seed, on_videos)
    for path, video in zip(paths, videos, strict=True):
        write_video(path, video.numpy(), generator.recipe.data.fps or 8)
    return paths
