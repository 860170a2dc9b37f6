"""What is wrong with a recipe as a whole: fields that are sound by themselves and can't be together."""

from __future__ import annotations

from collections.abc import Iterator

from mutoscope.autoencoders.conv import ConvAutoencoder
from mutoscope.config import check
from mutoscope.errors import ConfigError
from mutoscope.limits import out_of_limits
from mutoscope.objectives.contrastive import Contrastive
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.objectives.tokens import NextToken
from mutoscope.recipe import ClipSet, Data, Optim, Parallel, Recipe, Sampler, TokenSampler
from mutoscope.training.optimizers import SHARDED


def validate(recipe: Recipe) -> None:
    """Refuses a recipe whose types, numbers or combinations can't work, or that no file could bring back.

    Raises ConfigError with a line for every problem. Whether clips, model and latents fit each other is seen later,
    when their shapes are known.
    """
    check(recipe)
    if problems := [*out_of_limits(recipe), *_contradictions(recipe)]:
        raise ConfigError(*problems)


def _contradictions(recipe: Recipe) -> Iterator[str]:
    data, sampler, optim = recipe.data, recipe.sampler, recipe.optim
    for k, clips in enumerate(data.sets):
        yield from _contradictions_of_set(clips, f"recipe.data.mix[{k - 1}]" if k else "recipe.data")
    if len({clips.weight is None for clips in data.sets}) > 1:
        yield "recipe.data.weight: give it to all sets of clips (data and each of data.mix), or to none"
    shapes = [(b.frames, b.height, b.width) for b in data.buckets]
    for k, bucket in enumerate(data.buckets):
        if min(bucket.frames, bucket.height, bucket.width, bucket.batch_size) < 1:
            yield f"recipe.data.buckets[{k}]: all numbers must be at least 1"
        if shapes.index(shapes[k]) < k:
            yield f"recipe.data.buckets[{k}]: the same shape as buckets[{shapes.index(shapes[k])}]"
    if data.template_weights and len(data.template_weights) != len(data.templates):
        yield (f"recipe.data.template_weights: {len(data.template_weights)} weights "
               f"for {len(data.templates)} templates")  # fmt: skip
    if data.window_interval is not None and data.window != "all":
        yield f'recipe.data.window_interval: is for window = "all", the window is {data.window}'
    pretrained = recipe.autoencoder is not None and recipe.autoencoder.recipe is None
    if (recipe.validation_file is not None or recipe.first_frame) and not pretrained:
        yield "recipe: validation_file and first_frame are for pretrained models, with an autoencoder of a checkpoint"
    if data.latent_window is not None and recipe.first_frame:
        yield "recipe.data.latent_window: a clip's first frame is not that of a window of it; set it to none"
    if data.latents is not None:
        if recipe.autoencoder is None:
            yield "recipe.data.latents: latents are an autoencoder's; set recipe.autoencoder to the one that made them"
        yield from stored_once(data)
        if data.cache:
            yield "recipe.data.cache: stored latents are memory-mapped already; it is for clips"
    if data.cache and (data.window == "random" or data.resize == "random_crop"):
        yield "recipe.data.cache: random windows and crops are new each time, so that there is nothing to keep"
    if isinstance(recipe.objective, NextToken) and isinstance(sampler, Sampler):
        yield 'recipe.sampler: tokens are drawn one by one, not by diffusion; set sampler.type = "TokenSampler"'
    if isinstance(recipe.objective, Diffusion) and isinstance(sampler, TokenSampler):
        yield 'recipe.sampler: videos are drawn by diffusion, not token by token; set sampler.type = "Sampler"'
    if isinstance(recipe.objective, Contrastive):
        if sampler is not None or recipe.sample_every:
            yield "recipe.sampler, recipe.sample_every: a contrastive model draws nothing; set them to none and 0"
        if recipe.text is None:
            yield "recipe.text: a contrastive model compares videos with captions; set it, to HashedWords for instance"
    if isinstance(sampler, Sampler) and sampler.eta and sampler.method not in ("ddim", "dpmpp_2m"):
        yield f"recipe.sampler.eta: ddim and dpmpp_2m have it, not {sampler.method}; set eta = 0"
    if optim.final_lr and optim.schedule == "constant":
        yield "recipe.optim.final_lr: a constant schedule has no end; set final_lr = 0, or schedule to linear or cosine"
    yield from _contradictions_of_memory(recipe)
    yield from _contradictions_of_parallel(recipe)


