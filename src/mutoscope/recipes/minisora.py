"""minisora: Flying MNIST through a small autoencoder and generators over its latents or tokens.

Source: https://github.com/kungfuai/CVlization, examples/generative/video_generation/minisora. Its README's commands are
named with each recipe. Full-size recipes want a GPU and, in data/flying_mnist, the clips that
``mutoscope data make flying-mnist data/flying_mnist`` draws; the tiny ones draw their clips in memory.
"""

from __future__ import annotations

from dataclasses import replace

from mutoscope.autoencoders.presets import preset
from mutoscope.models.dit import DiT
from mutoscope.models.gpt import GPT
from mutoscope.models.mamba import Mamba
from mutoscope.models.sparse_context import Nearest
from mutoscope.models.sparse_gpt import SparseGPT
from mutoscope.models.stdit import STDiT
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.objectives.reconstruction import Reconstruction
from mutoscope.objectives.tokens import NextToken
from mutoscope.recipe import Autoencoder, Data, Optim, Recipe, Sampler, TokenSampler
from mutoscope.text.encoders import HashedWords

_FULL = Data(root="data/flying_mnist", frames=32, height=256, width=256, workers=4)
_TINY = Data(root="flying-mnist://tiny", frames=4, height=16, width=16, cache=True)
_IDDPM = Diffusion(schedule="ddpm_linear", prediction="eps", learned_variance=True, prefix_share=0.1)
_DPM = Sampler(method="dpmpp_2m", steps=50)


def vqvae() -> Recipe:
    """VQ-VAE of minisora: 32×256×256 pixels to 8×64×64 tokens of 5120 codes.

    Source: minisora's README, train_vqvae.py --network_variant s8_b --n_codes 5120 --embedding_dim 4 --resolution 256
    --sequence_length 32 --low_utilization_cost 0.1 --commitment_cost 0.25 --lr 0.001 --epochs 150 (of 10,000 clips).
    The seed's s8_b did not quantise (see autoencoders/presets.py); this one does, and reinitialises idle codes each
    epoch, as the README suggests. The learning rate fell when the validation loss stood still; here along a cosine.
    Command: mutoscope train minisora.vqvae --out runs/vqvae
    Hardware and time: a GPU, with 3 GB; not timed. A CPU core takes 3.5 seconds per clip, a minute per step.
    Expected result: nearly all codes used; the seed published no figures. On 1024 clips of 8×32×32, with 512 codes and
    300 steps of 16, the last epoch used 97 % of them, and 11 % without reinitialisation.
    Status: untested
    """
    return Recipe(
        data=_FULL,
        model=preset("s8_b"),
        objective=Reconstruction(low_utilization_cost=0.1, reinit_every_n_epochs=1),
        optim=Optim(lr=1e-3, schedule="cosine", final_lr=0.01),
        steps=93_750,
        batch_size=2,
        accumulate=8,
    )


def vqvae_tiny() -> Recipe:
    """The VQ-VAE in seconds on a CPU: 4×16×16 pixels to 1×4×4 tokens of 64 codes.

    Source: minisora.vqvae with all sizes cut down.
    Command: mutoscope train minisora.vqvae_tiny --out runs/vqvae_tiny
    Hardware and time: a CPU, under a second.
    Status: verified
    """
    return replace(
        vqvae(),
        data=_TINY,
        model=replace(preset("s8_b"), encoder_channels=(8,), decoder_channels=(8, 8), num_codes=64),
        optim=Optim(lr=1e-2),
        steps=20,
        batch_size=2,
        accumulate=1,
        log_every=5,
        validate_every=10,
        sample_every=10,
        save_every=10,
        num_samples=4,
    )


def vae() -> Recipe:
    """Variational autoencoder of minisora: 32×256×256 pixels to 4×8×64×64 latents.

    Source: minisora's README, train_vqvae.py --network_variant vae_s4t4_b --kl_loss_weight 0.1 --lr 0.001.
    Command: mutoscope train minisora.vae --out runs/vae
    Hardware and time: as minisora.vqvae.
    Expected result: the seed published no figures.
    Status: untested
    """
    return replace(
        vqvae(),
        model=preset("vae_s4t4_b"),
        objective=Reconstruction(kl_loss_weight=0.1),
    )


