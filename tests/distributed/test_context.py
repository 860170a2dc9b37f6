"""Processes that share the tokens of each sample train, and draw, what one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from distributed.processes import case, play
from distributed.test_strategies import BATCH, STEPS, assert_close, assert_equal, drawn, val_losses

MODELS = {
    "lora": ("cogvideox.t2v_lora_tiny",),
    "dit": ("minisora.dit_tiny", "--ema", "0.9"),
    "stdit": ("minisora.stdit3_tiny",),
}


def steps(world: int, context: int, strategy: str, name: str, out: Path, *flags: str) -> dict[str, Any]:
    batch = ("--batch-size", str(BATCH * context // world))
    context_flags = ("--parallel.context", str(context)) if context > 1 else ()
    return case(world, out, *MODELS[name], *STEPS, *batch, "--parallel.strategy", strategy, *context_flags, *flags)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    cases = []
    for name in MODELS:
        cases.append(steps(1, 1, "none", name, folder / f"{name}-none-1"))
        cases += [steps(2, 2, s, name, folder / f"{name}-{s}-2") for s in ("ddp", "fsdp2")]
    play(folder, cases)
    return folder


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_equal(two: Path, name: str, strategy: str) -> None:
    assert_close(two / f"{name}-{strategy}-2", two / f"{name}-none-1")
    assert val_losses(two / f"{name}-{strategy}-2") == pytest.approx(val_losses(two / f"{name}-none-1"), rel=1e-5)
    a, b = drawn(two / f"{name}-{strategy}-2", 2)
    assert a == b == drawn(two / f"{name}-none-1", 1)[0]
