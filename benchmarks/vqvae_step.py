"""A whole training step of the VQ-VAE s4t4_b_vq, against the seed's: 16×64×64 pixels, 5120 codes.

    python -m benchmarks.vqvae_step [--peer PATH_TO_A_CHECKOUT_OF_CVLIZATION]

Both sides get the same weights and clips, and must give the same codes, losses and gradients before anything is timed.
A step is what the loops do: ours with counter-based noise, gradient clipping and statistics of the codebook, which the
seed's lacks. Time is CPU time of one thread. The last line is at the seed's own batch size and costs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.cvlization import PEER, vqvae
from benchmarks.harness import compare, last_line, table, timing_row
from mutoscope.autoencoders.conv import ConvAutoencoderModel
from mutoscope.autoencoders.presets import preset
from mutoscope.objectives.reconstruction import Reconstruction
from mutoscope.randomness import Draw
from mutoscope.recipe import Optim
from mutoscope.training.optimizers import build_optimizers
from mutoscope.types import Batch, Cond, ModelIO

FRAMES, SIZE, CODES, CHANNELS, LR = 16, 64, 5120, 4, 1e-3
COSTS = ((0.0, "low utilisation off"), (0.1, "low utilisation 0.1"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, help=f"a checkout of {PEER}")
    checkout: Path | None = parser.parse_args().peer
    torch.set_num_threads(1)

    rows, pairs = [], []
    for batch_size in (1, 2):
        for cost, name in COSTS:
            video = torch.rand(batch_size, 3, FRAMES, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1
            torch.manual_seed(0)
            model = preset("s4t4_b_vq").build(ModelIO(channels=3, grid=(FRAMES, SIZE, SIZE)))
            peer = None
            if checkout is not None:
                peer = vqvae(checkout, "s4t4_b_vq", CODES, CHANNELS, cost)
                copy_weights(model, peer)
                check_equal(model, peer, video, cost)
            pairs = compare(our_step(model, video, cost), peer_step(peer, video) if peer is not None else None)
            rows.append(timing_row(f"batch {batch_size}, {name}", pairs))
    table([f"{FRAMES}x{SIZE}x{SIZE}, {CODES} codes", "ours ms", "peer ms", "ratio"], rows)
    last_line("vqvae_step", PEER, pairs)


def our_loss(model: ConvAutoencoderModel, video: Tensor, cost: float) -> tuple[Tensor, dict[str, Tensor]]:
    """(total, parts) of the objective."""
    samples = list(range(len(video)))
    batch = Batch(ids=[str(n) for n in samples], samples=samples, cond=Cond(), video=video)
    loss = Reconstruction(low_utilization_cost=cost).loss(model, batch, Draw(0, "train", samples))
    return loss.total, loss.parts


def our_step(model: ConvAutoencoderModel, video: Tensor, cost: float) -> Callable[[], None]:
    """A step of our loop."""
    [optimizer] = build_optimizers(model, Optim(lr=LR))

    def step() -> None:
        our_loss(model, video, cost)[0].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        Reconstruction().after_step(model, lambda value: value)
        optimizer.zero_grad(set_to_none=True)

    return step


def peer_step(model: nn.Module, video: Tensor) -> Callable[[], None]:
    """A step of the seed's loop (training_step, configure_optimizers), without what it logs."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, betas=(0.9, 0.999))

    def step() -> None:
        reconstruction, kl, _, codes = model(video / 2)
        (reconstruction + codes["commitment_loss"] + kl).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def copy_weights(model: ConvAutoencoderModel, peer: nn.Module) -> None:
    """Give the seed's model our weights; its parameters come in the same order."""
    for theirs, ours in zip(peer.parameters(), model.parameters(), strict=True):
        theirs.data.copy_(ours.detach())


def check_equal(model: ConvAutoencoderModel, peer: nn.Module, video: Tensor, cost: float) -> None:
    """Raise AssertionError unless both sides give the same codes, losses and gradients."""
    total, parts = our_loss(model, video, cost)
    total.backward()
    reconstruction, kl, _, codes = peer(video / 2)
    (reconstruction + codes["commitment_loss"] + kl).backward()
    torch.testing.assert_close(model.encode(video).flatten(), codes["encodings"].flatten(), rtol=0, atol=0)
    torch.testing.assert_close(parts["reconstruction"], reconstruction.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(total.detach(), (reconstruction + codes["commitment_loss"]).detach(), rtol=1e-5, atol=0)
    for ours, theirs in zip(model.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)
        ours.grad = theirs.grad = None


if __name__ == "__main__":
    main()
