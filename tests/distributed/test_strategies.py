"""However a run is spread over gloo processes on the CPU, it trains what one process with the joined batch trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed.processes import case, play
from PIL import Image
from torch import Tensor

from mutoscope.run import Run
from mutoscope.weights import read_weights

SMALL = ("--data.frames", "4", "--data.height", "16", "--data.width", "16")
MODELS = {
    "lora": ("cogvideox.t2v_lora_tiny",),
    "dit": ("minisora.dit_tiny", "--ema", "0.9"),
    # Without the terms that are over the codes of a batch, which are others for another batch; DeepSpeed does not take
    # codes that replace themselves
    "vqvae": ("minisora.vqvae_tiny", "--objective.low-utilization-cost", "0", "--objective.reinit-every-n-epochs", "0"),
    "gpt": (f"{Path(__file__).parent / 'token_recipe.py'}:gpt",),  # over the tokens of vqvae-none-1
    "clip": ("dalle2_video.clip_tiny", "--data.root", "flying-mnist://tiny", *SMALL),
}
DRAWN = [name for name in MODELS if name != "clip"]
"""Those that make videos."""
# Three steps, since many weights are zero at first, and others have no gradient until they are not. Adam divides by a
# gradient's size: with its own eps, one that is all rounding error would move a weight as far as any
STEPS = ("--steps", "3", "--validate-every", "3", "--save-every", "3", "--optim.eps", "1e-4", "--log-every", "1")
FSDP2 = ("--parallel.strategy", "fsdp2")
BATCH = 4
"""Samples of a step."""


def steps(world: int, strategy: str, name: str, folder: Path, *flags: str) -> dict[str, Any]:
    recipe, *own = MODELS[name]
    own += ["--autoencoder.path", str(folder.parent / "vqvae-none-1")] if name == "gpt" else []
    batch = ("--batch-size", str(BATCH // world))
    return case(world, folder, recipe, *own, *STEPS, *batch, "--parallel.strategy", strategy, *flags)


def final(folder: Path) -> dict[str, Tensor]:
    return read_weights(Run(folder).weights)


def assert_close(found: Path, expected: Path) -> None:
    a, b = final(found), final(expected)
    assert a.keys() == b.keys()
    for name in b:
        torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def assert_equal(found: Path, expected: Path) -> None:
    a, b = final(found), final(expected)
    assert a.keys() == b.keys()
    assert [name for name in b if not torch.equal(a[name], b[name])] == []


def drawn(folder: Path, world: int) -> list[list[tuple[int, float]]]:
    """(sample, random number) of each process."""
    return [[tuple(pair) for pair in json.loads((folder / f"drawn-{rank}.json").read_text())] for rank in range(world)]


def val_losses(folder: Path) -> list[float]:
    return [line["val_loss"] for line in Run(folder).metrics() if "val_loss" in line]


def check_steps(folder: Path, names: list[str], worlds: list[int]) -> None:
    """Cases NAME-STRATEGY-WORLD against NAME-none-1."""
    for name in names:
        one = folder / f"{name}-none-1"
        for strategy in ("ddp", "fsdp2"):
            for world in worlds:
                many = folder / f"{name}-{strategy}-{world}"
                assert_close(many, one)
                assert val_losses(many) == pytest.approx(val_losses(one), rel=1e-5)
                by_process = drawn(many, world)
                samples = [{sample for sample, _ in pairs} for pairs in by_process]
                numbers = [{number for _, number in pairs} for pairs in by_process]
                assert all(numbers) or name in ("vqvae", "gpt", "clip")  # which draw nothing; dropout is off
                for i in range(world):
                    assert not any(samples[i] & samples[j] or numbers[i] & numbers[j] for j in range(i))
                assert sorted(pair for pairs in by_process for pair in pairs) == sorted(drawn(one, 1)[0])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs of two processes."""
    folder = tmp_path_factory.mktemp("two")
    cases = []
    for name in MODELS:
        cases.append(steps(1, "none", name, folder / f"{name}-none-1"))
        cases += [steps(2, s, name, folder / f"{name}-{s}-2") for s in ("ddp", "fsdp2")]
    cases += resumed(folder)
    cases.append(case(2, folder / "unlike", MODELS["dit"][0], *STEPS, "--batch-size", "6", *FSDP2))
    play(folder, cases)
    return folder


