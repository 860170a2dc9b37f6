"""What to draw from CogVideoX: a prompt, perhaps an image or a video, a size, a seed; and what no checkpoint can draw,
told before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mutoscope.checkpoints import part_config
from mutoscope.data.images import read_image
from mutoscope.data.media import Media
from mutoscope.data.video import frame_index, frames_at, read_frames, resize
from mutoscope.errors import listed
from mutoscope.known_checkpoints import Config
from mutoscope.models.cogvideox import LATENTS, check_shape

SIZE_1_5 = (768, 1360)
"""Height and width that CogVideoX 1.5 was trained for; the size in its config.json is the largest it takes."""
Resize = Literal["crop", "pad", "squash"]
Guidance = Literal["none", "cosine", "cogvideox"]
Solver = Literal["ddim", "dpm"]
RATES = {"1.0": 8.0, "1.5": 16.0}
"""Frames per second of the videos that CogVideoX was trained on."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A video to draw, and how. `request_for` knows the numbers that suit a checkpoint."""

    prompt: str
    """What the video shows."""
    negative_prompt: str = ""
    """What it does not show: stands where no prompt would, where there is guidance."""
    image: str | Path | Image.Image | UInt8[np.ndarray, "h1 w1 3"] | None = None
    """The first frame, for checkpoints of image to video."""
    video: str | Path | UInt8[np.ndarray, "t1 h2 w2 3"] | None = None
    """The video to start from instead of noise alone, for checkpoints of text to video; a file is read at `fps`."""
    strength: float = 0.8
    """How much of that video is drawn anew: above 0, and 1 leaves nothing of it."""
    resize: Resize = "crop"
    """How an image or a video of another aspect ratio is met: scale and cut, scale and pad with black, or squash."""
    frames: int
    """8·n + 1."""
    height: int
    """In pixels, a multiple of 16."""
    width: int
    """In pixels, a multiple of 16."""
    fps: float
    """Frames per second that the video is written with."""
    seed: int = 0
    """Of the noise: that of ``torch.Generator().manual_seed(seed)``, which is diffusers' habit, on the CPU."""
    steps: int = 50
    """Steps from noise to video."""
    guidance_scale: float = 6.0
    """Classifier-free guidance; 1 is none, higher follows the prompt more."""
    dynamic_guidance: Guidance = "none"
    """Guidance that changes on the way, up to 1 + guidance_scale. cosine falls from there to 1, most of it at the
    end; cogvideox is the same formula given the noise level in place of the step, as in CogVideo's own code and
    diffusers' use_dynamic_cfg: it goes up and down with every few steps, and its authors like what it does."""
    scheduler: Solver | None = None
    """The solver; none takes the checkpoint's. dpm puts some noise back at each step."""

    @property
    def passes(self) -> int:
        """Steps that are taken: of a video to start from, the later part."""
        return self.steps if self.video is None else min(int(self.steps * self.strength), self.steps)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts whose embeddings it takes."""
        return (self.prompt, self.negative_prompt) if self.guidance_scale > 1 else (self.prompt,)


def request_for(path: str, prompt: str = "") -> Request:
    """What a checkpoint draws where only the prompt is given: of the size, length and rate that it was trained for.

    Raises as `checkpoints.part_config`.
    """
    config = part_config(path, "transformer")
    height, width = _largest(config)
    version = "1.0"
    if config["patch_size_t"]:
        height, width, version = min(height, SIZE_1_5[0]), min(width, SIZE_1_5[1]), "1.5"
    return Request(prompt=prompt, frames=config["sample_frames"], height=height, width=width, fps=RATES[version])


def check_requests(requests: Sequence[Request], path: str) -> None:
    """Raise ValueError for what the checkpoint at `path` can't draw, with the first ten faults and their number; and as
    `checkpoints.part_config`. Images and videos are looked at; no weights are read."""
    config = part_config(path, "transformer")
    several = len(requests) > 1
    found = [
        f"request {k}: {fault}" if several else fault
        for k, request in enumerate(requests)
        for fault in faults(request, config)
    ]
    if found:
        raise ValueError(f"{path} can't draw what is asked for; {len(found)} faults:{listed(found)}")


def faults(request: Request, config: Config) -> Iterator[str]:
    """What a transformer of this config.json can't draw of a request, and which of its files can't be read."""
    fits = True
    try:
        check_shape(config, request.frames, request.height, request.width)
    except ValueError as error:
        fits = False
        yield str(error)
    limit = _largest(config)
    if config["patch_size_t"] and (request.height > limit[0] or request.width > limit[1]):
        yield (f"{request.height} × {request.width} pixels are more than the positions of this CogVideoX 1.5 reach, "
               f"{limit[0]} × {limit[1]}")  # fmt: skip
    if not 1 <= request.steps <= 1000:
        yield f"steps={request.steps} must be from 1 to 1000"
    if not (math.isfinite(request.guidance_scale) and request.guidance_scale >= 1):
        yield f"guidance_scale={request.guidance_scale:g} must be at least 1, which is no guidance"
    elif request.guidance_scale == 1 and request.dynamic_guidance != "none":
        yield f"dynamic_guidance={request.dynamic_guidance} needs guidance: set guidance_scale above 1"
    if not 0 <= request.seed < 2**63:
        yield f"seed={request.seed} must be from 0 to 2⁶³ - 1"
    if not 0.01 <= request.fps <= 1000:
        yield f"fps={request.fps:g} must be from 0.01 to 1000"
    yield from _faults_of_task(request, config)
    if fits:
        yield from _faults_of_media(request)


def _faults_of_task(request: Request, config: Config) -> Iterator[str]:
    from_image = config["in_channels"] != config["out_channels"]
    if request.image is not None and request.video is not None:
        yield "both an image and a video to start from; give one"
    elif from_image and request.video is not None:
        yield "this checkpoint is for image to video; videos to start from are for those of text to video"
    elif from_image and request.image is None:
        yield "this checkpoint is for image to video, and there is no image"
    elif not from_image and request.image is not None:
        yield "this checkpoint is for text to video, and takes no image; one of image to video does (CogVideoX-5b-I2V)"
    if request.video is not None and not (0 < request.strength <= 1 and request.passes >= 1):
        yield (f"strength={request.strength:g} must be above 0 and at most 1, and leave at least one of the "
               f"{request.steps} steps")  # fmt: skip


def _faults_of_media(request: Request) -> Iterator[str]:
    try:
        if request.image is not None:
            image_of(request)
        if isinstance(request.video, str | Path):
            _frame_numbers(request, str(request.video))
        elif request.video is not None:
            video_of(request)
    except ValueError as error:
        yield str(error)


def image_of(request: Request) -> UInt8[np.ndarray, "h w 3"]:
    """The image, at the request's size. Raises ValueError where it can't be read or is none."""
    image = request.image
    if isinstance(image, str | Path):
        pixels = read_image(Media(str(image)))
    else:
        pixels = np.array(image.convert("RGB")) if isinstance(image, Image.Image) else np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"image: must be uint8 (height, width, 3); it is {pixels.dtype} {pixels.shape}")
    return resize(pixels[None], request.height, request.width, request.resize)[0]


def video_of(request: Request) -> UInt8[np.ndarray, "t h w 3"]:
    """The frames to start from, at the request's size and rate. Raises ValueError where they can't be read, are too
    few, or are no video."""
    video = request.video
    if isinstance(video, str | Path):
        pixels = read_frames(str(video), _frame_numbers(request, str(video)))
    else:
        pixels = np.asarray(video)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
            raise ValueError(f"video: must be uint8 (frames, height, width, 3); it is {pixels.dtype} {pixels.shape}")
        pixels = pixels[: _enough(len(pixels), request.frames, "video")]
    return resize(pixels, request.height, request.width, request.resize)


def _frame_numbers(request: Request, path: str) -> list[int]:
    numbers = frames_at(frame_index(path), request.fps).tolist()
    return numbers[: _enough(len(numbers), request.frames, f"{path} at {request.fps:g} frames per second")]


def _enough(found: int, wanted: int, what: str) -> int:
    if found < wanted:
        least = found - (found - 1) % 8
        raise ValueError(f"{what}: {found} frames, {wanted} are to be drawn; take a longer video"
                         + (f", or frames={least}" if found >= 9 else ""))  # fmt: skip
    return wanted


def _largest(config: Config) -> tuple[int, int]:
    """Height and width of the size in a config.json."""
    return config["sample_height"] * LATENTS.strides[1], config["sample_width"] * LATENTS.strides[2]