def _contradictions_of_memory(recipe: Recipe) -> Iterator[str]:
    optim = recipe.optim
    if recipe.weights == "bf16" and recipe.lora is not None:
        yield "recipe.weights: LoRA's weights are always fp32, and the others are not trained; set weights = fp32"
    if recipe.weights == "bf16" and recipe.precision == "fp32" and not recipe.model.native_precision:
        yield "recipe.precision: over bf16 weights this network computes by autocast; set precision = bf16"
    if recipe.weights == "bf16" and optim.name == "muon":
        yield "recipe.optim.name: muon trains fp32 weights; set weights = fp32, or another optimizer"
    if recipe.quantize != "none" and recipe.lora is None:
        yield "recipe.quantize: quantised weights cannot be trained; set recipe.lora, which trains others beside them"
    if recipe.quantize != "none" and recipe.lora is not None and recipe.lora.dora:
        yield "recipe.quantize: DoRA computes with the weights themselves; set lora.dora = false, or quantize = none"
    if recipe.offload_blocks and recipe.lora is None:
        yield "recipe.offload_blocks: is for frozen weights; set recipe.lora, which trains others beside them"
    for name in ("offload_activations", "offload_blocks"):
        if getattr(recipe, name) and not recipe.activation_checkpointing:
            yield f"recipe.{name}: goes with activation checkpointing alone; set activation_checkpointing = true"
    if optim.stochastic_rounding and recipe.weights != "bf16":
        yield "recipe.optim.stochastic_rounding: fp32 weights need no rounding; set it to false, or weights = bf16"
    if optim.stochastic_rounding and optim.offload:
        yield "recipe.optim.stochastic_rounding: saves memory that optim.offload has taken off the GPU; set it to false"
    if optim.offload and optim.name == "muon":
        yield "recipe.optim.offload: muon's products of matrices are too slow for a CPU; set offload = false"
    if optim.name == "prodigy" and optim.lr < 0.01:
        yield f"recipe.optim.lr: Prodigy multiplies the rate that it finds by it, {optim.lr:g} stops it; set lr = 1"
    if optim.name == "came" and optim.eps != Optim.eps:
        yield "recipe.optim.eps: came has floors of its own; leave eps alone"
    if optim.release_gradients:
        yield from _contradictions_of_release(recipe)


def _contradictions_of_release(recipe: Recipe) -> Iterator[str]:
    name, optim = "recipe.optim.release_gradients", recipe.optim
    if optim.max_grad_norm:
        yield f"{name}: steps are taken before the norm of all gradients is known; set optim.max_grad_norm = 0"
    if recipe.accumulate > 1:
        yield f"{name}: gradients are not kept for a next micro-step; set accumulate = 1"
    if recipe.parallel.strategy != "none":
        yield f"{name}: processes average gradients before a step; set parallel.strategy = none, and no torchrun"
    if optim.offload:
        yield f"{name}: optim.offload takes gradients off the GPU already; set one of the two to false"
    if optim.name in ("muon", "prodigy"):
        yield f"{name}: {optim.name} is not for single gradients; take one of AdamW's or came"


