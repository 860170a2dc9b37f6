"""Drawing videos: the only path from a model to frames, for `mutoscope sample`, evaluation and samples in training;
CogVideoX, which diffusers' pipelines draw from, is in `sample_cogvideox.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from mutoscope.build import build_encoder, build_trained, model_io
from mutoscope.contradictions import validate
from mutoscope.data.dataset import to_pixels, to_uint8
from mutoscope.data.video import frame_index, frames_at, read_frames, resize, write_video
from mutoscope.encoder import Encoder
from mutoscope.models.ulysses import ContextGroup, share_sequence
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.objectives.tokens import NextToken
from mutoscope.randomness import Draw
from mutoscope.recipe import Recipe, Sampler, TokenSampler
from mutoscope.run import Run
from mutoscope.samplers.diffusion import sample_diffusion
from mutoscope.samplers.tokens import sample_tokens
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
                assert isinstance(recipe.sampler, Sampler)
                shape = (io.channels, *io.grid)
                drawn = sample_diffusion(model, objective, recipe.sampler, cond, shape, draw, on_step)
            case NextToken() as objective:
                assert isinstance(recipe.sampler, TokenSampler)
                # One position at a time, casting weights to bf16 takes longer than computing with them
                with torch.autocast(draw.device.type, torch.bfloat16, enabled=recipe.weights == "bf16"):
                    drawn = sample_tokens(
                        model, recipe.sampler, cond, io.grid, draw, cond.known_tokens, objective.window, on_step
                    )
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


def conditions(
    generator: Generator, num: int, label: int | None, prompt: str | None, prefix: Tensor | None = None
) -> Cond:
    """The condition of `num` videos of one label and prompt, which begin with the latents or tokens of
    `prefix`.

    Raises ValueError where the model was not trained with labels, captions or given frames, or the label is out of
    range.
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
    if prefix is not None and isinstance(recipe.objective, NextToken):
        return replace(cond, known_tokens=prefix.expand(num, -1, -1, -1))
    if prefix is not None:
        if not (isinstance(recipe.objective, Diffusion) and recipe.objective.prefix_share):
            raise ValueError("--video, --image: the model was not trained to go on from frames that are given; train "
                             "it with --objective.prefix-share 0.2")  # fmt: skip
        cond = _begun(cond, prefix, model_io(recipe, generator.encoder.spec).grid[0], num)
    return cond


def _begun(cond: Cond, prefix: Float[Tensor, "1 c n h w"], frames: int, num: int) -> Cond:
    given = prefix.shape[2]
    known = torch.nn.functional.pad(prefix, (0, 0, 0, 0, 0, frames - given)).expand(num, -1, -1, -1, -1)
    return replace(cond, known=known, known_mask=(torch.arange(frames, device=known.device) < given).expand(num, -1))


def encode_prefix(generator: Generator, video: Path | None, image: Path | None, known_frames: int | None) -> Tensor:
    """What a video begins with, of the first `known_frames` frames of a file, or of one image: its first latents,
    normalised, (1, c, n, h, w), or its first tokens, (1, n, h, w).

    The frames are resampled and cut as the recipe's clips are, and the last of them is held until the end of the clip
    that the autoencoder is shown, so that what follows is not looked at. An image stands still for as many frames as
    one latent takes. Raises ValueError for a number of frames that makes no whole latents, too many of them, or both
    files; VideoError where the file can't be read or is too short.
    """
    recipe, encoder = generator.recipe, generator.encoder
    if (video is None) == (image is None):
        raise ValueError("--video, --image: give one of the two")
    if (video is None) != (known_frames is None):
        raise ValueError("--known-frames is how many frames of --video are given: it goes with --video, and only there")
    data, spec, grid = recipe.data, encoder.spec, model_io(recipe, encoder.spec).grid
    source, wanted = (image, 1) if video is None else (video, known_frames or 0)
    latents = 1 if video is None else spec.latent_shape(wanted, data.height, data.width)[0]
    if latents >= grid[0]:
        raise ValueError(f"--known-frames {wanted}: the model draws {spec.pixel_shape(*grid)[0]} frames, and some must "
                         "be left for it to draw")  # fmt: skip
    assert source is not None
    numbers = frames_at(frame_index(source), data.fps)[:: data.frame_interval]
    if len(numbers) < wanted:
        raise ValueError(f"--known-frames {wanted}: {source} has {len(numbers)}, at the rate of the model's clips")
    mode = "crop" if data.resize == "random_crop" else data.resize
    frames = torch.from_numpy(resize(read_frames(source, numbers[:wanted]), data.height, data.width, mode))
    held = torch.arange(spec.pixel_shape(*grid)[0]).clamp(max=wanted - 1)
    moments = encoder.moments(to_pixels(frames[held][None].to(generator.device)))
    return moments[:, :latents] if spec.vocab else encoder.latents(moments)[:, :, :latents]


