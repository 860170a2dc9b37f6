"""All that a run changes, and the only way it changes: the step of the optimizers."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from mutoscope.recipe import Optim, Recipe
from mutoscope.training.checkpoint import load_checkpoint
from mutoscope.training.deepspeed import DeepSpeedState
from mutoscope.training.ema import EMA
from mutoscope.training.engine import Engine
from mutoscope.training.optimizers import build_optimizers, clip_gradients, gradient_norms, set_learning_rates


def build_state(model: nn.Module, recipe: Recipe, engine: Engine) -> TrainState | DeepSpeedState:
    """A model that is to be trained, divided or replicated as the recipe has it."""
    if recipe.parallel.strategy == "deepspeed":
        return DeepSpeedState(model, recipe, engine)
    trainee = engine.wrap(model, recipe.precision)
    optimizers = build_optimizers(model, recipe.optim, recipe.seed)  # of the parameters as the engine has them now
    return TrainState(model, optimizers, EMA(model, recipe.ema) if recipe.ema else None, trainee, engine)


@dataclass
class TrainState:
    """A model in training by torch's own means: none, ddp or fsdp2. Everything else is a function of the recipe."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    ema: EMA | None
    trainee: nn.Module
    """What the objective calls in training."""
    engine: Engine
    step: int = 0
    """Optimizer steps taken, those included that were skipped."""
    consumed: tuple[int, ...] = ()
    """Training samples that all processes have taken, from each of the plan's pools."""
    _reached: bool = False

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        """Around the forward and backward pass of a micro-step of an optimizer step, of which it is the last or not."""
        return self.engine.accumulating(self.trainee, last)

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradient to that of the micro-steps before."""
        loss.backward()

    def take_step(self, optim: Optim, steps: int) -> tuple[float, float]:
        """Take an optimizer step of `steps`, unless its gradient is not finite. Returns the learning rate and the
        gradient's norm before it was clipped, the same on all processes.

        Raises ValueError at the first step for parameters that no gradient reaches.
        """
        lr = set_learning_rates(self.optimizers, optim, self.step, steps)
        norms = gradient_norms(self.optimizers)
        if not self._reached:
            _check_reached(self.model, norms)
            self._reached = True
        norm = clip_gradients(self.optimizers, norms, optim.max_grad_norm)
        self.step += 1
        if norm.isfinite():
            for optimizer in self.optimizers:
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return lr, float(norm)

    def average(self) -> None:
        """Take the weights into their moving average."""
        if self.ema is not None:
            self.ema.update(self.model, self.step)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """To evaluate: the model carries the averaged weights inside the block, where there are any."""
        with self.ema.applied(self.model) if self.ema is not None else nullcontext():
            try:
                yield
            finally:
                self.engine.settle(self.model)

    def whole(self) -> AbstractContextManager[None]:
        """Weights that are divided by other means than torch's are whole on every process inside the block."""
        return nullcontext()

    def tensors(self) -> dict[str, Any]:
        """The tensors of a checkpoint, as a tree; filling them in place does not set the optimizers'."""
        optimizer = get_optimizer_state_dict(self.model, self.optimizers)
        tree = {"model": _weights(self.model), "optimizer": optimizer["state"]}
        return tree | ({"ema": self.ema.averages} if self.ema is not None else {})

    def load(self, path: Path) -> dict[str, int]:
        """Become what a checkpoint's tensors hold. Returns its numbers."""
        optimizer = get_optimizer_state_dict(self.model, self.optimizers)
        numbers = load_checkpoint(path, self.tensors() | {"optimizer": optimizer["state"]})
        set_optimizer_state_dict(self.model, self.optimizers, optimizer)
        self.step = numbers["step"]
        return numbers


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: everything, or of a model with frozen weights what is not frozen."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    if not frozen:
        return model.state_dict()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def _check_reached(model: nn.Module, reached: Container[nn.Parameter]) -> None:
    """Raise ValueError for parameters without a gradient: they would never train, and nothing would tell."""
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p not in reached]
    if idle:
        raise ValueError(f"no gradient reaches these parameters; use them, or freeze them: {', '.join(idle[:10])}")
