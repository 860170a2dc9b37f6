"""From a recipe to the sizes of its work, and to the strategy that is named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mutoscope.cli import main
from mutoscope.estimate import advice, plan
from mutoscope.estimate.cluster import cluster_of
from mutoscope.estimate.plan import Choice, allowed, fastest, ways
from mutoscope.estimate.step import estimate
from mutoscope.estimate.strategies import Sent, Step, at_rest, memory
from mutoscope.estimate.work import work_of
from mutoscope.models.dit import DiT
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.parallel import Parallel
from mutoscope.recipe import Data, Lora, Optim, Recipe

DIT = Recipe(
    data=Data(root="flying-mnist://tiny", frames=8, height=32, width=32),
    model=DiT(depth=3, width=64, heads=2, patch=(1, 4, 4), attention="joint"),
    objective=Diffusion(),
    steps=1,
    batch_size=2,
)
RECIPES = {
    "full": replace(DIT, ema=0.9),
    "bf16": replace(DIT, weights="bf16", precision="bf16", activation_checkpointing=True),
    # Of more blocks than are measured
    "LoRA over int8": replace(
        DIT,
        model=replace(DIT.model, depth=8),
        lora=Lora(rank=4),
        quantize="int8",
        accumulate=2,  # type: ignore[type-var]
    ),
    "8 bit": replace(DIT, optim=Optim(name="adamw8bit")),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_work_is_that_of_the_estimate(recipe: Recipe) -> None:
    work, cost = work_of(recipe), estimate(recipe)
    assert len(work.blocks) == recipe.model.depth  # type: ignore[attr-defined] and work.trained == cost.trainable
    assert at_rest(work.units, 1) + work.undivided["weights"] == cost.peak_parts["weights"]
    assert work.optimizer * work.trained == pytest.approx(cost.peak_parts["optimizer"])
    assert work.ema * work.trained == cost.peak_parts.get("ema", 0)
    assert work.flops_forward * work.accumulate == cost.flops_forward
    assert work.flops_recomputed * work.accumulate == cost.flops_recomputed
    assert work.bf16 == (recipe.precision == "bf16")
    if recipe.lora:  # no gradients of frozen weights
        assert work.flops_forward < work.flops_backward < 1.7 * work.flops_forward
    else:  # all but what the first layer would hand on to the pixels
        assert work.flops_backward == pytest.approx(2 * work.flops_forward, rel=0.1)


def test_gathered_in_bf16_under_mixed_precision() -> None:
    """And so without autocast's copies, which DDP has: of nearly all weights, where its peak is."""
    work = work_of(replace(DIT, precision="bf16"))
    assert {(w.kept, w.gathered) for unit in work.units for w in unit} == {(4, 2)}
    assert max(m.activations for m in work.moments) < work.replica["activations"] - 2 * 0.85 * work.trained


def test_the_fastest_that_fits_is_taken_and_of_equals_the_simplest() -> None:
    def choice(strategy: str, seconds: float, size: int) -> Choice:
        made = Step(memory={"weights": size}, sent=Sent(), computing=0, seconds=seconds, samples=1, mfu=0)
        return Choice(Parallel(strategy=strategy), made)  # type: ignore[arg-type]

    found = [choice("ddp", 1.0, 8 << 30), choice("fsdp2", 1.005, 4 << 30), choice("deepspeed", 0.996, 2 << 30)]
    named = lambda size: best.parallel.strategy if (best := fastest(found, size << 30)) else None
    assert [named(size) for size in (10, 8, 3, 1)] == ["ddp", "fsdp2", "deepspeed", None]
    assert named(4) == "deepspeed", "some must be left free"


def test_what_a_recipe_cannot_have_is_said_once_for_each_reason() -> None:
    cluster = cluster_of("h100", gpus=16)
    assert Parallel(strategy="fsdp2", replicate=2) in ways(cluster)
    assert Parallel(strategy="fsdp2", replicate=1) not in ways(cluster_of("h100", gpus=8))
    found, refused = allowed(replace(DIT, optim=Optim(name="muon"), ema=0.9), cluster)
    assert found == [Parallel(strategy="ddp")]
    assert len(refused) == 2 and "muon looks at whole weights" in refused[0] and "zero 3, offload all" in refused[1]
    assert len(allowed(DIT, cluster)[0]) == len(ways(cluster))


def test_the_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    main(["show", "minisora.dit_tiny", "--gpus", "16", "--gpu", "a100", "--ema", "0"])
    told = capsys.readouterr().out
    assert "16 GPUs of 79.1 GiB on 2 nodes" in told and "fsdp2, replicate 2, reshard false" in told
    assert "fastest that fits: --parallel.strategy ddp" in told and "deepspeed, zero 2, offload optimizer" in told
    for flags, said in (
        (["--gpus", "12"], "--gpus-per-node"),
        (["--hfu", "0.3"], "--gpus"),
        (["--gpus", "8", "--hfu", "0"], "must be above 0"),
    ):
        with pytest.raises(SystemExit) as refused:
            main(["show", "minisora.dit_tiny", *flags])
        assert refused.value.code == 2 and said in capsys.readouterr().err


def test_where_none_fits_it_is_said_what_makes_one_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "RESERVE", 0)
    monkeypatch.setattr(advice, "RESERVE", 0)
    cluster = cluster_of("h100", gpus=8)
    least = plan.least_memory(DIT, cluster)
    work = work_of(DIT)
    assert least == min(sum(memory(work, parallel, cluster).values()) for parallel in ways(cluster))
    shared = replace(DIT, parallel=Parallel(context=2))
    lines = plan.plan(shared, replace(cluster, memory=int(0.8 * least)))
    assert any("parallel.context = 2 is not in this table" in line for line in lines)
    assert "none fits; one does with these, one after another:" in lines
    assert any(line.startswith("  --") and "cost in speed" in line for line in lines)