def sample_videos(
    generator: Generator, cond: Cond, num: int, seed: int, on_batch: Callable[[int], None] = lambda done: None
) -> Iterator[UInt8[Tensor, "t h w 3"]]:
    """`num` videos, drawn in batches of the recipe's size; the i-th hangs on the seed, i and row i of `cond`."""
    size = generator.recipe.batch_size
    for first in range(0, num, size):
        rows = range(first, min(first + size, num))
        draw = Draw(seed, "sample", rows, generator.device)
        # A tenth faster, token by token, than without gradients alone; while a model trains, what it keeps from here
        # for itself could not be used in a backward pass
        with torch.inference_mode():
            videos = draw_videos(generator, cond.rows(slice(rows.start, rows.stop)), draw)
        yield from videos
        on_batch(len(rows))


def sample_run(
    folder: Path,
    *,
    out: Path | None = None,
    num: int = 1,
    label: int | None = None,
    prompt: str | None = None,
    video: Path | None = None,
    image: Path | None = None,
    known_frames: int | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    trust_code: bool = False,
    context: ContextGroup | None = None,
    on_videos: Callable[[int], None] = lambda done: None,
) -> list[Path]:
    """Draw videos from a finished run and write them as mp4 files; returns their paths.

    Args:
        out: the file of one video; of more, the i-th goes to OUT-i.mp4. RUN/drawn/WHAT.mp4 by default.
        num: videos to draw.
        label: class of the videos, for models trained with labels.
        prompt: caption of the videos, for models trained with captions.
        video, known_frames: the videos begin with so many frames of this one; for models over tokens, and for others
            that were trained with given frames.
        image: likewise, one frame.
        seed: the i-th video of a seed is the same whatever `num` is.
        steps, guidance_scale: in place of the recipe's.
        context: processes that draw each video together, all of which call this; the first of them writes.
        on_videos: called with the number of videos drawn since the last call, for progress.

    Raises ValueError for what the model can't do, and as `load_generator` and `share_sequence` do.
    """
    if num < 1:
        raise ValueError(f"--num {num}: at least 1")
    generator = load_generator(folder, trust_code)
    share_sequence(generator.model, context)
    sampler = generator.recipe.sampler
    if sampler is None:
        raise ValueError(f"{folder} holds a model that does not generate (its recipe has no sampler)")
    if guidance_scale is not None:
        sampler = replace(sampler, guidance_scale=guidance_scale)
    if steps is not None:
        if not isinstance(sampler, Sampler):
            raise ValueError(f"--steps {steps}: {folder} holds a model over tokens, which are drawn one by one")
        sampler = replace(sampler, steps=steps)
    generator = replace(generator, recipe=replace(generator.recipe, sampler=sampler))
    validate(generator.recipe)
    given = video is not None or image is not None or known_frames is not None
    prefix = encode_prefix(generator, video, image, known_frames) if given else None
    cond = conditions(generator, num, label, prompt, prefix)
    what = "-".join([f"label{label}"] * (label is not None) + [f"seed{seed}"])
    paths = video_files(out or folder / "drawn" / f"{what}.mp4", num)
    drawn = sample_videos(generator, cond, num, seed, on_videos)
    for path, frames in zip(paths, drawn, strict=True):
        if context is None or context.leads:
            write_video(path, frames.numpy(), generator.recipe.data.fps or 8)
    return paths


def video_files(out: Path, num: int) -> list[Path]:
    """OUT for one video; of more, OUT-i for the i-th. Their folder is there afterwards."""
    out.parent.mkdir(parents=True, exist_ok=True)
    return [out] if num == 1 else [out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(num)]
