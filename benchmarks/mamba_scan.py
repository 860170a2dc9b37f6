"""Mamba on a CPU: the scan against mamba_ssm's `selective_scan_ref`, and a training step against transformers'.

    python -m benchmarks.mamba_scan [--peer PATH_TO_A_CHECKOUT_OF_MAMBA] [--quick]

The reference is a loop over positions through autograd, which is what there is without CUDA: mamba_ssm's from a
checkout (needs einops), or the same as published, written below. transformers takes that loop, too. All sides get the
same weights and inputs, and must give the same outputs and gradients before anything is timed. Time is CPU time of one
thread. Sampling is measured by the tensors that live, at 1k and at 8k tokens.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import compare, cpu_seconds, last_line, table, timing_row
from mutoscope.models.mamba import Mamba, MambaModel
from mutoscope.models.selective_scan import selective_scan
from mutoscope.types import Cond, ModelIO, TokenCache

PEER = "selective_scan_ref"
BATCH, CHANNELS, STATE = 1, 128, 16
HIDDEN, LAYERS, VOCAB, STEP_LENGTH = 64, 2, 512, 1024

Reference = Callable[..., tuple[Tensor, Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, help="a checkout of state-spaces/mamba; else its formula, written here")
    parser.add_argument("--quick", action="store_true", help="one repeat of the slow sides in place of five and three")
    options = parser.parse_args()
    torch.set_num_threads(1)
    reference = selective_scan_ref if options.peer is None else checked_out(options.peer)

    rows, headline = [], []
    for length in (512, 2048):
        ours, theirs = scan_step(our_scan, length), scan_step(reference, length)
        for a, b in zip(ours(), theirs(), strict=True):
            assert (a - b).abs().max() < 1e-4 * b.abs().max()
        pairs = compare(ours, theirs, repeats=1 if options.quick else 5)
        rows.append(timing_row(f"scan, forward and backward, {length} positions", pairs))
        headline = pairs
    for version in (1, 2):
        ours, theirs = training_steps(version)
        ours(), theirs()
        repeats = 1 if options.quick else {1: 3, 2: 5}[version]
        pairs = [(cpu_seconds(ours), cpu_seconds(theirs)) for _ in range(repeats)]
        rows.append(timing_row(f"Mamba-{version}, training step, {STEP_LENGTH} tokens, transformers", pairs))
    table(["1 thread", "ours ms", "peer ms", "ratio"], rows)
    print()
    table(["sampling", "positions", "KiB of states", "peak KiB of tensors in a step"], sampling_rows())
    last_line("mamba_scan", PEER, headline)


# ---------------------------------------------------------------- the scan


def selective_scan_ref(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """mamba_ssm/ops/selective_scan_interface.py (Apache-2.0), its path for B and C by position, without D and z."""
    x = A.new_zeros((u.shape[0], A.shape[0], A.shape[1]))
    ys = []
    deltaA = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    deltaB_u = torch.einsum("bdl,bnl,bdl->bdln", delta, B, u)
    for i in range(u.shape[2]):
        x = deltaA[:, :, i] * x + deltaB_u[:, :, i]
        ys.append(torch.einsum("bdn,bn->bd", x, C[:, :, i]))
    return torch.stack(ys, dim=2), x


def checked_out(checkout: Path) -> Reference:
    """The function itself. Its module can't be imported without CUDA: it is taken out of the source."""
    file = checkout / "mamba_ssm" / "ops" / "selective_scan_interface.py"
    if not file.is_file():
        raise SystemExit(f"--peer {checkout}: not a checkout of state-spaces/mamba (no {file.name} in mamba_ssm/ops)")
    try:
        from einops import rearrange, repeat
    except ModuleNotFoundError as error:
        raise SystemExit(f"--peer {checkout}: mamba_ssm needs {error.name}: pip install {error.name}") from None
    functions = [f for f in ast.parse(file.read_text()).body if isinstance(f, ast.FunctionDef)]
    chosen = ast.Module([f for f in functions if f.name == "selective_scan_ref"], [])
    scope: dict[str, Any] = {"torch": torch, "F": F, "rearrange": rearrange, "repeat": repeat}
    exec(compile(chosen, str(file), "exec"), scope)
    return partial(scope["selective_scan_ref"], return_last_state=True)


