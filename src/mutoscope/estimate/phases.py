"""What other phases than the training step need at their peak: encoding captions and clips, and looking at the model.

encode captions    the text encoder alone; also at the start of a run whose validation file has prompts
encode clips       the autoencoder alone
validate           the validation loss, beside all that training keeps
draw               videos of the sampler, decoding included, beside all that training keeps
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mutoscope.autoencoders.pretrained import load_autoencoder
from mutoscope.data.dataset import to_pixels, to_uint8
from mutoscope.estimate.networks import measure, shapes_of
from mutoscope.estimate.step import at_largest_bucket, fake_clips, fake_encoder, frozen_parts, prepared, resident_state
from mutoscope.estimate.tracker import Account, CudaAutocast, Device, Tracker
from mutoscope.models.cogvideox import LATENTS, CogVideoX
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.randomness import Draw
from mutoscope.recipe import Autoencoder, Recipe, Sampler
from mutoscope.sample import inference
from mutoscope.samplers.diffusion import sample_diffusion
from mutoscope.text.t5 import T5
from mutoscope.types import Cond


@dataclass(frozen=True)
class Phase:
    """A part of the work that has the memory to itself."""

    name: str
    peak_parts: dict[str, int]
    """Bytes of what lives at its peak."""

    @property
    def peak_bytes(self) -> int:
        """At the moment when most memory is in use."""
        return sum(self.peak_parts.values())


PHASES = ("encode captions", "encode clips", "validate", "draw")


def phases(
    recipe: Recipe, device: Device = "cuda", whole: nn.Module | None = None, only: Sequence[str] = PHASES
) -> list[Phase]:
    """Those of `only` that this recipe has besides the training step. Other arguments and errors as for `estimate`."""
    recipe = at_largest_bucket(recipe.model.complete(recipe))
    whole = shapes_of(recipe) if whole is None else whole
    found = []
    if isinstance(recipe.text, T5) and "encode captions" in only:
        found.append(_encode_captions(recipe.text, device))
    if recipe.autoencoder is not None and "encode clips" in only:
        found.append(_encode_clips(recipe, recipe.autoencoder, device))
    draws = isinstance(recipe.sampler, Sampler) and isinstance(recipe.objective, Diffusion)
    looks = [name for name in ("validate", "draw") if name in only and (name == "validate" or draws)]
    return found + (_validate(recipe, whole, device, looks) if looks else [])


def _encode_captions(text: T5, device: Device) -> Phase:
    tracker = Tracker(device)
    with FakeTensorMode(), torch.no_grad():
        encoder = text.build_without_tokenizer()
        tracker.tell("text encoder", [*encoder.parameters(), *encoder.buffers()])
        with tracker, tracker.phase("encode"):
            encoder(torch.zeros(1, text.length, dtype=torch.int64))[0].float()
    return Phase("encode captions", tracker.account.peak())


def _encode_clips(recipe: Recipe, config: Autoencoder, device: Device) -> Phase:
    """One clip at a time, as `mutoscope encode` does it."""
    fake = FakeTensorMode()
    with fake:
        frozen = frozen_parts(replace(recipe, text=None, data=replace(recipe.data, latents=None)))["autoencoder"]
    data = recipe.data

    def run(frames: int) -> Account:
        tracker = Tracker(device)
        with fake, torch.no_grad():
            encoder = fake_encoder(replace(recipe, text=None), frozen.eval().requires_grad_(False))
            tracker.tell("autoencoder", [*frozen.parameters(), *frozen.buffers()])
            with tracker, tracker.phase("encode"):
                video = torch.zeros(1, frames, data.height, data.width, 3, dtype=torch.uint8)
                encoder.moments(to_pixels(video)).to(encoder.dtype)
        return tracker.account

    return Phase("encode clips", _along_time(run, data.frames, 8 if config.recipe is None else 0).peak())


def _along_time(run: Any, frames: int, step: int) -> Account:
    """An account that is linear in the frames, where work goes through them `step` at a time (0: it does not)."""
    few = 1 + 3 * step
    if not step or frames <= few:
        return run(frames)
    account: Account = run(few)
    return account.moved(run(few - step), (frames - few) / step)


def _validate(recipe: Recipe, whole: nn.Module, device: Device, looks: Sequence[str]) -> list[Phase]:
    fake = FakeTensorMode()
    with fake, torch.random.fork_rng(devices=[]):
        frozen = frozen_parts(recipe)
    account = measure(recipe, whole, partial(_look, frozen), device, fake)
    if isinstance(recipe.model, CogVideoX) and "draw" in looks:
        kept = account.segments["kept "]
        for name, parts in _decode(recipe, recipe.model.path, device).segments.items():
            account.segments[f"draw {name}"] = parts + kept
    return [Phase(name, account.peak(name)) for name in looks]


def _look(frozen: dict[str, nn.Module], recipe: Recipe, model: nn.Module, tracker: Tracker) -> None:
    copies = prepared(recipe, model, tracker)
    for part, module in frozen.items():
        tracker.tell(part, [*module.parameters(), *module.buffers()])
    with tracker, torch.no_grad(), ExitStack() as stack:
        state = resident_state(recipe, model, tracker, copies)
        if tracker.device == "cuda" and recipe.precision == "bf16":
            stack.enter_context(CudaAutocast())
        # Averages take the weights' place, which are kept meanwhile
        held = [p.detach().clone() for p in model.parameters() if recipe.ema and p.requires_grad]
        tracker.tell("ema", held)
        tracker.forget()
        with tracker.phase("kept"):
            pass
        _look_at(recipe, model, fake_encoder(recipe, frozen.get("autoencoder")), tracker)
        del state, held  # which lived so long


def _look_at(recipe: Recipe, model: nn.Module, encoder: Any, tracker: Tracker) -> None:
    clips = fake_clips(recipe, encoder)
    draw = Draw(recipe.seed, "estimate", clips.samples)
    with tracker.phase("validate"):
        batch = encoder.batch(clips, None)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
            recipe.objective.validation_loss(model, batch, draw)
        del batch
    if not isinstance(recipe.sampler, Sampler) or not isinstance(recipe.objective, Diffusion):
        return
    drawn_by_file = isinstance(recipe.model, CogVideoX)
    shown = 1 if drawn_by_file else recipe.num_samples
    small = replace(recipe, batch_size=shown)
    clips = fake_clips(small, encoder)
    with tracker.phase("draw"), inference(recipe, model):
        cond = encoder.batch(clips, None).cond
        draw = Draw(recipe.seed, "estimate", clips.samples)
        if drawn_by_file:
            _draw_both(recipe, model, cond, encoder)
        else:
            sampler = replace(recipe.sampler, steps=2)
            io = recipe.data
            shape = (encoder.spec.channels, *encoder.spec.latent_shape(io.frames, io.height, io.width))
            drawn = sample_diffusion(model, recipe.objective, sampler, cond, shape, draw)
            to_uint8(encoder.decode(drawn))


def _draw_both(recipe: Recipe, model: nn.Module, cond: Cond, encoder: Any) -> None:
    """A step of diffusers' pipelines, which have the video with the caption and without in one batch."""
    grid = encoder.spec.latent_shape(recipe.data.frames, recipe.data.height, recipe.data.width)
    grid = (grid[0] + -grid[0] % getattr(recipe.objective, "temporal_patch", 1), *grid[1:])
    both = 2 if isinstance(recipe.sampler, Sampler) and recipe.sampler.guidance_scale != 1 else 1
    twice = lambda x: None if x is None else torch.cat([x] * both)
    latents, before = torch.zeros(1, encoder.spec.channels, *grid), torch.zeros(1, encoder.spec.channels, *grid)
    known = None if cond.known is None else torch.zeros(both, encoder.spec.channels, *grid)
    out = model(
        twice(latents), torch.zeros(both), Cond(text=twice(cond.text), text_mask=twice(cond.text_mask), known=known)
    ).float()
    before.add_(out[:1].lerp(out[-1:], 0.5))


