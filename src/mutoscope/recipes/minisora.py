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
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.objectives.reconstruction import Reconstruction
from mutoscope.objectives.tokens import NextToken
from mutoscope.recipe import Autoencoder, Data, Optim, Recipe, Sampler, TokenSampler
from mutoscope.text.encoders import HashedWords

_FULL = Data(root="data/flying_mnist", frames=32, height=256, width=256, workers=4)
_TINY = Data(root="flying-mnist://tiny", frames=4, height=16, width=16, cache=True)


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

    Source: minisora's README, train_dit.py --model Latte-S/2 --sequence_length 4 --latent_input_size 64.
    There it was unconditional DDPM on windows of 4 latent frames at a constant rate of 2e-5 without an average of the
    weights; here it is rectified flow on the whole clip. `--objective.schedule ddpm_linear --objective.prediction eps`
    gives the seed's objective (its learned variance comes with IDDPM).
    Command: mutoscope train minisora.vae --out runs/vae
        mutoscope encode minisora.dit --out runs/latents
        mutoscope train minisora.dit --data.latents runs/latents --out runs/dit
    Hardware and time: a GPU of 24 GB or more, a day.
    Expected result: the seed published no figures.
    Status: untested
    """
    return Recipe(
        data=_FULL,
        autoencoder=Autoencoder(path="runs/vae", recipe="minisora.vae", dtype="bf16"),
        text=HashedWords(max_length=80),
        model=DiT(depth=12, width=384, heads=6, patch=(1, 2, 2)),
        objective=Diffusion(),
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
    return replace(
        dit(),
        data=replace(_TINY, num_labels=10),
        autoencoder=None,
        text=None,
        model=DiT(depth=2, width=32, heads=2, patch=(2, 4, 4)),
        sampler=Sampler(steps=4, guidance_scale=2.0),
        optim=Optim(lr=1e-3, warmup_steps=5),
        precision="fp32",
        ema=0.9,
        activation_checkpointing=False,
        steps=20,
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
    """Mamba-1 of 32 blocks over the tokens of minisora.vqvae, the 32,768 of a clip as one sequence.

    Source: minisora's README, train_latent_mamba.py --n_layer 32 --n_embed 1280 --batch_size 8 --block_size 512, and
    the script's constant --learning_rate 5e-4 and --beta2 .99. There windows of 512 tokens, an eighth of a latent
    frame, began without a state and without a place, and the likeliest token was always taken; here a clip is one
    sequence, computed 2048 positions at a time, and positions and neighbours are told. It takes captions.
    `--model.version 2 --model.state 64` is Mamba-2, which needs no kernels to be fast on a GPU.
    Command: mutoscope train minisora.vqvae --out runs/vqvae
        mutoscope encode minisora.mamba --out runs/tokens
        mutoscope train minisora.mamba --data.latents runs/tokens --out runs/mamba
    Hardware and time: a GPU with mamba_ssm (pip install "mutoscope[mamba]"); neither time nor memory were measured.
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