def vae_tiny() -> Recipe:
    """The variational autoencoder in seconds on a CPU: 4×16×16 pixels to 4×1×4×4 latents.

    Source: minisora.vae with all sizes cut down.
    Command: mutoscope train minisora.vae_tiny --out runs/vae_tiny
    Hardware and time: a CPU, under a second.
    Status: verified
    """
    return replace(
        vqvae_tiny(),
        model=replace(preset("vae_s4t4_b"), encoder_channels=(8,), decoder_channels=(8, 8)),
        objective=Reconstruction(kl_loss_weight=0.1),
    )


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
        data=_FULL,
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
        dit(), DiT(depth=2, width=32, heads=2, patch=(2, 4, 4)), replace(_TINY, num_labels=10), guidance_scale=2.0
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
        data=replace(_FULL, latent_window=4, repeats=10),
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
        latte(), DiT(depth=2, width=32, heads=2, patch=(1, 4, 4)), replace(_TINY, latent_window=2, repeats=2)
    )


def stdit() -> Recipe:
    """STDiT of Open-Sora 1.0 with IDDPM over the latents of minisora.vae, unconditional.

    Source: minisora's README, iddpm.py --depth 6 --hidden_size 768 --num_heads 3 --batch_size 4
    --accumulate_grad_batches 8 --latent_frames_to_generate 8 --diffusion_steps 1000 --clip_grad 1.0 (lr 1e-4, 1,000,000
    micro-steps). Its larger net: --model.depth 16 --model.heads 12 --batch-size 1 --accumulate 32. For 32 latents after
    8, as its --resume_from: --init-from runs/stdit --model.base-frames 8, and clips of four times the frames.
    Here, besides, some samples have their first latents given, and 50 steps of DPM-Solver++ draw, not 1000.
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
        data=replace(_FULL, latent_window=8),
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
    return _in_seconds(stdit(), model, replace(_TINY, latent_window=4))


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
    tiny = _in_seconds(stdit3(), model, _TINY, guidance_scale=2.0)
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


def gpt() -> Recipe:
    """GPT of 8 blocks over the tokens of minisora.vqvae, in windows of 512 of a clip's 32,768.

    Source: minisora's README, train_latent_nanogpt.py --block_size 512 --batch_size 8 --gradient_accumulation_steps 4,
    with the script's --n_layer 8 --n_head 6 --n_embd 768 --dropout 0.2 --learning_rate 5e-4 --min_lr 1e-4 --beta2 0.99
    --warmup_iters 100 --max_iters 50000 (the README's 10,000,000 is "until stopped").
    The seed's model did not know where in the clip its window was; this one does, sees each token's neighbours in
    space and time, and takes captions. The seed's rate reached its end at step 5,000; here at the last step.
    `--model.positions 1d --model.neighbours False --model.qk-norm False` gives the seed's network.
    Command: mutoscope train minisora.vqvae --out runs/vqvae
        mutoscope encode minisora.gpt --out runs/tokens
        mutoscope train minisora.gpt --data.latents runs/tokens --out runs/gpt
    Hardware and time: a GPU of 24 GB or more; not timed.
    Expected result: the seed published no figures.
    Status: untested
    """
    return Recipe(
        data=_FULL,
        autoencoder=Autoencoder(path="runs/vqvae", recipe="minisora.vqvae"),
        text=HashedWords(max_length=80),
        model=GPT(depth=8, width=768, heads=6, dropout=0.2),
        objective=NextToken(window=512),
        sampler=TokenSampler(top_k=100),
        optim=Optim(
            lr=5e-4, betas=(0.9, 0.99), weight_decay=0.1, warmup_steps=100, schedule="cosine", final_lr=0.2
        ),
        steps=50_000,
        batch_size=8,
        accumulate=4,
        precision="bf16",
        validate_every=2000,
        sample_every=10_000,
        save_every=2000,
        num_samples=2,
    )  # fmt: skip


def gpt_tiny() -> Recipe:
    """The GPT in seconds on a CPU, over tokens of 8×16×16 clips: 2×4×4, in windows of 12.

    Source: minisora.gpt with all sizes cut down.
    Command: mutoscope train minisora.gpt_tiny --out runs/gpt_tiny
    Status: verified
    """
    return replace(
        gpt(),
        data=replace(_TINY, frames=8, short="loop"),
        autoencoder=Autoencoder(path="untrained://", recipe="minisora.vqvae_tiny"),
        text=HashedWords(width=16, max_length=8),
        model=GPT(depth=2, width=32, heads=2, dropout=0.2),
        objective=NextToken(window=12),
        optim=Optim(lr=1e-3, warmup_steps=5),
        precision="fp32",
        steps=20,
        batch_size=4,
        accumulate=1,
        log_every=5,
        validate_every=10,
        sample_every=10,
        save_every=10,
        num_samples=4,
    )


def mamba() -> Recipe:
    """Mamba-1 of 32 blocks over the tokens of minisora.vqvae: all 32,768 of a clip, a state carried through.

    Source: minisora's README, train_latent_mamba.py --n_layer 32 --n_embed 1280 --batch_size 8 --block_size 512, and
    the script's constant --learning_rate 5e-4 and --beta2 .99. There windows of 512 tokens, an eighth of a latent
    frame, began without a state and without a place, and the likeliest token was always taken; here a clip is one
    sequence, computed 2048 positions at a time, and positions and neighbours are told. It takes captions.
    `--model.version 2 --model.state 64` is Mamba-2, which needs no kernels to be fast on a GPU.
    Command: mutoscope train minisora.vqvae --out runs/vqvae
        mutoscope encode minisora.mamba --out runs/tokens
        mutoscope train minisora.mamba --data.latents runs/tokens --out runs/mamba
    Hardware and time: a GPU of 24 GB or more with mamba_ssm (pip install mamba-ssm); not timed.
    Expected result: the seed published no figures ("quality is low").
    Status: untested
    """
    return Recipe(
        data=_FULL,
        autoencoder=Autoencoder(path="runs/vqvae", recipe="minisora.vqvae"),
        text=HashedWords(max_length=80),
        model=Mamba(version=1, depth=32, width=1280, state=16, chunk=2048),
        objective=NextToken(),
        sampler=TokenSampler(top_k=100),
        optim=Optim(lr=5e-4, betas=(0.9, 0.99), weight_decay=0.1, warmup_steps=100),
        steps=50_000,
        batch_size=1,
        precision="bf16",
        log_every=20,
        validate_every=2000,
        sample_every=10_000,
        save_every=2000,
        num_samples=2,
    )


def mamba_tiny() -> Recipe:
    """Mamba in seconds on a CPU, over tokens of 8×16×16 clips: 2×4×4, 12 positions at a time.

    Source: minisora.mamba with all sizes cut down.
    Command: mutoscope train minisora.mamba_tiny --out runs/mamba_tiny
    Status: verified
    """
    return replace(
        mamba(),
        data=replace(_TINY, frames=8, short="loop"),
        autoencoder=Autoencoder(path="untrained://", recipe="minisora.vqvae_tiny"),
        text=HashedWords(width=16, max_length=8),
        model=Mamba(version=1, depth=2, width=32, state=4, chunk=12),
        optim=Optim(lr=1e-3, warmup_steps=5),
        precision="fp32",
        steps=20,
        batch_size=4,
        log_every=5,
        validate_every=10,
        sample_every=10,
        save_every=10,
        num_samples=4,
    )


def sparse_gpt() -> Recipe:
    """GPT over all 32,768 tokens of a clip of minisora.vqvae, each of which sees the 128 nearest known ones.

    Source: minisora's README, train_latent_mdgpt.py --block_size 512 --sparse_block_size 512 --num_latent_frames 8
    --batch_size 8 --gradient_accumulation_steps 4 --use_1d_pos_emb --only_predict_last, with the script's other
    defaults as in minisora.gpt. (Its own --sparse_block_size is 128; 512 of a block of 512 leave nothing out.)
    There a forward pass told one token, and the command stopped at an error; here it tells all of a clip at once.
    `--model.positions 1d --objective.window 512 --objective.only-last True` is the README's way. With
    `--model.context.type mutoscope.models.sparse_context:Frames` a frame's tokens see it and all of the one before, as
    in the script at that time; `...:Strided` is train_latent_nanogpt.py's --sparse_context_window --context_stride 2
    --context_stride_start 32.
    Command: mutoscope train minisora.vqvae --out runs/vqvae
        mutoscope encode minisora.sparse_gpt --out runs/tokens
        mutoscope train minisora.sparse_gpt --data.latents runs/tokens --out runs/sparse_gpt
    Hardware and time: a GPU of 24 GB or more; not timed.
    Expected result: the seed published no figures.
    Status: untested
    """
    return replace(
        gpt(),
        model=SparseGPT(depth=8, width=768, heads=6, dropout=0.2, context=Nearest(tokens=128)),
        objective=NextToken(),
        steps=20_000,
        batch_size=1,
        accumulate=4,
        activation_checkpointing=True,
    )


def sparse_gpt_tiny() -> Recipe:
    """The sparse GPT in seconds on a CPU, over tokens of 8×16×16 clips: 2×4×4, each of which sees 6.

    Source: minisora.sparse_gpt with all sizes cut down.
    Command: mutoscope train minisora.sparse_gpt_tiny --out runs/sparse_gpt_tiny
    Status: verified
    """
    return replace(
        gpt_tiny(),
        model=SparseGPT(depth=2, width=32, heads=2, dropout=0.2, context=Nearest(tokens=6)),
        objective=NextToken(),
        activation_checkpointing=True,
    )
