"""What `mutoscope show --gpus 2` expects two gloo processes to hold and to send, against what they do.

Peaks are within 10 %: gloo copies what it gathers and adds up once more, which nccl does not, nor do the formulas.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from distributed.processes import case, play

from mutoscope.estimate.cluster import cluster_of
from mutoscope.estimate.strategies import memory, resident, step
from mutoscope.estimate.work import work_of
from mutoscope.loading import load_recipe
from mutoscope.overrides import override

pytestmark = pytest.mark.slow

RECIPE = "minisora.dit_tiny"
SIZES = ("--model.width", "256", "--model.heads", "4", "--model.depth", "8", "--model.attention", "joint",
         "--steps", "3", "--log-every", "1", "--validate-every", "0")  # fmt: skip
FSDP2 = ("--parallel.strategy", "fsdp2")
WAYS = {
    "ddp": ("--parallel.strategy", "ddp", "--ema", "0.9"),
    "fsdp2": (*FSDP2, "--ema", "0.9"),
    "kept": (*FSDP2, "--parallel.reshard", "false"),
    "accumulated": (*FSDP2, "--precision", "bf16", "--accumulate", "2", "--activation-checkpointing", "true"),
    "lora": (*FSDP2, "--precision", "bf16", "--lora.rank", "8", "--batch-size", "8"),
}
TWO = cluster_of("h100", gpus=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs, each of which has been measured."""
    folder = tmp_path_factory.mktemp("runs")
    play(folder, [case(2, folder / way, RECIPE, *SIZES, *f) | {"measured": True} for way, f in WAYS.items()])
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_hold_and_send_what_was_expected(runs: Path, way: str) -> None:
    recipe = override(load_recipe(RECIPE), [*SIZES, *WAYS[way]])
    work = work_of(recipe, "cpu")
    found: list[dict[str, Any]] = [json.loads((runs / way / f"measured-{rank}.json").read_text()) for rank in (0, 1)]
    held, sent = found[0]["held"], found[0]["sent"]
    # On a CPU an estimate counts a checkpoint's copies, which are not there yet
    peak = sum(size for part, size in memory(work, recipe.parallel, TWO).items() if part != "checkpoint")
    if way == "ddp":
        assert held["gradients"] == held["buckets"] == held["weights"]
        assert work.replica["gradients"] == pytest.approx(2 * held["weights"], rel=0.01)  # the last one comes later
        assert {part: work.replica[part] for part in ("weights", "optimizer", "ema")} == {
            part: held[part] for part in ("weights", "optimizer", "ema")
        }
        assert peak == pytest.approx(found[0]["peak"], rel=0.01)
    else:
        expected = resident(work, recipe.parallel, TWO)
        held.pop("buckets")
        assert expected == pytest.approx(held, rel=1e-3)
        assert peak == pytest.approx(found[0]["peak"], rel=0.1)
    whole = {name: size / 2 for name, size in sent.items()}  # (N − 1)/N of what is whole
    passed = whole.get("_allgather_base_", 0) + whole.get("_reduce_scatter_base_", 0) + 2 * whole.get("allreduce_", 0)
    assert step(work, recipe.parallel, TWO).sent.within == passed
    assert found[0]["sent"] == found[1]["sent"] and "broadcast_" not in sent