def resumed(folder: Path) -> list[dict[str, Any]]:
    """Runs of four steps, whole, and stopped after two to go on in another way."""
    flags = ("--save-every", "2", "--validate-every", "0", "--log-every", "1", "--optim.warmup-steps", "3")
    flags += ("--accumulate", "2", "--ema", "0.9", "--optim.max-grad-norm", "0.1")

    def run(out: str, steps: int, world: int, strategy: str, *more: str) -> dict[str, Any]:
        size = ("--steps", str(steps), "--batch-size", str(BATCH // world), "--parallel.strategy", strategy)
        return case(world, folder / out, "minisora.dit_tiny", *flags, *size, *more)

    cases = [run("whole-none", 4, 1, "none")]
    for strategy in ("ddp", "fsdp2"):
        cases += [run(f"whole-{strategy}", 4, 2, strategy), run(f"part-{strategy}", 2, 2, strategy)]
        cases.append(run(f"part-{strategy}", 4, 2, strategy))
    for out, (world, strategy), (then_world, then) in (
        ("fsdp2-to-ddp", (2, "fsdp2"), (2, "ddp")),
        ("ddp-to-fsdp2", (2, "ddp"), (2, "fsdp2")),
        ("fsdp2-to-one", (2, "fsdp2"), (1, "none")),
        ("one-to-fsdp2", (1, "none"), (2, "fsdp2")),
    ):
        cases += [run(out, 2, world, strategy), run(out, 4, then_world, then)]
    return cases


def test_steps_of_two_processes_equal_those_of_one(two: Path) -> None:
    check_steps(two, list(MODELS), [2])


def test_validation_of_unlike_shares(two: Path) -> None:
    """Three batches for two processes, which must call a sharded model alike."""
    assert val_losses(two / "unlike")[0] == pytest.approx(val_losses(two / "dit-none-1")[0], rel=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_resumed_equals_uninterrupted(two: Path, strategy: str) -> None:
    assert_equal(two / f"part-{strategy}", two / f"whole-{strategy}")
    assert_close(two / f"whole-{strategy}", two / "whole-none")


@pytest.mark.parametrize("name", ["fsdp2-to-ddp", "ddp-to-fsdp2", "fsdp2-to-one", "one-to-fsdp2"])
def test_a_checkpoint_goes_on_under_another_strategy(two: Path, name: str) -> None:
    assert_close(two / name, two / "whole-none")


# ---------------------------------------------------------------- four processes

DRAW = ("--sample-every", "3", "--num-samples", "2")
WAYS = {
    "hsdp": ("--parallel.replicate", "2"),
    "kept": ("--parallel.reshard", "false"),
    "recomputed": ("--activation-checkpointing", "true"),
    "compiled": ("--activation-checkpointing", "true", "--compile", "true"),
}
"""Of fsdp2."""
OPTIMS = {
    "bf16": ("--weights", "bf16", "--precision", "bf16"),
    "rounded": ("--weights", "bf16", "--precision", "bf16", "--optim.stochastic-rounding", "true"),
}


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs of four processes."""
    folder = tmp_path_factory.mktemp("four")
    (folder / "wanted.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("one", "two", "three")))
    wanted = ("--validation-file", str(folder / "wanted.jsonl"))
    draw = dict.fromkeys(MODELS, ()) | dict.fromkeys(DRAWN, DRAW) | {"lora": (*DRAW, *wanted)}
    cases = []
    for name in MODELS:
        cases.append(steps(1, "none", name, folder / f"{name}-none-1", *draw[name]))
        for strategy in ("ddp", "fsdp2"):
            cases += [steps(w, strategy, name, folder / f"{name}-{strategy}-{w}", *draw[name]) for w in (1, 4)]
    cases += [
        steps(2 if way == "compiled" else 4, "fsdp2", "dit", folder / f"dit-{way}", *flags)
        for way, flags in WAYS.items()
    ]
    for name, flags in OPTIMS.items():
        for world, strategy in ((1, "none"), (2, "ddp"), (2, "fsdp2")):
            cases.append(steps(world, strategy, "dit", folder / f"{name}-{strategy}", *flags))
    play(folder, cases, timeout=1200)
    return folder


@pytest.mark.slow
def test_steps_of_four_processes_equal_those_of_one(four: Path) -> None:
    check_steps(four, list(MODELS), [1, 4])


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWN)
def test_a_sharded_model_is_drawn_from(four: Path, name: str) -> None:
    """By all processes together, and what one process draws."""
    found, expected = (
        {str(p.relative_to(folder)): p for p in sorted((folder / "samples").rglob("*.*")) if p.is_file()}
        for folder in (four / f"{name}-fsdp2-4", four / f"{name}-none-1")
    )
    assert found.keys() == expected.keys()
    assert len(found) == (12 if name == "lora" else 4)  # before the steps and after them
    for path in (p for p in found if p.endswith(".png")):
        a, b = (np.asarray(Image.open(paths[path])).astype(int) for paths in (found, expected))
        assert np.abs(a - b).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_ways_of_sharding_make_no_difference(four: Path, way: str) -> None:
    assert_close(four / f"dit-{way}", four / "dit-none-1")


@pytest.mark.slow
@pytest.mark.parametrize("name, tolerance", [("bf16", 1e-2), ("rounded", 1e-2)])
def test_optimizers_of_shards(four: Path, name: str, tolerance: float) -> None:
    one, ddp, fsdp2 = (final(four / f"{name}-{strategy}") for strategy in ("none", "ddp", "fsdp2"))
    for key in one:
        torch.testing.assert_close(fsdp2[key], one[key], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(fsdp2[key], ddp[key], rtol=tolerance, atol=tolerance)
