"""The autoencoders of minisora."""

from __future__ import annotations

from dataclasses import replace

from mutoscope.autoencoders.presets import preset
from mutoscope.objectives.reconstruction import Reconstruction
from mutoscope.recipe import Optim, Recipe
from mutoscope.recipes.minisora import FULL, TINY


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
        data=FULL,
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
        data=TINY,
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