def _contradictions_of_parallel(recipe: Recipe) -> Iterator[str]:
    parallel, optim = recipe.parallel, recipe.optim
    if parallel.stall >= parallel.timeout:
        yield (f"recipe.parallel.stall: {parallel.stall:g} s is no sooner than the timeout of {parallel.timeout:g} s, "
               "after which there is nobody left to ask; set it to less, or to 0")  # fmt: skip
    for strategy, names in {
        "fsdp2": ("shard", "replicate", "reshard"),
        "deepspeed": ("zero", "deepspeed_config"),
        "fsdp2 or deepspeed": ("offload",),
        "none or ddp or fsdp2": ("context",),
    }.items():
        for name in names:
            if parallel.strategy not in strategy.split(" or ") and getattr(parallel, name) != getattr(Parallel, name):
                yield f"recipe.parallel.{name}: is for strategy = {strategy}, the strategy is {parallel.strategy}"
    if parallel.strategy == "deepspeed":
        yield from _contradictions_of_deepspeed(recipe)
    if parallel.strategy != "fsdp2":
        return
    if parallel.offload == "optimizer":
        yield 'recipe.parallel.offload: fsdp2 moves "all" or "none"'
    if optim.name not in SHARDED:
        yield (f"recipe.optim.name: {optim.name} looks at whole weights, and fsdp2 divides them; take "
               f"{' or '.join(SHARDED)} (their state is divided, too), or strategy = ddp")  # fmt: skip
    if optim.offload:
        yield 'recipe.optim.offload: is for whole weights; with fsdp2, set parallel.offload = "all"'
    if recipe.offload_blocks:
        yield 'recipe.offload_blocks: fsdp2 divides the blocks already; set it to 0, or parallel.offload = "all"'


def _contradictions_of_deepspeed(recipe: Recipe) -> Iterator[str]:
    """Much of what a recipe may have would be written over, or is DeepSpeed's own business."""
    parallel, optim = recipe.parallel, recipe.optim
    if parallel.offload == "all" and parallel.zero < 3:
        yield 'recipe.parallel.offload: weights that are whole stay on the GPU; set zero = 3, or offload = "optimizer"'
    if optim.name != "adamw":
        yield f"recipe.optim.name: deepspeed trains by adamw here, not by {optim.name}; take it, or strategy = ddp"
    for name, instead in (("ema", 0), ("quantize", "none"), ("weights", "fp32"), ("offload_blocks", 0)):
        if getattr(recipe, name) != instead:
            yield f"recipe.{name}: is not for strategy = deepspeed; set it to {instead}, or strategy to fsdp2 or ddp"
    if parallel.zero == 3 and isinstance(recipe.model, ConvAutoencoder):
        yield ("recipe.parallel.zero: with 3, DeepSpeed (0.19) fails in the backward pass of these autoencoders; take "
               "2, or strategy = fsdp2")  # fmt: skip
    if optim.offload:
        yield 'recipe.optim.offload: with deepspeed, set parallel.offload = "optimizer"'
    if recipe.data.buckets:
        yield "recipe.data.buckets: deepspeed counts on one batch size; leave them out, or set the strategy to fsdp2"
    if getattr(recipe.objective, "reinit_every_n_epochs", 0):
        yield ("recipe.objective.reinit_every_n_epochs: deepspeed would write over codes that replace themselves; set "
               "it to 0")  # fmt: skip


def _contradictions_of_set(clips: ClipSet, path: str) -> Iterator[str]:
    in_memory = clips.root.startswith("flying-mnist://")
    if not clips.root:
        yield f"{path}.root: empty; give a folder of clips, or flying-mnist://PRESET"
    if clips.layout not in ("auto", "flying_mnist") and in_memory:
        yield f"{path}.layout: {clips.root} is of layout flying_mnist, not {clips.layout}; leave it at auto"
    if clips.layout == "flying_mnist" and not in_memory:
        yield f"{path}.root: layout flying_mnist wants flying-mnist://PRESET, got {clips.root!r}"
    if clips.repeats < 1 or (clips.weight is not None and clips.weight <= 0):
        yield f"{path}: repeats must be at least 1 and weight above 0, got {clips.repeats} and {clips.weight}"
    if clips.weight is not None and clips.repeats != 1:
        yield f"{path}.repeats: the set's share is given by its weight already; leave repeats at 1"


def stored_once(data: Data) -> Iterator[str]:
    """What keeps clips from being stored once and read for ever: whatever changes from one reading to the next."""
    if data.window == "random":
        yield "recipe.data.window: random takes other frames each time, but a clip is stored once; use first or all"
    if data.resize == "random_crop":
        yield "recipe.data.resize: random_crop takes another part each time, but a clip is stored once; use crop"
    if data.flip:
        yield "recipe.data.flip: a clip is stored once, one way round; set flip = 0"
