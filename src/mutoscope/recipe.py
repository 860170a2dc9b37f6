"""A recipe: everything that decides what is trained and how, as one tree of frozen dataclasses.

A recipe is what a function annotated ``-> Recipe`` returns (`recipes/`), or a ``recipe.toml``. `ModelConfig`,
`ObjectiveConfig` and `TextConfig` are open: a subclass beside a new network or loss is all that it takes to use it.

An attribute's docstring is also its help on the command line, its comment in TOML and its tooltip in an editor."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor, nn

from mutoscope.parallel import Parallel as Parallel
from mutoscope.randomness import Draw
from mutoscope.types import Batch, Cond, Loss, ModelIO


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The hyper-parameters of a network."""

    native_precision: ClassVar[bool] = False
    """Whether the network computes in the precision of its weights by itself; others want autocast over bf16."""

    def build(self, io: ModelIO) -> nn.Module:
        """The network, with fresh weights drawn from torch's global generator, or with pretrained ones."""
        raise TypeError(f"{type(self).__name__} has no build method")

    def complete(self, recipe: Recipe) -> Recipe:
        """The recipe with what follows from this model's checkpoint filled in: its own text encoder, autoencoder and
        noise schedule. Called before a recipe is used; models without a checkpoint have nothing to say."""
        return recipe


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is learned. May call the model only through ``model(...)``: a call to any other method by-passes the
    hooks of DDP and FSDP and leaves gradients that differ between ranks, silently."""

    def out_channels(self, channels: int) -> int:
        """Channels that it wants of a denoiser for latents of so many."""
        return channels

    def loss(self, model: nn.Module, batch: Batch, draw: Draw) -> Loss:
        """The batch's loss; all randomness comes from `draw`."""
        raise TypeError(f"{type(self).__name__} has no loss method")

    def validation_loss(self, model: nn.Module, batch: Batch, draw: Draw) -> Loss:
        """The loss to validate by, of a model in eval mode: `loss`, unless that hangs on chance."""
        return self.loss(model, batch, draw)

    def over_all(self, rows: Tensor) -> dict[str, Tensor]:
        """Numbers to validate by that are of all val clips together: of their `Loss.rows`, in the order of clips. They
        take the place of a mean over batches of the same name."""
        return {}

    def after_step(self, model: nn.Module, all_reduce: Callable[[Tensor], Tensor], skipped: bool = False) -> None:
        """Called with the model itself, unwrapped, after each optimizer step, also after one that was skipped for a
        non-finite loss or gradient. `all_reduce` sums a tensor over processes. For what no gradient updates."""

    def after_epoch(self, model: nn.Module, epoch: int, all_reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Called with the model itself after each pass over the data, the first being epoch 0. Returns the epoch's
        numbers for the log."""
        return {}


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How captions become embeddings."""

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        raise TypeError(f"{type(self).__name__} has no dim")

    @property
    def length(self) -> int:
        """Positions that embeddings are padded to."""
        raise TypeError(f"{type(self).__name__} has no length")

    @property
    def has_null(self) -> bool:
        """Whether a caption that is dropped is the embedding of "" and not nothing (`Cond.null_text`)."""
        return False

    @property
    def identity(self) -> str:
        """Names the embeddings, so that one encoder's are never taken for another's: the class and its fields."""
        return repr(self)

    def build(self) -> Callable[[list[str]], Cond]:
        """A function from captions to a Cond with `text` and `text_mask`."""
        raise TypeError(f"{type(self).__name__} has no build method")


@dataclass(frozen=True, kw_only=True)
class ClipSet:
    """Clips in one place, and how to read what is said about them there."""

    root: str
    """A folder of clips, a table that names them, tar or Parquet shards (a glob, a URL), or flying-mnist://PRESET."""
    layout: Literal[
        "auto",
        "split_folders",
        "captioned_folder",
        "line_paired",
        "table",
        "cosmos",
        "webdataset",
        "parquet",
        "arrow",
        "flying_mnist",
    ] = "auto"
    """How the clips are laid out; auto looks."""
    dataset_file: str | None = None
    """Of layout table: the CSV, TSV, JSONL or Parquet file, below the root; none looks for one."""
    caption_file: str | None = None
    """Of layout line_paired: the file with a caption in each line; none means prompts.txt (or captions.txt)."""
    video_file: str | None = None
    """Of layout line_paired: the file with a video in each line; none means videos.txt."""
    caption_columns: tuple[str, ...] = ()
    """Columns with captions, each a kind of its own; empty looks for caption, text or prompt."""
    video_column: str | None = None
    """Column with videos (paths, or bytes); none looks for video, path or file_name."""
    id_token: str = ""
    """Put before each caption, with a space between: the word that is to stand for what is learned."""
    repeats: int = 1
    """How often each clip is seen in an epoch."""
    weight: float | None = None
    """Share of the samples that come from here, against the other sets' weights; none counts clips."""


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """A shape of training clips, and how many of them make a batch."""

    frames: int
    height: int
    width: int
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class Data(ClipSet):
    """Which clips, and which pixels of them."""

    mix: tuple[ClipSet, ...] = ()
    """More sets of clips, to train on together with this one."""
    frames: int
    """Frames of a training clip."""
    height: int
    """Height of a training clip in pixels."""
    width: int
    """Width of a training clip in pixels."""
    buckets: tuple[Bucket, ...] = ()
    """Shapes to train at, each clip at the one that fits it best; empty is frames × height × width alone. Samples are
    drawn at frames × height × width."""
    fps: float | None = None
    """Frames per second to resample to; none takes frames at the file's own rate."""
    frame_interval: int = 1
    """Take every n-th frame (after resampling to fps); Cosmos calls it sequence_interval."""
    skip_frames_start: int = 0
    """Frames (after resampling) to leave out at a clip's beginning."""
    skip_frames_end: int = 0
    """Frames (after resampling) to leave out at a clip's end."""
    resize: Literal["crop", "random_crop", "pad", "squash"] = "crop"
    """How another aspect ratio is met: scale and cut the centre (or anywhere), scale and pad with black, or squash."""
    flip: float = 0.0
    """Probability that a clip is mirrored left to right, all of its frames alike."""
    window: Literal["first", "random", "all"] = "first"
    """Which frames of a longer clip: its first, a new random window each time, or all windows as clips of their own."""
    window_interval: int | None = None
    """Frames from the start of one window to the next, for window = "all"; none sets them end to end."""
    short: Literal["error", "loop", "pad", "drop"] = "error"
    """What to do with a clip that has too few frames: stop, begin again, repeat the last, or leave it out."""
    templates: tuple[str, ...] = ()
    """Captions made from kinds, as in "{short}" or "{appearance} {action}"; one is drawn each time. Empty takes the
    kind "caption", or any kind there is."""
    template_weights: tuple[float, ...] = ()
    """How often each template is drawn, against the others; empty draws all alike."""
    val_fraction: float = 0.05
    """Share of clips held out (by a hash of their ids) where the layout has no val part."""
    num_labels: int = 0
    """Number of classes of the clips' labels; 0 ignores labels."""
    max_broken: int = 10
    """Broken clips that a run goes on without; one more stops it."""
    timeout: float = 60.0
    """Seconds after which the reading of a clip is given up and the clip counts as broken."""
    latent_window: int | None = None
    """Latents along time that the model is given of each clip, another random stretch of them each time; samples are
    as long. none: all of the clip's."""
    latents: str | None = None
    """A LatentStore made by `mutoscope encode`, a folder or a URL; training then reads it in place of the clips."""
    workers: int = 0
    """Processes that decode clips; 0 decodes in the training process."""
    cache: bool = False
    """Keep decoded clips in memory: for data sets that fit."""

    @property
    def sets(self) -> tuple[ClipSet, ...]:
        """All sets of clips: this one and those mixed in."""
        return (self, *self.mix)

    def shapes(self, batch_size: int) -> tuple[Bucket, ...]:
        """The buckets, or the one that frames, height and width make."""
        return self.buckets or (
            Bucket(frames=self.frames, height=self.height, width=self.width, batch_size=batch_size),
        )


@dataclass(frozen=True, kw_only=True)
class Autoencoder:
    """The trained autoencoder whose latents or tokens the model learns."""

    path: str
    """The run directory that holds it; or, where `recipe` is none, a pretrained checkpoint: a folder in diffusers'
    format, a Hub id or tiny://NAME. Empty is the model's own checkpoint; untrained:// is the recipe's network with
    fresh weights, which is enough to try a chain out."""
    recipe: str | None
    """The recipe that trains it: tells its shapes before it exists, and the command that makes it. none: pretrained."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of stored and on-the-fly moments, and of a pretrained autoencoder's weights."""
    tiling: bool = False
    """Work on large frames in overlapping tiles: less memory, and not quite the same latents. For pretrained ones."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A low-rank update of frozen weights: W + alpha / rank · B A for each target."""

    rank: int = 64
    """Columns of B and rows of A."""
    alpha: float | None = None
    """The update is multiplied by alpha / rank; none takes the rank. (cogvideox-factory: 64 and 64; CogVideo's own
    trainer: rank 128, alpha 64.)"""
    dropout: float = 0.0
    """Share of the inputs of A that are dropped in training."""
    targets: str = "attention"
    """Layers with an update: attention, attention+mlp, or a regular expression that is looked for in the names of
    linear layers, as in "to_q|to_v"."""
    dora: bool = False
    """Learn the lengths of the weights' rows by themselves (DoRA)."""
    init_from: str | None = None
    """An adapter's file or folder to start from: diffusers', PEFT's or kohya's."""
    init_alpha: float | None = None
    """The alpha that init_from was trained with, where its file does not say."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank={self.rank} must be at least 1")
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"lora.alpha={self.alpha:g} must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout={self.dropout:g} must be at least 0 and below 1")
        if self.init_alpha is not None and self.init_from is None:
            raise ValueError("lora.init_alpha is the alpha of the adapter in lora.init_from, which is not given")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(f"lora.targets={self.targets!r} is not a regular expression: {error}; or use attention or "
                             "attention+mlp") from None  # fmt: skip

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How videos are drawn."""

    method: Literal["euler", "heun", "ddim", "dpmpp_2m", "ancestral"] = "euler"
    """The solver. Euler is DDIM with eta = 0 (the same update); Heun calls the model twice a step; DPM-Solver++ (2M)
    needs the fewest steps; ancestral sampling puts noise back, by the learned variance where the objective has one."""
    steps: int = 30
    """Steps from noise to video."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 turns it off, higher follows the condition more."""
    eta: float = 0.0
    """Noise that DDIM and DPM-Solver++ put back each step: 0 none, 1 as in ancestral sampling. It forgives a network's
    errors, which otherwise add up."""


@dataclass(frozen=True, kw_only=True)
class TokenSampler:
    """How videos are drawn from a model over tokens: one token after the other."""

    temperature: float = 1.0
    """The logits are divided by it: below 1, likely tokens become likelier; 0 always takes the likeliest."""
    top_k: int = 0
    """Draw from the k likeliest tokens only; 0 from all."""
    top_p: float = 1.0
    """Draw from the fewest tokens that together have this probability (arXiv:1904.09751); 1 from all."""
    guidance_scale: float = 1.0
    """Classifier-free guidance of the logits; 1 turns it off, higher follows the condition more."""


@dataclass(frozen=True, kw_only=True)
class Optim:
    """The optimizer and its schedule. All counts are optimizer steps."""

    name: Literal["adamw", "adamw8bit", "adamw4bit", "muon", "prodigy", "came"] = "adamw"
    """AdamW keeps 8 bytes of state for each weight; in 8 bits 2, in 4 bits 1; CAME 4. Muon orthogonalises the updates
    of the blocks' matrices and leaves everything else to AdamW. Prodigy (16 bytes) finds the learning rate by itself.
    """
    lr: float = 1e-4
    """Peak learning rate (of AdamW, in whatever precision, and CAME); Prodigy's is multiplied by it: 1 for that."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moments."""
    eps: float = 1e-8
    """AdamW's and Prodigy's epsilon; CAME has floors of its own."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on tensors of two or more dimensions."""
    muon_lr: float = 0.02
    """Peak learning rate of Muon's matrices."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the decay after the warm-up."""
    final_lr: float = 0.0
    """Where the decay ends, as a fraction of the peak."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm once per optimizer step; 0 turns it off."""
    max_bad_steps: int = 10
    """Steps in a row with a non-finite loss or gradient that stop the run; each is skipped."""
    offload: bool = False
    """Keep the optimizer's state on the CPU and take the steps there; in a single process, gradients lie there, too."""
    release_gradients: bool = False
    """Take each parameter's step in the backward pass, as soon as its gradient is there, and let go of that."""
    stochastic_rounding: bool = False
    """For weights = bf16: round each step to them at random, right on average; else the state has 2 bytes for each
    weight besides, which complete it to fp32."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what is trained and how."""

    data: Data
    """Which clips, and which pixels of them."""
    autoencoder: Autoencoder | None = None
    """The autoencoder before the model; none trains on pixels."""
    text: TextConfig | None = None
    """How captions become embeddings; none ignores captions."""
    model: ModelConfig
    """The network."""
    objective: ObjectiveConfig
    """What is learned."""
    first_frame: bool = False
    """Give the model the first frame of each clip, as image to video does; it is noised anew each time."""
    lora: Lora | None = None
    """Train a low-rank update of the model and keep its own weights as they are; none trains all weights."""
    sampler: Sampler | TokenSampler | None = None
    """How videos are drawn, by diffusion or token by token; none for models that do not generate."""
    validation_file: str | None = None
    """A table (JSONL, CSV, ...) of videos to draw at each sample_every: prompt, image, frames, seed, ... in columns."""
    optim: Optim = field(default_factory=Optim)
    """The optimizer and its schedule."""
    parallel: Parallel = field(default_factory=Parallel)
    """How the work is spread over processes."""
    steps: int
    """Optimizer steps."""
    batch_size: int
    """Samples per process, or group of `parallel.context`, and micro-step."""
    accumulate: int = 1
    """Micro-steps per optimizer step."""
    seed: int = 0
    """Seed of weights, order of the data, noise and samples."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32, or autocast to bf16 over fp32 weights."""
    ema: float = 0.0
    """Decay of the moving average of the weights that is sampled and exported; 0 turns it off."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """What the weights that are trained are kept in; those of LoRA are always fp32. Networks that don't compute in the
    precision of their weights by themselves, as CogVideoX does, want precision = bf16 with bf16."""
    quantize: Literal["none", "int8", "fp8", "nf4"] = "none"
    """What the blocks' frozen weights are kept in under LoRA: 8 bits, or 4 and a quarter; they compute in the precision
    of what flows through them."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    offload_activations: bool = False
    """Keep on the CPU what activation checkpointing keeps: the blocks' inputs. GPUs only."""
    offload_blocks: int = 0
    """Keep the frozen weights of so many blocks, the last ones, on the CPU; each block's are fetched while the one
    before computes. GPUs only."""
    compile: bool = False
    """Compile the model with torch.compile."""
    init_from: str | None = None
    """A run directory whose final weights to start from."""
    log_every: int = 10
    """Steps between log lines."""
    validate_every: int = 500
    """Steps between validation losses; once before step 1 too. 0 turns it off."""
    sample_every: int = 500
    """Steps between samples (reconstructions for autoencoders); once before step 1 too. 0 turns it off."""
    save_every: int = 500
    """Steps between checkpoints. One is written at the end and when the run is stopped."""
    keep_last: int = 2
    """Checkpoints that are kept: the newest, and those to fall back to."""
    keep_every: int = 0
    """Checkpoints of steps that this divides are kept besides, for ever; 0 none."""
    num_samples: int = 8
    """Videos in each of those samples."""
    wandb: str | None = None
    """Weights & Biases project to log to as well."""
