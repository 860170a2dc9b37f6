"""tiny://NAME: complete checkpoints of random weights in the published format, made on first use.

They stand in for those of gigabytes wherever only the path through the program matters: tests, a recipe's tiny twin,
a first look. They are the same on every machine with the same torch.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from mutoscope.errors import did_you_mean
from mutoscope.known_checkpoints import TINY, TINY_IMAGE_VAE, Config
from mutoscope.randomness import seed_of

IMAGE_VAE_NAME = "sd-vae"
"""An autoencoder by itself, in no folder of a pipeline: as stabilityai/sd-vae-ft-mse is published."""
VERSION = 2
"""Counts changes to what is made, so that an older one in the cache is never taken for it."""


def cache_folder() -> Path:
    """Where tiny checkpoints are kept: ``$XDG_CACHE_HOME/mutoscope/tiny``, below ``~/.cache`` by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mutoscope" / "tiny"


def tiny_config(name: str, part: str) -> Config:
    """The configuration of a part of tiny://NAME. Raises ValueError with the names there are, or for a part that it has
    not."""
    parts = {IMAGE_VAE_NAME: {"vae": TINY_IMAGE_VAE}, **TINY}
    if name not in parts:
        hint = did_you_mean(name, parts, "")
        raise ValueError(f"tiny://{name}: there is no such tiny checkpoint{hint}; there are {', '.join(parts)}")
    if part not in parts[name]:
        raise ValueError(f"tiny://{name}: has no {part}, only {', '.join(parts[name])}")
    return parts[name][part]


def make_tiny(name: str) -> Path:
    """The folder of tiny://NAME, made if it is not there yet; whole or not at all, whoever makes it at the same time.

    Raises ValueError with the names there are.
    """
    tiny_config(name, "vae")
    folder = cache_folder() / f"{name}-v{VERSION}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write(name, aside)
        os.chmod(aside, 0o755)  # mkdtemp's is for its owner alone
        os.rename(aside, folder)
    except OSError:
        if not folder.is_dir():  # else another process was first, with the same files
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _write(name: str, folder: Path) -> None:
    if name == IMAGE_VAE_NAME:
        return _write_image_vae(folder)
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXImageToVideoPipeline,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    parts = TINY[name]
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed_of("tiny checkpoint", name))
        transformer = CogVideoXTransformer3DModel.from_config(parts["transformer"])
        vae = AutoencoderKLCogVideoX.from_config(parts["vae"])
        text_encoder = T5EncoderModel(T5Config(**parts["text_encoder"]))
    # Of several processes transformers lets the first alone write, and each of them makes a whole folder here
    text_encoder.should_save_on_this_rank = lambda is_main_process: True  # type: ignore[method-assign]
    if transformer.config.use_learned_positional_embeddings:
        embed = transformer.patch_embed
        embed.pos_embedding = 0.02 * embed.pos_embedding.float()  # nearly nothing in the real one, too
    from_image = transformer.config.in_channels != transformer.config.out_channels
    pipeline: Any = CogVideoXImageToVideoPipeline if from_image else CogVideoXPipeline
    pipeline(
        tokenizer=ByT5Tokenizer(),
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=CogVideoXDDIMScheduler.from_config(parts["scheduler"]),
    ).save_pretrained(folder)


def _write_image_vae(folder: Path) -> None:
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed_of("tiny checkpoint", IMAGE_VAE_NAME))
        AutoencoderKL.from_config(TINY_IMAGE_VAE).save_pretrained(folder)
