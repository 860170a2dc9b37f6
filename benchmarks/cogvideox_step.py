"""A whole LoRA step of CogVideoX text to video, against cogvideox-factory's own, on the CPU.

    python -m benchmarks.cogvideox_step [--peer PATH_TO_A_CHECKOUT_OF_COGVIDEOX_FACTORY] [--repeats 5]

A step goes from the stored moments of a clip and its caption's embedding to changed adapters. The peer's is the body of
its own loop (see cogvideox_factory.py). Both sides get the same weights, clip, noise and times, and in fp32 must give
the same losses over three steps to 1e-5 before anything is timed. Time is CPU time of one thread, the sides in turn.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cogvideox_factory import PEER, lora_step
from benchmarks.harness import compare, last_line, peak_memory, table, timing_row
from mutoscope.checkpoints import scheduler_fields
from mutoscope.data.store import LatentStats, StoredClips
from mutoscope.encoder import Encoder
from mutoscope.known_checkpoints import TINY, Config
from mutoscope.models.cogvideox import CogVideoX
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.randomness import Draw
from mutoscope.recipe import Lora, Optim, Recipe
from mutoscope.recipes.cogvideox import t2v_lora
from mutoscope.training.lora import NAME, add_lora, lora_layers
from mutoscope.training.offload import place
from mutoscope.training.optimizers import build_optimizers, clip_gradients, gradient_norms, set_learning_rates
from mutoscope.types import Cond, LatentSpec, ModelIO

LR, SCALING = 1e-3, 0.7
SPEC = LatentSpec(strides=(4, 8, 8), channels=4, first_frame_alone=True)


@dataclass(frozen=True)
class Case:
    """What is trained, and how."""

    name: str
    transformer: Config
    """What of the tiny T2V's configuration is another."""
    grid: tuple[int, int, int]
    """Latents (t, h, w)."""
    rank: int
    precision: Any = "fp32"
    checkpointing: bool = False
    compiled: bool = False


SMALL: Config = {
    "num_attention_heads": 8, "attention_head_dim": 64, "time_embed_dim": 512, "num_layers": 4, "text_embed_dim": 512,
    "sample_height": 16, "sample_width": 24, "sample_frames": 9, "max_text_seq_length": 226,
}  # fmt: skip
"""Of 15 million parameters, with attention heads, patches and a caption's length as the published models have them."""
CASES = (
    Case("tiny, fp32", {}, (3, 4, 6), rank=4),
    Case("tiny, fp32, compiled", {}, (3, 4, 6), rank=4, compiled=True),
    Case("small, fp32, checkpointing", SMALL, (3, 16, 24), rank=64, checkpointing=True),
    Case(
        "small, bf16, checkpointing, compiled",
        SMALL,
        (3, 16, 24),
        rank=64,
        precision="bf16",
        checkpointing=True,
        compiled=True,
    ),
    Case("small, fp32, checkpointing, compiled", SMALL, (3, 16, 24), rank=64, checkpointing=True, compiled=True),
)
"""The peer has no switch to compile by, and is never compiled. The last line is of the last case."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, help=f"a checkout of {PEER}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--case", type=int, nargs="*", help="which of the cases, counted from 0; all by default")
    options = parser.parse_args()
    torch.set_num_threads(1)

    rows, pairs = [], []
    for case in [CASES[i] for i in options.case] if options.case else CASES:
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), case)
            if options.peer is not None and case.precision == "fp32":
                check_equal(case, folder, options.peer)
            ours, theirs = our_step(case, folder), None
            if options.peer is not None:
                theirs = peer_step(case, folder, options.peer)
            pairs = compare(ours, theirs, options.repeats)
            peaks = [peak_memory(our_step, case, folder)]
            peaks += [peak_memory(peer_step, case, folder, options.peer)] if theirs is not None else [float("nan")]
            rows.append([*timing_row(case.name, pairs), *(f"{peak:.0f}" for peak in peaks)])
    table(["LoRA step", "ours ms", "peer ms", "ratio", "ours MiB", "peer MiB"], rows)
    last_line("cogvideox_step", PEER, pairs)


def write_checkpoint(folder: Path, case: Case) -> None:
    """A transformer with random weights and its scheduler, as files."""
    from diffusers import CogVideoXDPMScheduler, CogVideoXTransformer3DModel

    torch.manual_seed(0)
    config = TINY["cogvideox-t2v"]["transformer"] | case.transformer
    CogVideoXTransformer3DModel.from_config(config).save_pretrained(folder / "transformer")
    CogVideoXDPMScheduler.from_config(TINY["cogvideox-t2v"]["scheduler"]).save_pretrained(folder / "scheduler")


def clip(case: Case) -> tuple[Tensor, Tensor]:
    """The moments (1, 2c, t, h, w) of a clip, and the embedding (1, l, d) of its caption."""
    config = TINY["cogvideox-t2v"]["transformer"] | case.transformer
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(1, config["max_text_seq_length"], config["text_embed_dim"], generator=generator)
    return torch.randn(1, 8, *case.grid, generator=generator) - 1, text


def recipe_of(case: Case, folder: str) -> Recipe:
    """Ours with the peer's settings."""
    recipe = t2v_lora()
    objective = Diffusion(**scheduler_fields(folder), cond_dropout=0.0)
    return replace(
        recipe,
        model=CogVideoX(path=folder, weights=case.precision),
        lora=Lora(rank=case.rank),
        objective=objective,
        optim=Optim(lr=LR, betas=(0.9, 0.95), weight_decay=1e-4),
        activation_checkpointing=case.checkpointing,
        compile=case.compiled,
    )


