"""DeepSpeed's ZeRO on gloo processes trains what one process trains."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from distributed.processes import case, play
from distributed.test_strategies import BATCH, MODELS, assert_close, steps, val_losses

from mutoscope.run import Run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason='pip install "mutoscope[deepspeed]"'),
]
PAIRS = [(name, zero) for name in MODELS for zero in ("1", "2", "3") if (name, zero) != ("vqvae", "3")]
"""Of models and stages of ZeRO; of those that are left out see `contradictions.py`."""
WAYS = [("1", "none"), ("2", "none"), ("3", "none"), ("2", "optimizer"), ("3", "all")]
"""ZeRO's stage, and what is on the CPU's side of it."""


def models(folder: Path, worlds: list[int]) -> list[dict[str, Any]]:
    """Three steps of each model, on one process without DeepSpeed and on so many with it."""
    cases = [steps(1, "none", name, folder / f"{name}-none-1", "--ema", "0") for name in MODELS]
    for world in worlds:
        for name, zero in PAIRS:
            flags = ("--ema", "0", "--parallel.zero", zero)
            cases.append(steps(world, "deepspeed", name, folder / f"{name}-zero{zero}-{world}", *flags))
    return cases


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the models' runs by two processes."""
    folder = tmp_path_factory.mktemp("two")
    play(folder, models(folder, [2]), timeout=2400)
    return folder


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the models' runs by one process and by four."""
    folder = tmp_path_factory.mktemp("others")
    play(folder, models(folder, [1, 4]), timeout=2400)
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs that were stopped and went on."""
    folder = tmp_path_factory.mktemp("stopped")
    play(folder, resumed(folder), timeout=2400)
    return folder


def resumed(folder: Path) -> list[dict[str, Any]]:
    """Runs of four steps, whole on one process, and stopped after two on two to go on."""
    flags = ("--ema", "0", "--save-every", "2", "--validate-every", "0", "--log-every", "1", "--optim.eps", "1e-4",
             "--optim.warmup-steps", "3", "--optim.max-grad-norm", "0.1", "--accumulate", "2")  # fmt: skip

    def run(out: str, steps: int, world: int, strategy: str, *more: str) -> dict[str, Any]:
        size = ("--steps", str(steps), "--batch-size", str(BATCH // world), "--parallel.strategy", strategy)
        return case(world, folder / out, "minisora.dit_tiny", *flags, *size, *more)

    cases = [run("whole", 4, 1, "none")]
    for zero, offload in WAYS:
        way = ("--parallel.zero", zero, "--parallel.offload", offload)
        cases += [run(f"part-{zero}-{offload}", count, 2, "deepspeed", *way) for count in (2, 4)]
    for zero in ("1", "2", "3"):
        way = ("--parallel.zero", zero, "--precision", "bf16")
        cases.append(run(f"bf16-whole-{zero}", 4, 2, "deepspeed", *way))
        cases += [run(f"bf16-part-{zero}", count, 2, "deepspeed", *way) for count in (2, 4)]
    cases.append(run("to-fsdp2", 2, 2, "deepspeed", "--parallel.zero", "3"))
    cases.append(run("to-fsdp2", 4, 2, "fsdp2"))
    return cases


@pytest.mark.parametrize(("name", "zero"), PAIRS)
def test_steps_of_two_processes_equal_those_of_one(two: Path, name: str, zero: str) -> None:
    check(two, name, zero, 2)


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize(("name", "zero"), PAIRS)
def test_steps_of_one_and_four_processes_equal_those_of_one(others: Path, name: str, zero: str, world: int) -> None:
    check(others, name, zero, world)


def check(folder: Path, name: str, zero: str, world: int) -> None:
    many, one = folder / f"{name}-zero{zero}-{world}", folder / f"{name}-none-1"
    assert_close(many, one)
    assert val_losses(many) == pytest.approx(val_losses(one), rel=1e-5)


@pytest.mark.parametrize(("zero", "offload"), WAYS)
def test_resumed_it_equals_one_process(stopped: Path, zero: str, offload: str) -> None:
    assert_close(stopped / f"part-{zero}-{offload}", stopped / "whole")


def train_losses(folder: Path) -> list[float]:
    return [line["loss"] for line in Run(folder).metrics() if "loss" in line]


@pytest.mark.parametrize("zero", ["1", "2", "3"])
def test_in_bf16_it_goes_on_exactly_and_near_fp32(stopped: Path, zero: str) -> None:
    """For ZeRO 1 in bf16, DeepSpeed takes another optimizer than for the others."""
    assert_close(stopped / f"bf16-part-{zero}", stopped / f"bf16-whole-{zero}")
    bf16, fp32 = (train_losses(stopped / name) for name in (f"bf16-whole-{zero}", "whole"))
    assert len(bf16) == 4 and bf16 != fp32 and bf16 == pytest.approx(fp32, rel=1e-3)


def test_from_zero_to_fsdp2(stopped: Path) -> None:
    assert_close(stopped / "to-fsdp2", stopped / "whole")
