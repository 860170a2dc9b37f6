"""minisora: Flying MNIST through a small autoencoder and generators over its latents or tokens.

Source: https://github.com/kungfuai/CVlization, examples/generative/video_generation/minisora. Its README's commands are
named with each recipe. Full-size recipes want a GPU and, in data/flying_mnist, the clips that
``mutoscope data make flying-mnist data/flying_mnist`` draws; the tiny ones draw their clips in memory.
"""

from __future__ import annotations

from dataclasses import replace

from mutoscope.autoencoders.presets import preset
from mutoscope.objectives.reconstruction import Reconstruction
from mutoscope.recipe import Data, Optim, Recipe

_FULL = Data(root="data/flying_mnist", frames=32, height=256, width=256, workers=4)
_TINY = Data(root="flying-mnist://tiny", frames=4, height=16, width=16, cache=True)


def vqvae() -> Recipe:
    """VQ-VAE of minisora: 32×256×256 pixels to 8×64×64 tokens of 5120 codes.

    Source: minisora's README, train_vqvae.py --network_variant s8_b --n_codes 5120 --embedding_dim 4 --resolution 256
    --sequence_length 32. The seed's s8_b did not quantise (see autoencoders/presets.py); this one does. Its learning
    rate fell when the validation loss stood still; here it falls along a cosine.
    Command: mutoscope train minisora.vqvae --out runs/vqvae
    Hardware and time: a GPU of 24 GB, hours; on a CPU about 10 seconds per step (tried there on 16×64×64 clips only).
    Expected result: every code used; the seed published no figures.
    Status: untested
    """
    return Recipe(
        data=_FULL,
        model=preset("s8_b"),
        objective=Reconstruction(low_utilization_cost=0.1, reinit_every_n_epochs=1),
        optim=Optim(lr=2e-3, schedule="cosine", final_lr=0.01, warmup_steps=100),
        steps=20_000,
        batch_size=2,
        accumulate=8,
    )


def vqvae_tiny() -> Recipe:
    """The VQ-VAE in seconds on a CPU: 4×16×16 pixels to 1×4×4 tokens of 64 codes.

    Source: minisora.vqvae with all sizes cut down.
    Command: mutoscope train minisora.vqvae_tiny --out runs/vqvae_tiny
    Status: untested
    """
    return replace(
        vqvae(),
        data=_TINY,
        model=replace(preset("s8_b"), encoder_channels=(8,), decoder_channels=(8, 8), num_codes=64),
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

    Source: minisora's README, train_vqvae.py --network_variant vae_s4t4_b --kl_loss_weight 0.01.
    Command: mutoscope train minisora.vae --out runs/vae
    Hardware and time: a GPU of 24 GB, hours; on a CPU about 10 seconds per step.
    Expected result: the seed published no figures.
    Status: untested
    """
    return replace(
        vqvae(),
        model=preset("vae_s4t4_b"),
        objective=Reconstruction(kl_loss_weight=0.01),
    )


def vae_tiny() -> Recipe:
    """The variational autoencoder in seconds on a CPU: 4×16×16 pixels to 4×1×4×4 latents.

    Source: minisora.vae with all sizes cut down.
    Command: mutoscope train minisora.vae_tiny --out runs/vae_tiny
    Status: untested
    """
    return replace(
        vqvae_tiny(),
        model=replace(preset("vae_s4t4_b"), encoder_channels=(8,), decoder_channels=(8, 8)),
        objective=Reconstruction(kl_loss_weight=0.01),
    )
