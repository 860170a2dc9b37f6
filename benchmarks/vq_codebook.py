"""The codebook's part of a VQ-VAE training step, against the seed's: forward and backward at 5120 codes of 4 channels.

    python -m benchmarks.vq_codebook [--peer PATH_TO_A_CHECKOUT_OF_CVLIZATION]

Both sides get the same codebook and vectors, and must give the same codes, losses and gradients before anything is
timed. Time is CPU time of one thread. Memory is the growth of a fresh process at its peak.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.cvlization import PEER, vector_quantizer
from benchmarks.harness import compare, last_line, peak_memory, table, timing_row
from mutoscope.autoencoders.bottlenecks import VectorQuantizer

CODES, CHANNELS, COMMITMENT_COST, LOW_UTILIZATION_COST = 5120, 4, 0.25, 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, help=f"a checkout of {PEER}")
    peer: Path | None = parser.parse_args().peer
    torch.set_num_threads(1)

    rows, headline = [], None
    for vectors, low in ((4096, False), (4096, True), (16_384, False), (16_384, True)):
        z, ours = latents(vectors), our_step(low)
        theirs = peer_step(peer, low) if peer is not None else None
        if theirs is not None:
            for a, b in zip(ours(z), theirs(z), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
        pairs = compare(partial(ours, z), partial(theirs, z) if theirs else None)
        headline = headline or pairs
        memory = [peak_memory(our_run, vectors, low), peak_memory(peer_run, peer, vectors, low) if peer else None]
        name = f"{vectors} vectors{', low utilisation' if low else ''}"
        rows.append([*timing_row(name, pairs), *memory_cells(*memory)])
    header = ["5120 codes", "ours ms", "peer ms", "ratio", "ours MiB", "peer MiB", "ratio"]
    table(header, rows)
    last_line("vq_codebook", PEER, headline or [])


Step = Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]


def our_step(low: bool) -> Step:
    """A step from latents to (codes, loss, gradient of the latents, gradient of the codebook)."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(CODES, CHANNELS)

    def step(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z = z.detach().requires_grad_()
        out = quantizer(z)
        assert out.codebook is not None and out.commitment is not None
        loss = out.codebook.mean() + COMMITMENT_COST * out.commitment.mean()
        if low:
            loss = loss + LOW_UTILIZATION_COST * quantizer.low_utilization(z)
        gradients = torch.autograd.grad(loss + out.latents.square().mean(), [z, quantizer.weight])
        return out.tokens.flatten(), loss.detach(), *gradients

    return step


def peer_step(checkout: Path, low: bool) -> Step:
    """The same step by the seed."""
    quantizer: nn.Module = vector_quantizer(checkout, CODES, CHANNELS, LOW_UTILIZATION_COST if low else 0.0)
    torch.manual_seed(0)
    quantizer.codebook.weight.data.copy_(VectorQuantizer(CODES, CHANNELS).weight.detach())  # type: ignore[union-attr]

    def step(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z = z.detach().requires_grad_()
        out = quantizer(z)
        loss = out["commitment_loss"]
        gradients = torch.autograd.grad(loss + out["z_recon"].square().mean(), [z, quantizer.codebook.weight])
        return out["encodings"].flatten(), loss.detach(), *gradients

    return step


def latents(vectors: int) -> Tensor:
    """(1, channels, t, 32, 32), N(0, 1)."""
    return torch.randn(1, CHANNELS, vectors // 1024, 32, 32, generator=torch.Generator().manual_seed(1))


def our_run(vectors: int, low: bool) -> Callable[[], object]:
    """A step of ours, warmed up by one of 1024 vectors."""
    step = our_step(low)
    step(latents(1024))
    return partial(step, latents(vectors))


def peer_run(checkout: Path, vectors: int, low: bool) -> Callable[[], object]:
    """A step of the seed's, warmed up by one of 1024 vectors."""
    step = peer_step(checkout, low)
    step(latents(1024))
    return partial(step, latents(vectors))


def memory_cells(ours: float, peer: float | None) -> list[str]:
    """Peaks and their ratio."""
    return [f"{ours:.1f}", f"{peer:.0f}", f"{peer / ours:.0f}x"] if peer else [f"{ours:.1f}", "-", "-"]


if __name__ == "__main__":
    main()
