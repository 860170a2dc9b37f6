"""DeepSpeed's ZeRO on two gloo processes trains what one process trains.

DeepSpeed keeps process groups in global variables: each run is in processes of its own.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from distributed.processes import case, play
from distributed.test_strategies import BATCH, assert_close

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason='pip install "mutoscope[deepspeed]"'),
]
FLAGS = ("--ema", "0", "--save-every", "2", "--validate-every", "2", "--log-every", "1", "--optim.eps", "1e-4",
         "--optim.warmup-steps", "3", "--optim.max-grad-norm", "0.1", "--accumulate", "2")  # fmt: skip


def train(out: Path, world: int, steps: int, *parallel: str, recipe: str = "minisora.dit_tiny") -> Path:
    size = ("--steps", str(steps), "--batch-size", str(BATCH // world))
    play(out.parent, [case(world, out, recipe, *FLAGS, *size, *parallel)], timeout=900)
    return out


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("one") / "run", 1, 4)


@pytest.mark.parametrize(
    ("zero", "offload"), [("1", "none"), ("2", "none"), ("3", "none"), ("2", "optimizer"), ("3", "all")]
)
def test_resumed_it_equals_one_process(tmp_path: Path, one: Path, zero: str, offload: str) -> None:
    flags = ("--parallel.strategy", "deepspeed", "--parallel.zero", zero, "--parallel.offload", offload)
    train(tmp_path / "run", 2, 2, *flags)
    assert_close(train(tmp_path / "run", 2, 4, *flags), one)


def test_from_zero_to_fsdp2(tmp_path: Path, one: Path) -> None:
    train(tmp_path / "run", 2, 2, "--parallel.strategy", "deepspeed", "--parallel.zero", "3")
    assert_close(train(tmp_path / "run", 2, 4, "--parallel.strategy", "fsdp2"), one)


@pytest.mark.parametrize("zero", ["2", "3"])
def test_lora(tmp_path: Path, zero: str) -> None:
    flags = ("--parallel.strategy", "deepspeed", "--parallel.zero", zero)
    lora = "cogvideox.t2v_lora_tiny"
    assert_close(train(tmp_path / "two", 2, 2, *flags, recipe=lora), train(tmp_path / "one", 1, 2, recipe=lora))