def _decode(recipe: Recipe, path: str, device: Device) -> Account:
    """One video by the checkpoint's autoencoder, in tiles, as `samplers.cogvideox.Drawer` does it: one tile is decoded
    on fake tensors, beside all tiles that have been, which are then put together."""
    fake = FakeTensorMode()
    dtype = recipe.model.weights if isinstance(recipe.model, CogVideoX) else "bf16"
    data = recipe.data
    with fake, torch.random.fork_rng(devices=[]):
        model: Any = load_autoencoder(Autoencoder(path=path, recipe=None, dtype=dtype, tiling=True))
    vae = model.vae
    _, height, width = LATENTS.latent_shape(data.frames, data.height, data.width)
    sizes = [
        _tiles(size, getattr(vae, f"tile_latent_min_{name}"), getattr(vae, f"tile_overlap_factor_{name}"))
        for name, size in (("height", height), ("width", width))
    ]
    pixels = lambda h, w, t: h * w * LATENTS.strides[1] * LATENTS.strides[2] * 3 * t * vae.dtype.itemsize
    vae.disable_tiling()

    def run(frames: int) -> Account:
        tracker = Tracker(device)
        with fake, torch.no_grad():
            tracker.tell("autoencoder", [*vae.parameters(), *vae.buffers()])
            with tracker:
                done = sum(pixels(h, w, frames) for h in sizes[0] for w in sizes[1])
                done -= pixels(sizes[0][0], sizes[1][0], frames)
                tiles = torch.zeros(done, dtype=torch.uint8)
                with tracker.phase("decode"):
                    t = LATENTS.latent_shape(frames, data.height, data.width)[0]
                    some = torch.zeros(1, model.spec.channels, t, sizes[0][0], sizes[1][0], dtype=vae.dtype)
                    out: Tensor = vae.decode(some).sample
                with tracker.phase("put together"):
                    video = torch.zeros(2 * pixels(height, width, frames), dtype=torch.uint8)  # rows, and all of them
                    del tiles, out, video
        return tracker.account

    return _along_time(run, data.frames, 8)


def _tiles(size: int, tile: int, overlap: float) -> list[int]:
    """The lengths of overlapping tiles along an axis, as diffusers cuts them."""
    if size <= tile:
        return [size]
    return [min(tile, size - start) for start in range(0, size, int(tile * (1 - overlap)))]
