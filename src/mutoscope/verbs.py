"""The verbs: each is a dataclass whose fields are its options and whose `run` calls what does the work.

They import what they need when they run, so that ``mutoscope --help`` and ``mutoscope recipes`` do not wait for torch.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mutoscope.data_verbs import Check, ExportNpy, FindCuts, ImportNpy, MakeClips, MakeFlyingMNIST, Stats
from mutoscope.errors import ConfigError
from mutoscope.on_recipe import OnRecipe
from mutoscope.workers import worker_context

if TYPE_CHECKING:
    from mutoscope.estimate.cluster import Cluster
    from mutoscope.training.engine import Engine


@dataclass(frozen=True)
class Recipes:
    """List what can be trained."""

    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        from mutoscope.recipes import list_recipes

        found = list_recipes()
        if self.json:
            listed = [{name: getattr(info, name) for name in ("name", "summary", "status", "tiny")} for info in found]
            print(json.dumps(listed, indent=2, ensure_ascii=False))
            return
        twins = {info.tiny for info in found}
        shown = [info for info in found if info.name not in twins]
        width = max((len(info.name) for info in shown), default=0)
        for info in shown:
            tiny = " (+ _tiny)" if info.tiny else ""
            print(f"{info.name:{width}}  {info.status:8}  {info.summary}{tiny}")


@dataclass(frozen=True, kw_only=True)
class Show(OnRecipe):
    """Print a recipe as TOML, every field explained: `mutoscope show X > mine.toml` makes it yours.

    Below it, as comments: parameters, shapes, and an estimate of memory on a GPU, phase by phase, and of FLOPs."""

    json_schema: bool = False
    """Print a JSON Schema of the TOML instead. Saved as recipe.schema.json, it gives completion in editors whose
    TOML files start with the line `#:schema ./recipe.schema.json`."""
    gpu_memory: str | None = None
    """Of a GPU, such as 24GB or 22.5GiB: say whether training fits into it, and which options would make it fit."""
    gpus: int = 1
    """With 2 or more: a table of all ways to spread the work over them, with memory, communication and expected time,
    and the fastest that fits."""
    gpu: Literal["a100", "h100", "h200"] = "h100"
    """Of --gpus: its memory, speed and links, by its data sheet; the options below and --gpu-memory say otherwise."""
    gpus_per_node: int = 8
    """Of --gpus."""
    tflops: float | None = None
    """A GPU's peak in bf16 and without sparsity, in TFLOP/s."""
    hfu: float = 0.45
    """What GPUs reach of it while they compute, with what is recomputed."""
    within_node: float | None = None
    """GB/s from a GPU to others of its node, one way."""
    between_nodes: float | None = None
    """GB/s from a GPU to other nodes, one way."""

    def run(self, flags: Sequence[str]) -> None:
        from rich.console import Console

        from mutoscope.estimate.report import describe
        from mutoscope.limits import LIMITS
        from mutoscope.loading import find_function
        from mutoscope.schema import json_schema
        from mutoscope.suggest import parse_memory
        from mutoscope.toml import dump_toml

        memory = None if self.gpu_memory is None else parse_memory(self.gpu_memory, "--gpu-memory")
        recipe = self.load(flags)
        if self.json_schema:
            print(json.dumps(json_schema(recipe, LIMITS), indent=2, ensure_ascii=False))
            return
        cluster = self._cluster(memory)
        # First: a recipe whose shapes don't fit is told, and not printed. Long sequences take a minute or two.
        with Console(stderr=True).status("working out memory and FLOPs"):
            summary = describe(recipe, memory, cluster)
        function = find_function(self.recipe, trust_code=self.trusts)
        print(dump_toml(recipe, header=inspect.getdoc(function) or "" if function else ""))
        print("\n".join(f"# {line}".rstrip() for line in summary.splitlines()))

    def _cluster(self, memory: int | None) -> Cluster | None:
        """What the options tell of several GPUs."""
        from mutoscope.estimate.cluster import cluster_of

        alone = Show(recipe=self.recipe)
        about_many = ("gpu", "gpus_per_node", "tflops", "hfu", "within_node", "between_nodes")
        if self.gpus == 1:
            if given := [name for name in about_many if getattr(self, name) != getattr(alone, name)]:
                raise ConfigError(f"--{given[0].replace('_', '-')}: is about several GPUs; say how many by --gpus")
            return None
        scaled = lambda x, unit: None if x is None else x * unit
        return cluster_of(
            self.gpu, gpus=self.gpus, per_node=self.gpus_per_node, memory=memory, bf16=scaled(self.tflops, 1e12),
            hfu=self.hfu, within=scaled(self.within_node, 1e9), between=scaled(self.between_nodes, 1e9),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Train(OnRecipe):
    """Train a recipe, from where an earlier run in the same directory stopped."""

    out: Path | None = None
    """The run directory; runs/NAME unless you say otherwise."""

    def run(self, flags: Sequence[str]) -> None:
        from mutoscope.training.loop import train

        here = Path(self.recipe)
        train(self.load(flags), self.out or (here if here.is_dir() else Path("runs") / self.name))


@dataclass(frozen=True, kw_only=True)
class Encode(OnRecipe):
    """Turn the recipe's clips into latents or tokens, and its captions into embeddings, once."""

    out: str | None = None
    """The store, a folder or a URL (s3://...); the recipe's data.latents, or runs/NAME.latents, unless you say
    otherwise."""
    workers: int = 0
    """Processes, each with an autoencoder of its own; 0 works in this one. With --ray actors; 0 takes as many as the
    cluster has GPUs or, without any, CPUs."""
    ray: str | None = None
    """Work on a Ray cluster: its address (auto, HOST:6379, ray://HOST:10001), or local for one on this machine."""

    def run(self, flags: Sequence[str]) -> None:
        if self.workers and not self.ray:
            worker_context()  # they import torch while this process does
        from mutoscope.encode import encode

        recipe = self.load(flags)
        out = self.out or recipe.data.latents or f"runs/{self.name}.latents"
        encode(recipe, out, workers=self.workers, ray=self.ray, trust_code=self.trusts)
        print(f"to train on them: mutoscope train {self.recipe} --data.latents {out}")


@dataclass(frozen=True, kw_only=True)
class OnRun:
    """What the verbs share that take a finished run."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run directory."""
    seed: int = 0
    """Seed of the videos."""
    trust_code: bool = False
    """Import the Python files in the run directory that its recipe names. They can do whatever you can."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Draw videos from a finished run, or from a CogVideoX checkpoint, and print the paths of their files.

    Processes that torchrun starts draw each video together: long ones, in less time and memory.

    Options below --known-frames are for CogVideoX alone."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_CHECKPOINT")]
    """A run directory; or a CogVideoX checkpoint: a folder in diffusers' format, a Hub id or tiny://NAME."""
    prompt: str | None = None
    """Caption of the videos, where the run was trained with captions."""
    label: int | None = None
    """Class of the videos, where the run was trained with labels."""
    num: int = 1
    """Videos to draw."""
    seed: int = 0
    """Seed of the videos."""
    out: Path | None = None
    """The mp4 file; of several videos, the i-th goes to OUT-i.mp4. RUN/drawn/ unless you say otherwise."""
    guidance_scale: float | None = None
    """Classifier-free guidance, in place of the recipe's."""
    steps: int | None = None
    """Steps of the sampler, in place of the recipe's."""
    image: Path | None = None
    """The first frame: of CogVideoX for image to video, of models over tokens, or where the run was trained with given
    frames."""
    video: Path | None = None
    """The video whose --known-frames the videos begin with, of models over tokens or where the run was trained with
    given frames; for text to video by CogVideoX, the video to start from."""
    known_frames: int | None = None
    """How many frames of --video are given; the rest is drawn. Not for CogVideoX."""
    negative_prompt: str | None = None
    """What guidance leads away from; nothing unless you say otherwise."""
    strength: float | None = None
    """How much of that video is drawn anew, from 0 to 1."""
    frames: int | None = None
    """Frames, in place of the recipe's or the checkpoint's."""
    height: int | None = None
    """Height in pixels, likewise."""
    width: int | None = None
    """Width in pixels, likewise."""
    fps: float | None = None
    """Frames per second of the file, likewise."""
    dynamic_guidance: Literal["none", "cosine", "cogvideox"] | None = None
    """How guidance changes along the steps; cogvideox is diffusers' use_dynamic_cfg."""
    scheduler: Literal["ddim", "dpm"] | None = None
    """The solver; the checkpoint's own unless you say otherwise."""
    adapter: tuple[str, ...] = ()
    """LoRAs to draw with, besides the run's own: PATH, PATH:WEIGHT or PATH:WEIGHT:ALPHA."""
    tile: bool = True
    """Decode large frames in tiles: less memory, almost the same pixels."""
    offload: Literal["none", "model", "sequential"] = "none"
    """What lies on the CPU while it does not work: nothing, each model in turn, or all but one layer."""
    trust_code: bool = False
    """Import the Python files in the run directory that its recipe names. They can do whatever you can."""

    def run(self) -> None:
        from mutoscope.recipe import Parallel
        from mutoscope.training.engine import Engine

        # Processes that torchrun has started draw each video together
        engine = Engine.start(Parallel(context=int(os.environ.get("WORLD_SIZE", "1"))))
        try:
            paths = self._draw(engine)
        finally:
            engine.stop()
        if engine.main:
            print(*paths, sep="\n")

    def _draw(self, engine: Engine) -> list[Path]:
        from mutoscope.recipe import Sampler
        from mutoscope.sample import sample_run
        from mutoscope.sample_cogvideox import cogvideox_recipe, sample_cogvideox

        folder = Path(self.source)
        wishes = {name: getattr(self, name) for name in _WISHES if getattr(self, name) is not None}
        recipe = cogvideox_recipe(folder, self.trust_code)
        if recipe is not None or not (folder / "recipe.toml").exists():
            if self.label is not None:
                raise ConfigError("--label: CogVideoX has no classes; describe the video by --prompt")
            if self.known_frames is not None:
                raise ConfigError("--known-frames: CogVideoX starts from one --image, or draws a --video anew")
            sampler = recipe.sampler if recipe is not None else None
            steps = self.steps or (sampler.steps if isinstance(sampler, Sampler) else 50)
            with _progress("drawing", self.num * steps, enabled=engine.main) as tick:
                return sample_cogvideox(
                    self.source,
                    out=self.out,
                    num=self.num,
                    wishes={"prompt": self.prompt or "", "seed": self.seed, **wishes},
                    adapters=self.adapter,
                    tile=self.tile,
                    offload=self.offload,
                    trust_code=self.trust_code,
                    context=engine.context,
                    on_step=lambda: tick(1),
                )
        if strange := [f"--{name.replace('_', '-')}" for name in wishes if name not in _OF_EVERY_RUN]:
            raise ConfigError(f"{', '.join(strange)}: only for CogVideoX, which {folder} is not")
        with _progress("drawing", self.num, enabled=engine.main) as tick:
            return sample_run(
                folder,
                out=self.out,
                num=self.num,
                label=self.label,
                prompt=self.prompt,
                video=self.video,
                image=self.image,
                known_frames=self.known_frames,
                seed=self.seed,
                steps=self.steps,
                guidance_scale=self.guidance_scale,
                trust_code=self.trust_code,
                context=engine.context,
                on_videos=tick,
            )


_WISHES = ("negative_prompt", "image", "video", "strength", "frames", "height", "width", "fps", "steps",
           "guidance_scale", "dynamic_guidance", "scheduler")  # fmt: skip
"""Options of `Sample` that are fields of `samplers.request.Request`."""
_OF_EVERY_RUN = ("steps", "guidance_scale", "image", "video")
"""Those of them that are not for CogVideoX alone."""


@dataclass(frozen=True, kw_only=True)
class Evaluate(OnRun):
    """Measure a finished run on held-out clips, and print the figures."""

    num: int = 200
    """Clips to reconstruct, or videos to draw."""

    def run(self) -> None:
        from mutoscope.evaluate import evaluate_run

        with _progress("evaluating", self.num) as tick:
            figures = evaluate_run(self.folder, num=self.num, seed=self.seed, trust_code=self.trust_code, on_clips=tick)
        for name, value in figures.items():
            print(f"{name:32} {value:.4g}")


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write what a finished run trained as other tools read it, load it back, and compare the two."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run directory."""
    to: Literal["diffusers", "peft", "comfyui", "full"]
    """diffusers: for load_lora_weights. peft: for PeftModel. comfyui: kohya's keys. full: a whole checkpoint, LoRA
    merged."""
    out: Path | None = None
    """The folder; RUN/exports/LAYOUT unless you say otherwise."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Of what is written; none keeps adapters in fp32 and full weights as the model has them."""
    trust_code: bool = False
    """Import the Python files in the run directory that its recipe names. They can do whatever you can."""

    def run(self) -> None:
        from mutoscope.export import export_run
        from mutoscope.run import Run

        print(export_run(Run(self.folder, trust_code=self.trust_code), self.to, self.out, self.dtype))


@dataclass(frozen=True, kw_only=True)
class Demo:
    """The whole chain on generated clips, on this machine, in minutes."""

    out: Path = Path("runs/demo")
    """Where everything goes; stages that are finished there are not done again."""

    def run(self) -> None:
        from mutoscope.demo import demo

        demo(self.out)


VERBS: dict[str, type[Any]] = {
    "recipes": Recipes,
    "show": Show,
    "data make flying-mnist": MakeFlyingMNIST,
    "data check": Check,
    "data stats": Stats,
    "data clip": MakeClips,
    "data cuts": FindCuts,
    "data import-npy": ImportNpy,
    "data export-npy": ExportNpy,
    "encode": Encode,
    "train": Train,
    "sample": Sample,
    "evaluate": Evaluate,
    "export": Export,
    "demo": Demo,
}


@contextmanager
def _progress(name: str, total: int, enabled: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, and the function that moves it on."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not (enabled and console.is_terminal)) as progress:
        bar = progress.add_task(name, total=total)
        yield lambda done: progress.advance(bar, done)
