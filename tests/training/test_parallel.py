"""Recipes spread over processes: what may not be, the mesh, and DeepSpeed's JSON. What needs processes is in
tests/distributed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mutoscope.contradictions import validate
from mutoscope.errors import ConfigError
from mutoscope.loading import load_recipe
from mutoscope.recipe import Lora, Optim, Parallel, Recipe
from mutoscope.training.deepspeed import configuration
from mutoscope.training.engine import Engine, _mesh_shape

RECIPE, VQVAE = load_recipe("minisora.dit_tiny"), load_recipe("minisora.vqvae_tiny")


def spread(strategy: str, changes: dict[str, Any] | None = None, **parallel: Any) -> Recipe:
    recipe = replace(RECIPE, ema=0, parallel=Parallel(strategy=strategy, **parallel))  # type: ignore[arg-type]
    return replace(recipe, **(changes or {}))


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        (spread("fsdp2", {"optim": Optim(name="came")}), "came looks at whole weights.*take adamw"),
        (spread("fsdp2", {"optim": Optim(name="muon")}), "muon looks at whole weights"),
        (spread("fsdp2", {"optim": Optim(name="adamw8bit")}), "adamw8bit looks at whole weights"),
        (spread("fsdp2", {"optim": Optim(name="prodigy", lr=1.0)}), "prodigy looks at whole weights"),
        (spread("fsdp2", {"optim": Optim(offload=True)}), 'parallel.offload = "all"'),
        (spread("fsdp2", offload="optimizer"), 'moves "all" or "none"'),
        (spread("ddp", shard=2), "parallel.shard: is for strategy = fsdp2, the strategy is ddp"),
        (spread("ddp", zero=3), "parallel.zero: is for strategy = deepspeed"),
        (spread("ddp", offload="all"), "is for strategy = fsdp2 or deepspeed"),
        (spread("deepspeed", context=2), "parallel.context: is for strategy = none or ddp or fsdp2"),
        (spread("ddp", stall=90.0, timeout=60.0), "stall: 90 s is no sooner than the timeout of 60 s"),
        (spread("deepspeed", {"ema": 0.9}), "ema: is not for strategy = deepspeed"),
        (spread("deepspeed", {"lora": Lora(), "quantize": "int8"}), "quantize: is not for strategy = deepspeed"),
        (spread("deepspeed", offload="all"), "set zero = 3"),
        (spread("deepspeed", {"model": VQVAE.model}, zero=3), "take 2, or strategy = fsdp2"),
    ],
)
def test_what_cannot_be_together(recipe: Recipe, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        validate(recipe)


def test_a_strategy_needs_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match='"fsdp2" needs a launcher: torchrun'):
        Engine.start(Parallel(strategy="fsdp2"))
    with pytest.raises(ValueError, match="context = 2 needs a launcher: torchrun"):
        Engine.start(Parallel(context=2))


@pytest.mark.parametrize(
    ("parallel", "told"),
    [
        (Parallel(strategy="ddp", context=3), "context = 3 does not divide the 4 processes; it must"),
        (Parallel(strategy="fsdp2", replicate=2, context=4), "context = 4 does not divide the 2 processes of a copy"),
    ],
)
def test_groups_that_processes_do_not_make(parallel: Parallel, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=told):
        Engine.start(parallel)


@pytest.mark.parametrize(
    ("shard", "replicate", "shape"), [(0, 0, (1, 8)), (4, 0, (2, 4)), (0, 4, (4, 2)), (8, 1, (1, 8)), (1, 8, (8, 1))]
)
def test_the_mesh(shard: int, replicate: int, shape: tuple[int, int]) -> None:
    assert _mesh_shape(Parallel(strategy="fsdp2", shard=shard, replicate=replicate), 8) == shape


@pytest.mark.parametrize(("shard", "replicate"), [(3, 0), (0, 3), (4, 4), (16, 0)])
def test_a_mesh_of_other_processes(shard: int, replicate: int) -> None:
    with pytest.raises(ValueError, match="do not make up 8 processes"):
        _mesh_shape(Parallel(strategy="fsdp2", shard=shard, replicate=replicate), 8)


# ---------------------------------------------------------------- DeepSpeed's JSON


def made(tmp_path: Path, given: Any, **parallel: Any) -> dict[str, Any]:
    file = tmp_path / "ds.json"
    file.write_text(given if isinstance(given, str) else json.dumps(given))
    return configuration(spread("deepspeed", deepspeed_config=str(file), **parallel), world=4)


def test_without_a_file_the_recipe_makes_it() -> None:
    made = configuration(spread("deepspeed", {"accumulate": 3, "precision": "bf16"}, zero=3, offload="all"), world=4)
    size = RECIPE.batch_size
    assert (made["train_batch_size"], made["train_micro_batch_size_per_gpu"]) == (12 * size, size)
    assert made["zero_optimization"] == {
        "stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}
    }  # fmt: skip
    assert made["bf16"] == {"enabled": True}
    assert made["data_types"] == {"grad_accum_dtype": "fp32"}


def test_auto_is_filled_in_and_the_rest_kept(tmp_path: Path) -> None:
    zero = {"stage": 2, "overlap_comm": True, "reduce_bucket_size": "auto", "offload_optimizer": {"pin_memory": True}}
    given = {
        "train_batch_size": "auto", "gradient_clipping": "auto", "steps_per_print": 5, "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", "loss_scale": 0}, "zero_optimization": zero,
        "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
    }  # fmt: skip
    found = made(tmp_path, given)
    assert found["steps_per_print"] == 5
    assert found["gradient_clipping"] == RECIPE.optim.max_grad_norm
    assert found["zero_optimization"]["overlap_comm"] is True
    assert found["zero_optimization"]["offload_optimizer"] == {"pin_memory": True, "device": "none"}
    assert "auto" not in json.dumps(found)
    assert not {"fp16", "optimizer"} & found.keys()


def test_what_contradicts_the_recipe_is_told_with_both_values(tmp_path: Path) -> None:
    given = {
        "train_micro_batch_size_per_gpu": 99, "gradient_clipping": 0.5, "zero_optimization": {"stage": 3},
        "fp16": {"enabled": True}, "scheduler": {"type": "WarmupLR"},
        "optimizer": {"type": "Lamb", "params": {"lr": 0.125}},
    }  # fmt: skip
    with pytest.raises(ConfigError) as error:
        made(tmp_path, given)
    told = str(error.value)
    assert f"train_micro_batch_size_per_gpu: is 99, and {RECIPE.batch_size} by the recipe's batch_size" in told
    assert "gradient_clipping: is 0.5, and 1.0 by the recipe's optim.max_grad_norm" in told
    assert "zero_optimization.stage: is 3, and 2 by the recipe's parallel.zero" in told
    assert f"optimizer.params.lr: is 0.125, and {RECIPE.optim.lr} by the recipe's optim.lr" in told
    assert 'optimizer.type: is "Lamb"' in told
    assert "fp16.enabled: is true" in told
    assert "scheduler: optim.schedule" in told


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_file_that_is_no_json(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"deepspeed_config=.*(cannot be read as JSON|must be a JSON object)"):
        made(tmp_path, text)
