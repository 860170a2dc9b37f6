"""Diffusion over the latents of minisora's autoencoders."""

from __future__ import annotations

from dataclasses import replace

from mutoscope.models.dit import DiT
from mutoscope.models.stdit import STDiT
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.recipe import Autoencoder, Data, Optim, Recipe, Sampler
from mutoscope.recipes.minisora import FULL, TINY
from mutoscope.text.encoders import HashedWords

_IDDPM = Diffusion(schedule="ddpm_linear", prediction="eps", learned_variance=True, prefix_share=0.1)
_DPM = Sampler(method="dpmpp_2m", steps=50, eta=1.0)


def dit() -> Recipe:
    """Latte-S/2 over the latents of minisora.vae, conditioned on captions.

    Source: minisora's README, train_dit.py --model Latte-S/2, brought up to date: rectified flow on whole clips in
    place of IDDPM on windows of 4 latents, captions, an average of the weights, given first frames. As the seed had
    it: minisora.latte. Other sizes: --model.preset Latte-B/2.
    Command: mutoscope train minisora.vae --out runs/vae
        mutoscope encode minisora.dit --out runs/latents
        mutoscope train minisora.dit --data.latents runs/latents --out runs/dit
        mutoscope sample runs/dit --video clip.mp4 --known-frames 8
    Hardware and time: a GPU of 24 GB or more, a day.
    Expected result: the seed published no figures.
    Status: untested
    """
    return Recipe(
        data=FULL,
        autoencoder=Autoencoder(path="runs/vae", recipe="minisora.vae", dtype="bf16"),
        text=HashedWords(max_length=80),
        model=DiT(),
        objective=Diffusion(prefix_share=0.1),
        sampler=Sampler(steps=50, guidance_scale=2.0),
        optim=Optim(lr=1e-4, warmup_steps=1000),
        steps=200_000,
        batch_size=4,
        precision="bf16",
        ema=0.9999,
        activation_checkpointing=True,
        log_every=20,
        validate_every=2000,
        sample_every=2000,
        save_every=2000,
    )


def dit_tiny() -> Recipe:
    """The transformer in seconds on a CPU, on the pixels of 4×16×16 clips and conditioned on their digit.

    Source: minisora.dit with all sizes cut down.
    Command: mutoscope train minisora.dit_tiny --out runs/dit_tiny
    Status: verified
    """
    return _in_seconds(
        dit(), DiT(depth=2, width=32, heads=2, patch=(2, 4, 4)), replace(TINY, num_labels=10), guidance_scale=2.0
    )


def latte() -> Recipe:
    """Latte-S/2 as the seed trained it: IDDPM with a learned variance, on windows of 4 latents.

    Source: minisora's README (unconditional), train_dit.py --model Latte-S/2 --sequence_length 4 --latent_input_size 64
    --num_clips_per_video 10 --learn_sigma --lr 0.00002 --batch_size 2. There, gradients were clipped to 0.5 after 1000
    steps (here from the first), and a sample took 1000 steps (--sampler.method ancestral --sampler.steps 1000).
    With Stable Diffusion's autoencoder, frame by frame: --autoencoder.path stabilityai/sd-vae-ft-mse
    --autoencoder.recipe none --model.preset Latte-T/2.
    Command: mutoscope train minisora.vae --out runs/vae
        mutoscope encode minisora.latte --out runs/latents
        mutoscope train minisora.latte --data.latents runs/latents --out runs/latte
    Hardware and time: a GPU of 8 GB or more; not timed.
    Expected result: the seed published no figures.
    Status: untested
    """
    return replace(
        dit(),
        data=replace(FULL, latent_window=4, repeats=10),
        text=None,
        objective=_IDDPM,
        sampler=_DPM,
        optim=Optim(lr=2e-5, max_grad_norm=0.5),
        steps=500_000,
        batch_size=2,
        ema=0.0,
        activation_checkpointing=False,
    )


def latte_tiny() -> Recipe:
    """The seed's Latte in seconds on a CPU, on windows of 2 frames of 4×16×16 pixels.

    Source: minisora.latte with all sizes cut down.
    Command: mutoscope train minisora.latte_tiny --out runs/latte_tiny
    Status: verified
    """
    return _in_seconds(
        latte(), DiT(depth=2, width=32, heads=2, patch=(1, 4, 4)), replace(TINY, latent_window=2, repeats=2)
    )


