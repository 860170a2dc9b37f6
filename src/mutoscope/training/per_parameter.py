"""An optimizer that takes one parameter's step at a time, so that little more than that parameter is ever unpacked.

Around an update rule (`update_rules`), which knows fp32 numbers on one device only, it does three things:

    bf16 weights  The rule's result is kept whole: rounded to bf16, with the other 16 bits of fp32 in the state ("low").
                  That is an exact fp32 master weight for 2 bytes and not 4. Or it is rounded up or down at random, in
                  proportion (stochastic rounding, arXiv:2010.06192), which is right on average and takes no memory;
                  rounding to nearest would lose every step smaller than 1/256 of its weight.
    offload       State lies on the CPU, where the steps are taken. In a single process gradients leave the device as
                  soon as the backward pass has made them; they are summed over micro-steps on the CPU, in fp32.
    release       A parameter's step is taken within the backward pass, and its gradient let go.

Of a weight that is held in parts each process takes the step of its own, which is right for rules that look at numbers
one by one (AdamW in 32 bits) and no others.

State comes into being with the optimizer and is restored as it was. (torch.optim.Optimizer would take it to the dtype
and the device of the weight.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import BFloat16, Float32, Int16
from torch import Tensor, nn

from mutoscope.randomness import seed_of
from mutoscope.sharded import like, local, place
from mutoscope.training.copies import Copies, Copy
from mutoscope.training.update_rules import Group, Rule, State


class PerParameter(torch.optim.Optimizer):
    """Takes the steps of a rule.

    groups: dicts of "params" (fp32 or bf16), "lr", "betas", "eps" and "weight_decay".
    rule: of the device where the state is to lie: the parameters' own, or with `offload` the CPU.
    stochastic: round bf16 weights stochastically, instead of keeping what they lack of fp32.
    seed: of that rounding, which depends on nothing else but the parameter's place and step: replicas stay equal.
    """

    def __init__(
        self,
        groups: list[Group],
        rule: Rule,
        *,
        stochastic: bool = False,
        offload: bool = False,
        seed: int = 0,
        copies: Copies | None = None,
    ) -> None:
        """copies: what moves memory, where it is not to be the parameters' device's own."""
        super().__init__(groups, {"lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0})
        self.rule, self.offload, self.seed = rule, offload, seed
        self.released: dict[nn.Parameter, Tensor] = {}
        """Norms of the gradients whose steps were taken in the backward pass."""
        self._groups = {p: group for group in self.param_groups for p in group["params"]}
        self._places = {p: place for place, p in enumerate(self._groups)}
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._arriving: dict[nn.Parameter, Copy] = {}
        self._copies = copies or Copies(next(iter(self._groups)).device)
        for p in self._groups:
            part = local(p)
            state = rule.new_state(part)
            if p.dtype == torch.bfloat16 and not stochastic:
                state["low"] = torch.zeros(part.shape, dtype=torch.int16, device="cpu" if offload else p.device)
            self.state[p] = {"step": torch.zeros(())} | {key: like(value, p) for key, value in state.items()}
        if offload and not dist.is_initialized():  # DDP wants the gradients where they are until it has averaged them
            self._when_there(self._take)

    # ---- gradients

    def gradient(self, p: nn.Parameter) -> Tensor | None:
        """The gradient of a parameter, wherever it lies."""
        if p in self._arriving:
            self._gradients[p] = self._sum(p)
        return self._gradients.get(p, p.grad)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Let go of all gradients."""
        super().zero_grad(set_to_none)
        for kept in (self._gradients, self._arriving, self.released):
            kept.clear()

    def release(self) -> None:
        """From now on take each step within the backward pass; `step` then only finishes it.

        A gradient that is not finite is passed over, and shows in `released`. There must be one micro-step to a step,
        and one process.
        """
        self._when_there(self._step_at_once)

    def _when_there(self, do: Callable[[nn.Parameter], None]) -> None:
        for p in self._groups:
            p.register_post_accumulate_grad_hook(do)

    @torch.no_grad()
    def _take(self, p: nn.Parameter) -> None:
        """Send a gradient to the CPU."""
        assert p.grad is not None
        if p in self._arriving:  # of the micro-step before
            self._gradients[p] = self._sum(p)
        self._arriving[p], p.grad = self._copies.to_cpu(p.grad), None

    def _sum(self, p: nn.Parameter) -> Tensor:
        arrived = self._arriving.pop(p).wait()
        return self._gradients[p].float().add_(arrived) if p in self._gradients else arrived

    @torch.no_grad()
    def _step_at_once(self, p: nn.Parameter) -> None:
        assert p.grad is not None
        norm = self.released[p] = torch.linalg.vector_norm(p.grad, dtype=torch.float32)
        if norm.isfinite():
            self._update(p, p.detach(), p.grad)
        p.grad = None

    # ---- steps

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take the step of every parameter that has a gradient."""
        todo = [(p, g) for p in self._groups if (g := self.gradient(p)) is not None]
        coming = [self._fetch(*todo[0])] if todo else []
        for i, (p, _) in enumerate(todo):
            weight, gradient = coming.pop()
            if i + 1 < len(todo):  # on its way while the CPU works on this one
                coming.append(self._fetch(*todo[i + 1]))
            self._update(p, weight.wait(), gradient.wait())
        if self.rule.finish is not None:
            self.rule.finish()

    def _fetch(self, p: nn.Parameter, gradient: Tensor) -> tuple[Copy, Copy]:
        """A parameter and its gradient where the state is."""
        if not self.offload:
            return Copy(local(p.detach()), None), Copy(local(gradient), None)
        there = gradient.device.type == "cpu"
        return self._copies.to_cpu(p), Copy(gradient, None) if there else self._copies.to_cpu(gradient)

    def _update(self, p: nn.Parameter, weight: Tensor, gradient: Tensor) -> None:
        """One step. weight: p itself, or its copy where the state is."""
        state = {key: local(value) for key, value in self.state[p].items()}
        state["step"] += 1
        w = join(weight, state["low"]) if "low" in state else weight.float()
        w = w.contiguous()
        self.rule.update(w, gradient.float().contiguous(), state, self._groups[p])
        if "low" in state:
            w, low = split(w)
            state["low"].copy_(low)
        elif p.dtype == torch.bfloat16:
            seed = seed_of(self.seed, "rounding", self._places[p], int(state["step"]), *place(p))
            w = round_stochastically(w, torch.Generator(w.device).manual_seed(seed))
        if p.dtype == torch.bfloat16 or not weight.is_contiguous():  # else w is the weight
            weight.copy_(w)
        if self.offload:
            p.copy_(weight, non_blocking=True)

    # ---- checkpoints

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of an optimizer like this one, bit for bit. Hyper-parameters stay as they are.

        Raises ValueError where its parameters, or what is kept of them, are others.
        """
        saved = [name for group in state_dict["param_groups"] for name in group["params"]]
        if len(saved) != len(self._places):
            raise ValueError(f"the state is of {len(saved)} parameters, the optimizer has {len(self._places)}")
        for name, p in zip(saved, self._places, strict=True):
            _copy_state(state_dict["state"].get(name, {}), self.state[p], f"parameter {name}")