def our_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Ours, called as the reference: positions last."""
    first = lambda x: x.transpose(1, 2)
    y, final = selective_scan(first(u), first(delta), A, first(B), first(C), A.new_zeros(len(u), *A.shape))
    return first(y), final


def scan_step(scan: Reference, length: int) -> Callable[[], list[Tensor]]:
    """A forward and backward pass: (y, last state, gradients of u, delta, A, B and C)."""
    g = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=g)
    inputs = [
        normal(BATCH, CHANNELS, length),
        F.softplus(normal(BATCH, CHANNELS, length) - 3),
        -torch.arange(1.0, STATE + 1).repeat(CHANNELS, 1),
        normal(BATCH, STATE, length),
        normal(BATCH, STATE, length),
    ]
    weight = normal(BATCH, CHANNELS, length)

    def step() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        y, final = scan(*leaves)
        return [y.detach(), final.detach(), *torch.autograd.grad((y * weight).sum() + final.sum(), leaves)]

    return step


# ---------------------------------------------------------------- a training step


def training_steps(version: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """Ours and transformers', of a stack of blocks with equal weights, which must agree."""
    torch.manual_seed(0)
    if version == 1:
        from transformers import MambaConfig, MambaForCausalLM

        config = MambaConfig(vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, state_size=STATE)
        theirs = MambaForCausalLM(config)
    else:
        from transformers import Mamba2Config, Mamba2ForCausalLM

        config = Mamba2Config(
            vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, state_size=64, head_dim=32, num_heads=4,
            n_groups=1, chunk_size=64,
        )  # fmt: skip
        theirs = Mamba2ForCausalLM(config)
    ours = model(version, (1, 32, 32))
    copied = ours.state_dict()
    for name, weight in theirs.backbone.layers.state_dict().items():
        copied[f"blocks.{name}"] = weight.flatten() if name.endswith("A_log") else weight
    copied["norm.weight"], copied["head.weight"] = theirs.backbone.norm_f.weight, theirs.lm_head.weight
    ours.load_state_dict(copied)
    tokens = torch.randint(VOCAB, (1, STEP_LENGTH), generator=torch.Generator().manual_seed(1))
    x = theirs.backbone.embeddings(tokens).detach()

    def logits() -> Tensor:
        y, states = x, ours._states(1, None)
        for i, block in enumerate(ours.blocks):
            y, _, _ = block(y, states[2 * i], states[2 * i + 1])
        return ours.head(ours.norm(y))

    torch.testing.assert_close(logits(), theirs(inputs_embeds=x).logits, atol=1e-4, rtol=1e-4)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-4) for m in (ours, theirs)]

    def step(predict: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> None:
        F.cross_entropy(predict()[0], tokens[0]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return partial(step, logits, optimizers[0]), partial(step, lambda: theirs(inputs_embeds=x).logits, optimizers[1])


def model(version: int, grid: tuple[int, int, int]) -> MambaModel:
    """A stack of blocks as small as transformers' can be trained."""
    torch.manual_seed(0)
    config = Mamba(
        version=version, depth=LAYERS, width=HIDDEN, state=STATE if version == 1 else 64,
        head_dim=64 if version == 1 else 32, chunk=0,
    )  # fmt: skip
    return config.build(ModelIO(channels=3, grid=grid, vocab=VOCAB))


# ---------------------------------------------------------------- sampling


@torch.no_grad()
def sampling_rows() -> list[list[str]]:
    """Of the first step after so many positions: bytes of its states, and of all that it allocates at its peak."""
    from mutoscope.estimate.tracker import Tracker

    rows = []
    for version in (1, 2):
        ours = model(version, (8, 32, 32))
        tokens, cache = torch.zeros(1, 8, 32, 32, dtype=torch.long), TokenCache()
        for length in (1023, 8191):
            at = torch.tensor([cache.length])
            ours(tokens, Cond(), at, length - cache.length, cache)
            tracker = Tracker("cpu")
            with tracker:
                ours(tokens, Cond(), torch.tensor([length]), 1, cache)
            states = sum(x.untyped_storage().nbytes() for x in cache.state.values()) / 1024
            peak = sum(tracker.account.peak().values()) / 1024
            rows.append([f"Mamba-{version}", f"{cache.length:,}", f"{states:.1f}", f"{peak:.1f}"])
    return rows


if __name__ == "__main__":
    main()
