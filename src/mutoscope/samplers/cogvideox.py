"""Drawing from CogVideoX by diffusers' own pipelines, bit for bit as they draw; for `mutoscope sample` and for samples
in training alike.

The parts of a checkpoint take turns, so that drawing needs little beside the transformer: the text encoder embeds all
prompts before there is a transformer, and goes; the autoencoder is on the device only while it encodes what a video
starts from, and while it decodes. Videos are drawn and decoded one at a time.

Two things are ours. 1.5 takes an even number of latents: diffusers puts one more in front where it draws from noise,
and refuses where it draws from a video, whose first frame is repeated here. And 5b-I2V's learned positions fit one size
alone: at another diffusers refuses; at another number of frames it adds the 2b model's sinusoids to a model that never
saw them. Here they are left out, as in training (`models/cogvideox.py`).
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from mutoscope.adapters import read_adapter
from mutoscope.checkpoints import load_part, part_config
from mutoscope.hub import INSTALL
from mutoscope.models.cogvideox import LATENTS
from mutoscope.samplers.request import Request, Solver, check_requests, image_of, video_of
from mutoscope.text.t5 import T5
from mutoscope.types import DTYPES

Embeddings = dict[str, Float[Tensor, "1 l d"]]
"""What the text encoder makes of prompts, on the CPU, by prompt."""
Offload = Literal["none", "model", "sequential"]
_NUMBER = r"-?[0-9]+(?:\.[0-9]*)?|-?\.[0-9]+"
_SCHEDULERS = {"ddim": "CogVideoXDDIMScheduler", "dpm": "CogVideoXDPMScheduler"}


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """A LoRA to draw with."""

    path: Path
    """A file or folder that `adapters.read_adapter` reads, a run directory among them."""
    weight: float = 1.0
    """How much of its strength; 1 is as trained."""
    alpha: float | None = None
    """The alpha of its training, where its file does not say."""

    @staticmethod
    def parse(text: str) -> AdapterFile:
        """PATH, PATH:WEIGHT or PATH:WEIGHT:ALPHA."""
        match = re.fullmatch(rf"(.+?)(?::({_NUMBER})(?::({_NUMBER}))?)?", text)
        if match is None or Path(text).exists():
            return AdapterFile(path=Path(text))
        path, weight, alpha = match.groups()
        return AdapterFile(path=Path(path), weight=float(weight or 1), alpha=float(alpha) if alpha else None)


def embed_prompts(
    path: str, requests: Sequence[Request], weights: Literal["bf16", "fp32"], device: torch.device | str = "cpu"
) -> Embeddings:
    """The embeddings of all prompts in some requests: the only use that drawing has for the text encoder, which is
    loaded in the precision `weights`, and gone again when this returns. One prompt at a time, whose embedding then does
    not hang on its company.

    Raises as `checkpoints.load_part`.
    """
    encoder = T5(path=path, weights=weights).build().to(device)
    prompts = dict.fromkeys(prompt for request in requests for prompt in request.prompts)
    embedded = {}
    for prompt in prompts:
        text = encoder([prompt]).text
        assert text is not None
        embedded[prompt] = text.cpu()
    return embedded


def load_adapters(transformer: nn.Module, files: Sequence[AdapterFile]) -> None:
    """Put LoRAs beside those that diffusers' transformer has, in order, each at its weight.

    Raises ValueError where a file does not fit, adapts nothing, or does not say its alpha (`read_adapter`), and
    FileNotFoundError.
    """
    net: Any = transformer
    own = list(net.active_adapters()) if getattr(net, "_hf_peft_config_loaded", False) else []
    names = [f"adapter{k}" for k in range(len(files))]
    for name, file in zip(names, files, strict=True):
        adapter = read_adapter(file.path, transformer, file.alpha)
        # Its alphas are worked into B: the strength hangs on nothing that diffusers knows or guesses of them
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)  # several are meant
            net.load_lora_adapter(adapter.scaled().state, prefix=None, adapter_name=name)
        if adapter.about.get("learned_positions") == "false":  # it was trained without them
            net.patch_embed.use_learned_positional_embeddings = False
    if files:
        net.set_adapters([*own, *names], [1.0] * len(own) + [file.weight for file in files])


class Drawer:
    """Draws videos from a transformer that is in memory: the only copy of it, where a model in training is drawn from,
    and left as it was found."""

    def __init__(
        self, path: str, transformer: nn.Module, embeddings: Embeddings, *, tile: bool = True, offload: Offload = "none"
    ) -> None:
        """path: the checkpoint that autoencoder and scheduler are of.
        transformer: diffusers' CogVideoXTransformer3DModel, on the device to draw on unless there is offloading.
        embeddings: of all prompts that are to come, by `embed_prompts`.
        tile: decode large frames in overlapping tiles, whose seams are blended: less memory, almost the same pixels.
        offload: keep transformer and autoencoder on the CPU while the other works ("model"), or all but the layer that
            works ("sequential": least memory, and slow). For models that are not trained at the same time.

        Raises ValueError for offloading without a GPU; as `checkpoints.load_part` for the autoencoder.
        """
        check_offload(offload)
        net: Any = transformer
        self.transformer, self.embeddings, self.offload = net, embeddings, offload
        weight = net.norm_final.weight  # neither quantised nor wrapped by anybody
        self.dtype = weight.dtype
        self.device = torch.device("cuda") if offload != "none" else weight.device
        self.vae: Any = load_part(path, "vae", self.dtype).requires_grad_(False)
        if tile:
            self.vae.enable_tiling()  # type: ignore[operator]
        self._scheduler_config = part_config(path, "scheduler")
        self._pipe = self._pipeline("CogVideoXPipeline", "ddim")
        if offload == "model":
            self._pipe.enable_model_cpu_offload(device=self.device)
        elif offload == "sequential":
            self._pipe.enable_sequential_cpu_offload(device=self.device)

    def draw(self, request: Request, on_step: Callable[[], None] = lambda: None) -> UInt8[np.ndarray, "t h w 3"]:
        """The video that a request asks for, which `check_requests` has let pass.

        on_step: called after each of the `Request.passes` steps; what it raises ends the drawing.

        Raises KeyError for prompts that were not embedded; ValueError where numbers come out that are none.
        """
        return self.decode(self.latents(request, on_step))

    @torch.no_grad()
    def latents(self, request: Request, on_step: Callable[[], None] = lambda: None) -> Float[Tensor, "1 c t h w"]:
        """The latents of that video, as the transformer makes them. Raises as `draw`."""
        config = self.transformer.config
        grid = LATENTS.latent_shape(request.frames, request.height, request.width)
        padding = -grid[0] % (config.patch_size_t or 1)
        pipe_class, start = self._start(request, padding)
        pipe = self._pipeline(pipe_class, request.scheduler)
        cosine = request.dynamic_guidance == "cosine"

        def after_step(pipe: Any, step: int, time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            if cosine:
                pipe._guidance_scale = _cosine(request.guidance_scale, (step + 1) / pipe.num_timesteps)
            on_step()
            return tensors

        embedded = [self.embeddings[prompt].to(self.device, self.dtype) for prompt in request.prompts]
        native = (config.sample_frames, *(LATENTS.strides[1] * n for n in (config.sample_height, config.sample_width)))
        fits = (request.frames, request.height, request.width) == native
        with _undisturbed(self.transformer, learned_positions=fits), self._vae_parked_at_first_step():
            drawn = pipe(
                **start,
                prompt_embeds=embedded[0],
                negative_prompt_embeds=embedded[1] if len(embedded) == 2 else None,
                height=request.height,
                width=request.width,
                num_inference_steps=request.steps,
                guidance_scale=_cosine(request.guidance_scale, 0) if cosine else request.guidance_scale,
                use_dynamic_cfg=request.dynamic_guidance == "cogvideox",
                generator=torch.Generator().manual_seed(request.seed),
                output_type="latent",
                callback_on_step_end=after_step,
                callback_on_step_end_tensor_inputs=[],
            ).frames
        return _finite(drawn[:, padding:].transpose(1, 2), "latents", self.dtype)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "1 c t h w"]) -> UInt8[np.ndarray, "u y x 3"]:
        """Latents of `latents` -> frames."""
        try:
            self._move_vae(self.device)
            video = _finite(self._pipe.decode_latents(latents.transpose(1, 2)), "pixels", self.dtype)
        finally:
            self._move_vae("cpu")
            self._pipe.maybe_free_model_hooks()
        frames = self._pipe.video_processor.postprocess_video(video, output_type="np")[0]
        return (255 * frames).round().astype(np.uint8)

    def _start(self, request: Request, padding: int) -> tuple[str, dict[str, Any]]:
        """The pipeline for a request, and what only that one takes."""
        if request.video is not None:
            video = video_of(request)
            video = np.concatenate([video[:1].repeat(LATENTS.strides[0] * padding, axis=0), video])
            frames = [Image.fromarray(frame) for frame in video]
            return "CogVideoXVideoToVideoPipeline", {"video": frames, "strength": request.strength}
        if request.image is not None:
            image = Image.fromarray(image_of(request))
            return "CogVideoXImageToVideoPipeline", {"image": image, "num_frames": request.frames}
        return "CogVideoXPipeline", {"num_frames": request.frames}

    def _pipeline(self, name: str, scheduler: Solver | None) -> Any:
        """One of diffusers' pipelines over the parts at hand; a scheduler counts steps, and is made anew."""
        try:
            import diffusers
        except ImportError as error:
            raise ImportError(f"drawing from CogVideoX needs diffusers: {INSTALL}") from error
        config = self._scheduler_config
        kind = config["_class_name"] if scheduler is None else _SCHEDULERS[scheduler]
        if kind not in _SCHEDULERS.values():
            raise ValueError(f"the checkpoint's scheduler is a {kind}; choose ddim or dpm")
        pipe = getattr(diffusers, name)(
            tokenizer=None,
            text_encoder=None,
            vae=self.vae,
            transformer=self.transformer,
            scheduler=getattr(diffusers, kind).from_config(config),
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @contextmanager
    def _vae_parked_at_first_step(self) -> Iterator[None]:
        """The autoencoder is at hand for what a video starts from, and gone before the transformer sets to work."""
        self._move_vae(self.device)
        handle = self.transformer.register_forward_pre_hook(lambda *_: self._move_vae("cpu"))
        try:
            yield
        finally:
            handle.remove()
            self._move_vae("cpu")

    def _move_vae(self, device: torch.device | str) -> None:
        if self.offload == "none":  # else diffusers' own hooks see to it
            self.vae.to(device)


def open_drawer(
    path: str,
    requests: Sequence[Request],
    *,
    weights: Literal["bf16", "fp32"] = "bf16",
    text_weights: Literal["bf16", "fp32"] | None = None,
    build: Callable[[], nn.Module] | None = None,
    adapters: Sequence[AdapterFile] = (),
    tile: bool = True,
    offload: Offload = "none",
) -> Drawer:
    """A `Drawer` for these requests, on the GPU where there is one: first the prompts are embedded, then there is a
    transformer.

    path: a checkpoint. weights: the precision it is loaded in; text_weights: that of its text encoder, where it is
    another. build: makes diffusers' transformer on the CPU, where it is not to be the checkpoint's own. adapters: to
    draw with. tile, offload: see `Drawer`.

    Raises as `check_requests`, `Drawer` and `load_adapters`.
    """
    check_offload(offload)
    check_requests(requests, path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Sequential offloading is for GPUs that the text encoder does not fit on either
    embeddings = embed_prompts(path, requests, text_weights or weights, "cpu" if offload == "sequential" else device)
    transformer = build() if build is not None else load_part(path, "transformer", DTYPES[weights])
    load_adapters(transformer, adapters)
    transformer.requires_grad_(False)
    return Drawer(path, transformer.to(device) if offload == "none" else transformer, embeddings, tile=tile,
                  offload=offload)  # fmt: skip


def check_offload(offload: Offload) -> None:
    """Raise ValueError for offloading from where there is nothing to offload to."""
    if offload != "none" and not torch.cuda.is_available():
        raise ValueError(f"--offload {offload}: moves what is not at work from the GPU to the CPU, and there is no GPU "
                         "here; leave it out")  # fmt: skip


@contextmanager
def _undisturbed(transformer: nn.Module, learned_positions: bool) -> Iterator[None]:
    """The transformer in eval mode, without its learned positions where they do not fit; then as it was."""
    embed: Any = transformer.patch_embed
    was_training, had_positions = transformer.training, embed.use_learned_positional_embeddings
    try:
        transformer.eval()
        embed.use_learned_positional_embeddings = had_positions and learned_positions
        yield
    finally:
        embed.use_learned_positional_embeddings = had_positions
        transformer.train(was_training)


def _cosine(scale: float, done: float) -> float:
    """Dynamic guidance as CogVideo's formula reads: from 1 + scale down to 1, by the share of steps that is done."""
    return 1 + scale * (1 - math.cos(math.pi * (1 - done) ** 5)) / 2


def _finite(values: Tensor, what: str, dtype: torch.dtype) -> Tensor:
    if not values.isfinite().all():
        raise ValueError(f"the {what} are not all finite numbers: weights that are damaged or have diverged, or that "
                         f"{str(dtype).removeprefix('torch.')} is too coarse for")  # fmt: skip
    return values
