"""ZeRO by DeepSpeed (arXiv:1910.02054), behind the methods of `state.TrainState`.

    zero = 1, 2, 3    optimizer state; gradients, too; weights, too, are divided over the processes

Its JSON is made from the recipe, or is the user's, whose "auto" the recipe fills in, and which must not contradict it.
Checkpoints are ours and not DeepSpeed's, which are pickles: the same tensors that other strategies keep, so that a run
goes on under any of them, with any number of processes.
"""

from __future__ import annotations

import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mutoscope.errors import ConfigError
from mutoscope.recipe import Optim, Recipe
from mutoscope.training.checkpoint import load_checkpoint
from mutoscope.training.engine import Engine
from mutoscope.training.optimizers import build_optimizers, set_learning_rates

MOMENTS = ("exp_avg", "exp_avg_sq")
Json = dict[str, Any]


class DeepSpeedState:
    """A model in training by DeepSpeed."""

    def __init__(self, model: nn.Module, recipe: Recipe, engine: Engine) -> None:
        """Raises ImportError, and ConfigError as `configuration`."""
        config = configuration(recipe, engine.world)
        if engine.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        try:
            import deepspeed
        except ImportError as error:
            raise ImportError('parallel.strategy = deepspeed needs it: pip install "mutoscope[deepspeed]"') from error
        if engine.device.type == "cpu":  # it would compile a C++ extension, for a minute, that only inference uses
            deepspeed.ops.__compatible_ops__ = defaultdict(bool)
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        engine.check_in_sync(model)
        self.model, self.engine, self.zero = model, engine, recipe.parallel.zero
        self._deepspeed: Any = deepspeed
        [self.optimizer] = build_optimizers(model, recipe.optim, recipe.seed)
        self.trainee: Any = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=config, dist_init_required=False
        )[0]
        self._begin_moments()
        self.optimizers, self.step = [self.optimizer], 0
        self.consumed: tuple[int, ...] = ()
        self._last, self._finite = True, True

    def _begin_moments(self) -> None:
        """Make the moments, zero, before the first step: they can be loaded then. DeepSpeed (0.19), which leaves it to
        the step, does not find those of the second group of weights afterwards."""
        zero = self.trainee.optimizer
        # Of ZeRO 3, of 1 and 2, and of the optimizer that DeepSpeed takes for ZeRO 1 in bf16
        names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        for flat in next(getattr(zero, name) for name in names if hasattr(zero, name)):
            self.optimizer.state[flat] = {"step": torch.zeros(())} | {key: torch.zeros_like(flat) for key in MOMENTS}
        if self.zero < 3:
            zero._lazy_init_hp_params_optimizer_state()

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        """Around the forward and backward pass of a micro-step of an optimizer step, of which it is the last or not."""
        self._last = last
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradient to that of the micro-steps before."""
        self._finite &= bool(loss.isfinite())
        self.trainee.backward(loss, scale_wrt_gas=False)
        if not self._last:
            self.trainee.step()  # it counts micro-steps by these calls

    def take_step(self, optim: Optim, steps: int) -> tuple[float, float]:
        """Take an optimizer step of `steps`. Returns the learning rate and the gradient's norm before it was clipped.

        DeepSpeed can neither leave out a step nor tell which parameters have no gradient. Raises RuntimeError where the
        loss or its gradient is not finite: the run goes on from its last checkpoint.
        """
        lr = set_learning_rates(self.optimizers, optim, self.step, steps)
        finite = not self.engine.any(not self._finite)
        if finite:
            self.trainee.step()
            self.step += 1
        norm = float(self.trainee.get_global_grad_norm()) if finite else float("nan")
        if not norm < float("inf"):
            raise RuntimeError(f"step {self.step}: the loss or its gradient is not finite, and DeepSpeed cannot leave "
                               "out a step; look at the clips, or lower optim.lr")  # fmt: skip
        return lr, norm

    def average(self) -> None:
        """Nothing: there is no moving average."""

    def averaged(self) -> AbstractContextManager[None]:
        """To evaluate the model as it is."""
        return nullcontext()

    def whole(self) -> AbstractContextManager[Any]:
        """All weights are whole on every process inside the block."""
        return self._gathered(list(self.model.parameters()))

    def _gathered(self, params: list[nn.Parameter], changed: bool = False) -> AbstractContextManager[Any]:
        if self.zero < 3:
            return nullcontext()
        gathered: AbstractContextManager[Any] = self._deepspeed.zero.GatheredParameters(
            params, modifier_rank=0 if changed else None
        )
        return gathered

    # ---- checkpoints

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _buffers(self) -> dict[str, Tensor]:
        params = dict(self.model.named_parameters())
        return {name: x for name, x in self.model.state_dict().items() if name not in params}

    def tensors(self) -> dict[str, Any]:
        """The tensors of a checkpoint, as a tree: process 0 has all of it, gathered one by one, and the others none."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        main = self.engine.main
        weights = {name: x.cpu() for name, x in self._buffers().items()} if main else {}
        states: dict[str, dict[str, Tensor]] = {}
        taken = self._steps_taken()
        for name, p in self._trained().items():
            weight = safe_get_full_fp32_param(p)
            moments = {key: safe_get_full_optimizer_state(p, key) for key in MOMENTS}
            if main:
                weights[name] = weight.detach().cpu().view(_shape(p))
                states[name] = {key: value.detach().cpu().view(_shape(p)) for key, value in moments.items()}
                states[name]["step"] = torch.tensor(taken)
        return {"model": weights, "optimizer": states}

    def load(self, path: Path) -> dict[str, int]:
        """Become what a checkpoint's tensors hold; each process reads all of them. Returns its numbers."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        params = self._trained()
        weights = {name: torch.empty(_shape(p)) for name, p in params.items()}
        weights |= {name: torch.empty_like(x, device="cpu") for name, x in self._buffers().items()}
        states = {
            name: {key: torch.empty(_shape(p)) for key in MOMENTS} | {"step": torch.zeros(())}
            for name, p in params.items()
        }
        numbers = load_checkpoint(path, {"model": weights, "optimizer": states})
        for name, p in params.items():
            safe_set_full_fp32_param(p, weights[name].to(self.engine.device))
            for key in MOMENTS:
                safe_set_full_optimizer_state(p, states[name][key].to(self.engine.device), key)
            with torch.no_grad(), self._gathered([p], changed=True):
                if self.zero < 3 or self.engine.main:
                    p.copy_(weights[name])
        for name, x in self._buffers().items():
            x.copy_(weights[name])
        for state in self.optimizer.state.values():
            state["step"] = torch.full_like(torch.as_tensor(state["step"]), float(next(iter(states.values()))["step"]))
        self.step = numbers["step"]
        return numbers

    def _steps_taken(self) -> float:
        return float(next(iter(self.optimizer.state.values()))["step"])


def _shape(p: nn.Parameter) -> torch.Size:
    """Of the whole parameter."""
    shape: torch.Size = getattr(p, "ds_shape", p.shape)
    return shape


# ---------------------------------------------------------------- its JSON

_FIELDS = {
    "train_micro_batch_size_per_gpu": "batch_size",
    "gradient_accumulation_steps": "accumulate",
    "train_batch_size": "batch_size × accumulate × processes",
    "gradient_clipping": "optim.max_grad_norm",
    "bf16.enabled": "precision = bf16",
    "zero_optimization.stage": "parallel.zero",
    "zero_optimization.offload_optimizer.device": "parallel.offload",
    "zero_optimization.offload_param.device": "parallel.offload",
    "optimizer.type": "optim.name",
    "optimizer.params.lr": "optim.lr",
    "optimizer.params.betas": "optim.betas",
    "optimizer.params.eps": "optim.eps",
    "optimizer.params.weight_decay": "optim.weight_decay",
}
"""What in the JSON a recipe decides, and by which field."""


def configuration(recipe: Recipe, world: int) -> Json:
    """DeepSpeed's configuration for `world` processes.

    Raises ConfigError where parallel.deepspeed_config is no JSON, with a line for each of its values that is another in
    the recipe, and for what only one of the two may decide.
    """
    parallel, optim = recipe.parallel, recipe.optim
    ours: Json = {
        "train_micro_batch_size_per_gpu": recipe.batch_size,
        "gradient_accumulation_steps": recipe.accumulate,
        "train_batch_size": recipe.batch_size * recipe.accumulate * world,
        "gradient_clipping": optim.max_grad_norm,
        "bf16": {"enabled": recipe.precision == "bf16"},
        "zero_optimization": {
            "stage": parallel.zero,
            "offload_optimizer": {"device": "none" if parallel.offload == "none" else "cpu"},
            "offload_param": {"device": "cpu" if parallel.offload == "all" else "none"},
        },
    }
    given, faults = _read(parallel.deepspeed_config), list[str]()
    params = {"lr": optim.lr, "betas": list(optim.betas), "eps": optim.eps, "weight_decay": optim.weight_decay}
    optimizer = {"optimizer": {"type": "AdamW", "params": params}}
    if "optimizer" in given:
        _merged({"optimizer": given.pop("optimizer")}, optimizer, "", faults)
    if "scheduler" in given:
        faults.append("scheduler: optim.schedule and optim.warmup_steps decide; take it out")
    if given.pop("fp16", {}).get("enabled", False) is True:
        faults.append('fp16.enabled: is true, the recipe\'s precision is fp32 or bf16; set it to false or "auto"')
    config = _merged(given, ours, "", faults)
    if faults:
        raise ConfigError(*(f"{parallel.deepspeed_config}: {fault}" for fault in faults))
    if recipe.precision == "bf16":
        config.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    # Of torch's own AdamW, whose kernel for the CPU is as fast as DeepSpeed's and needs no compiler
    return config | {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}


def _read(path: str | None) -> Json:
    if path is None:
        return {}
    try:
        given = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"recipe.parallel.deepspeed_config={path}: cannot be read as JSON: {error}") from None
    if not isinstance(given, dict):
        raise ConfigError(f"recipe.parallel.deepspeed_config={path}: must be a JSON object")
    return given


def _merged(given: Json, ours: Json, prefix: str, faults: list[str]) -> Json:
    """The given values and ours where there are none; "auto" is ours, or DeepSpeed's default where we know nothing."""
    merged: Json = {}
    for key in dict.fromkeys([*given, *ours]):
        name, value, own = f"{prefix}{key}", given.get(key, "auto"), ours.get(key)
        if isinstance(value, dict) or (isinstance(own, dict) and value == "auto"):
            parts = value if isinstance(value, dict) else {}
            merged[key] = _merged(parts, own if isinstance(own, dict) else {}, f"{name}.", faults)
        elif key not in ours:
            merged |= {key: value} if value != "auto" else {}
        elif value not in ("auto", own):
            faults.append(f"{name}: is {json.dumps(value)}, and {json.dumps(own)} by the recipe's {_FIELDS[name]}; set "
                          'one to the other, or it to "auto"')  # fmt: skip
        else:
            merged[key] = own
    return merged