def no_autoencoder() -> torch.nn.Module:
    """Stored moments need none."""
    raise AssertionError("the autoencoder was asked for")


def our_side(case: Case, folder: str) -> tuple[Any, Callable[[Draw], float]]:
    """The model, and a step of our loop with what a draw gives."""
    recipe, (moments, text) = recipe_of(case, folder), clip(case)
    model = recipe.model.build(ModelIO(channels=4, grid=case.grid, text_dim=text.shape[2]))
    assert recipe.lora is not None
    add_lora(model, recipe.lora, seed=0)
    place(model, recipe, torch.device("cpu"))
    optimizers = build_optimizers(model, recipe.optim)
    encoder = Encoder(no_autoencoder, spec=SPEC, stats=LatentStats(mean=(0.0,) * 4, std=(1 / SCALING,) * 4))
    model.train()

    def step(draw: Draw) -> float:
        set_learning_rates(optimizers, recipe.optim, 0, 1000)
        cond = Cond(text=text, text_mask=torch.ones(text.shape[:2], dtype=torch.bool))
        stored = StoredClips(
            ids=["a"], samples=[0], moments=moments, captions=["a"], cond=cond, labels=torch.zeros(1, dtype=torch.int64)
        )
        loss = recipe.objective.loss(model, encoder.batch(stored, draw), draw)
        loss.total.backward()
        norms = gradient_norms(optimizers)
        clip_gradients(optimizers, norms, recipe.optim.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(loss.total.detach())

    return model, step


def our_step(case: Case, folder: str) -> Callable[[], object]:
    """A step as training takes it, warmed up."""
    _, step = our_side(case, folder)
    step(Draw(0, "train", [0]))
    return lambda: step(Draw(0, "train", [1]))


def peer_side(case: Case, folder: str, checkout: Path) -> tuple[Any, Callable[[], float]]:
    """The peer's model, and a step of its loop."""
    from diffusers import CogVideoXDPMScheduler, CogVideoXTransformer3DModel

    transformer = CogVideoXTransformer3DModel.from_pretrained(f"{folder}/transformer")
    step = lora_step(
        checkout, transformer, CogVideoXDPMScheduler.from_pretrained(f"{folder}/scheduler"), rank=case.rank,
        alpha=case.rank, precision=case.precision, checkpointing=case.checkpointing, lr=LR, scaling_factor=SCALING,
    )  # fmt: skip
    return transformer, partial(step, *clip(case))


def peer_step(case: Case, folder: str, checkout: Path) -> Callable[[], object]:
    """A step of the peer's, warmed up."""
    _, step = peer_side(case, folder, checkout)
    step()
    return step


class Given(Draw):
    """The numbers that the peer draws after torch.manual_seed(seed), in the order and the form that we ask for them."""

    def __init__(self, seed: int, case: Case) -> None:
        torch.manual_seed(seed)
        t, h, w = case.grid
        posterior = torch.randn(1, 4, t, h, w)
        noise = torch.randn_like(posterior.transpose(1, 2)).transpose(1, 2)  # as it lies in memory, so it is filled
        time = torch.randint(0, 1000, (1,))
        self.device = torch.device("cpu")
        self.normals, self.uniforms = [posterior, noise], [torch.ones(1), (time + 0.5) / 1000]

    def normal(self, *shape: int) -> Tensor:
        """The next one."""
        return self.normals.pop(0)

    def uniform(self, *shape: int) -> Tensor:
        """The next one."""
        return self.uniforms.pop(0)


def check_equal(case: Case, folder: str, checkout: Path) -> None:
    """Raise AssertionError unless three steps give the same losses on both sides."""
    model, ours = our_side(case, folder)
    transformer, theirs = peer_side(case, folder, checkout)
    with torch.no_grad():
        for (_, mine), (_, other) in zip(lora_layers(model), lora_layers(transformer), strict=True):
            other.lora_A[NAME].weight.copy_(mine.lora_A[NAME].weight)
    for seed in range(3):
        loss = ours(Given(seed, case))
        torch.manual_seed(seed)
        torch.testing.assert_close(loss, theirs(), rtol=1e-5, atol=0)


if __name__ == "__main__":
    main()
