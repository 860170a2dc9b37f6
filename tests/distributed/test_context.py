"""Processes that share the tokens of each sample train what one process does, and draw it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from distributed.processes import case, play
from distributed.test_strategies import BATCH, STEPS, assert_close, drawn, val_losses
from PIL import Image, ImageChops

from mutoscope.data.video import probe, read_frames

LORA, DIT = "cogvideox.t2v_lora_tiny", "minisora.dit_tiny"
RECOMPUTED = ("--activation-checkpointing", "true")


def spread(world: int, context: int) -> tuple[str, ...]:
    """As many samples a step however many processes there are."""
    return "--batch-size", str(BATCH * context // world), "--parallel.context", str(context)


def steps(world: int, context: int, strategy: str, recipe: str, out: Path, *flags: str) -> dict[str, Any]:
    """A run of three steps."""
    return case(world, out, recipe, *STEPS, *spread(world, context), "--parallel.strategy", strategy, *flags)


def assert_same_draws(found: Path, expected: Path) -> None:
    """All that was drawn while a model trained."""
    names = [p.relative_to(expected) for p in sorted((expected / "samples").rglob("*.*")) if p.is_file()]
    assert names == [p.relative_to(found) for p in sorted((found / "samples").rglob("*.*")) if p.is_file()] != []
    for name in (n for n in names if n.suffix == ".png"):
        with Image.open(found / name) as a, Image.open(expected / name) as b:
            assert max(high for _, high in ImageChops.difference(a, b).convert("RGB").getextrema()) <= 1
    for name in (n for n in names if n.suffix == ".mp4"):  # which the codec does not keep to the bit
        a, b = (read_frames(run / name, range(probe(run / name).frames)).astype(int) for run in (found, expected))
        assert abs(a - b).mean() < 0.5 < abs(a - b[:, :, ::-1]).mean()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs of two processes that share all samples."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "wanted.jsonl").write_text(json.dumps({"prompt": "one"}) + "\n")
    draw = {LORA: ("--validation-file", str(folder / "wanted.jsonl")), DIT: ("--num-samples", "2", "--ema", "0.9")}
    draw = {recipe: (*flags, "--sample-every", "3") for recipe, flags in draw.items()}
    cases = [
        steps(1, 1, "none", LORA, folder / "lora-one", *draw[LORA]),
        steps(2, 2, "ddp", LORA, folder / "lora-ddp", *draw[LORA]),
        steps(2, 2, "fsdp2", LORA, folder / "lora-fsdp2", *RECOMPUTED, *draw[LORA]),
        steps(1, 1, "none", DIT, folder / "dit-one", *draw[DIT]),
        steps(2, 2, "ddp", DIT, folder / "dit-ddp", *RECOMPUTED, *draw[DIT]),
        steps(2, 2, "fsdp2", DIT, folder / "dit-fsdp2", *draw[DIT]),
    ]
    flags = ("--ema", "0.9", "--accumulate", "2", "--save-every", "2", "--validate-every", "0", "--optim.eps", "1e-4")
    for out, count, world, context in (("whole", 4, 1, 1), ("changed", 2, 2, 2), ("changed", 4, 2, 1)):
        cases.append(case(world, folder / out, DIT, *flags, *spread(world, context), "--steps", str(count)))
    play(folder, cases)
    return folder


@pytest.mark.parametrize("name", ["lora", "dit"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_equal_one(two: Path, name: str, strategy: str) -> None:
    """In weights, validation, samples and videos; both see the samples, noise and times that one sees."""
    found, one = two / f"{name}-{strategy}", two / f"{name}-one"
    assert_close(found, one)
    assert val_losses(found) == pytest.approx(val_losses(one), rel=1e-5)
    assert_same_draws(found, one)
    first, second = drawn(found, 2)
    assert first == second == drawn(one, 1)[0] != []


def test_a_run_goes_on_with_other_groups(two: Path) -> None:
    assert_close(two / "changed", two / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [LORA, DIT, "minisora.stdit3_tiny"])
def test_four_processes_in_groups_of_two(tmp_path: Path, recipe: str) -> None:
    """Two groups, with samples of their own, whose copies of the model are whole, in four parts, or in two."""
    bf16 = ("--precision", "bf16")
    ways = {
        "ddp": steps(4, 2, "ddp", recipe, tmp_path / "ddp"),
        "fsdp2": steps(4, 2, "fsdp2", recipe, tmp_path / "fsdp2", *RECOMPUTED),
        "hsdp": steps(4, 2, "fsdp2", recipe, tmp_path / "hsdp", "--parallel.replicate", "2"),
        "compiled": steps(2, 2, "ddp", recipe, tmp_path / "compiled", *RECOMPUTED, "--compile", "true"),
    }
    one = steps(1, 1, "none", recipe, tmp_path / "one")
    coarse = [steps(1, 1, "none", recipe, tmp_path / "bf16-one", *bf16)]
    coarse.append(steps(4, 2, "fsdp2", recipe, tmp_path / "bf16", *bf16))
    play(tmp_path, [one, *ways.values(), *coarse], timeout=1500)
    for way in ways:
        assert_close(tmp_path / way, tmp_path / "one")
    for way in ("ddp", "fsdp2", "hsdp"):
        by_process = drawn(tmp_path / way, 4)
        assert by_process[0] == by_process[1] and by_process[2] == by_process[3]
        assert sorted(by_process[0] + by_process[2]) == sorted(drawn(tmp_path / "one", 1)[0])
    assert val_losses(tmp_path / "bf16") == pytest.approx(val_losses(tmp_path / "bf16-one"), rel=1e-2)