def stdit() -> Recipe:
    """STDiT of Open-Sora 1.0 with IDDPM over the latents of minisora.vae, unconditional.

    Source: minisora's README, iddpm.py --depth 6 --hidden_size 768 --num_heads 3 --batch_size 4
    --accumulate_grad_batches 8 --latent_frames_to_generate 8 --diffusion_steps 1000 --clip_grad 1.0 (lr 1e-4, 1,000,000
    micro-steps). Its larger net: --model.depth 16 --model.heads 12 --batch-size 1 --accumulate 32. For 32 latents after
    8, as its --resume_from: --init-from runs/stdit --model.base-frames 8, and clips of four times the frames.
    Here, besides, some samples have their first latents given, and 50 steps of SDE-DPM-Solver++ draw, not 1000.
    Command: mutoscope train minisora.vae --out runs/vae
        mutoscope encode minisora.stdit --out runs/latents
        mutoscope train minisora.stdit --data.latents runs/latents --out runs/stdit
        mutoscope sample runs/stdit --image first.png
    Hardware and time: a GPU of 24 GB or more, days.
    Expected result: the seed published no figures.
    Status: untested
    """
    return replace(
        dit(),
        data=replace(FULL, latent_window=8),
        text=None,
        model=STDiT(version=1, depth=6, width=768, heads=3),
        objective=_IDDPM,
        sampler=_DPM,
        optim=Optim(lr=1e-4),
        steps=125_000,
        accumulate=8,
        ema=0.0,
    )


def stdit_tiny() -> Recipe:
    """STDiT in seconds on a CPU, on the pixels of 4×16×16 clips.

    Source: minisora.stdit with all sizes cut down.
    Command: mutoscope train minisora.stdit_tiny --out runs/stdit_tiny
    Status: verified
    """
    model = STDiT(version=1, depth=1, width=32, heads=2, patch=(1, 4, 4))
    return _in_seconds(stdit(), model, replace(TINY, latent_window=4))


def stdit3() -> Recipe:
    """STDiT of Open-Sora 1.2, with rectified flow and captions, over the latents of minisora.vae.

    Source: Open-Sora 1.2's STDiT3 (rotary positions along time, normalised queries and keys, sizes and rates, given
    frames) at a size for Flying MNIST; a quarter of the samples have first frames given.
    Command: mutoscope train minisora.vae --out runs/vae
        mutoscope encode minisora.stdit3 --out runs/latents
        mutoscope train minisora.stdit3 --data.latents runs/latents --out runs/stdit3
        mutoscope sample runs/stdit3 --prompt "a red 3 flies right" --video clip.mp4 --known-frames 8
    Hardware and time: a GPU of 24 GB or more, a day.
    Expected result: none yet.
    Status: untested
    """
    return replace(dit(), model=STDiT(version=3, depth=6, width=384, heads=6), objective=Diffusion(prefix_share=0.25))


def stdit3_tiny() -> Recipe:
    """The later STDiT in seconds on a CPU, on the pixels of 4×16×16 clips with captions.

    Source: minisora.stdit3 with all sizes cut down.
    Command: mutoscope train minisora.stdit3_tiny --out runs/stdit3_tiny
    Status: verified
    """
    model = STDiT(version=3, depth=1, width=32, heads=2, patch=(1, 4, 4))
    tiny = _in_seconds(stdit3(), model, TINY, guidance_scale=2.0)
    return replace(tiny, text=HashedWords(width=16, max_length=8))


def _in_seconds(recipe: Recipe, model: DiT | STDiT, data: Data, guidance_scale: float = 1.0) -> Recipe:
    """A recipe of latents as one of a few pixels."""
    assert isinstance(recipe.sampler, Sampler)
    return replace(
        recipe,
        data=data,
        autoencoder=None,
        text=None,
        model=model,
        sampler=replace(recipe.sampler, steps=4, guidance_scale=guidance_scale),
        optim=Optim(lr=1e-3, warmup_steps=5),
        precision="fp32",
        ema=0.9,
        activation_checkpointing=False,
        steps=20,
        batch_size=4,
        accumulate=1,
        log_every=5,
        validate_every=10,
        sample_every=10,
        save_every=10,
        num_samples=4,
    )