def _copy_state(source: State, target: State, what: str) -> None:
    told = {key: f"{list(t.shape)} {t.dtype}" for key, t in target.items()}
    if (found := {key: f"{list(t.shape)} {t.dtype}" for key, t in source.items()}) != told:
        raise ValueError(f"{what}: the state to load has {found}, this optimizer keeps {told}")
    for key, tensor in target.items():
        local(tensor).copy_(local(source[key]))


# ---------------------------------------------------------------- bf16


def split(w: Float32[Tensor, "*shape"]) -> tuple[BFloat16[Tensor, "*shape"], Int16[Tensor, "*shape"]]:
    """fp32 as the nearest bf16 (ties away from zero) and the difference of the bits. Undone by `join`; for finite
    numbers that do not round to infinity, as weights are."""
    bits = w.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join(high: BFloat16[Tensor, "*shape"], low: Int16[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """What `split` took apart, bit for bit."""
    return ((high.view(torch.int16).int() << 16) + low.int()).view(torch.float32)


def round_stochastically(w: Float32[Tensor, "*shape"], generator: torch.Generator) -> BFloat16[Tensor, "*shape"]:
    """One of the two bf16 beside each number, the nearer one more often: w on average. bf16 numbers stay."""
    noise = torch.randint(0, 1 << 16, w.shape, generator=generator, device=w.device, dtype=torch.int32)
    return ((w.view(torch.int32) + noise) >> 16).to(torch.int16).view(torch.bfloat16)
